"""The chat in a terminal, or through pipes: answers on the standard output, everything else beside it."""

import contextlib
import io
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console

from nexusquant_cache.cli.progress import progress_bars
from nexusquant_cache.errors import NexusQuantError, OptionError, suggest
from nexusquant_cache.evaluation.steps import Report, Step
from nexusquant_cache.evaluation.texts import read_text
from nexusquant_cache.pages.elements import printable
from nexusquant_cache.presets import all_presets
from nexusquant_cache.serving.chat_model import Listener
from nexusquant_cache.serving.session import ChatSession

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines
_PROMPT = "> "

HELP = f"""\
/read FILE    read a text, to be asked about it
/save FILE    write the chat and its cache to a file
/load FILE    take up the chat in a file
/report       show what the cache holds, layer by layer
/preset NAME  compress with another preset: {all_presets()}
/reset        begin a new chat
/help         show this
/quit         leave; so does the end of the input

Ctrl-C stops an answer. To begin a message with a slash, write two."""


class ChatLoop:
    """Takes lines, and hands them to a chat as messages and commands.  What goes wrong is said, and the chat goes on.

    Args:
        session: The chat.
    """

    def __init__(self, session: ChatSession) -> None:
        """Take no line yet."""
        self._session = session
        self._is_over = False
        self.failures = 0
        self._commands = {
            name: getattr(self, f"_{name}")
            for name in ("read", "save", "load", "report", "preset", "reset", "help", "quit")
        }

    def run(self) -> None:
        """Chat until the input ends, or the user leaves."""
        for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)  # bytes may be anything, and not every terminal has every letter
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401, PLC0415 - it gives `input` a history
            _note("Ask something. /help shows the commands.")
        while not self._is_over:
            try:
                line = input(_PROMPT) if is_terminal else sys.stdin.readline()
            except EOFError:
                break
            except KeyboardInterrupt:  # between answers it stops nothing
                _note("\n/quit leaves")
                continue
            if not line and not is_terminal:
                break
            self.take(line.strip())

    def take(self, line: str) -> None:
        """Do what a line says."""
        if not line:
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._obey(line)
            else:
                self._ask(line.removeprefix("/") if line.startswith("//") else line)
        except (NexusQuantError, OSError, MemoryError, RuntimeError) as error:  # the last for what torch says
            self._fail(" ".join(str(error).split()) or type(error).__name__)
        except KeyboardInterrupt:
            self._fail("interrupted")

    def _fail(self, text: str) -> None:
        self.failures += 1
        _note(f"error: {printable(text)}")

    def _ask(self, text: str) -> None:
        with _hearing() as terminal:
            start = time.perf_counter()
            answer = self._session.ask(text, terminal)
            seconds = time.perf_counter() - start
        if answer.tokens:
            typer.echo()
        why = {"left": "; stopped", "length": "; the answer is not over, it had as many tokens as it might"}
        pace = f"{answer.tokens} tokens in {seconds:.1f} s" if answer.tokens else "nothing said"
        self._show_line(pace + why.get(answer.ended, ""))

    def _show_line(self, more: str) -> None:
        _note(f"[{self._session.report().line}; {more}]")

    def _obey(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        if name not in self._commands:
            msg = f"there is no command /{name}. {suggest(name, self._commands)}"
            raise OptionError(msg)
        takes = {"read": "FILE", "save": "FILE", "load": "FILE", "preset": "NAME"}.get(name)
        argument = argument.strip()
        if bool(argument) != (takes is not None):
            msg = f"/{name} takes nothing more" if takes is None else f"/{name} needs more: /{name} {takes}"
            raise OptionError(msg)
        self._commands[name](*([argument] if takes else []))

    def _read(self, file: str) -> None:
        text = read_text(_path(file))
        with _hearing() as terminal:
            is_read = self._session.read(text, terminal)
        self._show_line("read" if is_read else "stopped; nothing was read")

    def _save(self, file: str) -> None:
        size = self._session.save(_path(file))
        _note(f"saved, {size:,} bytes")

    def _load(self, file: str) -> None:
        talk = self._session.load(_path(file))
        turns = sum(message["role"] == "user" for message in talk.messages)
        self._show_line(f"loaded, questions so far: {turns}")
        if talk.model != self._session.model.name:
            _note(f"warning: it was saved by {printable(talk.model)}: with other weights, the answers will be poor")

    def _report(self) -> None:
        typer.echo(str(self._session.report()))

    def _preset(self, name: str) -> None:
        self._session.use_preset(name)
        _note(f"preset {self._session.report().preset}; the next question has the chat read again")

    def _reset(self) -> None:
        self._session.reset()
        _note("a new chat")

    def _help(self) -> None:
        typer.echo(HELP)

    def _quit(self) -> None:
        self._is_over = True


class _Terminal(Listener):
    """Shows an answer as it comes."""

    def __init__(self, bars: contextlib.ExitStack, report: Report) -> None:
        self._bars, self._show = bars, report
        self.is_interrupted = False

    def read(self, done: int, total: int) -> None:
        self._show(Step("reading", done, total))

    def say(self, text: str) -> None:
        """Show what is said.  A model may say anything, and must not control the terminal."""
        self._bars.close()
        sys.stdout.write(_CONTROL.sub(lambda found: printable(found[0]), text))
        sys.stdout.flush()

    @property
    def wants_no_more(self) -> bool:
        return self.is_interrupted


@contextlib.contextmanager
def _hearing() -> Iterator[_Terminal]:
    """Give a listener that Ctrl-C stops between two tokens; a second Ctrl-C does not wait."""
    with contextlib.ExitStack() as bars:
        terminal = _Terminal(bars, bars.enter_context(progress_bars(Console(stderr=True))))

        def stop(number: int, frame: FrameType | None) -> None:
            if terminal.is_interrupted:
                signal.default_int_handler(number, frame)
            terminal.is_interrupted = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield terminal
        finally:
            signal.signal(signal.SIGINT, before)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _note(text: str) -> None:
    typer.secho(text, err=True, dim=True)
