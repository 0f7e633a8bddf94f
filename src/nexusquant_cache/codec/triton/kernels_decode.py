"""Packed tokens decoded into a tensor: for attention that needs all keys and values as such.

A program decodes a tile of rows of one head into planes (`kernels_codes`), multiplies them with a part of the axes at a
time, and turns the result by the phases of its tokens if that was asked for.
"""

from collections.abc import Iterator
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec.operands import NUMBERS, PackedOperand, Places, RopeOperand
from nexusquant_cache.codec.triton.compile_case import CompileCase, compile_case
from nexusquant_cache.codec.triton.kernels_attend import shared_strides, side_shape, token_phase, use_asm
from nexusquant_cache.codec.triton.kernels_codes import key_planes, relative_scale
from nexusquant_cache.errors import ShapeError, UnsupportedError

_NUMBERS: tl.constexpr = tl.constexpr(len(NUMBERS))
_AXES_UNIT: tl.constexpr = tl.constexpr(8.0)  # times 127: the largest number of an axis as float16
_FINE: tl.constexpr = tl.constexpr(2.0**11)  # what float16 leaves of a number, enlarged to be one itself
_ROWS = 64
_CHANNELS = 32  # that a program writes at once


@triton.jit
@no_type_check
def _axes_part(axes, step, plane: tl.constexpr, channel, used, COLUMNS: tl.constexpr, D: tl.constexpr):
    """Return the given channels of a plane's axes in float32."""
    coded = 4 * tl.arange(0, COLUMNS) + plane
    inside = (coded < D)[:, None] & used[None, :]
    part = tl.load(axes + coded[:, None] * D + channel[None, :], mask=inside, other=0).to(tl.float32)
    return part * (tl.load(step + coded, mask=coded < D, other=0.0) * _AXES_UNIT)[:, None]


@triton.jit
@no_type_check
def _add_plane(total, rest, plane_values, part, FINE: tl.constexpr):
    coarse = part.to(tl.float16)
    total = tl.dot(plane_values, coarse, total)
    if FINE:
        rest = tl.dot(plane_values, ((part - coarse.to(tl.float32)) * _FINE).to(tl.float16), rest)
    return total, rest


@triton.jit
@no_type_check
def _channels(k0, k1, k2, k3, axes, step, channel, used, COLUMNS: tl.constexpr, D: tl.constexpr, FINE: tl.constexpr):
    """Return some channels of the decoded rows, without scale and mean, ``[rows, channels]``."""
    total = tl.zeros([k0.shape[0], channel.shape[0]], tl.float32)
    rest = total
    total, rest = _add_plane(total, rest, k0, _axes_part(axes, step, 0, channel, used, COLUMNS, D), FINE)
    total, rest = _add_plane(total, rest, k1, _axes_part(axes, step, 1, channel, used, COLUMNS, D), FINE)
    total, rest = _add_plane(total, rest, k2, _axes_part(axes, step, 2, channel, used, COLUMNS, D), FINE)
    total, rest = _add_plane(total, rest, k3, _axes_part(axes, step, 3, channel, used, COLUMNS, D), FINE)
    if FINE:
        total += rest * (1.0 / _FINE)
    return total


@triton.jit(
    do_not_specialize=[
        *("start", "tokens", "words_b", "words_h", "scales_b", "scales_h"),
        *("out_b", "out_h", "positions_b", "positions_h"),
    ]
)
@no_type_check
def decode_kernel(
    words, scales, numbers, plans, axes, step, factor, mean, out, positions, low, high,
    start, tokens,
    words_b, words_h, scales_b, scales_h, axes_b, axes_h, out_b, out_h, out_n, out_d, positions_b, positions_h, heads,
    D: tl.constexpr, SHAPE: tl.constexpr, BN: tl.constexpr, CHANNELS: tl.constexpr,
    PHASE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, FINE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Decode a tile of rows of one head: grid (tiles, b * h)."""
    COLUMNS: tl.constexpr = 2 * SHAPE[0]
    place = tl.program_id(1).to(tl.int64)
    b, h = place // heads, place % heads
    first = tl.program_id(0).to(tl.int64) * BN
    last = (tokens - 1 - first).to(tl.int32)
    n = tl.arange(0, BN)
    token = first + tl.minimum(n, last)
    stored = (n <= last)[:, None]
    words += b * words_b + h * words_h + first * SHAPE[1]
    numbers += tl.load(plans + place) * (_NUMBERS * SHAPE[0])
    axes += b * axes_b + h * axes_h
    step += place * D
    k0, k1, k2, k3 = key_planes(words, last, numbers, BN, SHAPE, ASM)
    scale = relative_scale(tl.load(scales + b * scales_b + h * scales_h + token))
    scale = (scale * (tl.load(factor + place) / _AXES_UNIT))[:, None]
    out += b * out_b + h * out_h + token[:, None] * out_n

    TURNING: tl.constexpr = 2 * PAIRS if PHASE > 0 else 0
    if PHASE > 0:
        if PHASE == 1:
            position = (start + token).to(tl.int32)
        else:
            position = tl.load(positions + b * positions_b + h * positions_h + token)
        for pair_start in tl.static_range(0, PAIRS, CHANNELS):
            pair = pair_start + tl.arange(0, CHANNELS)
            used = pair < PAIRS
            even_channel = 2 * pair if INTERLEAVED else pair
            odd_channel = 2 * pair + 1 if INTERLEAVED else pair + PAIRS
            even = _channels(k0, k1, k2, k3, axes, step, even_channel, used, COLUMNS, D, FINE) * scale
            odd = _channels(k0, k1, k2, k3, axes, step, odd_channel, used, COLUMNS, D, FINE) * scale
            if mean is not None:
                even += tl.load(mean + place * D + even_channel, mask=used, other=0.0).to(tl.float32)[None, :]
                odd += tl.load(mean + place * D + odd_channel, mask=used, other=0.0).to(tl.float32)[None, :]
            cos, sin = token_phase(low, high, position, pair, used, PAIRS)
            inside = stored & used[None, :]
            tl.store(
                out + even_channel[None, :] * out_d, (even * cos - odd * sin).to(out.dtype.element_ty), mask=inside
            )
            tl.store(out + odd_channel[None, :] * out_d, (odd * cos + even * sin).to(out.dtype.element_ty), mask=inside)
    for channel_start in tl.static_range(TURNING, D, CHANNELS):
        channel = channel_start + tl.arange(0, CHANNELS)
        used = channel < D
        part = _channels(k0, k1, k2, k3, axes, step, channel, used, COLUMNS, D, FINE) * scale
        if mean is not None:
            part += tl.load(mean + place * D + channel, mask=used, other=0.0).to(tl.float32)[None, :]
        tl.store(out + channel[None, :] * out_d, part.to(out.dtype.element_ty), mask=stored & used[None, :])


def decode(
    packed: PackedOperand,
    out: Float[Tensor, "b h n d"],
    *,
    rope: RopeOperand | None = None,
    places: Places | None = None,
    asm: bool | None = None,
) -> None:
    """Write decoded vectors.

    Args:
        packed: What to decode.
        out: Where to write, in any floating dtype and with any strides.  Numbers of 16 bits are computed with float16
            axes, others to the precision of float32.
        rope: The phase that the vectors were coded without, to be put back; None to leave them.
        places: Where the tokens stand; needed with ``rope``.
        asm: Whether to use instructions of NVIDIA's GPUs; by default if the device has them.

    Raises:
        ShapeError: If ``out`` has another shape than the vectors.
        UnsupportedError: If there is a phase but no places.
    """
    plan = packed.plan
    batch, heads, tokens = packed.scales.shape
    if out.shape != (batch, heads, tokens, plan.head_dim):
        msg = f"expected room for vectors {(batch, heads, tokens, plan.head_dim)}, got shape {tuple(out.shape)}"
        raise ShapeError(msg)
    if rope is not None and places is None:
        msg = "keys coded without their phase need the places of their tokens"
        raise UnsupportedError(msg)
    if out.numel() == 0:
        return
    positions = places.positions if places is not None and rope is not None else None
    phase = 0 if rope is None else 1 if positions is None else 2
    decode_kernel[(triton.cdiv(tokens, _ROWS), batch * heads)](
        *(packed.words, packed.scales, plan.numbers, plan.plans, plan.axes, plan.step, plan.factor, plan.mean),
        *(out, positions, None if rope is None else rope.low, None if rope is None else rope.high),
        *(0 if places is None else places.start, tokens),
        *(*packed.words.stride()[:2], *packed.scales.stride()[:2], *shared_strides(plan.axes), *out.stride()),
        *((0, 0) if positions is None else shared_strides(positions)),
        heads,
        D=plan.head_dim,
        SHAPE=side_shape(plan, even=packed.even),
        **_constexprs(rope, fine=out.dtype not in (torch.float16, torch.bfloat16), phase=phase),
        ASM=use_asm(out.device) if asm is None else asm,
        **_OPTIONS,
    )


_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def _constexprs(rope: RopeOperand | None, *, fine: bool, phase: int) -> dict[str, Any]:
    return {
        "BN": _ROWS,
        "CHANNELS": _CHANNELS,
        "PHASE": phase,
        "PAIRS": rope.pairs if rope is not None else 0,
        "INTERLEAVED": rope is not None and rope.interleaved,
        "FINE": fine,
    }


def compile_cases() -> Iterator[CompileCase]:
    """Yield what a model with heads of 128 channels and the default bits would launch."""
    types = {
        "words": "*u8",
        "scales": "*u8",
        "numbers": "*i32",
        "plans": "*i32",
        "positions": "*i32",
        "axes": "*i8",
        "step": "*fp32",
        "factor": "*fp32",
        "mean": "*fp16",
        "low": "*fp32",
        "high": "*fp32",
        "out": "*bf16",
    }
    for name, phase in (("decode d=128", 0), ("decode d=128, with phase", 2)):
        constexprs: dict[str, Any] = {
            "D": 128,
            "SHAPE": (16, 36, 0b11110, True),
            "ASM": True,
            "BN": _ROWS,
            "CHANNELS": _CHANNELS,
            "PHASE": phase,
            "PAIRS": 64 if phase else 0,
            "INTERLEAVED": False,
            "FINE": False,
        }
        constexprs |= {} if phase else dict.fromkeys(("positions", "low", "high"))
        yield compile_case(name, decode_kernel, types, constexprs, _OPTIONS, _ROWS)
