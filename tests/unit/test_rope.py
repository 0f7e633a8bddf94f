"""`nexusquant_cache.codec.rope`: the laws of the rotation, its tables, and what it refuses."""

import copy
import pickle
from collections.abc import Iterator
from functools import partialmethod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.errors import DtypeError, ShapeError

EPS = torch.finfo(torch.float32).eps
# A phase is the product of two rounded rows (3 roundings of cos and sin), then two products and a sum.
ROUNDING = 8 * EPS


@pytest.fixture(scope="module", autouse=True, params=[False, True], ids=["sines", "tables"])
def _both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take phases from sines of their own, and from tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RotaryPhase, "rotate", partialmethod(RotaryPhase.rotate, by_tables=request.param))
        yield


def frequencies(pairs: int = 16, theta: float = 10000.0) -> Tensor:
    return 1.0 / theta ** (torch.arange(pairs, dtype=torch.float32) / pairs)


def exact_rotation(x: Tensor, positions: Tensor, phase: RotaryPhase) -> Tensor:
    """Rotate by the definition: float64 angles, one cosine and sine per pair, no tables."""
    pairs = phase.inv_freq.shape[0]
    angle = positions.double()[..., None] * phase.inv_freq.double()
    out = x.double().clone()
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if phase.interleaved else (i, i + pairs)
        cos, sin = angle[..., i].cos(), angle[..., i].sin()
        out[..., a] = x[..., a].double() * cos - x[..., b].double() * sin
        out[..., b] = x[..., b].double() * cos + x[..., a].double() * sin
    return out


phases = st.builds(
    lambda pairs, theta, interleaved: RotaryPhase(frequencies(pairs, theta), interleaved),
    st.sampled_from([1, 4, 8, 12, 16]),
    st.sampled_from([100.0, 10000.0, 5e5]),
    st.booleans(),
)


@st.composite
def keys_and_positions(draw: st.DrawFn, shared: bool | None = None) -> tuple[Tensor, Tensor]:
    """Draw keys ``[b, h, n, 40]`` and positions, shared or per head, near each other or far apart."""
    batch, heads, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    last = draw(st.sampled_from([1, 300, 5000, 200_000]))
    shape = (tokens,) if (draw(st.booleans()) if shared is None else shared) else (batch, heads, tokens)
    positions = torch.randint(0, last, shape, generator=generator)
    return torch.randn(batch, heads, tokens, 40, generator=generator), positions


@given(phases, keys_and_positions())
def test_agrees_with_the_definition(phase: RotaryPhase, keys: tuple[Tensor, Tensor]) -> None:
    """Channels turn by position x frequency, to the rounding of float32."""
    x, positions = keys
    error = (phase.rotate(x, positions).double() - exact_rotation(x, positions, phase)).abs()
    assert error.max() <= ROUNDING * x.abs().max()


@given(phases, keys_and_positions())
def test_inverse_restores(phase: RotaryPhase, keys: tuple[Tensor, Tensor]) -> None:
    """Turning back after turning is the identity to rounding, in either order."""
    x, positions = keys
    for first in (False, True):
        back = phase.rotate(phase.rotate(x, positions, inverse=first), positions, inverse=not first)
        assert (back - x).abs().max() <= 2 * ROUNDING * x.abs().max()


@given(phases, keys_and_positions())
def test_norm_is_preserved_and_the_rest_passes_through(phase: RotaryPhase, keys: tuple[Tensor, Tensor]) -> None:
    """|R x| = |x|, and channels from `rotary_dim` on are copied bit by bit."""
    x, positions = keys
    turned = phase.rotate(x, positions)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=ROUNDING, atol=0)
    assert torch.equal(turned[..., phase.rotary_dim :], x[..., phase.rotary_dim :])


@given(phases, keys_and_positions(shared=True))
def test_logits_depend_on_relative_positions(phase: RotaryPhase, keys: tuple[Tensor, Tensor]) -> None:
    """<R_m q, R_n k> = <R_{m+s} q, R_{n+s} k>: what rotary embeddings are for."""
    x, positions = (part.double() if part.is_floating_point() else part for part in keys)
    here = phase.rotate(x, positions) @ phase.rotate(x, positions.flip(0)).mT
    there = phase.rotate(x, positions + 1000) @ phase.rotate(x, positions.flip(0) + 1000).mT
    torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-9)


@given(phases, keys_and_positions())
def test_each_token_is_rotated_alone(phase: RotaryPhase, keys: tuple[Tensor, Tensor]) -> None:
    """Rotating a concatenation is the concatenation of rotations, bit by bit."""
    x, positions = keys
    alone = [phase.rotate(x[:, :, i : i + 1], positions[..., i : i + 1]) for i in range(x.shape[2])]
    assert torch.equal(phase.rotate(x, positions), torch.cat(alone, dim=2))


@pytest.mark.parametrize("pairs", [3, 16, 32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_token_gets_the_same_bits_from_both_kinds_of_gathering(pairs: int, interleaved: bool) -> None:
    """Many tokens multiply the tables out, few gather twice, thousands gather in chunks."""
    phase = RotaryPhase(frequencies(pairs), interleaved)
    x = torch.randn(1, 3, 5000, 64)
    near, far = torch.randint(0, 4096, (1, 3, 5000)), torch.randint(0, 100_000, (1, 3, 5000))
    for positions in (near, far):
        few = [0, 1, 777, 4096, 4999]
        together = phase.rotate(x, positions)[:, :, few]
        assert torch.equal(phase.rotate(x[:, :, few], positions[:, :, few]), together)


@given(phases, keys_and_positions(shared=True))
def test_shared_and_per_head_positions_agree(phase: RotaryPhase, keys: tuple[Tensor, Tensor]) -> None:
    """Positions ``[n]`` mean the same as ``[b, h, n]`` with equal rows."""
    x, positions = keys
    assert torch.equal(phase.rotate(x, positions), phase.rotate(x, positions.expand(x.shape[:3])))


@given(phases, keys_and_positions(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_computed_in_float32(
    phase: RotaryPhase, keys: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    """A half-precision result is the float32 result rounded once, whatever the dtype of ``x`` and ``out``."""
    x, positions = keys[0].to(dtype), keys[1]
    expected = phase.rotate(x.float(), positions)
    assert torch.equal(phase.rotate(x, positions), expected.to(dtype))
    assert torch.equal(phase.rotate(x, positions, out=torch.empty_like(expected)), expected)


@given(phases, keys_and_positions())
def test_float64_stays_float64(phase: RotaryPhase, keys: tuple[Tensor, Tensor]) -> None:
    """With float64 input nothing is rounded to float32."""
    x, positions = keys[0].double(), keys[1]
    error = (phase.rotate(x, positions) - exact_rotation(x, positions, phase)).abs().max()
    assert error <= 1e-13 * x.abs().max() + 1e-15 * float(positions.max())


@given(phases, keys_and_positions(), st.sampled_from([torch.float32, torch.float16, torch.float64]))
def test_out_may_be_a_strided_part_of_a_buffer(
    phase: RotaryPhase, keys: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    """``out`` receives the result and its neighbours keep theirs."""
    x, positions = keys
    batch, heads, tokens, channels = x.shape
    buffer = torch.full((batch, heads, tokens + 5, channels + 8), 7.0, dtype=dtype)
    out = buffer[:, :, 2 : tokens + 2, 4 : channels + 4]
    assert phase.rotate(x, positions, out=out) is out
    assert torch.equal(out, phase.rotate(x, positions).to(dtype))
    out.fill_(7.0)
    assert (buffer == 7.0).all()


@given(phases, keys_and_positions())
def test_strides_of_the_input_do_not_matter(phase: RotaryPhase, keys: tuple[Tensor, Tensor]) -> None:
    """Keys arrive as a transposed view of ``[b, n, h, d]``."""
    x, positions = keys
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(phase.rotate(transposed, positions), phase.rotate(x, positions))


def test_hand_computed_quarter_turns() -> None:
    quarter = torch.tensor([torch.pi / 2])
    x = torch.tensor([1.0, 2.0, 3.0]).expand(1, 1, 4, 3)
    turned = RotaryPhase(quarter).rotate(x, torch.arange(4))
    expected = torch.tensor([[1.0, 2, 3], [-2, 1, 3], [-1, -2, 3], [2, -1, 3]])
    torch.testing.assert_close(turned[0, 0], expected, atol=1e-6, rtol=0)


def test_negative_frequencies_turn_backwards() -> None:
    x, positions = torch.randn(1, 2, 5, 32), torch.arange(5)
    forwards, backwards = RotaryPhase(frequencies()), RotaryPhase(-frequencies())
    assert torch.equal(backwards.rotate(x, positions), forwards.rotate(x, positions, inverse=True))


def test_no_tokens() -> None:
    assert RotaryPhase(frequencies()).rotate(torch.zeros(1, 2, 0, 32), torch.arange(0)).shape == (1, 2, 0, 32)


def test_tables_grow_on_demand_and_stay_small() -> None:
    phase = RotaryPhase(frequencies(32))
    assert phase.nbytes == 32 * 4
    sizes = []
    for last in (10, 4000, 131_071, 10):
        phase.rotate(torch.zeros(1, 1, 1, 64), torch.tensor([last]))
        sizes.append(phase.nbytes)
    assert sizes == sorted(sizes)
    assert sizes[1] < 2**17
    assert sizes[-1] < 2**18


def test_growing_changes_no_result() -> None:
    phase, x, positions = RotaryPhase(frequencies()), torch.randn(1, 2, 8, 32), torch.arange(8)
    before = phase.rotate(x, positions)
    phase.rotate(x, positions + 50_000)
    assert torch.equal(phase.rotate(x, positions), before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda phase: pickle.loads(pickle.dumps(phase))])  # noqa: S301
def test_copies_work_on_their_own(clone) -> None:
    phase, x, positions = RotaryPhase(frequencies(), interleaved=True), torch.randn(1, 2, 8, 32), torch.arange(8)
    before = phase.rotate(x, positions)
    twin = clone(phase)
    assert twin.matches(phase)
    assert twin.inv_freq.data_ptr() != phase.inv_freq.data_ptr()
    assert torch.equal(twin.rotate(x, positions), before)


def test_matching() -> None:
    phase = RotaryPhase(frequencies())
    assert phase.matches(RotaryPhase(frequencies()))
    assert not phase.matches(RotaryPhase(frequencies(), interleaved=True))
    assert not phase.matches(RotaryPhase(frequencies(8)))
    assert not phase.matches(None)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("channels", "positions", "error", "message"),
    [
        (30, torch.arange(5), ShapeError, "30 channels cannot hold 32"),
        (32, torch.arange(4), ShapeError, r"got \(4,\) for \(1, 2, 5, 32\)"),
        (32, torch.zeros(2, 5, dtype=torch.int64), ShapeError, r"got \(2, 5\)"),
        (32, torch.zeros(5), DtypeError, r"torch\.float32"),
        (32, torch.arange(5) - 1, ValueError, "start at 0, got -1"),
    ],
)
def test_refusals(channels: int, positions: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RotaryPhase(frequencies()).rotate(torch.zeros(1, 2, 5, channels), positions)
