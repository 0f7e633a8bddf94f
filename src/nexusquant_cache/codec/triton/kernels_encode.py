"""Encode vectors in one kernel: centre, rotate, search the scale, find the nearest codewords, pack.

A program encodes a tile of vectors of one head.  Channel ``i`` of all blocks is *plane* ``i``, a tensor
``[rows, blocks]`` with a matrix product of its own, so that everything after it is elementwise: the eight channels of a
block are the same element of eight tensors.

The levels of the block code are evenly spaced in float16 patterns (`layout`), so the two levels around a channel follow
from one rounding down, without a table.  Blocks of all rates run through the same instructions with their own numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from nexusquant_cache.codec.layout import BLOCK, COMPANDER, MAX_BITS
from nexusquant_cache.codec.operands import NUMBERS, PackedOperand, SidePlan
from nexusquant_cache.codec.scale import CANDIDATES
from nexusquant_cache.codec.triton.compile_case import CompileCase
from nexusquant_cache.errors import ShapeError

_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
_CODES = [(0, 0, 0.0), *(COMPANDER[bits] for bits in range(1, MAX_BITS + 1))]  # blocks without bits read the first
# By rate: integers for float16 patterns, floats for their search, where level k of coset 0 is at k * spacing + offset.
_STEP: tl.constexpr = tl.constexpr(tuple(step for step, _, _ in _CODES))
_FIRST: tl.constexpr = tl.constexpr(tuple(offset for _, offset, _ in _CODES))
_OFFSET: tl.constexpr = tl.constexpr(tuple(float(offset) for _, offset, _ in _CODES))
_SPACING: tl.constexpr = tl.constexpr(tuple(float(step + 2 * offset) for step, offset, _ in _CODES))
_PER_SPACING: tl.constexpr = tl.constexpr(tuple(1 / max(step + 2 * offset, 1) for step, offset, _ in _CODES))
_HALF: tl.constexpr = tl.constexpr((0.0, 1.0, 2.0, 4.0, 8.0))
_PER_UNIT: tl.constexpr = tl.constexpr(tuple(1 / unit if unit else 0.0 for _, _, unit in _CODES))
_UNIT: tl.constexpr = tl.constexpr(tuple(unit * 2.0**24 for _, _, unit in _CODES))
_WHOLE: tl.constexpr = tl.constexpr(-0x2000)  # the bits of a float32 number that a product in tf32 takes
_STEPS_PER_OCTAVE = 16  # of scale bytes

_ROWS = 16  # vectors of a program: the least that a tensor core multiplies
_CHUNK = 32  # channels per step of the rotation
_OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


def _cuts() -> tuple[int, ...]:
    """Return where within an octave the scale byte rises, as mantissas of float32."""
    exponents = (torch.arange(_STEPS_PER_OCTAVE, dtype=torch.float64, device="cpu") + 0.5) / _STEPS_PER_OCTAVE
    return tuple((exponents.exp2().float().view(torch.int32) & 0x7FFFFF).tolist())


_CUTS: tl.constexpr = tl.constexpr(_cuts())


@triton.jit
@no_type_check
def _by_rate(bits, numbers: tl.constexpr, rates: tl.constexpr):
    """Return the number of each block's rate: a constant in launches of one rate."""
    lowest: tl.constexpr = 1 if rates & 2 else 2 if rates & 4 else 3 if rates & 8 else 4
    chosen = numbers[lowest]
    for rate in tl.static_range(lowest + 1, 5):
        if rates & (1 << rate):
            chosen = tl.where(bits == rate, numbers[rate], chosen)
    return chosen


@triton.jit
@no_type_check
def _level(pattern, third: tl.constexpr):
    """Return what a float16 pattern stands for, in units of 2 ** -24; small patterns may be negative."""
    level = tl.maximum(pattern, 2 * pattern - 2048)
    if third:
        level = tl.maximum(level, 4 * pattern - 8192)
    return level


@triton.jit
@no_type_check
def _pattern(size, third: tl.constexpr):
    """Invert `_level` for sizes from 0."""
    pattern = tl.minimum(size, 0.5 * size + 1024)
    if third:
        pattern = tl.minimum(pattern, 0.25 * size + 2048)
    return pattern


@triton.jit
@no_type_check
def _choices(size, pattern, offset, spacing, per_spacing, half, third: tl.constexpr):
    """Return the nearest level (k + 1/2), its distance, that of the second nearest, and whether that is further out.

    The ladder has level 0 or -1 nearest to 0.  Levels get wider outwards: the second nearest is the other end of the
    bracket around ``size``, or the level below the bracket.
    """
    k = tl.minimum(tl.floor((pattern - offset) * per_spacing), half - 2)
    lower = k * spacing + offset
    below = size - _level(lower, third)
    above = _level(lower + spacing, third) - size
    up = above < below
    first, other = tl.minimum(above, below), tl.maximum(above, below)
    inner = size - _level(lower - spacing, third)
    second = tl.minimum(inner, other)
    return tl.where(up, k + 1.5, k + 0.5), first, second, up == (inner < other)


@triton.jit
@no_type_check
def _nearest(planes, scale, spacing, per_spacing, offset, half, third: tl.constexpr):
    """Return the fields of the nearest codewords as nibbles of an integer, and their cosets.

    As in `codec.blocks`: in either coset every channel takes its nearest level and, if the parity is wrong, the
    channel where it costs least takes its second nearest.  A channel below 0 is reflected, which exchanges the cosets'
    ladders.
    """
    mirrored_offset = spacing - offset
    for i in tl.static_range(8):
        x = planes[i] * scale
        size = tl.abs(x)
        pattern = _pattern(size, third)
        negative = x < 0
        place = tl.where(negative, -(16.0 ** (i % 4)), 16.0 ** (i % 4))
        offset0 = tl.where(negative, mirrored_offset, offset)
        level0, first0, second0, out0 = _choices(size, pattern, offset0, spacing, per_spacing, half, third)
        level1, first1, second1, out1 = _choices(size, pattern, spacing - offset0, spacing, per_spacing, half, third)
        square0, square1 = first0 * first0, first1 * first1
        cost0, cost1 = second0 * second0 - square0, second1 * second1 - square1
        move = tl.where(negative, -(16.0**i), 16.0**i)
        move0, move1 = tl.where(out0, move, -move), tl.where(out1, -move, move)
        if i == 0:
            error0, least0, moved0, sum0 = square0, cost0, move0, level0 * place
            error1, least1, moved1, sum1 = square1, cost1, move1, level1 * -place
        else:
            error0, error1 = error0 + square0, error1 + square1
            moved0, moved1 = tl.where(cost0 < least0, move0, moved0), tl.where(cost1 < least1, move1, moved1)
            least0, least1 = tl.minimum(cost0, least0), tl.minimum(cost1, least1)
            if i == 4:
                low0, low1, sum0, sum1 = sum0, sum1, level0 * place, level1 * -place
            else:
                sum0, sum1 = sum0 + level0 * place, sum1 - level1 * place
    levels0, wrong0 = _repaired(low0, sum0, moved0, 0)
    levels1, wrong1 = _repaired(low1, sum1, moved1, 1)
    coset1 = tl.where(wrong1, error1 + least1, error1) < tl.where(wrong0, error0 + least0, error0)
    return _fields(tl.where(coset1, levels1, levels0)), coset1.to(tl.int32)


@triton.jit
@no_type_check
def _repaired(low, high, move, coset: tl.constexpr):
    """Return nibbles k + 8 of the level indices, the parity of their sum repaired, and whether it was wrong."""
    # The sums hold k + 1/2 for every channel.
    levels = (low + 7.5 * 0x1111).to(tl.int32) | ((high + 7.5 * 0x1111).to(tl.int32) << 16)
    parity = levels & 0x11111111
    parity ^= parity >> 16
    parity ^= parity >> 8
    parity ^= parity >> 4
    wrong = (parity & 1) != coset
    return tl.where(wrong, levels + move.to(tl.int32), levels), wrong


@triton.jit
@no_type_check
def _fields(levels):
    """Return the fields of nibbles k + 8: 2 k from 0, -2 k - 1 below."""
    negative = ((levels >> 3) & 0x11111111) ^ 0x11111111
    return (((levels ^ (7 * negative)) & 0x77777777) << 1) | negative


@triton.jit
@no_type_check
def _products(planes, fields, coset, step, first):
    """Return by block the inner product with the codeword and its squared norm; codewords as float16 numbers."""
    for i in tl.static_range(8):
        field = (fields >> (4 * i)) & 15
        pattern = (field * step + first) | (((field ^ coset) & 1) << 15)
        value = pattern.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        if i == 0:
            inner, norm = planes[i] * value, value * value
        else:
            inner += planes[i] * value
            norm += value * value
    return inner, norm


@triton.jit
@no_type_check
def _scale_byte(relative, cuts: tl.constexpr):
    """Return the byte of a scale relative to the reference: 128 at 1, 16 per octave, from exact thresholds."""
    bits = relative.to(tl.int32, bitcast=True)
    mantissa = bits & 0x7FFFFF
    stored = 128 + 16 * ((bits >> 23) - 127)
    for i in tl.static_range(16):
        stored += (mantissa > cuts[i]).to(tl.int32)
    stored = tl.minimum(tl.maximum(stored, 1), 255)
    return tl.where(relative > 0, stored, 0).to(tl.uint8)


@triton.jit
@no_type_check
def _store_word(place, word, mask, even: tl.constexpr):
    if even:
        tl.store(place.to(tl.pointer_type(tl.int16)), word.to(tl.int16), mask)
    else:
        tl.store(place, word.to(tl.uint8), mask)
        tl.store(place + 1, (word >> 8).to(tl.uint8), mask)


@triton.jit
@no_type_check
def _closed(nibbles, width: tl.constexpr):
    """Close the gaps between four fields of ``width`` bits."""
    field: tl.constexpr = (1 << width) - 1
    x = (nibbles & (field * 0x0101)) | ((nibbles & (field * 0x1010)) >> (4 - width))
    return (x & 0xFF) | ((x >> 8) << (2 * width))


@triton.jit
@no_type_check
def _store_codes(row, fields, places, bits, kept, padded_blocks: tl.constexpr, rates: tl.constexpr, even: tl.constexpr):
    """Write the codes of nibbles to their places in the row (`layout`)."""
    word, tail = fields, fields
    low, high = fields & 0xFFFF, (fields >> 16) & 0xFFFF
    for rate in tl.static_range(1, 4):
        if rates & (1 << rate):
            own = bits == rate
            first, last = _closed(low, rate), _closed(high, rate)
            if rate == 3:
                # Fields 0-4 and the top bit of field 7 make the word, the rest the byte.
                word = tl.where(own, first | ((last & 7) << 12) | ((last >> 11) << 15), word)
                tail = tl.where(own, last >> 3, tail)
            else:
                code = first | (last << (4 * rate))
                word, tail = tl.where(own, code, word), tl.where(own, code, tail)
    if rates & 16:
        _store_word(row + tl.load(places + padded_blocks)[None, :], high, kept & (bits == 4), even)
    _store_word(row + tl.load(places)[None, :], word, kept & (bits > 1), even)
    place = tl.load(places + 2 * padded_blocks)[None, :]
    tl.store(row + place, tail.to(tl.uint8), kept & ((bits & 1) == 1))


@triton.jit
@no_type_check
def _split(x):
    """Return the part of float32 numbers that a matrix product in tf32 takes exactly, and the rest."""
    whole = (x.to(tl.int32, bitcast=True) & _WHOLE).to(tl.float32, bitcast=True)
    return whole, x - whole


@triton.jit
@no_type_check
def _rotated(y, x, rest, matrix, part: tl.constexpr):
    """Add products with a matrix in two parts, almost to float32."""
    whole = tl.load(matrix)
    y = tl.dot(x, whole, y, input_precision="tf32")
    y = tl.dot(rest, whole, y, input_precision="tf32")
    return tl.dot(x, tl.load(matrix + part), y, input_precision="tf32")


@triton.jit
@no_type_check
def _encode(
    vectors,
    mean,
    forward,
    reference,
    places,
    plans,
    weights,
    words,
    scales,
    tokens,
    heads,
    tiles,
    vector_b,
    vector_h,
    vector_n,
    mean_b,
    mean_h,
    forward_b,
    forward_h,
    word_b,
    word_h,
    scale_b,
    scale_h,
    head_dim: tl.constexpr,
    row_bytes: tl.constexpr,
    blocks: tl.constexpr,
    rows: tl.constexpr,
    chunk: tl.constexpr,
    rates: tl.constexpr,
    candidates: tl.constexpr,
    even: tl.constexpr,
):
    third: tl.constexpr = (rates & 16) != 0
    plane: tl.constexpr = head_dim * blocks
    part: tl.constexpr = 8 * plane
    head = tl.program_id(0) // tiles
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    n = (tl.program_id(0) % tiles) * rows + tl.arange(0, rows)
    row = n.to(tl.int64)[:, None]
    present = n < tokens
    column = tl.arange(0, blocks)

    vectors += b * vector_b + h * vector_h
    forward += b * forward_b + h * forward_h
    y0 = tl.zeros((rows, blocks), tl.float32)
    y1, y2, y3, y4, y5, y6, y7 = y0, y0, y0, y0, y0, y0, y0
    for start in range(0, head_dim, chunk):
        channel = start + tl.arange(0, chunk)
        x = tl.load(vectors + row * vector_n + channel[None, :], present[:, None], 0.0).to(tl.float32)
        if mean is not None:
            x -= tl.load(mean + b * mean_b + h * mean_h + channel).to(tl.float32)[None, :]
        x, rest = _split(x)
        matrix = forward + channel[:, None] * blocks + column[None, :]
        y0 = _rotated(y0, x, rest, matrix, part)
        y1 = _rotated(y1, x, rest, matrix + plane, part)
        y2 = _rotated(y2, x, rest, matrix + 2 * plane, part)
        y3 = _rotated(y3, x, rest, matrix + 3 * plane, part)
        y4 = _rotated(y4, x, rest, matrix + 4 * plane, part)
        y5 = _rotated(y5, x, rest, matrix + 5 * plane, part)
        y6 = _rotated(y6, x, rest, matrix + 6 * plane, part)
        y7 = _rotated(y7, x, rest, matrix + 7 * plane, part)

    # Divided by its largest channel first: no square of a finite vector overflows.
    peak = tl.maximum(
        tl.maximum(tl.maximum(tl.abs(y0), tl.abs(y1)), tl.maximum(tl.abs(y2), tl.abs(y3))),
        tl.maximum(tl.maximum(tl.abs(y4), tl.abs(y5)), tl.maximum(tl.abs(y6), tl.abs(y7))),
    )
    peak = tl.maximum(tl.max(peak, 1), _TINY)
    shrink = (1 / peak)[:, None]
    y0, y1, y2, y3 = y0 * shrink, y1 * shrink, y2 * shrink, y3 * shrink
    y4, y5, y6, y7 = y4 * shrink, y5 * shrink, y6 * shrink, y7 * shrink
    planes = (y0, y1, y2, y3, y4, y5, y6, y7)
    square = y0 * y0 + y1 * y1 + y2 * y2 + y3 * y3 + y4 * y4 + y5 * y5 + y6 * y6 + y7 * y7

    places += tl.load(plans + head) * (4 * blocks) + column
    bits = tl.load(places + 3 * blocks)[None, :]
    coded = tl.where(bits > 0, 1.0, 0.0)
    weight = coded
    if weights is not None:
        weight *= tl.load(weights + head * blocks + column)[None, :]
    power = tl.sum(square * weight, 1)
    rms = tl.sqrt(tl.sum(square * coded, 1) / (8 * tl.maximum(tl.sum(coded, 1), 1.0)))
    level = tl.where(rms > 0, 1 / tl.maximum(rms, _TINY), 0.0)[:, None] * _by_rate(bits, _PER_UNIT, rates)
    unit = _by_rate(bits, _UNIT, rates)
    step, first = _by_rate(bits, _STEP, rates), _by_rate(bits, _FIRST, rates)
    offset, spacing = _by_rate(bits, _OFFSET, rates), _by_rate(bits, _SPACING, rates)
    per_spacing, half = _by_rate(bits, _PER_SPACING, rates), _by_rate(bits, _HALF, rates)
    for c in tl.static_range(len(candidates)):
        scale = level * (1 / candidates[c])
        fields, coset = _nearest(planes, scale, spacing, per_spacing, offset, half, third)
        inner, norm = _products(planes, fields, coset, step, first)
        inner, norm = tl.sum(inner * (weight * unit), 1), tl.sum(norm * (weight * unit * unit), 1)
        fit = inner * inner / tl.maximum(norm, _TINY)
        if c == 0:
            best_fit, best_norm, best = fit, norm, fields
        else:
            better = fit > best_fit
            best_fit = tl.where(better, fit, best_fit)
            best_norm = tl.where(better, norm, best_norm)
            best = tl.where(better[:, None], fields, best)

    size = tl.where(power > 0, tl.sqrt(power / tl.maximum(best_norm, _TINY)), 0.0) * peak
    stored = _scale_byte(size / tl.load(reference + head), _CUTS)
    tl.store(scales + b * scale_b + h * scale_h + n, stored, present)
    words += b * word_b + h * word_h + row * row_bytes
    _store_codes(words, best, places, bits, present[:, None], blocks, rates, even)


@dataclass(frozen=True, eq=False)
class EncodeOperand:
    """What `encode` needs to know of one side of a layer; `encode_operand` makes it.

    Attributes:
        plan: Layouts and mean.
        places: For each layout, by block, where in the row its first word, its second word and its byte begin, and its
            bits.
        forward: For each of the 8 channels of a block its axis in every block, in two parts that add up to it.
        reference: Scale that scale byte 128 stands for, in units of ``forward``.
        weights: As `Rotation.block_variances`.
    """

    plan: SidePlan
    places: Int32[Tensor, "layouts 4 padded_blocks"]
    forward: Float32[Tensor, "b_or_1 h_or_1 2 8 d padded_blocks"]
    reference: Float32[Tensor, "b h 1"]
    weights: Float32[Tensor, "b h padded_blocks"] | None


def encode_operand(
    plan: SidePlan,
    forward: Float[Tensor, "b_or_1 h_or_1 d d"],
    reference: Float[Tensor, "b h 1"],
    weights: Float[Tensor, "b h blocks"] | None = None,
) -> EncodeOperand:
    """Return what `encode` needs to know of one side of a layer.

    Args:
        plan: Layouts and mean.
        forward: The coded channels of a vector ``x`` are ``(x - mean) @ forward``.
        reference: Scale that scale byte 128 stands for.
        weights: As `Rotation.block_variances`.
    """
    # Entries of at most 1: no product of a finite vector is too large or too small because of a head's unit.
    largest = forward.float().abs().amax((-1, -2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    by_channel = (forward / largest).float().unflatten(-1, (-1, BLOCK)).movedim(-1, -3)
    padding = (0, plan.padded_blocks - by_channel.shape[-1])
    by_channel = torch.nn.functional.pad(by_channel, padding)
    whole = (by_channel.view(torch.int32) & _WHOLE.value).view(torch.float32)
    return EncodeOperand(
        plan=plan,
        places=plan.numbers[:, [NUMBERS.index(name) for name in ("word", "second", "byte", "bits")]].contiguous(),
        forward=torch.stack([whole, by_channel - whole], 2),
        reference=(reference / largest[..., 0]).float().contiguous(),
        weights=None if weights is None else torch.nn.functional.pad(weights.float(), padding).contiguous(),
    )


def encode(
    vectors: Float[Tensor, "b h n d"],
    operand: EncodeOperand,
    candidates: tuple[float, ...],
    out: PackedOperand,
) -> None:
    """Encode vectors as `codec.e8.E8Codec.encode` does, up to rounding of the rotation.

    Args:
        vectors: Finite vectors; their products with ``forward`` must not overflow float32.
        operand: What all vectors share.
        candidates: Scales to try, relative to the root mean square.
        out: Where rows and scales go; nothing else is written.

    Raises:
        ShapeError: If vectors and rows are not of the same number or size.
    """
    plan = operand.plan
    batch, heads, tokens, head_dim = vectors.shape
    if vectors.shape[:3] != out.words.shape[:3] or head_dim != plan.head_dim:
        msg = (
            f"vectors {tuple(vectors.shape)} do not fit the rows {tuple(out.words.shape)} for head_dim {plan.head_dim}"
        )
        raise ShapeError(msg)
    if not vectors.numel():
        return
    vectors = vectors if vectors.stride(-1) == 1 else vectors.contiguous()
    mean = plan.mean
    tiles = triton.cdiv(tokens, _ROWS)
    _encode[(batch * heads * tiles,)](
        vectors,
        mean,
        operand.forward,
        operand.reference,
        operand.places,
        plan.plans,
        operand.weights,
        out.words,
        out.scales,
        tokens,
        heads,
        tiles,
        *vectors.stride()[:3],
        *((0, 0) if mean is None else mean.stride()[:2]),
        *operand.forward.expand(batch, heads, -1, -1, -1, -1).stride()[:2],
        *out.words.stride()[:2],
        *out.scales.stride()[:2],
        **_constants(plan, candidates, even=out.even),
        **_OPTIONS,
    )


def _constants(plan: SidePlan, candidates: tuple[float, ...], *, even: bool) -> dict[str, int | tuple[float, ...]]:
    """Return the compile-time parameters of the kernel."""
    return {
        "head_dim": plan.head_dim,
        "row_bytes": plan.row_bytes,
        "blocks": plan.padded_blocks,
        "rows": _ROWS,
        "chunk": gcd(plan.head_dim, _CHUNK),
        "rates": plan.rates,
        "candidates": candidates,
        "even": even,
    }


def compile_cases() -> Iterator[CompileCase]:
    """Yield specialisations to compile without a GPU; all of the kernel counts, its loop ``head_dim / chunk`` times."""
    yield _compile_case(128, 32, 0b100, even=True)
    yield _compile_case(128, 48, 0b1000, even=True)
    yield _compile_case(128, 40, 0b1100, even=True)
    yield _compile_case(128, 32, 0b11110, even=True)
    yield _compile_case(64, 21, 0b1100, even=False)


def _compile_case(head_dim: int, row_bytes: int, rates: int, *, even: bool) -> CompileCase:
    """Return the kernel for bfloat16 vectors: with all rates as keys with principal axes, with one as plain values."""
    signature = dict.fromkeys(_encode.arg_names, "i32") | {
        "vectors": "*bf16",
        "mean": "*fp16",
        "forward": "*fp32",
        "reference": "*fp32",
        "places": "*i32",
        "plans": "*i32",
        "weights": "*fp32",
        "words": "*u8",
        "scales": "*u8",
    }
    plan = {"head_dim": head_dim, "row_bytes": row_bytes, "blocks": max(head_dim // BLOCK, 8), "rates": rates}
    constants: dict[str, Any] = plan | {
        "rows": _ROWS,
        "chunk": gcd(head_dim, _CHUNK),
        "candidates": CANDIDATES,
        "even": even,
    }
    if rates != 0b11110:
        constants["weights"] = None
    if rates & (rates - 1) == 0:
        constants["mean"] = None
    signature |= dict.fromkeys(constants, "constexpr")
    whole_rows = ("vector_b", "vector_h", "vector_n", "mean_b", "mean_h", "forward_b", "forward_h")
    aligned = [
        i
        for i, (name, kind) in enumerate(signature.items())
        if (kind[0] == "*" and name not in ("words", "scales")) or name in whole_rows
    ]
    occurring = "+".join(str(bits) for bits in range(1, MAX_BITS + 1) if rates >> bits & 1)
    return CompileCase(
        name=f"encode d={head_dim}, {occurring} bits{'' if even else ', odd rows'}",
        function=_encode,
        signature=signature,
        constexprs=constants,
        options=_OPTIONS,
        rows=_ROWS,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
