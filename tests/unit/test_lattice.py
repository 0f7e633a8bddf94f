"""Hand-computed examples and the messages of `lattice`."""

import pytest
import torch
from lattice import SECOND_MOMENT, is_member, mirror, nearest_point
from torch import Tensor

import oracles
from nexusquant_cache.errors import DtypeError, ShapeError


def eight(*values: float) -> Tensor:
    return torch.tensor(values + (0.0,) * (8 - len(values)))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (eight(0.2, -0.3), eight()),
        (eight(0.9, 0.8), eight(1, 1)),
        # The sum would be odd: the larger error moves, 0.6 down to 0 or 0.4 up to 1.
        (eight(0.6), eight()),
        (eight(0.6, 0.45), eight(1, 1)),
        (torch.full((8,), 0.4), torch.full((8,), 0.5)),
        (torch.full((8,), -0.4), torch.full((8,), -0.5)),
        # Equally far from 0 and from (1/2, ..., 1/2): the integers win.
        (torch.full((8,), 0.25), eight()),
        # A deep hole: 16 points at distance 1; the first coordinate moves, upwards.
        (eight(1), eight(2)),
    ],
)
def test_examples(x: Tensor, expected: Tensor) -> None:
    assert torch.equal(nearest_point(x), expected)


def test_huge_odd_sums_are_repaired_at_a_coordinate_that_can_move() -> None:
    found = nearest_point(eight(2.0**25, 1))
    assert is_member(found)
    assert found[0] == 2.0**25


def test_there_are_240_shortest_vectors() -> None:
    roots = oracles.e8_roots()
    assert len({tuple(root) for root in roots.tolist()}) == 240
    assert is_member(roots).all()
    assert torch.equal(roots.square().sum(-1), torch.full((240,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(
    "stranger",
    [
        eight(1),  # odd sum
        eight(0.5, 0.5),  # mixed cosets
        eight(0.25, 0.25),
        torch.tensor([0.5] * 7 + [-0.5]),  # the mirror image
        eight(float("nan")),
        eight(float("inf"), float("inf")),
    ],
)
def test_strangers(stranger: Tensor) -> None:
    assert not is_member(stranger)


def test_mirror_image_holds_its_own_points() -> None:
    glue = torch.tensor([0.5] * 7 + [-0.5])
    assert is_member(mirror(glue))
    assert torch.equal(mirror(nearest_point(mirror(0.9 * glue))), glue)


def test_float16_beyond_the_lattice_unit_does_not_overflow() -> None:
    assert is_member(torch.full((8,), 60000.0, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 3, 8)])
def test_any_batch_shape(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert nearest_point(x).shape == shape
    assert is_member(x).shape == shape[:-1]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", [nearest_point, is_member, mirror])
class TestRefusals:
    def test_shape(self, function) -> None:
        with pytest.raises(ShapeError, match=r"8 coordinates in the last axis, got shape \(2, 7\)"):
            function(torch.zeros(2, 7))
        with pytest.raises(ShapeError, match=r"got shape \(\)"):
            function(torch.tensor(0.0))

    def test_dtype(self, function) -> None:
        with pytest.raises(DtypeError, match=r"floating point, got torch\.int64"):
            function(torch.zeros(8, dtype=torch.int64))


def test_second_moment_is_the_published_number() -> None:
    assert SECOND_MOMENT == pytest.approx(0.07168, abs=1e-5)
