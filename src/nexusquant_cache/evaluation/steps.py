"""What long work says about how far it is."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias


@dataclass(frozen=True)
class Step:
    """What is being done: a phase, how far it is (no total: unknown), and a detail such as the cache's name.

    Attributes:
        seconds_left: About how long all phases together will go on; None if nobody knows.
    """

    phase: str
    done: int = 0
    total: int = 0
    detail: str = ""
    seconds_left: float | None = None


Report: TypeAlias = Callable[[Step], None]
"""Called as work goes on."""


def progress_of(report: Report, phase: str) -> Callable[[int, int], None]:
    """Return what tells a report how far a phase is, called with what is done and the total."""
    return lambda done, total: report(Step(phase, done, total))


_TRUST = 10.0  # seconds; so much work has to be done before what it took counts more than what was expected


def with_time_left(report: Report, seconds: Mapping[str, float]) -> Report:
    """Return what shows steps with the time that is left of all of them.

    Args:
        report: Shows them.
        seconds: About how long each phase takes on some machine, in their order.  How much faster or slower this one
            is shows as work goes on.
    """
    start, whole, phases = time.monotonic(), sum(seconds.values()), list(seconds)

    def show(step: Step) -> None:
        before = sum(seconds[phase] for phase in phases[: phases.index(step.phase)])
        done = before + seconds[step.phase] * (step.done / step.total if step.total else 0)
        pace = (time.monotonic() - start + _TRUST) / (done + _TRUST)
        report(replace(step, seconds_left=(whole - done) * pace))

    return show


def no_report(_step: Step) -> None:
    """Say nothing."""
