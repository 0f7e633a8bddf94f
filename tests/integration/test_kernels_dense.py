"""Kernels decode what the torch codec decodes, in the interpreter of triton."""

import os
from dataclasses import replace

import pytest
import torch
from integration.packed import codec_of, packed_side, phase_of

pytest.importorskip("triton", reason="triton is for Linux")

from nexusquant_cache.codec.operands import PackedOperand
from nexusquant_cache.codec.triton import kernels_decode as kernel
from nexusquant_cache.errors import ShapeError, UnsupportedError

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter of triton must be chosen before torch is imported",
)
# float32 with float16 axes in two parts; else the rounding of the axes and of the result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 6e-3}


def assert_alike(side, dtype=torch.float32, phase=None, out=None, **options):
    """Compare with the codec; what lies around the result must stay as it is."""
    expected = side.decoded
    if phase is not None:
        expected = phase.rotary.rotate(expected, phase.positions)
        options |= {"rope": phase.rope, "places": phase.places}
    out = torch.full(expected.shape, torch.nan, dtype=dtype) if out is None else out
    kernel.decode(side.operand, out, **options)
    assert (out.double() - expected).abs().max() <= TOLERANCE[out.dtype] * expected.abs().max()


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "bits", "transform"),
    [(64, 2.625, "principal"), (128, 1.75, "principal"), (80, 2.25, "hadamard"), (96, 1.0, "principal")],
)
def test_vectors_of_the_torch_codec(head_dim, bits, transform, dtype):
    assert_alike(packed_side(codec_of(head_dim, bits, transform), 1, 2, 70), dtype)


@interpreted
@pytest.mark.parametrize("tokens", [1, 7, 63, 65, 200])
def test_any_number_of_tokens(tokens):
    assert_alike(packed_side(codec_of(64, 1.75, center=False), 2, 1, tokens))


@interpreted
def test_wide_heads():
    assert_alike(packed_side(codec_of(256, 2.0), 1, 1, 20))


@interpreted
@pytest.mark.parametrize("start", [None, 0, 300])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "interleaved"), [(64, 64, False), (128, 128, True), (80, 32, False), (80, 20, True)]
)
def test_with_phase(head_dim, rotary_dim, interleaved, start):
    phase = phase_of((1, 2, 67), rotary_dim, interleaved=interleaved, start=start)
    assert_alike(packed_side(codec_of(head_dim, 2.25), 1, 2, 67), phase=phase)


@interpreted
def test_into_a_part_of_a_tensor_of_any_strides():
    side = packed_side(codec_of(64, 2.0), 2, 2, 30)
    room = torch.full((2, 50, 2, 64), torch.nan, dtype=torch.float16)
    assert_alike(side, out=room.transpose(1, 2)[:, :, 10:40])
    assert room[:, :10].isnan().all()
    assert room[:, 40:].isnan().all()
    apart = torch.full((2, 2, 64, 30), torch.nan)
    assert_alike(side, out=apart.mT)


@interpreted
def test_nothing_to_decode():
    side = packed_side(codec_of(64, 2.0), 1, 1, 3)
    words, scales = side.operand.words[:, :, :0], side.operand.scales[:, :, :0]
    kernel.decode(PackedOperand(side.operand.plan, words, scales), torch.empty(1, 1, 0, 64))


def test_what_does_not_fit_is_refused():
    side, phase = packed_side(codec_of(64, 2.0), 1, 1, 3), phase_of((1, 1, 3), 64, start=0)
    with pytest.raises(ShapeError, match="room"):
        kernel.decode(side.operand, torch.empty(1, 1, 3, 32))
    with pytest.raises(UnsupportedError, match="places"):
        kernel.decode(side.operand, torch.empty(1, 1, 3, 64), rope=phase.rope)


def test_cases_to_compile_name_every_parameter():
    for case in kernel.compile_cases():
        assert list(case.signature) == kernel.decode_kernel.arg_names
        assert {name for name, kind in case.signature.items() if kind == "constexpr"} == set(case.constexprs)
        assert replace(case, name="other").name == "other"
