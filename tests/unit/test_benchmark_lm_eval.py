"""`benchmarks/lm_eval_tasks.py`: which prompts are asked, what an interruption leaves, and the table of scores."""

import argparse
import importlib
import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from unit.evaluation_tiny import tiny

from nexusquant_cache.evaluation import python_topics
from nexusquant_cache.evaluation.steps import no_report

SAMPLES = 6
NAMES = ("niah_single_1", "choose_code", "say_code", "continue_text")
LENGTH = 1200  # of bytes, which are the tiny model's tokens
SCORES = {"niah_single_1": 1.0, "ruler_cwe": 0.2, "say_code": 0.25, "continue_text": -100.0}


@pytest.fixture
def load(monkeypatch):
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / folder))
    return importlib.import_module


@pytest.fixture
def script(load, monkeypatch):
    found = load("lm_eval_tasks")
    monkeypatch.setattr(found, "version", lambda _: "0")
    return found


@pytest.fixture
def work(script, tmp_path, monkeypatch):
    """Return what makes a run on invented tasks, and the prompts that it asks, in turn."""
    asked = []

    def ask(model, task, index, metric):
        assert metric == {"say_code": "exact_match", "continue_text": "perplexity"}.get(task.name, "2048")
        asked.append((task.name, index, model))
        return {"score": SCORES[task.name], "prompt_tokens": 2000}

    monkeypatch.setattr(script, "ask", ask)
    given = argparse.Namespace(samples=SAMPLES, length=2048, task=list(SCORES), fresh=False, output=tmp_path / "r.json")
    makers = {name: lambda name=name: name for name in ("hf", "quant", "max")}

    def make(first="first"):
        docs = [{"text": text} for text in (first, *map(str, range(1, SAMPLES)))]
        tasks = {name: SimpleNamespace(name=name, eval_docs=docs) for name in SCORES}
        return script.Work(tiny(), tasks, makers, given)

    return make, asked


def test_a_task_that_is_beyond_the_model_is_left_at_its_first_prompts(work, script):
    make, asked = work
    make().run(no_report)
    counts = Counter((name, model) for name, _, model in asked)
    assert {model: counts["ruler_cwe", model] for model in ("hf", "quant", "max")} == {"hf": 4, "quant": 0, "max": 0}
    assert script.PROBE == 4
    others = [count for (name, _), count in counts.items() if name != "ruler_cwe"]
    assert others == [SAMPLES] * 9
    order = [model for name, _, model in asked if name == "say_code"]
    assert order[:SAMPLES] == ["hf"] * SAMPLES


def test_a_run_goes_on_where_it_was_interrupted(work, script, monkeypatch):
    make, asked = work
    answer = script.ask

    def interrupted(*given):
        if len(asked) == 15:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(script, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make().run(no_report)
    monkeypatch.setattr(script, "ask", answer)
    steps = []
    make().run(steps.append)
    assert len(asked) == len(set(asked)) == 9 * SAMPLES + 4
    assert steps[0].total == 10 * SAMPLES + 2 * SAMPLES - 15  # what is beyond the model is not known yet
    assert steps[-1].done + 1 == steps[-1].total == len(asked) - 15
    assert steps[0].seconds_left is None
    assert steps[-1].seconds_left >= 0
    asked.clear()
    make(first="changed").run(no_report)
    assert asked == [(name, 0, model) for name, _, model in dict.fromkeys(asked)]  # that prompt alone
    assert len(asked) == 9 + 1


def test_texts_are_cut_at_words_and_go_on(script, tmp_path):
    script.write_continuations(tmp_path, count=3, characters=1000)
    rows = [json.loads(line) for line in (tmp_path / "continue_text.jsonl").read_text().splitlines()]
    words = " ".join(python_topics().split())
    for number, row in enumerate(rows):
        assert f"{row['text']} {row['next']}" == words[1300 * number : 1300 * (number + 1)]
        assert 950 < len(row["text"]) <= 1000
    assert str(tmp_path / "continue_text.jsonl") in (tmp_path / "continue_text.yaml").read_text()


def test_the_table_compares_prompt_by_prompt(load):
    def row(name, index, cache, score, **more):
        return {"name": name, "index": index, "cache": cache, "score": score, "prompt_tokens": 1000, **more}

    held = {"seen_tokens": 1000, "compression_factor": 4.0}
    less = {"seen_tokens": 1000, "compression_factor": 12.0}
    rows = [
        *(row("niah", index, "hf", score) for index, score in enumerate((1, 0, 1, 1))),
        *(row("niah", index, "max", score, **held) for index, score in enumerate((0, 1, 1, 0))),
        row("cwe", 0, "hf", 0.1),
        row("text", 0, "hf", -20.0, scored_tokens=10),
        row("text", 1, "hf", -40.0, scored_tokens=10),
        row("text", 0, "max", -6.931471805599453, scored_tokens=10, **less),
    ]
    assert load("tables").lm_eval_table({"caches": {"hf": {}, "max": {}}, "quality": rows}).splitlines()[2:] == [
        "| `niah` | 4 | 1,000 | 0.75 | 0.50 (2 worse, 1 better) |",
        "| `cwe` | 1 | 1,000 | 0.10 | not asked |",
        "| `text` | 2 | 1,000 | perplexity 20.09 | perplexity 2.00 |",
        f"| times fewer bytes |  |  | 1.0x | {5000 / (4000 / 4 + 1000 / 12):.1f}x |",
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the script, and tasks of lm-eval for a tiny model."""
    for package in ("lm_eval", "wonderwords"):
        pytest.importorskip(package, reason="lm-eval[ruler] is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        patch.setattr("nltk.download", lambda *_: False)  # tried on import, of what these tasks do not need
        script = importlib.import_module("lm_eval_tasks")
        folder = tmp_path_factory.mktemp("tasks")
        return script, script.load_tasks(tiny(), NAMES, samples=2, length=LENGTH, folder=folder)


class TestWithLmEval:
    """What is asked of lm-eval itself, with a tiny model and without a network."""

    @pytest.mark.parametrize("name", NAMES)
    def test_prompts_have_the_length_and_are_scored_through_the_cache(self, found, name):
        script, tasks = found
        rows = {
            cache: script.ask(make(), tasks[name], 1, script.METRICS.get(name, str(LENGTH)))
            for cache, make in script.models(tiny(), ["max"]).items()
        }
        assert 800 < rows["hf"]["prompt_tokens"] == rows["max"]["prompt_tokens"] <= LENGTH
        assert rows["max"]["seen_tokens"] >= rows["max"]["prompt_tokens"] - 1
        assert rows["max"]["kept_tokens"] < rows["max"]["seen_tokens"]
        assert "kept_tokens" not in rows["hf"]
        assert ("answer" in rows["hf"]) == (name not in {"choose_code", "continue_text"})
        if name == "continue_text":
            assert rows["hf"]["scored_tokens"] == rows["max"]["scored_tokens"] >= 300
            assert rows["hf"]["score"] != pytest.approx(rows["max"]["score"], abs=1e-3)

    def test_another_process_would_make_the_same_prompts(self, found, tmp_path):
        script, tasks = found
        again = script.load_tasks(tiny(), ["niah_single_1", "say_code"], samples=1, length=LENGTH, folder=tmp_path)
        for name, task in again.items():
            assert task.eval_docs[0] == tasks[name].eval_docs[0]
