"""The laws of the E8 lattice."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lattice import COVERING_RADIUS, SECOND_MOMENT, is_member, mirror, nearest_point
from torch import Tensor

import oracles
import strategies

# Distances of float32 vectors up to 64: eight squares below 1, rounded a few times each.
ROUNDING = 8 * torch.finfo(torch.float32).eps


def distance(x: Tensor, point: Tensor) -> float:
    return float((x.double() - point.double()).norm())


@given(strategies.vectors(strategies.huge_coordinates()))
def test_nearest_point_is_a_lattice_point(x: Tensor) -> None:
    """Q(x) is in E8, for every finite x."""
    assert is_member(nearest_point(x))


@given(strategies.vectors())
def test_distance_is_at_most_the_covering_radius(x: Tensor) -> None:
    """|x - Q(x)| <= 1."""
    assert distance(x, nearest_point(x)) <= COVERING_RADIUS + ROUNDING


@given(strategies.vectors())
def test_no_lattice_point_is_nearer(x: Tensor) -> None:
    """|x - Q(x)| = min over E8, and Q(x) is that point unless two are equally near."""
    nearest, second, point = oracles.distances_to_e8(x)
    found = nearest_point(x)
    assert distance(x, found) <= nearest + ROUNDING
    if second > nearest + ROUNDING:
        assert torch.equal(found.double(), point)


@given(strategies.vectors())
def test_no_neighbour_of_the_nearest_point_is_nearer(x: Tensor) -> None:
    """Q(x) = p exactly if x is on p's side of every root (the Voronoi cell of a root lattice)."""
    rest = x.double() - nearest_point(x).double()
    assert (oracles.e8_roots() @ rest).max() <= 1 + ROUNDING


@given(strategies.e8_points())
def test_lattice_points_are_their_own_nearest_points(point: Tensor) -> None:
    """Q(p) = p for p in E8, so Q is idempotent."""
    assert is_member(point)
    assert torch.equal(nearest_point(point), point)


@given(strategies.vectors())
def test_quantizing_twice_changes_nothing(x: Tensor) -> None:
    """Q(Q(x)) = Q(x)."""
    once = nearest_point(x)
    assert torch.equal(nearest_point(once), once)


@given(strategies.e8_points(), strategies.e8_points())
def test_lattice_is_a_group(a: Tensor, b: Tensor) -> None:
    """E8 is closed under addition and negation."""
    assert is_member(a + b)
    assert is_member(-a)


@given(strategies.e8_points(), strategies.e8_points())
def test_lattice_is_even_and_integral(a: Tensor, b: Tensor) -> None:
    """<a, b> is an integer and <a, a> an even one."""
    assert (a @ b) == (a @ b).round()
    assert (a @ a) % 2 == 0


@given(strategies.vectors(st.integers(-512, 512).map(lambda k: k / 16)), strategies.e8_points())
def test_shift_by_a_lattice_vector_commutes(x: Tensor, shift: Tensor) -> None:
    """Q(x + p) = Q(x) + p for p in E8, away from ties."""
    nearest, second, _ = oracles.distances_to_e8(x)
    assume(second > nearest + ROUNDING)
    assert torch.equal(nearest_point(x + shift), nearest_point(x) + shift)


@given(strategies.vectors())
def test_mirror_is_an_involution_that_keeps_distances(x: Tensor) -> None:
    """The mirror image is a lattice of its own: M(M(x)) = x and |M(x)| = |x|."""
    assert torch.equal(mirror(mirror(x)), x)
    assert mirror(x).square().sum() == x.square().sum()


@given(st.lists(strategies.vectors(), min_size=1, max_size=5))
def test_each_vector_is_quantized_alone(rows: list[Tensor]) -> None:
    """Q of a batch is the batch of Q."""
    assert torch.equal(nearest_point(torch.stack(rows)), torch.stack([nearest_point(row) for row in rows]))


@given(strategies.vectors(strategies.coordinates(limit=96)), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_computed_in_float32(x: Tensor, dtype: torch.dtype) -> None:
    """Q(x) keeps the dtype of x and loses nothing to it."""
    half = x.to(dtype)
    found = nearest_point(half)
    assert found.dtype == dtype
    assert torch.equal(found.float(), nearest_point(half.float()))
    assert is_member(found)


@given(strategies.vectors())
def test_float64_agrees_with_float32_away_from_ties(x: Tensor) -> None:
    """Q does not depend on the dtype that holds x."""
    nearest, second, _ = oracles.distances_to_e8(x)
    assume(second > nearest + ROUNDING)
    assert torch.equal(nearest_point(x.double()), nearest_point(x).double())


@pytest.mark.parametrize("seed", range(3))
def test_second_moment(seed: int) -> None:
    """E |x - Q(x)|^2 / 8 = 929 / 12960 for x uniform over a period of the lattice, within 3 sigma."""
    # 2 Z^8 is a sublattice: the cube [0, 2)^8 holds every residue of x equally often.
    x = 2 * torch.rand(200_000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    error = (x - nearest_point(x)).square().mean(-1)
    sigma = float(error.std()) / math.sqrt(len(error))
    assert abs(float(error.mean()) - SECOND_MOMENT) < 3 * sigma
    assert sigma < 1e-3 * SECOND_MOMENT
