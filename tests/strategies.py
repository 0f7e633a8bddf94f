"""Inputs that hypothesis draws: the awkward cases first, then everything between them."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from nexusquant_cache.codec.layout import BLOCK, MAX_BITS, CodeLayout

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


# Row counts around the widths of vector units and the codec's own; none but 1 divides another.
RAGGED_ROWS = (1, 7, 63, 65, 1000)

bits_per_channel = st.sampled_from([1, 2, 3, 4])


def bit_plans(max_blocks: int = 12) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw the bits per channel of every block: equal, or mixed with blocks that store nothing, up to all."""
    uniform = st.builds(lambda bits, blocks: (bits,) * blocks, bits_per_channel, st.integers(1, max_blocks))
    mixed = st.lists(st.integers(0, 4), min_size=1, max_size=max_blocks).map(tuple)
    return st.one_of(uniform, mixed)


def layout_of(plan: tuple[int, ...]) -> CodeLayout:
    """Return the layout of a plan.  For tests, not strategies: beartype draws random numbers to check a tuple."""
    return CodeLayout(BLOCK * len(plan), plan)


def ragged_rows(limit: int = 70) -> st.SearchStrategy[int]:
    """Draw a number of rows, from none; no implementation may care about it."""
    return st.one_of(st.sampled_from([rows for rows in RAGGED_ROWS if rows <= limit]), st.integers(0, limit))


@st.composite
def normal(draw: st.DrawFn, *shape: int, scale: float = 1.0) -> Tensor:
    """Draw Gaussian numbers: hypothesis draws the seed alone, for inputs too large to shrink."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return scale * torch.randn(*shape, generator=generator)


@st.composite
def codes_of(draw: st.DrawFn, plan: tuple[int, ...], rows: int) -> Tensor:
    """Draw block codes ``[rows, blocks]`` over their whole range, with all-zero and all-one codes among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    top = torch.tensor([(1 << BLOCK * bits) - 1 for bits in plan])
    codes = torch.randint(0, 1 << BLOCK * MAX_BITS, (rows, len(plan)), generator=generator) & top
    extreme = torch.randint(0, 8, codes.shape, generator=generator)
    return torch.where(extreme == 0, 0, torch.where(extreme == 1, top, codes))
