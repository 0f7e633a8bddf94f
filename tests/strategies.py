"""Inputs that hypothesis draws: the awkward cases first, then everything between them."""

import torch
from hypothesis import strategies as st
from torch import Tensor

# Zeros of both signs, exact ties of one coset (quarters), of rounding (halves), subnormal numbers.
SPECIAL_COORDINATES = [0.0, -0.0, 0.25, -0.25, 0.5, -0.5, 0.75, 1.0, -1.0, 1.5, 2**-149, -(2**-149), 1e-40, 2**-126]


def coordinates(limit: float = 64.0) -> st.SearchStrategy[float]:
    """Draw float32 numbers within ``limit``, with many ties, zeros and subnormal numbers."""
    return st.one_of(
        st.sampled_from(SPECIAL_COORDINATES),
        st.integers(-int(4 * limit), int(4 * limit)).map(lambda quarters: quarters / 4),
        st.floats(-limit, limit, width=32),
    )


def huge_coordinates() -> st.SearchStrategy[float]:
    """Draw float32 numbers of any finite size."""
    return st.one_of(st.sampled_from(SPECIAL_COORDINATES), st.floats(allow_nan=False, allow_infinity=False, width=32))


def vectors(elements: st.SearchStrategy[float] | None = None, length: int = 8) -> st.SearchStrategy[Tensor]:
    """Draw one float32 vector."""
    elements = coordinates() if elements is None else elements
    return st.lists(elements, min_size=length, max_size=length).map(lambda row: torch.tensor(row, dtype=torch.float32))


def e8_points(limit: int = 64) -> st.SearchStrategy[Tensor]:
    """Draw lattice points, from their definition: integers of even sum, in half of the cases plus one half."""
    rows = st.lists(st.integers(-limit, limit), min_size=8, max_size=8)

    def point(row: list[int], offset: float) -> Tensor:
        row[0] += sum(row) % 2
        return torch.tensor(row, dtype=torch.float32) + offset

    return st.builds(point, rows, st.sampled_from([0.0, 0.5]))
