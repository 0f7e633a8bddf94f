"""The laws of the 8-bit scales."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.scale import STEPS_PER_OCTAVE, decode_scales, encode_scales

HALF_STEP = 0.5 / STEPS_PER_OCTAVE  # octaves
REACH = 2 ** ((255 - 128) / STEPS_PER_OCTAVE)  # of the largest code over code 128

references = st.floats(2**-60, 2**60, width=32).map(lambda r: torch.tensor([[[r]]]))
ratios = st.floats(-7.9, 7.9)  # octaves inside the reach of the codes


def scales_of(reference: Tensor, octaves: list[float]) -> Tensor:
    return (reference.double() * 2.0 ** torch.tensor([[octaves]], dtype=torch.float64)).float()


def one_code(scale: float) -> int:
    return int(encode_scales(torch.tensor([[[scale]]]), torch.ones(1, 1, 1)))


@given(references)
def test_codes_are_kept_by_decode_and_encode(reference: Tensor) -> None:
    """encode(decode(c)) = c for every code c and any reference: idempotent."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, -1)
    assert torch.equal(encode_scales(decode_scales(codes, reference), reference), codes)


@given(references, st.lists(ratios, min_size=1, max_size=20))
def test_error_is_at_most_half_a_step(reference: Tensor, octaves: list[float]) -> None:
    """|log2(decode(encode(s)) / s)| <= 1/32 within the reach of the codes."""
    scales = scales_of(reference, octaves)
    decoded = decode_scales(encode_scales(scales, reference), reference)
    assert ((decoded.double() / scales.double()).log2().abs() <= HALF_STEP + 1e-6).all()


@given(references, st.lists(ratios, min_size=2, max_size=20))
def test_order_is_kept(reference: Tensor, octaves: list[float]) -> None:
    """s <= t implies code(s) <= code(t) and decode(s) <= decode(t)."""
    codes = encode_scales(scales_of(reference, sorted(octaves)), reference)
    assert (codes.int().diff() >= 0).all()
    assert (decode_scales(codes, reference).diff() >= 0).all()


def test_levels_by_hand() -> None:
    codes = torch.tensor([[[0, 112, 128, 144, 136]]], dtype=torch.uint8)
    expected = torch.tensor([[[0.0, 1.5, 3.0, 6.0, 3.0 * math.sqrt(2)]]])
    torch.testing.assert_close(decode_scales(codes, torch.full((1, 1, 1), 3.0)), expected, rtol=1e-6, atol=0)


def test_zero_and_the_ends_of_the_grid() -> None:
    assert one_code(0.0) == 0
    assert one_code(1.0) == 128
    assert one_code(1.01 * REACH) == one_code(1e30) == 255
    # The least positive scale is not a vector of zeros.
    assert one_code(0.5 / REACH) == one_code(1e-38) == one_code(2**-149) == 1
    ends = decode_scales(torch.tensor([[[1, 255]]], dtype=torch.uint8), torch.ones(1, 1, 1))[0, 0]
    assert ends.tolist() == pytest.approx([1 / REACH, REACH], rel=1e-6)


def test_each_head_has_its_own_reference() -> None:
    reference = torch.tensor([1.0, 8.0, 0.25]).view(1, 3, 1)
    codes = encode_scales(reference.expand(1, 3, 5), reference)
    assert (codes == 128).all()
    assert torch.equal(decode_scales(codes, reference), reference.expand(1, 3, 5))


def test_code_takes_one_byte() -> None:
    codes = encode_scales(torch.rand(2, 3, 7), torch.ones(2, 3, 1))
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, 3, 7)


@pytest.mark.parametrize("tokens", [1, 511, 513, 3000])
def test_reference_is_the_median_of_some_vectors_among_all(tokens: int) -> None:
    """With axes it is taken from at most 512, evenly spread: of vectors that grow it is the middle one's scale."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(1, 3, tokens)[:, None]
    vectors = torch.randn(1, 2, tokens, 16, generator=generator) * sizes
    transform = E8Codec(CodeLayout.flat(16, 2), transform="principal").fit(vectors)
    scales = transform.rotation.rotate(vectors).square().mean(-1).sqrt()
    assert (transform.reference[..., 0] / scales.median(-1).values - 1).abs().max() < 0.05
