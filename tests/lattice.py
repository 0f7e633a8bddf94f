"""The E8 lattice: nearest point, membership, and the mirror image on which the block code lives.

E8 is the union of D8 (integer vectors with even sum) and D8 + ½ (every coordinate shifted by ½).
Negating the last coordinate gives its mirror image, D8 ∪ (D8 + (½, …, ½, -½)), a lattice with the
same distances; `layout` explains why the codes use that one.

References:
    Conway & Sloane (1999), "Sphere Packings, Lattices and Groups", 3rd ed., chapters 4 and 21.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nexusquant_cache.codec.layout import BLOCK
from nexusquant_cache.errors import DtypeError, ShapeError

_HALF = 0.5

COVERING_RADIUS = 1.0
"""Largest distance between a vector and its nearest lattice point."""

SECOND_MOMENT = 929 / 12960
"""Mean squared quantization error per dimension of a uniform source (the lattice has volume 1)."""


def nearest_point(x: Float[Tensor, "*batch 8"]) -> Float[Tensor, "*batch 8"]:
    """Return the E8 lattice point nearest to each 8-vector.

    Each coset is rounded on its own; where its sum comes out odd, the coordinate with the largest
    rounding error goes to its second-nearest value instead.  The closer of the two candidates wins.
    Ties between the cosets go to the integers, ties within one to the first coordinate, so that equal
    vectors get equal points wherever they stand in a batch.

    Args:
        x: Finite vectors in lattice units, that is, already divided by their scale.  Half precision
            is computed in float32.

    Returns:
        Points in the dtype of ``x``, at a distance of at most `COVERING_RADIUS`.  Coordinates are
        multiples of ½: exact in bfloat16 up to 128, in float16 up to 1024, in float32 up to 2^22.
        A float32 or float64 vector beyond its range (2^22, 2^51) gets a lattice point with integer
        coordinates, which need not be the nearest one.

    Raises:
        ShapeError: If the last axis does not have length 8.
        DtypeError: If ``x`` is not floating point.

    References:
        Conway & Sloane (1982), "Fast quantizing and decoding algorithms for lattice quantizers and
        codes", IEEE Trans. Inf. Theory 28(2), 227-232.
    """
    work = _floating_blocks(x)
    integer = _nearest_in_d8(work)
    half = _nearest_in_d8(work - 0.5) + 0.5
    # Further out the dtype has no half-integers any more.
    has_halves = work.abs().amax(-1) < 0.5 / torch.finfo(work.dtype).eps
    closer = _squared_norm(work - half) < _squared_norm(work - integer)
    return torch.where((closer & has_halves).unsqueeze(-1), half, integer).to(x.dtype)


def is_member(x: Float[Tensor, "*batch 8"]) -> Bool[Tensor, "*batch"]:
    """Tell for each 8-vector whether it is exactly a point of E8.

    Args:
        x: Vectors of any floating dtype; NaN and infinity are no members.

    Returns:
        True where all coordinates are integers, or all are integers plus ½, and their sum is even.

    Raises:
        ShapeError: If the last axis does not have length 8.
        DtypeError: If ``x`` is not floating point.
    """
    work = _floating_blocks(x)
    fraction = work - work.floor()
    one_coset = ((fraction == 0) | (fraction == _HALF)).all(-1) & (fraction == fraction[..., :1]).all(-1)
    # Eight halves add 4, so the sum is even exactly if the sum of the floors is.
    return one_coset & ~_sum_is_odd(work.floor())


def mirror(x: Float[Tensor, "*batch 8"]) -> Float[Tensor, "*batch 8"]:
    """Negate the last coordinate: the map between E8 and its mirror image, in both directions.

    ``is_member(mirror(y))`` tells whether ``y`` is a point of the mirror image, and
    ``mirror(nearest_point(mirror(y)))`` is the nearest one.

    Raises:
        ShapeError: If the last axis does not have length 8.
        DtypeError: If ``x`` is not floating point.
    """
    _floating_blocks(x)
    return torch.cat([x[..., :-1], -x[..., -1:]], dim=-1)


def _floating_blocks(x: Tensor) -> Tensor:
    """Return ``x`` in a dtype to compute in, after checking what every function here asks of it."""
    if x.ndim == 0 or x.shape[-1] != BLOCK:
        raise ShapeError(f"lattice vectors have {BLOCK} coordinates in the last axis, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise DtypeError(f"lattice vectors are floating point, got {x.dtype}; convert them with .float()")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _nearest_in_d8(x: Float[Tensor, "*batch 8"]) -> Float[Tensor, "*batch 8"]:
    """Return the nearest integer vector with an even sum."""
    rounded = x.round()
    error = x - rounded
    # Integers past this bound are all even and cannot be moved by one; an odd sum implies a smaller one.
    movable = rounded.abs() < 2 / torch.finfo(x.dtype).eps
    worst = torch.where(movable, error.abs(), -1.0).argmax(-1, keepdim=True)
    step = torch.where(error < 0, -1.0, 1.0).to(x.dtype) * _sum_is_odd(rounded).unsqueeze(-1)
    is_worst = torch.arange(BLOCK, device=x.device) == worst
    return rounded + step * is_worst


def _squared_norm(x: Float[Tensor, "*batch 8"]) -> Float[Tensor, "*batch"]:
    """Return the squared length, summed in a fixed order: a reduction's order may depend on the batch."""
    square = x.square()
    fours = square[..., :4] + square[..., 4:]
    pairs = fours[..., :2] + fours[..., 2:]
    return pairs[..., 0] + pairs[..., 1]


def _sum_is_odd(integers: Float[Tensor, "*batch 8"]) -> Bool[Tensor, "*batch"]:
    """Tell whether each vector's sum is odd, without forming sums too large to be exact."""
    return integers.remainder(2).sum(-1).remainder(2) == 1
