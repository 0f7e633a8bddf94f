"""Progress bars on a terminal, one line per phase elsewhere."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from nexusquant_cache.evaluation.demo import Report, Step


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
        TextColumn("{task.fields[detail]:<8}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bars(progress).show


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""

    def show(self, step: Step) -> None:
        if step.phase != self._phase:
            self._phase = step.phase
            self._console.print(f"{step.phase} ...", markup=False, highlight=False)


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
