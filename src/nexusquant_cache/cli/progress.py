"""Progress bars on a terminal; elsewhere a line per phase, and one a minute with the time left while it lasts."""

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
        self._first = Step("")
        self._started_at = self._shown_at = 0.0

    def show(self, step: Step) -> None:
        now = time.monotonic()
        if step.phase != self._first.phase:
            line = f"{step.phase} ..."
            self._first, self._started_at = step, now
        elif now - self._shown_at >= _SECONDS_BETWEEN_LINES:
            line = f"{step.phase} {step.done}/{step.total} {step.detail}".rstrip() + self._left(step, now)
        else:
            return
        self._shown_at = now
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _left(self, step: Step, now: float) -> str:
        """Return how long a phase will last if it goes on as it has gone; nothing if that cannot be told."""
        done, left = step.done - self._first.done, step.total - step.done
        if done <= 0 or left <= 0:
            return ""
        minutes = (now - self._started_at) * left / done / 60
        return f", about {math.ceil(minutes)} min left"


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
        self._progress.update(self._task, completed=step.done, total=step.total or None, detail=step.detail)
