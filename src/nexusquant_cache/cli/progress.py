"""Progress bars on a terminal; elsewhere a line per phase, and one a minute while it lasts."""

import contextlib
import math
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from nexusquant_cache.evaluation.steps import Report, Step

_SECONDS_BETWEEN_LINES = 60


@contextlib.contextmanager
def progress_bars(console: Console) -> Iterator[Report]:
    """Give a function that shows steps, a bar per phase; the bars leave no trace on a terminal."""
    if not console.is_terminal:
        yield _Lines(console).show
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        yield _Bars(progress).show


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._shown_at = 0.0

    def show(self, step: Step) -> None:
        now = time.monotonic()
        if step.phase != self._phase:
            line = f"{step.phase} ..."
        elif now - self._shown_at >= _SECONDS_BETWEEN_LINES:
            line = f"{step.phase} {step.done}/{step.total} {step.detail}".rstrip()
        else:
            return
        if step.seconds_left is not None:
            line = f"{line} ({_time_left(step.seconds_left)})"
        self._phase, self._shown_at = step.phase, now
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._phase = ""
        self._task: TaskID | None = None

    def show(self, step: Step) -> None:
        if self._task is None or step.phase != self._phase:
            if self._task is not None:
                self._progress.update(self._task, completed=1, total=1, detail="")
            self._phase = step.phase
            self._task = self._progress.add_task(step.phase, total=None, detail="")
        detail = step.detail
        if step.seconds_left is not None:
            detail = f"{_time_left(step.seconds_left)}; {detail}" if detail else _time_left(step.seconds_left)
        self._progress.update(self._task, completed=step.done, total=step.total or None, detail=detail)


def _time_left(seconds: float) -> str:
    return f"about {max(math.ceil(seconds / 5) * 5, 5):.0f} s left in all"
