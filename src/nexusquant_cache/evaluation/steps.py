"""What long work says about how far it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Step:
    """What is being done: a phase, how far it is (no total: unknown), and a detail such as the cache's name."""

    phase: str
    done: int = 0
    total: int = 0
    detail: str = ""


Report: TypeAlias = Callable[[Step], None]
"""Called as work goes on."""


def progress_of(report: Report, phase: str) -> Callable[[int, int], None]:
    """Return what tells a report how far a phase is, called with what is done and the total."""
    return lambda done, total: report(Step(phase, done, total))


def no_report(_step: Step) -> None:
    """Say nothing."""
