"""The laws of the rotations: orthogonal, the matrix they say, one vector at a time, the same for ever."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import strategies
from nexusquant_cache.codec.hadamard import (
    apply_hadamard,
    apply_hadamard_rows,
    hadamard_factors,
    hadamard_matrix,
    hadamard_stages,
    random_signs,
)
from nexusquant_cache.codec.rotation import HadamardRotation
from nexusquant_cache.errors import ShapeError

EPS = torch.finfo(torch.float32).eps
CPU = torch.device("cpu")
NO_CONSTRUCTION = (184, 232)  # 23 * 8 and 29 * 8: no Paley matrix over a prime field divides them
DIMS = [d for d in range(8, 257, 8) if d not in NO_CONSTRUCTION]
COMMON = [32, 64, 80, 96, 128, 192, 256]  # head dimensions of models

dims = st.sampled_from(DIMS)
rotations = st.builds(HadamardRotation, st.sampled_from(COMMON), st.integers(0, 2**32))


def rounding(head_dim: int) -> float:
    """Bound the relative error of a product: one rounding per stage or term, and a few for the signs."""
    outer, order = hadamard_factors(head_dim)
    return EPS * (order.bit_length() + outer.shape[0] + 4)


def awkward(head_dim: int) -> st.SearchStrategy[Tensor]:
    """Draw vectors ``[1, 1, n, head_dim]``: Gaussian ones, one-hot ones, one by hand."""
    hand = strategies.vectors(length=head_dim).map(lambda x: x[None])
    one_hot = st.integers(0, head_dim - 1).map(lambda i: 3.0 * torch.eye(head_dim)[i : i + 1])
    return st.builds(lambda *parts: torch.cat(parts)[None, None], hand, one_hot, strategies.normal(5, head_dim))


@pytest.mark.parametrize("head_dim", DIMS)
def test_matrix_is_a_hadamard_matrix(head_dim: int) -> None:
    """Entries are +-1 and H H^T = d I, for every multiple of 8 up to 256 that has a construction."""
    matrix = hadamard_matrix(head_dim)
    assert torch.equal(matrix.abs(), torch.ones(head_dim, head_dim))
    assert torch.equal(matrix @ matrix.T, head_dim * torch.eye(head_dim))
    outer, order = hadamard_factors(head_dim)
    assert outer.shape[0] * order == head_dim


@pytest.mark.parametrize("head_dim", NO_CONSTRUCTION)
def test_orders_without_a_construction_are_refused(head_dim: int) -> None:
    with pytest.raises(ShapeError, match=f"no Hadamard matrix of order {head_dim} is known"):
        hadamard_factors(head_dim)


@pytest.mark.parametrize("head_dim", [0, -8, 4, 20])
def test_other_head_dims_are_refused(head_dim: int) -> None:
    with pytest.raises(ShapeError, match=f"positive multiple of 8, got {head_dim}"):
        hadamard_factors(head_dim)


@given(dims, st.booleans(), st.data())
def test_fast_product_is_the_matrix_product(head_dim: int, transpose: bool, data: st.DataObject) -> None:
    """Stages and terms give H x, or H^T x, in either memory order."""
    x = data.draw(awkward(head_dim))[0, 0]
    matrix = hadamard_matrix(head_dim).double()
    if transpose:
        matrix = matrix.T
    exact = x.double() @ matrix.T
    bound = rounding(head_dim) * x.double().abs().sum(-1, keepdim=True)
    assert ((apply_hadamard_rows(x, transpose=transpose) - exact).abs() <= bound).all()
    if hadamard_factors(head_dim)[0].shape[0] == 1 or transpose:
        channels = apply_hadamard(x.T.contiguous(), transpose=transpose).T
        assert ((channels - exact).abs() <= bound).all()


@given(dims, st.data())
def test_both_memory_orders_agree_bit_for_bit(head_dim: int, data: st.DataObject) -> None:
    """Row-major and channel-major do the same sums in the same order."""
    x = data.draw(awkward(head_dim))[0, 0]
    assert torch.equal(apply_hadamard(x.T.contiguous()).T, apply_hadamard_rows(x))


@given(dims, st.sampled_from([2, 4, 8]), st.data())
def test_first_stages_may_be_done_before(head_dim: int, stride: int, data: st.DataObject) -> None:
    """Doing the stages below a stride first, by a table for instance, changes no bit."""
    stride = min(stride, hadamard_factors(head_dim)[1])
    x = data.draw(awkward(head_dim))[0, 0]
    started = hadamard_stages(x, 1, stride)
    assert torch.equal(
        apply_hadamard_rows(started, first_stride=stride, transpose=True), apply_hadamard_rows(x, transpose=True)
    )


@given(dims, st.sampled_from(strategies.RAGGED_ROWS), st.data())
def test_each_vector_is_rotated_alone(head_dim: int, rows: int, data: st.DataObject) -> None:
    """A vector's result does not depend, in any bit, on the vectors beside it."""
    x = data.draw(strategies.normal(rows, head_dim))
    together = apply_hadamard_rows(x)
    channels = apply_hadamard(x.T.contiguous())
    for i in {0, rows // 2, rows - 1}:
        assert torch.equal(apply_hadamard_rows(x[i : i + 1]), together[i : i + 1])
        assert torch.equal(apply_hadamard(x[i : i + 1].T.contiguous()), channels[:, i : i + 1])


@given(dims, st.data())
def test_input_is_never_written_to(head_dim: int, data: st.DataObject) -> None:
    x = data.draw(awkward(head_dim))[0, 0].contiguous()
    before = x.clone()
    apply_hadamard_rows(x)
    apply_hadamard(x.T.contiguous())
    hadamard_stages(x, 1, 8)
    assert torch.equal(x, before)


@given(rotations, st.data())
def test_rotation_keeps_norms_and_inner_products(rotation: HadamardRotation, data: st.DataObject) -> None:
    """<R x, R y> = <x, y>, so |R x| = |x|."""
    x = data.draw(awkward(rotation.head_dim))
    y = rotation.rotate(x)
    gram = (x.double() @ x.double().mT)[0, 0]
    rotated = (y.double() @ y.double().mT)[0, 0]
    size = gram.diagonal().sqrt()
    bound = 4 * rounding(rotation.head_dim) * rotation.head_dim**0.5 * size * size[:, None]
    assert ((rotated - gram).abs() <= bound + 1e-30).all()


@given(rotations, st.data())
def test_unrotate_inverts_rotate(rotation: HadamardRotation, data: st.DataObject) -> None:
    """R^T R x = x, to rounding, in either order."""
    x = data.draw(awkward(rotation.head_dim))
    bound = 4 * rounding(rotation.head_dim) * rotation.head_dim**0.5 * x.norm(dim=-1, keepdim=True)
    assert ((rotation.unrotate(rotation.rotate(x)) - x).abs() <= bound + 1e-30).all()
    assert ((rotation.rotate(rotation.unrotate(x)) - x).abs() <= bound + 1e-30).all()


@given(rotations, st.data())
def test_rotation_is_signs_then_the_matrix(rotation: HadamardRotation, data: st.DataObject) -> None:
    """R x = H (signs * x) / sqrt(d)."""
    x = data.draw(awkward(rotation.head_dim))
    d = rotation.head_dim
    signs = random_signs(d, rotation.seed, CPU).double()
    exact = (x.double() * signs) @ hadamard_matrix(d).double().T / d**0.5
    assert ((rotation.rotate(x) - exact).abs() <= rounding(d) * x.double().norm(dim=-1, keepdim=True)).all()


@given(rotations, st.data())
def test_axes_and_adjoint_are_the_rotation(rotation: HadamardRotation, data: st.DataObject) -> None:
    """What is decoded is the sum of the axes, each times its channel; the adjoint is the product with each axis."""
    x = data.draw(awkward(rotation.head_dim))
    axes, step = rotation.axes(CPU)
    matrix = axes[0, 0].double() * step.double()[:, None]
    bound = 4 * rounding(rotation.head_dim) * x.double().norm(dim=-1, keepdim=True) + 1e-30
    assert axes.dtype == torch.int8
    assert ((rotation.unrotate(x) - x.double() @ matrix).abs() <= bound).all()
    assert ((rotation.adjoint(x) - x.double() @ matrix.T).abs() <= bound).all()


@given(rotations, st.data())
def test_rotation_spreads_a_single_channel(rotation: HadamardRotation, data: st.DataObject) -> None:
    """An outlier channel becomes |x| / sqrt(d) in every channel."""
    d = rotation.head_dim
    channel = data.draw(st.integers(0, d - 1))
    x = torch.zeros(1, 1, 1, d)
    x[..., channel] = 100.0
    torch.testing.assert_close(rotation.rotate(x).abs(), torch.full_like(x, 100 / d**0.5))


@pytest.mark.parametrize("head_dim", COMMON)
def test_unrotate_continues_after_the_first_stages(head_dim: int) -> None:
    rotation = HadamardRotation(head_dim, seed=3)
    y = torch.randn(2, 3, 5, head_dim)
    stride = min(8, rotation.first_stride)
    started = hadamard_stages(y, 1, stride)
    assert torch.equal(rotation.unrotate(started, stride), rotation.unrotate(y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rotated_in_float32(dtype: torch.dtype) -> None:
    rotation = HadamardRotation(64)
    x = torch.randn(1, 2, 3, 64).to(dtype)
    y = rotation.rotate(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, rotation.rotate(x.float()))


def test_signs_are_the_bits_of_splitmix64() -> None:
    """The published first outputs for seed 0, lowest bit first; a set bit is a minus."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [1.0 - 2.0 * (output >> bit & 1) for output in outputs for bit in range(64)]
    assert random_signs(192, 0, CPU).tolist() == expected
    assert random_signs(80, 0, CPU).tolist() == expected[:80]


def test_signs_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_signs(128, 7, CPU).clone()
    random_signs.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(random_signs(128, 7, CPU), first)
    assert not torch.equal(random_signs(128, 8, CPU), first)
    assert torch.equal(random_signs(64, 7, CPU), first[:64])
