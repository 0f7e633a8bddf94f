import importlib.util
import io
import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from rich.console import Console
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig
from typer.testing import CliRunner
from unit.evaluation_tiny import PROSE, tiny

import nexusquant_cache
from nexusquant_cache import NexusQuantCache, cli
from nexusquant_cache.cli import progress
from nexusquant_cache.cli.app import app
from nexusquant_cache.cli.progress import progress_bars
from nexusquant_cache.cli.render import demo_renderables, evaluation_renderables
from nexusquant_cache.evaluation import bench, demo, steps
from nexusquant_cache.evaluation.caches import Footprint, update
from nexusquant_cache.evaluation.demo import DemoOptions, DemoResult, DemoRow
from nexusquant_cache.evaluation.fit import Shape, fit, random_tokens
from nexusquant_cache.evaluation.kinds import Needle
from nexusquant_cache.evaluation.needle import NeedleResult
from nexusquant_cache.evaluation.quality import TextQuality
from nexusquant_cache.evaluation.steps import Step, with_time_left
from nexusquant_cache.evaluation.timing import StepTime


def run(*arguments):
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_that_something_happens_and_then_nothing_of_it(is_terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(cli.sys, "stderr", stream)
    with cli._starting():
        assert stream.getvalue() == ("starting ..." if is_terminal else "")
    assert stream.getvalue().rpartition("\r")[2] == ""
    assert stream.getvalue().strip("\r ") == ("starting ..." if is_terminal else "")


def row(name, held, answer):
    held = Footprint(32_768, 32_768, held, 377_487_360)
    needle = NeedleResult("task", "single", 32_768, 0.4, ("123456",), answer, "123456" in answer, held)
    quality = TextQuality("text", 3.0, 2.0, 0.12345, 0.915, held)
    return DemoRow(name, quality, needle, StepTime(1234.5, 12.34, 12.34, (1234.5,)))


def said(log_prob):
    return {"log_prob": log_prob, "found": True}


@pytest.fixture
def result():
    plain = row("plain", 377_487_360, "It is 123456.")
    balanced = row("balanced", 22_000_000, "It is\n" + 30 * "not known ")
    needle = Needle("single", "", ("The code is 123456.",), "What is the code?", ("123456",))
    return DemoResult("a model", "a text", DemoOptions(), needle, (plain, balanced))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--preset", "balnced"), "Did you mean 'balanced'?"),
        (("demo", "--text", "no such file.txt"), "no such text file: no such file.txt"),
        (("demo", "--tokens", "10"), "tokens must be at least 256"),
        (("demo", "--json", "no such folder/result.json"), "must be a file in a folder that exists"),
        (("evaluate", "--presets", "quant,balnced"), "Did you mean 'balanced'?"),
        (("evaluate", "--text", "no such file.txt"), "no such text file: no such file.txt"),
        (("evaluate", "--kinds", "singel"), "Did you mean 'single'?"),
        (("evaluate", "--lengths", "1024,2k"), "--lengths takes numbers separated by commas, got '1024,2k'"),
        (("evaluate", "--depths", "0.5", "--depths", "1.5"), "every depth must be from 0"),
        (("evaluate", "--windows", "0"), "windows must be at least 1"),
        (("bench", "--rounds", "0"), "rounds must be at least 1, got 0"),
        (("bench", "--presets", "quant,balnced"), "Did you mean 'balanced'?"),
        (("evaluate", "--facts", "49"), "facts must be from 0 to 48, got 49"),
        (("evaluate", "--output", __file__), "it is no folder"),
        (("evaluate", "--text", __file__, "--text", __file__), "the same file name"),
        (("evaluate", "no such model"), "cannot load the model no such model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    (error,) = [line for line in outcome.stderr.splitlines() if not line.endswith(" ...")]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", ("--text", "--tokens", "--preset", "--model", "--seed", "--json", "--new-tokens", "--no-needle")),
        ("evaluate", ("--presets", "--text", "--windows", "--prefix", "--continuation", "--lengths", "--depths")),
        ("evaluate", ("--kinds", "--facts", "--wordings", "--repeats", "--seed", "--output", "--fresh")),
    ],
)
def test_help_names_every_option(command, options):
    outcome = run(command, "--help")
    assert outcome.exit_code == 0
    for option in options:
        assert option in outcome.output


def test_a_report_needs_matplotlib_before_anything_is_done(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    outcome = run("evaluate", "no such model", "--output", str(tmp_path / "new"))
    assert outcome.exit_code == 2
    assert outcome.stderr == 'error: the report needs matplotlib: pip install "nexusquant-cache[cli]"\n'
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder with two texts in it."""
    path = tmp_path_factory.mktemp("model")
    tiny().model.save_pretrained(path)
    tiny().tokenizer.save_pretrained(path)
    (path / "a.txt").write_text(PROSE)
    (path / "b.txt").write_text(PROSE[3:])
    return path


def test_versions_are_told():
    outcome = run("--version")
    assert outcome.exit_code == 0
    told = f"nexusquant-cache {nexusquant_cache.__version__}, transformers {transformers.__version__}, torch (.*)\n"
    (release,) = re.fullmatch(told, outcome.stdout).groups()
    assert release in {torch.__version__, torch.__version__.partition("+")[0]}  # PyPI's torch leaves out its CUDA


class TestBench:
    def test_end_to_end(self, folder, tmp_path):
        text, output = str(folder / "a.txt"), tmp_path / "bench.json"
        sizes = ("--tokens", "300", "--rounds", "2", "--steps", "3")
        outcome = run("bench", str(folder), *sizes, "--presets", "quant,max", "--text", text, "--json", str(output))
        assert outcome.exit_code == 0, outcome.output
        rows = json.loads(output.read_text())["rows"]
        assert [row["name"] for row in rows][:3] == ["plain", "quant", "max"]
        assert rows[0]["time"]["relative"] == 1
        assert all(len(row["time"]["rounds"]) == 2 and min(row["time"]["rounds"]) > 0 for row in rows)
        assert rows[0]["compress_seconds"] is None
        assert rows[1]["compress_seconds"] > 0
        assert rows[1]["footprint"]["seen_tokens"] == 300
        for shown in ("plain", "quant", "max", "1.00x", "2 rounds of 3 tokens", folder.name):
            assert shown in outcome.stdout
        phases = ["reading the text ...", "compressing ...", "timing generation ..."]
        assert outcome.stderr.splitlines()[1:] == phases

    def test_packages_that_are_not_there_are_named(self, folder, monkeypatch):
        """Those of transformers' quantized caches; one that fails is named, too."""

        class Failing(DynamicCache):
            def __init__(self, *_, **__):
                msg = "not today"
                raise RuntimeError(msg)

        monkeypatch.setattr(bench, "_missing", lambda: iter([("quanto", "optimum.quanto")]))
        monkeypatch.setattr(bench, "QuantizedCache", Failing)
        sizes = ("--tokens", "300", "--rounds", "1", "--steps", "1", "--text", str(folder / "a.txt"))
        outcome = run("bench", str(folder), *sizes, "--presets", "quant")
        assert outcome.exit_code == 0, outcome.output
        assert "quanto, 4 bits: optimum.quanto is not installed" in outcome.stdout
        assert "hqq, 4 bits: RuntimeError: not today" in outcome.stdout


class TestFit:
    def test_end_to_end(self, folder):
        outcome = run("fit", str(folder), "--tokens", "2000", "--batch", "3", "--presets", "balanced,max")
        assert outcome.exit_code == 0, outcome.output
        for shown in ("plain", "balanced", "max", "1.0x", "3 prompts of 2,000 tokens", folder.name):
            assert shown in outcome.stdout
        assert "quant " not in outcome.stdout

    def test_bytes_are_those_that_a_cache_holds(self):
        """Of a model with four heads in each of three layers, but for what layers share, and for an uneven number."""
        config = LlamaConfig(num_hidden_layers=3, num_attention_heads=4, hidden_size=256)
        shape = Shape.of(config)
        assert shape == Shape(3, (), 4, 64)
        plain, balanced = fit(shape, 1500, ("balanced",), batch=2)
        assert plain.held_bytes == plain.reading_bytes == 2 * 3 * 2 * 2 * 4 * 64 * 1500
        cache, held = NexusQuantCache("balanced", config=config), []
        random = torch.Generator().manual_seed(1)
        for count in (1500, 1):
            for layer_idx in range(3):
                rows = [random_tokens(4, count, 64, random) for _ in range(2)]
                update(cache, *(torch.cat(side).bfloat16() for side in zip(*rows, strict=True)), layer_idx)
            cache.layers[2].encode()
            held.append(sum(layer.held_bytes for layer in cache.memory_report().layers))
        assert balanced.held_bytes == pytest.approx(held[1], rel=0.01)
        # Codes of all tokens, with what waits for the choice, and one exact layer.
        assert balanced.reading_bytes == pytest.approx(held[0] + plain.held_bytes // 3, rel=0.05)
        assert balanced.held_bytes < balanced.reading_bytes < 0.6 * plain.held_bytes

    def test_windows_hold_what_they_see(self):
        config = Gemma3TextConfig(num_hidden_layers=6, num_key_value_heads=1, head_dim=256, sliding_window=512)
        shape = Shape.of(config)
        assert shape == Shape(1, (512,) * 5, 1, 256)
        plain, most = fit(shape, 4096, ("max",))
        assert plain.held_bytes == 2 * 2 * 256 * (4096 + 5 * 512)
        assert 2 * 2 * 256 * 5 * 512 < most.held_bytes < 2 * 2 * 256 * (5 * 512 + 4096 / 15)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--tokens", "0"), "tokens must be at least 1, got 0"),
            (("--batch", "-1"), "batch must be at least 1, got -1"),
            (("--tokens", "100000000"), "channels, got 100,000,000"),
            (("--presets", "balnced"), "Did you mean 'balanced'?"),
        ],
    )
    def test_refusals(self, folder, arguments, message):
        outcome = run("fit", str(folder), *arguments)
        assert outcome.exit_code == 2
        assert message in outcome.stderr


class TestEvaluate:
    def evaluate(self, folder, output, *more, kinds="single,later"):
        texts = ("--text", str(folder / "a.txt"), "--text", str(folder / "b.txt"))
        sizes = ("--windows", "2", "--prefix", "300", "--continuation", "8")
        needles = ("--lengths", "400,500", "--depths", "0.5", "--depths", "0.2", "--kinds", kinds, "--facts", "0")
        outcome = run("evaluate", str(folder), *texts, *sizes, *needles, "--output", str(output), *more)
        assert outcome.exit_code == 0, outcome.output
        return outcome, json.loads((output / "results.json").read_text())

    def test_end_to_end(self, folder, tmp_path):
        output = tmp_path / "new" / "folder"
        outcome, content = self.evaluate(folder, output, "--presets", "quant", "--presets", "max")
        assert {(row["task"], row["cache"]) for row in content["quality"]} == {
            (task, cache) for task in ("a.txt 1", "b.txt 1") for cache in ("plain", "quant", "max")
        }
        assert {(row["kind"], row["length"], row["depth"]) for row in content["needles"]} == {
            (kind, length, depth) for kind in ("single", "later") for length in (400, 500) for depth in (0.2, 0.5)
        }
        names = ["quality_vs_bytes.png", "recall_by_place.png", "recall_vs_bytes.png", "report.html", "results.json"]
        assert sorted(path.name for path in output.iterdir()) == names
        for shown in ("plain", "quant", "max", "0 of 4", "later", "dPPL %", "report.html"):
            assert shown in outcome.stdout
        assert folder.name in outcome.stdout
        assert outcome.stderr.splitlines()[1:] == ["measuring ...", "drawing ..."]

    def test_goes_on(self, folder, tmp_path):
        _, first = self.evaluate(folder, tmp_path, "--presets", "max", kinds="none")
        _, second = self.evaluate(folder, tmp_path, "--presets", "max,quant", kinds="none")
        assert [row for row in second["quality"] if row["cache"] != "quant"] == first["quality"]
        _, fresh = self.evaluate(folder, tmp_path, "--presets", "max,quant", "--fresh", kinds="none")
        assert fresh["quality"] != second["quality"]  # their times, if nothing else

    def test_the_table_fits_into_100_columns(self, tmp_path):
        held = {"seen_tokens": 32_768, "kept_tokens": 32_768, "held_bytes": 377_487_360, "dense_bytes": 377_487_360}
        row = {"text": "a", "nll": 3.0, "plain_nll": 2.0, "top1": 0.915, "compress_seconds": 123.4, "footprint": held}
        content = {
            "settings": {"model": "a model"},
            "caches": {"balanced": {}},
            "quality": [
                {"task": task, "cache": cache, "kl": kl, **row}
                for cache in ("plain", "balanced")
                for task, kl in (("a", 0.123), ("b", 1.234))
            ],
            "needles": [],
            "facts": [
                {"task": f"{kind} {place}", "cache": cache, "kind": kind, "place": place, "expected": kind, **answer}
                for cache, answer in (("plain", said(-0.5)), ("balanced", said(-12.75)), ("absent", said(-22.75)))
                for kind in ("name", "content")
                for place in ("prompt", "later")
            ],
        }
        console = Console(width=100, record=True, file=io.StringIO())
        for part in evaluation_renderables(content, tmp_path):
            console.print(part)
        shown = console.export_text()
        for cell in ("balanced", "360.00", "+171.8 (+171.8, +171.8)", "0.678 (", "91.5", "123.40", "-12.25   1   1"):
            assert cell in shown
        assert max(map(len, shown.splitlines())) <= 100
        assert "Needles" not in shown


def test_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert 'pip install "nexusquant-cache[cli]"' in capsys.readouterr().err


def test_the_table_fits_into_100_columns(result):
    console = Console(width=100, record=True, file=io.StringIO())
    for part in demo_renderables(result):
        console.print(part)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for shown in ("32,768", "360.00", "17.2x", "+171.8", "0.1235", "91.5", "found", "lost", "12.34x"):
        assert shown in text
    assert "What is the code?" in text
    assert "It is not known" in text


def last_line(result):
    return list(demo_renderables(result))[-1].plain.strip()


def test_the_last_line_is_a_verdict(result):
    assert last_line(result) == "Verdict: 0 of 1 presets find the fact; lost by balanced."
    found = replace(result, rows=(result.rows[0], row("max", 15_000_000, "123456"), *result.rows[1:]))
    assert last_line(found) == (
        "Verdict: 1 of 2 presets find the fact; lost by balanced. max: 25.2x smaller, "
        "perplexity +171.8 %, 12.34x the time per token."
    )


def test_the_verdict_tells_when_the_model_itself_is_lost(result):
    plain = row("plain", 377_487_360, "I do not know.")
    assert "the model misses the fact even with the plain cache" in last_line(
        replace(result, rows=(plain, result.rows[1]))
    )


def test_the_verdict_without_question_and_times(result):
    rows = tuple(replace(each, needle=None, time=None) for each in result.rows)
    assert last_line(replace(result, rows=rows)) == "Verdict: balanced: 17.2x smaller, perplexity +171.8 %."


def test_the_time_left_is_that_of_all_phases(monkeypatch):
    times = iter((0.0, 0.0, 20.0, 40.0))
    monkeypatch.setattr(steps.time, "monotonic", lambda: next(times))
    shown = []
    report = with_time_left(shown.append, {"loading": 10.0, "reading": 20.0})
    for step in (Step("loading"), Step("reading"), Step("reading", 1, 2)):
        report(step)
    # 30 expected; then 10 of them took 20, and 20 took 40, on top of 10 that are trusted
    assert [step.seconds_left for step in shown] == [30, 20 * 30 / 20, pytest.approx(10 * 50 / 30)]
    assert [step.phase for step in shown] == ["loading", "reading", "reading"]


def test_the_time_left_is_shown_with_and_without_a_terminal(capsys):
    for console in (Console(width=120), Console(force_terminal=True, width=120)):
        with progress_bars(console) as report:
            report(Step("reading", 1, 2, "max", seconds_left=83.0))
        assert "about 85 s left" in capsys.readouterr().out


def test_the_demo_expects_every_phase_that_it_has():
    expected = DemoOptions().expected_seconds()
    assert list(expected) == [demo.LOADING, demo.READING, demo.COMPILING, demo.COMPARING, demo.TIMING]
    assert demo.TIMING not in DemoOptions(rounds=0).expected_seconds()
    assert DemoOptions(presets=("max",)).expected_seconds()[demo.COMPARING] < expected[demo.COMPARING]


def test_without_a_terminal_each_phase_is_one_line(capsys):
    with progress_bars(Console()) as report:
        for step in (Step("reading", 1, 2), Step("reading", 2, 2), Step("asking")):
            report(step)
    assert capsys.readouterr().out == "reading ...\nasking ...\n"


def test_without_a_terminal_a_long_phase_shows_itself_once_a_minute(monkeypatch, capsys):
    times = iter((0.0, 59.0, 61.0, 120.0, 122.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with progress_bars(Console(width=20)) as report:
        for done in range(5):
            report(Step("measuring", done, 5, "a long name of a text"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "measuring ...",
        "measuring 2/5 a long name of a text",
        "measuring 4/5 a long name of a text",
    ]


def test_on_a_terminal_bars_are_drawn(capsys):
    with progress_bars(Console(force_terminal=True, width=100)) as report:
        for step in (Step("reading", 1, 2), Step("reading", 2, 2), Step("asking", detail="max")):
            report(step)
    shown = capsys.readouterr().out
    assert "reading" in shown
    assert "asking" in shown
