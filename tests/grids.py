"""Combinations of which the quick suite draws some; `nox -s grid` runs all."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def combined(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by all combinations of these arguments.

    The quick suite has the diagonals, on which each value of each argument stands; the others have the mark ``grid``.
    """
    size = sorted(map(len, axes.values()))[-2]  # with more, the longest would not meet all diagonals
    cases = [
        pytest.param(*values, marks=() if sum(places) % size == 0 else pytest.mark.grid)
        for places, values in zip(
            itertools.product(*(range(len(values)) for values in axes.values())),
            itertools.product(*axes.values()),
            strict=True,
        )
    ]
    return pytest.mark.parametrize(list(axes), cases)
