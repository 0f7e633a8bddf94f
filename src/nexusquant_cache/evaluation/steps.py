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


def no_report(_step: Step) -> None:
    """Say nothing."""
