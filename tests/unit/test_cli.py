import importlib.util
import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from nexusquant_cache import cli
from nexusquant_cache.cli.app import app
from nexusquant_cache.cli.progress import progress_bars
from nexusquant_cache.cli.render import demo_renderables
from nexusquant_cache.evaluation import Fact, Footprint, NeedleResult, StepTime, TextQuality
from nexusquant_cache.evaluation.demo import DemoOptions, DemoResult, DemoRow, Step


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *arguments])


def row(name, held, answer):
    held = Footprint(32_768, 32_768, held, 377_487_360)
    needle = NeedleResult("task", 32_768, 0.4, "123456", answer, "123456" in answer, held)
    quality = TextQuality("text", 3.0, 2.0, 0.12345, 0.915, held)
    return DemoRow(name, quality, needle, StepTime(1234.5, 12.34, (1234.5,)))


@pytest.fixture
def result():
    plain = row("plain", 377_487_360, "It is 123456.")
    balanced = row("balanced", 22_000_000, "It is\n" + 30 * "not known ")
    fact = Fact("the bakery in Cornwall", "123456")
    return DemoResult("a model", "a text", DemoOptions(), fact, (plain, balanced))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "balnced"), "Did you mean 'balanced'?"),
        (("--text", "no such file.txt"), "no such text file: no such file.txt"),
        (("--tokens", "10"), "tokens must be at least 256"),
        (("--json", "no such folder/result.json"), "must be a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("error: ")
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_help_names_every_option():
    outcome = run("--help")
    assert outcome.exit_code == 0
    for option in ("--text", "--tokens", "--preset", "--model", "--seed", "--json", "--new-tokens", "--no-needle"):
        assert option in outcome.output


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
    assert "What is the access code of the bakery in Cornwall?" in text
    assert "It is not known" in text


def test_without_a_terminal_each_phase_is_one_line(capsys):
    with progress_bars(Console()) as report:
        for step in (Step("reading", 1, 2), Step("reading", 2, 2), Step("asking")):
            report(step)
    assert capsys.readouterr().out == "reading ...\nasking ...\n"


def test_on_a_terminal_bars_are_drawn(capsys):
    with progress_bars(Console(force_terminal=True, width=100)) as report:
        for step in (Step("reading", 1, 2), Step("reading", 2, 2), Step("asking", detail="max")):
            report(step)
    shown = capsys.readouterr().out
    assert "reading" in shown
    assert "asking" in shown
