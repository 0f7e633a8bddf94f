import copy
import json
import math
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from unit.evaluation_tiny import PROSE, build_model, tiny

from nexusquant_cache import PRESETS, OptionError
from nexusquant_cache.evaluation import (
    KINDS,
    Candidate,
    EvaluationError,
    EvaluationOptions,
    LoadedModel,
    evaluate,
    nexusquant_candidate,
    preset_candidates,
    summaries,
)
from nexusquant_cache.evaluation.intervals import wilson_interval
from nexusquant_cache.evaluation.results import Results, environment, read_json, text_id, write_json
from nexusquant_cache.evaluation.summary import Recall, recall_by_place

TEXTS = {"a": PROSE, "b": PROSE[3:]}
OPTIONS = EvaluationOptions(
    windows=2, prefix=300, continuation=8, lengths=(400,), depths=(0.0, 0.5), kinds=("single", "later"), facts=0
)
ROWS = 2 + 4  # per cache


class Counted:
    """Makes candidates and remembers which were measured how often."""

    def __init__(self):
        self.made = []
        self.fails_at = math.inf

    def candidate(self, name, **settings):
        def factory():
            self.made.append(name)
            if len(self.made) == self.fails_at:
                raise KeyboardInterrupt
            return DynamicCache()

        return Candidate(name, factory, settings=settings)

    def taken(self):
        """Return what was measured since the last call."""
        made, self.made = self.made, []
        return made


@pytest.fixture(scope="module")
def loaded():
    return tiny()


@pytest.fixture
def counted():
    return Counted()


@pytest.fixture
def output(tmp_path):
    return tmp_path / "results" / "results.json"


def with_options(**changes):
    return EvaluationOptions(**{**{name: getattr(OPTIONS, name) for name in vars(OPTIONS)}, **changes})


def without_times(content):
    return [
        {key: value for key, value in row.items() if key != "compress_seconds"}
        for section in ("quality", "needles")
        for row in content[section]
    ]


class TestEvaluate:
    def test_measures_every_cache_on_every_task(self, loaded, output):
        options = with_options(kinds=KINDS, depths=(0.5,))
        content = evaluate(loaded, preset_candidates(loaded, ("quant", "max")), TEXTS, options, output=output)
        assert {(row["task"], row["cache"]) for row in content["quality"]} == {
            (task, cache) for task in ("a 1", "b 1") for cache in ("plain", "quant", "max")
        }
        assert len(content["needles"]) == len(KINDS) * 3
        plain, quant, shortest = summaries(content)
        assert (plain.name, quant.name, shortest.name) == ("plain", "quant", "max")
        assert plain.quality.kl.mean == 0
        assert plain.compress_seconds is None
        assert quant.compress_seconds.mean > 0
        assert min(quant.quality.compression_factor, shortest.quality.compression_factor) > 1
        assert list(quant.recall) == list(KINDS)
        assert quant.all_recall.asked == len(KINDS)

    def test_reading_again_is_measured_beside_reading_once(self, loaded):
        """Of presets that evict; it chooses other tokens, so predictions differ."""
        candidates = preset_candidates(loaded, ("quant", "max"), read_again=True)
        assert [candidate.name for candidate in candidates] == ["quant", "max", "again@max"]
        once, again = (dict(candidate.settings) for candidate in candidates[1:])
        assert again == once | {"reads_again": True}
        evicting = replace(PRESETS["max"], min_kept=0)
        pair = [
            nexusquant_candidate(name, evicting, loaded.model.config, reads_again=name == "again")
            for name in ("once", "again")
        ]
        content = evaluate(loaded, pair, TEXTS, with_options(kinds=()))
        _, once, again = summaries(content)
        assert again.kept_tokens == once.kept_tokens < 300
        assert again.quality.kl.mean != once.quality.kl.mean

    def test_the_file_says_what_was_returned_and_what_decided_it(self, loaded, output):
        content = evaluate(loaded, preset_candidates(loaded, ("max",)), TEXTS, OPTIONS, output=output)
        assert json.loads(output.read_text()) == json.loads(json.dumps(content))
        settings = content["settings"]
        assert settings["texts"] == [text_id("a", PROSE), text_id("b", PROSE[3:])]
        assert (settings["model"], settings["dtype"], settings["kinds"]) == ("tiny", "float32", ["single", "later"])
        assert content["caches"]["max"]["keep_ratio"] < 0.5
        assert content["environment"]["torch"] == torch.__version__

    def test_steps_count_the_rows(self, loaded, counted):
        steps = []
        evaluate(loaded, [counted.candidate("x")], TEXTS, OPTIONS, report=steps.append)
        assert {step.total for step in steps} == {2 * ROWS}
        assert [step.done for step in steps if "reading" not in step.detail] == list(range(2 * ROWS))
        assert steps[1].detail == "a 1: plain"

    def test_no_kinds_leave_recall_out(self, loaded, counted):
        content = evaluate(loaded, [counted.candidate("x")], TEXTS, with_options(kinds=()))
        assert content["needles"] == []
        assert summaries(content)[0].all_recall is None

    def test_chance_is_the_same_in_any_order(self, loaded):
        def shake(cache, _loaded, _ids):
            cache.layers[0].values += torch.randn_like(cache.layers[0].values)

        first, second = (Candidate(name, DynamicCache, shake) for name in ("first", "second"))
        one = evaluate(loaded, [first, second], TEXTS, OPTIONS)
        other = evaluate(loaded, [second], TEXTS, OPTIONS)
        of_second = [row for row in without_times(one) if row["cache"] == "second"]
        assert of_second == [row for row in without_times(other) if row["cache"] == "second"]
        assert of_second[0]["kl"] > 0

    def test_the_callers_random_state_is_left_alone(self, loaded, counted):
        before = torch.get_rng_state()
        evaluate(loaded, [counted.candidate("x")], TEXTS, with_options(kinds=()))
        assert torch.equal(torch.get_rng_state(), before)

    def test_names_must_differ(self, loaded, counted):
        for names in (("x", "x"), ("plain",)):
            with pytest.raises(EvaluationError, match="needs a name of its own"):
                evaluate(loaded, [counted.candidate(name) for name in names], TEXTS, OPTIONS)

    def test_settings_must_be_plain(self, loaded):
        with pytest.raises(EvaluationError, match="only plain containers"):
            evaluate(loaded, [Candidate("x", DynamicCache, settings={"policy": object()})], TEXTS, OPTIONS)

    def test_a_text_is_needed(self, loaded):
        with pytest.raises(EvaluationError, match="no text"):
            evaluate(loaded, [], {}, OPTIONS)

    def test_unknown_presets_are_refused(self, loaded):
        with pytest.raises(OptionError, match="balanced"):
            preset_candidates(loaded, ("balnced",))

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"windows": 0}, "windows must be at least 1"),
            ({"prefix": 0}, "prefix must be at least 1"),
            ({"lengths": (100, -1)}, "every length must be at least 1, got -1"),
            ({"depths": (0.5, 2.0)}, "every depth must be from 0"),
            ({"kinds": ("singel",)}, "Did you mean 'single'"),
        ],
    )
    def test_options_are_checked_first(self, option, message):
        with pytest.raises(EvaluationError, match=message):
            EvaluationOptions(**option)


class TestGoingOn:
    """A run takes over what earlier runs have measured, and nothing that was measured under other conditions."""

    @pytest.mark.parametrize("stops_at", [1, 2, ROWS, ROWS + 3])
    def test_after_an_interruption_only_the_rest_is_measured(self, loaded, counted, output, stops_at):
        caches = [counted.candidate("x"), counted.candidate("y")]
        expected = evaluate(loaded, caches, TEXTS, OPTIONS)
        counted.taken()
        counted.fails_at = stops_at
        with pytest.raises(KeyboardInterrupt):
            evaluate(loaded, caches, TEXTS, OPTIONS, output=output)
        written = read_json(output)
        rows = [row for section in ("quality", "needles") for row in written[section] if row["cache"] != "plain"]
        assert [row["cache"] for row in rows] == counted.taken()[:-1]
        counted.fails_at = math.inf
        content = evaluate(loaded, caches, TEXTS, OPTIONS, output=output)
        assert len(counted.taken()) == 2 * ROWS - len(rows)
        assert without_times(content) == without_times(expected)

    def test_nothing_is_measured_twice(self, loaded, counted, output):
        for times in (ROWS, 0):
            evaluate(loaded, [counted.candidate("x")], TEXTS, OPTIONS, output=output)
            assert len(counted.taken()) == times

    def test_fresh_forgets(self, loaded, counted, output):
        for _ in range(2):
            content = evaluate(loaded, [counted.candidate("x")], TEXTS, OPTIONS, output=output, fresh=True)
            assert len(counted.taken()) == ROWS
        assert len(content["quality"]) + len(content["needles"]) == 2 * ROWS

    def test_settings_of_one_candidate_concern_only_its_rows(self, loaded, counted, output):
        evaluate(loaded, [counted.candidate("x", bits=2), counted.candidate("y")], TEXTS, OPTIONS, output=output)
        counted.taken()
        changed = [counted.candidate("x", bits=3), counted.candidate("y"), counted.candidate("z")]
        content = evaluate(loaded, changed, TEXTS, OPTIONS, output=output)
        assert sorted(counted.taken()) == ["x"] * ROWS + ["z"] * ROWS
        assert content["caches"] == {"x": {"bits": 3}, "y": {}, "z": {}}
        assert len([row for row in content["quality"] if row["cache"] == "x"]) == 2

    def test_a_changed_text_concerns_only_its_rows(self, loaded, counted, output):
        evaluate(loaded, [counted.candidate("x")], TEXTS, OPTIONS, output=output)
        counted.taken()
        evaluate(loaded, [counted.candidate("x")], {**TEXTS, "b": PROSE[5:]}, OPTIONS, output=output)
        assert len(counted.taken()) == ROWS / 2

    @pytest.mark.parametrize("change", [{"prefix": 310}, {"continuation": 9}])
    def test_another_window_concerns_only_predictions(self, loaded, counted, output, change):
        evaluate(loaded, [counted.candidate("x")], TEXTS, OPTIONS, output=output)
        counted.taken()
        evaluate(loaded, [counted.candidate("x")], TEXTS, with_options(**change), output=output)
        assert len(counted.taken()) == 2

    def test_another_seed_concerns_every_row(self, loaded, counted, output):
        for seed in (0, 1):
            evaluate(loaded, [counted.candidate("x")], TEXTS, with_options(seed=seed), output=output)
            assert len(counted.taken()) == ROWS

    def test_another_model_of_the_same_name_concerns_every_row(self, loaded, counted, output):
        evaluate(loaded, [counted.candidate("x")], TEXTS, OPTIONS, output=output)
        counted.taken()
        model = build_model()
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
        evaluate(LoadedModel("tiny", model, loaded.tokenizer), [counted.candidate("x")], TEXTS, OPTIONS, output=output)
        assert len(counted.taken()) == ROWS

    def test_another_dtype_concerns_every_row(self, loaded, counted, output):
        evaluate(loaded, [counted.candidate("x")], TEXTS, OPTIONS, output=output)
        counted.taken()
        model = copy.deepcopy(loaded.model).bfloat16()
        evaluate(LoadedModel("tiny", model, loaded.tokenizer), [counted.candidate("x")], TEXTS, OPTIONS, output=output)
        assert len(counted.taken()) == ROWS

    def test_a_grid_can_grow(self, loaded, counted, output):
        evaluate(loaded, [counted.candidate("x")], TEXTS, OPTIONS, output=output)
        counted.taken()
        larger = with_options(lengths=(400, 500), kinds=("single", "later", "multikey"))
        content = evaluate(loaded, [counted.candidate("x")], TEXTS, larger, output=output)
        assert len(counted.taken()) == 3 * 2 * 2 - 4
        assert len(content["needles"]) == 2 * 3 * 2 * 2

    def test_what_is_not_asked_for_is_set_aside(self, loaded, counted, output):
        both = [counted.candidate("x"), counted.candidate("y")]
        evaluate(loaded, both, TEXTS, OPTIONS, output=output)
        content = evaluate(loaded, both[:1], TEXTS, with_options(kinds=("single",)), output=output)
        assert [summary.name for summary in summaries(content)] == ["plain", "x"]
        assert {row["kind"] for row in content["needles"]} == {"single"}
        counted.taken()
        evaluate(loaded, both, TEXTS, OPTIONS, output=output)
        assert counted.taken() == []
        assert read_json(output)["set_aside"] == {"quality": [], "needles": [], "facts": []}


class TestFiles:
    def test_a_file_is_written_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "results.json"
        write_json(path, {"rows": [1]})
        with pytest.raises(TypeError):
            write_json(path, {"rows": [object()]})
        assert read_json(path) == {"rows": [1]}

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_what_is_no_result_file_is_left_alone(self, tmp_path, content):
        path = tmp_path / "results.json"
        path.write_text(content)
        with pytest.raises(EvaluationError, match="is not a result file"):
            Results(path, {}, {"quality": {}, "needles": {}})
        assert path.read_text() == content

    def test_without_a_file_rows_stay_in_memory(self):
        results = Results(None, {}, {"quality": {"a": {"x": "1"}}, "needles": {}})
        results.add("quality", "a", "x", {"kl": 1.0})
        assert results.content["quality"] == [{"task": "a", "cache": "x", "fingerprint": "1", "kl": 1.0}]
        assert results.count_missing() == 0


@pytest.fixture(scope="module")
def by_hand():
    footprint = {"seen_tokens": 100, "kept_tokens": 50, "held_bytes": 10, "dense_bytes": 40}
    outcomes = {("single", 10): (True, False), ("single", 20): (True,), ("later", 10): (False,)}
    return {
        "caches": {"x": {}},
        "quality": [
            {
                "task": task,
                "cache": "x",
                "text": task,
                "nll": 1.0 + extra,
                "plain_nll": 1.0,
                "kl": extra,
                "top1": 0.5,
                "compress_seconds": seconds,
                "footprint": footprint,
            }
            for task, extra, seconds in (("a", 0.1, 1.0), ("b", 0.3, 2.0))
        ],
        "needles": [
            {
                "task": f"{kind} {length} {index}",
                "cache": "x",
                "kind": kind,
                "length": length,
                "depth": 0.5,
                "found": is_found,
                "compress_seconds": 3.0,
                "footprint": {**footprint, "held_bytes": length, "dense_bytes": 8 * length},
            }
            for (kind, length), found in outcomes.items()
            for index, is_found in enumerate(found)
        ],
    }


def test_a_processor_without_a_name_has_a_machine(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda _path: False)
    assert environment()["cpu"] in {platform.processor(), platform.machine()}


class TestSummaries:
    def test_numbers(self, by_hand):
        (summary,) = summaries(by_hand)
        assert summary.quality.kl.mean == pytest.approx(0.2)
        assert (summary.kept_tokens, summary.seen_tokens, summary.dense_bytes) == (50, 100, 40)
        assert summary.recall == {"single": Recall(2, 3, 40, 320), "later": Recall(0, 1, 10, 80)}
        assert summary.all_recall == Recall(2, 4, 50, 400)
        assert summary.all_recall.rate == wilson_interval(2, 4)
        assert summary.compress_seconds.mean == pytest.approx((1 + 2 + 4 * 3) / 6)

    def test_recall_by_place(self, by_hand):
        cells = recall_by_place(by_hand, "x", "single")
        assert cells == {(10, 0.5): Recall(1, 2, 20, 160), (20, 0.5): Recall(1, 1, 20, 160)}
        assert recall_by_place(by_hand, "x", "paraphrase") == {}

    def test_a_cache_without_predictions_is_left_out(self, by_hand):
        assert summaries({**by_hand, "quality": []}) == []
