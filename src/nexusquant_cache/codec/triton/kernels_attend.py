"""Attention of a few queries over packed tokens, which are decoded in registers and nowhere else.

One program reads a part of the tokens of one head (a *split*) for all queries of its group.  Products are tokens by
queries, and not the other way round, so that few queries waste little of a tensor core.  Logits ``[tokens, queries]``
are the sum of four products, each of a plane of keys (`kernels_codes`) and a plane of queries.  Sums of values
``[channels, queries]`` are those of coded channels, plane by plane.

Rotations are kept out of the loop where that is possible.  Keys that were encoded with their rotary phase are not
rotated: the queries are, in their place.  Values are rotated once, after the softmax.  Only keys that were encoded
without their phase are rotated in the loop.

A second kernel joins the splits and the exact tokens, rotates the sum of values, and adds the mean.

References:
    Dao et al. (2023), "Flash-Decoding for long-context inference" (splits and their merging); Milakov & Gimelshein
    (2018), "Online normalizer calculation for softmax", arXiv:1805.02867.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from nexusquant_cache.codec.operands import NUMBERS, ExactTokens, PackedOperand, Places, RopeOperand, SidePlan
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.triton.compile_case import CompileCase, compile_case
from nexusquant_cache.codec.triton.kernels_codes import key_planes, relative_scale, value_channels, value_planes
from nexusquant_cache.errors import ShapeError, UnsupportedError

_LOG2_E = 1.4426950408889634
_LEAST_LOGIT: tl.constexpr = tl.constexpr(-1e30)  # in place of -inf, whose differences are undefined
_AXES_UNIT: tl.constexpr = tl.constexpr(8.0)  # times 127: the largest number of an axis as float16
_TINY: tl.constexpr = tl.constexpr(1e-30)
_LEAST_SCALE: tl.constexpr = tl.constexpr(2.0**-14)  # relative to the mean
_NUMBERS: tl.constexpr = tl.constexpr(len(NUMBERS))
_LOW_POSITIONS: tl.constexpr = tl.constexpr(256)
_CONTIGUOUS, _BY_TOKEN = 1, 2  # positions of tokens whose keys are rotated in the loop

_ALL_RATES = 0b11110
_LEAST_SPLIT = 256  # tokens; each split writes its sums, which must stay small beside what it reads
_PROGRAMS = {1: 8, 4: 2}  # to keep a multiprocessor busy, by warps of a program
_MOST_QUERIES = 16  # rows of queries in a program; their sums are held in registers


@dataclass(frozen=True, eq=False)
class PartialAttention:
    """Attention over each split of the packed tokens.

    Attributes:
        sums: Mean of the coded channels of the values, not rotated.
        lse: Logarithm to base 2 of the sum of the exponentials; -inf if all tokens are hidden.
    """

    sums: Float32[Tensor, "splits b h rows dv"]
    lse: Float32[Tensor, "splits b h rows"]


@triton.jit
@no_type_check
def _power_of_two(x):
    """Return the largest power of two that is not greater, and its inverse; 2 ** -113 for anything smaller."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.maximum(tl.minimum(exponent, 253 << 23), 14 << 23)
    return exponent.to(tl.float32, bitcast=True), ((254 << 23) - exponent).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _axes_plane(axes, step, plane: tl.constexpr, channel, COLUMNS: tl.constexpr, D: tl.constexpr, used):
    """Return given channels of what a plane adds to a vector, ``[COLUMNS, channels]``, and its units ``[COLUMNS]``."""
    coded = 4 * tl.arange(0, COLUMNS) + plane
    inside = (coded < D)[:, None] & used[None, :]
    part = tl.load(axes + coded[:, None] * D + channel[None, :], mask=inside, other=0)
    return part.to(tl.float32), tl.load(step + coded, mask=coded < D, other=0.0)


@triton.jit
@no_type_check
def _rotated_query(
    query,
    axes,
    step,
    plane: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Return the products of a plane's axes with the queries, leaving out the channels before ``FIRST``."""
    channel = tl.arange(0, PADDED_D)
    part, unit = _axes_plane(axes, step, plane, channel, COLUMNS, D, (channel >= FIRST) & (channel < D))
    return tl.dot(part.to(tl.float16), query) * unit[:, None]


@triton.jit
@no_type_check
def _pair_axes(axes, step, plane: tl.constexpr, channel, COLUMNS: tl.constexpr, D: tl.constexpr, used):
    """Return a plane's part of channels that turn, as float16."""
    part, unit = _axes_plane(axes, step, plane, channel, COLUMNS, D, used)
    return (part * (unit * _AXES_UNIT)[:, None]).to(tl.float16)


@triton.jit
@no_type_check
def token_phase(low, high, position, pair, used, PAIRS: tl.constexpr):
    """Return cosine and sine of the angle that each pair turns by at each position, ``[positions, pairs]``.

    A position is 256 times an upper part, plus a lower part; the angle is the sum of those of both parts, which the
    tables ``high`` and ``low`` hold (`operands.RopeOperand`).
    """
    row = low + (position & (_LOW_POSITIONS - 1)).to(tl.int64)[:, None] * (2 * PAIRS) + pair[None, :]
    base = high + (position // _LOW_POSITIONS).to(tl.int64)[:, None] * (2 * PAIRS) + pair[None, :]
    inside = used[None, :]
    cos, sin = tl.load(row, mask=inside, other=0.0), tl.load(row + PAIRS, mask=inside, other=0.0)
    base_cos, base_sin = tl.load(base, mask=inside, other=0.0), tl.load(base + PAIRS, mask=inside, other=0.0)
    return cos * base_cos - sin * base_sin, cos * base_sin + sin * base_cos


@triton.jit
@no_type_check
def _softcapped(logits, softcap):
    """Return ``softcap * tanh(logits / softcap)``."""
    power = tl.exp2(logits * (2.0 * 1.4426950408889634 / softcap))
    return softcap * (1.0 - 2.0 / (1.0 + power))


@triton.jit
@no_type_check
def _turned_logits(k0, k1, k2, k3, scale, position, axes, query, rope, PAIRS: tl.constexpr, MEAN: tl.constexpr):
    """Return what the rotary channels add to the logits, for keys that were encoded without their phase.

    A position is 256 times an upper part, plus a lower part.  Keys are turned by the lower part.  In place of turning
    them further, the queries are turned back by the upper part, which gives the same products.  Tokens of a tile are
    near one another, so they share one or two upper parts: the queries are turned once for each of these.
    """
    low, high, pair, used = rope
    even_query, odd_query, even_mean, odd_mean, least, factor = query
    a0, a1, a2, a3, b0, b1, b2, b3 = axes
    if MEAN:
        # A key is its scale times (what the axes add up to, plus mean / scale).  Below 2 ** -14 of the mean, scales
        # count as that: the mean stays in the range of float16, beside which no such key shows.
        scale = tl.maximum(scale, least)
        share = (1.0 / scale)[:, None]
        even = tl.dot(k0, a0, even_mean[None, :] * share)
        odd = tl.dot(k0, b0, odd_mean[None, :] * share)
    else:
        even = tl.dot(k0, a0)
        odd = tl.dot(k0, b0)
    even = tl.dot(k1, a1, even)
    even = tl.dot(k2, a2, even)
    even = tl.dot(k3, a3, even)
    odd = tl.dot(k1, b1, odd)
    odd = tl.dot(k2, b2, odd)
    odd = tl.dot(k3, b3, odd)
    row = low + (position % _LOW_POSITIONS)[:, None] * (2 * PAIRS) + pair[None, :]
    cos = tl.load(row, mask=used[None, :], other=0.0)
    sin = tl.load(row + PAIRS, mask=used[None, :], other=0.0)
    turned_even = (even * cos - odd * sin).to(tl.float16)
    turned_odd = (odd * cos + even * sin).to(tl.float16)

    upper = position // _LOW_POSITIONS
    logits = tl.zeros([k0.shape[0], factor.shape[0]], tl.float32)
    current, largest = tl.min(upper, 0), tl.max(upper, 0)
    while current <= largest:
        base = high + tl.full([], current, tl.int64) * (2 * PAIRS) + pair
        base_cos = tl.load(base, mask=used, other=0.0)[:, None]
        base_sin = tl.load(base + PAIRS, mask=used, other=0.0)[:, None]
        even_back = even_query * base_cos + odd_query * base_sin
        odd_back = odd_query * base_cos - even_query * base_sin
        found = tl.dot(turned_even, even_back.to(tl.float16))
        found = tl.dot(turned_odd, odd_back.to(tl.float16), found)
        logits = tl.where((upper == current)[:, None], found, logits)
        current = tl.min(tl.where(upper > current, upper, largest + 1), 0)
    return logits * scale[:, None] * factor[None, :]


@triton.jit
@no_type_check
def _attend_tile(
    most,
    total,
    sum0,
    sum1,
    sum2,
    sum3,
    keys,
    values,
    query,
    rope,
    where,
    hidden,
    softcap,
    tokens,
    first,
    K_SHAPE: tl.constexpr,
    V_SHAPE: tl.constexpr,
    BN: tl.constexpr,
    PHASE: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    MEAN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ASM: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Add a tile of tokens to the running softmax."""
    k_words, k_scales, k_numbers, k_axes = keys
    v_words, v_scales, v_numbers = values
    plane0, plane1, plane2, plane3, rest_factor, mean_logit, turning = query
    start, positions = where

    # Offsets in the tile are the same in all of them, and small.
    n, last = tl.arange(0, BN), None
    if RAGGED:
        last = tokens - 1 - first
        n = tl.minimum(n, last)
    start_of = tl.full([], first, tl.int64)
    token = first + n
    k_tile = k_words + start_of * K_SHAPE[1]
    k0, k1, k2, k3 = key_planes(k_tile, last, k_numbers, BN, K_SHAPE, ASM)
    scale = relative_scale(tl.load(k_scales + token))
    if REST:
        logits = tl.dot(k0, plane0)
        logits = tl.dot(k1, plane1, logits)
        logits = tl.dot(k2, plane2, logits)
        logits = tl.dot(k3, plane3, logits)
        logits = logits * scale[:, None] * rest_factor[None, :] + mean_logit[None, :]
    else:
        logits = tl.zeros([BN, mean_logit.shape[0]], tl.float32)
    if PHASE > 0:
        position = start + token if PHASE == 1 else tl.load(positions + token)
        logits += _turned_logits(k0, k1, k2, k3, scale, position, k_axes, turning, rope, PAIRS, MEAN)
    if SOFTCAP:
        logits = _softcapped(logits, softcap) * 1.4426950408889634
    if hidden is not None:
        logits = tl.where((tl.load(hidden + token) != 0)[:, None], -float("inf"), logits)
    if RAGGED:
        logits = tl.where((first + tl.arange(0, BN) < tokens)[:, None], logits, -float("inf"))

    peak = tl.maximum(most, tl.max(logits, 0))
    fade = tl.exp2(most - peak)
    weight = tl.exp2(logits - peak[None, :])
    total = total * fade + tl.sum(weight, 0)
    weight = (weight * relative_scale(tl.load(v_scales + token))[:, None]).to(tl.float16)
    v_tile = v_words + start_of * V_SHAPE[1]
    v0, v1, v2, v3 = value_planes(v_tile, last, v_numbers, BN, V_SHAPE, ASM)
    sum0 = tl.dot(v0, weight, sum0 * fade[None, :])
    sum1 = tl.dot(v1, weight, sum1 * fade[None, :])
    sum2 = tl.dot(v2, weight, sum2 * fade[None, :])
    sum3 = tl.dot(v3, weight, sum3 * fade[None, :])
    return peak, total, sum0, sum1, sum2, sum3


# What changes from step to step must not lead to another specialisation, which takes seconds to compile.
_VOLATILE = ["start", "tokens", "per_split", "hidden_b", "hidden_h", "positions_b", "positions_h"] + [
    f"{side}_{what}_{axis}" for side in "kv" for what in ("words", "scales") for axis in "bh"
]


@triton.jit(do_not_specialize=_VOLATILE)
@no_type_check
def attend_kernel(
    query, sums, lse,
    k_words, k_scales, k_numbers, k_plans, k_axes, k_step, k_factor, k_mean,
    v_words, v_scales, v_numbers, v_plans,
    hidden, positions, low, high,
    start, tokens, per_split, scaling, softcap,
    query_b, query_h, query_m,
    k_words_b, k_words_h, k_scales_b, k_scales_h, v_words_b, v_words_h, v_scales_b, v_scales_h,
    axes_b, axes_h, hidden_b, hidden_h, positions_b, positions_h,
    heads, rows, queries,
    D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr,
    K_SHAPE: tl.constexpr, V_SHAPE: tl.constexpr,
    G: tl.constexpr, BN: tl.constexpr,
    PHASE: tl.constexpr, PAIRS: tl.constexpr, PADDED_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    SOFTCAP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Attend to one split of the packed tokens of one head with one tile of queries: grid (splits, b * h, tiles).

    ``K_SHAPE`` and ``V_SHAPE`` are padded blocks, bytes of a row, rates, and whether rows begin at even addresses.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    place = head.to(tl.int64)
    b, h = place // heads, place % heads
    K_COLUMNS: tl.constexpr = 2 * K_SHAPE[0]
    V_COLUMNS: tl.constexpr = 2 * V_SHAPE[0]
    TURNING: tl.constexpr = 2 * PAIRS if PHASE > 0 else 0  # channels that turn in the loop
    REST: tl.constexpr = TURNING < D

    # The queries, as float16 numbers of at most 2 times a power of two.
    r = tl.program_id(2) * G + tl.arange(0, G)
    query += b * query_b + (h * (rows // queries) + r // queries) * query_h + (r % queries) * query_m
    channel = tl.arange(0, PADDED_D)
    x = tl.load(query[None, :] + channel[:, None], mask=(r < rows)[None, :] & (channel < D)[:, None], other=0.0)
    x = x.to(tl.float32)
    size, inverse = _power_of_two(tl.max(tl.abs(x), 0))
    mean_logit = tl.zeros([G], tl.float32)
    if k_mean is not None:
        k_mean += place * D
        mean = tl.load(k_mean + channel, mask=(channel >= TURNING) & (channel < D), other=0.0).to(tl.float32)
        mean_logit = tl.sum(x * mean[:, None], 0) * scaling
    x = (x * inverse[None, :]).to(tl.float16)

    k_axes += b * axes_b + h * axes_h
    k_step += place * D
    factor = tl.load(k_factor + place)
    planes = (None, None, None, None)
    rest_factor = size
    if REST:
        q0 = _rotated_query(x, k_axes, k_step, 0, K_COLUMNS, D, PADDED_D, TURNING)
        q1 = _rotated_query(x, k_axes, k_step, 1, K_COLUMNS, D, PADDED_D, TURNING)
        q2 = _rotated_query(x, k_axes, k_step, 2, K_COLUMNS, D, PADDED_D, TURNING)
        q3 = _rotated_query(x, k_axes, k_step, 3, K_COLUMNS, D, PADDED_D, TURNING)
        largest = tl.maximum(tl.maximum(tl.abs(q0), tl.abs(q1)), tl.maximum(tl.abs(q2), tl.abs(q3)))
        power, enlarge = _power_of_two(tl.max(largest, 0))
        enlarge = (enlarge * 4096.0)[None, :]
        planes = (
            (q0 * enlarge).to(tl.float16), (q1 * enlarge).to(tl.float16),
            (q2 * enlarge).to(tl.float16), (q3 * enlarge).to(tl.float16),
        )  # fmt: skip
        rest_factor = size * power * (factor * scaling / 4096.0)
    log_scaling = scaling
    if not SOFTCAP:  # logits to base 2 from the beginning
        log_scaling = scaling * 1.4426950408889634
        rest_factor = rest_factor * 1.4426950408889634
        mean_logit = mean_logit * 1.4426950408889634
    turning, axes, rope = None, None, None
    if PHASE > 0:
        pair = tl.arange(0, PADDED_PAIRS)
        used = pair < PAIRS
        even = 2 * pair if INTERLEAVED else pair
        odd = 2 * pair + 1 if INTERLEAVED else pair + PAIRS
        inside = (r < rows)[None, :] & used[:, None]
        axes = (
            _pair_axes(k_axes, k_step, 0, even, K_COLUMNS, D, used),
            _pair_axes(k_axes, k_step, 1, even, K_COLUMNS, D, used),
            _pair_axes(k_axes, k_step, 2, even, K_COLUMNS, D, used),
            _pair_axes(k_axes, k_step, 3, even, K_COLUMNS, D, used),
            _pair_axes(k_axes, k_step, 0, odd, K_COLUMNS, D, used),
            _pair_axes(k_axes, k_step, 1, odd, K_COLUMNS, D, used),
            _pair_axes(k_axes, k_step, 2, odd, K_COLUMNS, D, used),
            _pair_axes(k_axes, k_step, 3, odd, K_COLUMNS, D, used),
        )
        # In units of the scale.
        even_mean, odd_mean, least = None, None, 0.0
        unit = factor / _AXES_UNIT
        if k_mean is not None:
            even_mean = tl.load(k_mean + even, mask=used, other=0.0).to(tl.float32) / unit
            odd_mean = tl.load(k_mean + odd, mask=used, other=0.0).to(tl.float32) / unit
            least = tl.max(tl.maximum(tl.abs(even_mean), tl.abs(odd_mean)), 0)
            least = tl.maximum(least * _LEAST_SCALE, _TINY)
        turning = (
            tl.load(query[None, :] + even[:, None], mask=inside, other=0.0).to(tl.float32) * inverse[None, :],
            tl.load(query[None, :] + odd[:, None], mask=inside, other=0.0).to(tl.float32) * inverse[None, :],
            even_mean,
            odd_mean,
            least,
            size * (unit * log_scaling),
        )
        rope = (low, high, pair, used)

    k_numbers += tl.load(k_plans + place) * (_NUMBERS * K_SHAPE[0])
    v_numbers += tl.load(v_plans + place) * (_NUMBERS * V_SHAPE[0])
    keys = (
        k_words + b * k_words_b + h * k_words_h, k_scales + b * k_scales_b + h * k_scales_h,
        k_numbers, axes,
    )  # fmt: skip
    values = (
        v_words + b * v_words_b + h * v_words_h, v_scales + b * v_scales_b + h * v_scales_h,
        v_numbers,
    )  # fmt: skip
    queries_of = (planes[0], planes[1], planes[2], planes[3], rest_factor, mean_logit, turning)
    if hidden is not None:
        hidden += b * hidden_b + h * hidden_h
    if PHASE == 2:
        positions += b * positions_b + h * positions_h
    where = (start, positions)

    empty = tl.zeros([V_COLUMNS, G], tl.float32)
    most, total = tl.full([G], _LEAST_LOGIT, tl.float32), tl.zeros([G], tl.float32)
    sum0, sum1, sum2, sum3 = empty, empty, empty, empty
    first = split * per_split
    end = tl.minimum(first + per_split, tokens)
    whole = first + (end - first) // BN * BN
    for tile in range(first, whole, BN):
        most, total, sum0, sum1, sum2, sum3 = _attend_tile(
            most, total, sum0, sum1, sum2, sum3, keys, values, queries_of, rope, where, hidden, softcap, tokens, tile,
            K_SHAPE, V_SHAPE, BN, PHASE, PAIRS, REST, k_mean is not None, SOFTCAP, ASM, RAGGED=False,
        )  # fmt: skip
    if whole < end:
        most, total, sum0, sum1, sum2, sum3 = _attend_tile(
            most, total, sum0, sum1, sum2, sum3, keys, values, queries_of, rope, where, hidden, softcap, tokens, whole,
            K_SHAPE, V_SHAPE, BN, PHASE, PAIRS, REST, k_mean is not None, SOFTCAP, ASM, RAGGED=True,
        )  # fmt: skip

    # Where all tokens are hidden, nothing was added up.
    some = tl.where(total > 0, total, 1.0)
    share = (1.0 / some)[None, :]
    part = (split.to(tl.int64) * tl.num_programs(1) + head) * rows + r
    coded = value_channels(V_SHAPE[0])
    sums += part[None, :] * DV + coded[:, None]
    inside = (r < rows)[None, :] & (coded < DV)[:, None]
    tl.store(sums, sum0 * share, mask=inside)
    tl.store(sums + 1, sum1 * share, mask=inside)
    tl.store(sums + 2, sum2 * share, mask=inside)
    tl.store(sums + 3, sum3 * share, mask=inside)
    tl.store(lse + part, tl.where(total > 0, most + tl.log2(some), -float("inf")), mask=r < rows)


@triton.jit(
    do_not_specialize=["splits", "tokens", "keys_b", "keys_h", "values_b", "values_h", "mask_b", "mask_m", "mask_e"]
)
@no_type_check
def combine_kernel(
    sums, lse, query, keys, values, mask, axes, step, factor, mean, sink_logits, out,
    splits, tokens, scaling, softcap,
    query_b, query_h, query_m, keys_b, keys_h, keys_e, values_b, values_h, values_e, mask_b, mask_m, mask_e,
    axes_b, axes_h, out_b, out_h, out_m,
    heads, group, queries,
    D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, BOOLEAN: tl.constexpr,
):  # fmt: skip
    """Join the splits and the exact tokens for one query: grid (b * query_heads * queries)."""
    m = tl.program_id(0) % queries
    place = (tl.program_id(0) // queries).to(tl.int64)
    query_head = place % (heads * group)
    b, h = place // (heads * group), query_head // group
    head = b * heads + h
    row = (query_head % group) * queries + m
    channel = tl.arange(0, PADDED_DV)
    i = tl.arange(0, BLOCK)

    most = _LEAST_LOGIT + tl.zeros([1], tl.float32)
    total = tl.zeros([1], tl.float32)
    coded = tl.zeros([PADDED_DV], tl.float32)
    all_heads = (tl.num_programs(0) // (group * queries)).to(tl.int64)
    for first in range(0, splits, BLOCK):
        some = first + i < splits
        part = ((first + i).to(tl.int64) * all_heads + head) * (group * queries) + row
        logit = tl.load(lse + part, mask=some, other=-float("inf"))
        peak = tl.maximum(most, tl.max(logit, 0))
        fade = tl.exp2(most - peak)
        weight = tl.exp2(logit - peak)
        block = tl.load(
            sums + part[:, None] * DV + channel[None, :], mask=some[:, None] & (channel < DV)[None, :], other=0.0
        )
        coded = coded * fade + tl.sum(block * weight[:, None], 0)
        total = total * fade + tl.sum(weight, 0)
        most = peak

    result = coded
    if splits > 0:
        coded *= tl.load(step + head * DV + channel, mask=channel < DV, other=0.0) * tl.load(factor + head)
        axes += b * axes_b + h * axes_h
        square = (channel < DV)[:, None] & (channel < DV)[None, :]
        table = tl.load(axes + channel[:, None] * DV + channel[None, :], mask=square, other=0).to(tl.float32)
        result = tl.sum(table * coded[:, None], 0)
        if mean is not None:
            result += tl.load(mean + head * DV + channel, mask=channel < DV, other=0.0).to(tl.float32) * total

    key_channel = tl.arange(0, PADDED_D)
    x = tl.load(
        query + b * query_b + query_head * query_h + m * query_m + key_channel, mask=key_channel < D, other=0.0
    ).to(tl.float32)
    keys += b * keys_b + h * keys_h
    values += b * values_b + h * values_h
    for first in range(0, tokens, BLOCK):
        e = (first + i).to(tl.int64)
        inside = e < tokens
        key = tl.load(
            keys + e[:, None] * keys_e + key_channel[None, :],
            mask=inside[:, None] & (key_channel < D)[None, :], other=0.0,
        )  # fmt: skip
        logit = tl.sum(key.to(tl.float32) * x[None, :], 1) * scaling
        if SOFTCAP:
            logit = _softcapped(logit, softcap)
        if mask is not None:
            masked = tl.load(mask + b * mask_b + m * mask_m + e * mask_e, mask=inside, other=0)
            if BOOLEAN:
                logit = tl.where(masked != 0, logit, -float("inf"))
            else:
                logit += masked.to(tl.float32)
        logit = tl.where(inside, logit * 1.4426950408889634, -float("inf"))
        peak = tl.maximum(most, tl.max(logit, 0))
        fade = tl.exp2(most - peak)
        weight = tl.exp2(logit - peak)
        value = tl.load(
            values + e[:, None] * values_e + channel[None, :],
            mask=inside[:, None] & (channel < DV)[None, :], other=0.0,
        )  # fmt: skip
        result = result * fade + tl.sum(value.to(tl.float32) * weight[:, None], 0)
        total = total * fade + tl.sum(weight, 0)
        most = peak

    if sink_logits is not None:
        sink = tl.load(sink_logits + query_head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(most, sink)
        fade = tl.exp2(most - peak)
        result *= fade
        total = total * fade + tl.exp2(sink - peak)
    result /= tl.where(total > 0, total, 1.0)
    out += b * out_b + query_head * out_h + m * out_m
    tl.store(out + channel, result.to(out.dtype.element_ty), mask=channel < DV)


def attend_packed(
    query: Float[Tensor, "b query_heads m d"],
    keys: PackedOperand,
    values: PackedOperand,
    softmax: Softmax,
    *,
    rope: RopeOperand | None = None,
    places: Places | None = None,
    hidden: Bool[Tensor, "b_or_1 h_or_1 n"] | None = None,
    splits: int | None = None,
    asm: bool | None = None,
) -> PartialAttention:
    """Attend to the packed tokens, all of which are older than the queries.

    Products are computed with float16 operands, whatever the dtype of the query, and added up in float32.

    Args:
        query: Rotated queries of any floating dtype.
        keys: Packed keys of the heads, each of which serves ``query_heads / h`` query heads in a row.
        values: Packed values of the same tokens.
        softmax: How logits are made; `Softmax.sink_logits` has no effect here.
        rope: The phase that the keys were coded without; None if they were coded with it.
        places: Where the tokens stand; needed with ``rope``.
        hidden: Tokens of each row and head that no query attends to.
        splits: Parts of the tokens to treat in parallel; by default as many as keep the device busy.
        asm: Whether to use instructions of NVIDIA's GPUs; by default if the device has them.

    Raises:
        ShapeError: If heads or tokens do not fit together.
        UnsupportedError: If there is no token.
    """
    launch = _Launch.of(query, keys, values, rope, places, splits, asm)
    plan_k, plan_v = keys.plan, values.plan
    batch, heads, tokens = keys.scales.shape
    rows, grid_splits = launch.rows, launch.splits
    query = query if query.stride(-1) == 1 else query.contiguous()
    sums = torch.empty(grid_splits, batch, heads, rows, plan_v.head_dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(grid_splits, batch, heads, rows, dtype=torch.float32, device=query.device)
    positions = launch.positions
    hidden = None if hidden is None else hidden.contiguous().view(torch.uint8)
    attend_kernel[(grid_splits, batch * heads, triton.cdiv(rows, launch.constexprs["G"]))](
        query,
        sums,
        lse,
        *(keys.words, keys.scales, plan_k.numbers, plan_k.plans, plan_k.axes, plan_k.step, plan_k.factor, plan_k.mean),
        *(values.words, values.scales, plan_v.numbers, plan_v.plans),
        hidden,
        positions,
        None if rope is None else rope.low,
        None if rope is None else rope.high,
        *(0 if places is None else places.start, tokens, launch.per_split),
        *(softmax.scaling, softmax.softcap or 1.0),
        *query.stride()[:3],
        *(*keys.words.stride()[:2], *keys.scales.stride()[:2]),
        *(*values.words.stride()[:2], *values.scales.stride()[:2]),
        *shared_strides(plan_k.axes),
        *(shared_strides(hidden) if hidden is not None else (0, 0)),
        *(shared_strides(positions) if positions is not None else (0, 0)),
        *(heads, rows, query.shape[2]),
        **launch.constexprs,
        SOFTCAP=softmax.softcap is not None,
        **launch.options,
    )
    return PartialAttention(sums, lse)


def combine(
    query: Float[Tensor, "b query_heads m d"],
    packed: PartialAttention | None,
    values: SidePlan,
    exact: ExactTokens,
    softmax: Softmax,
    out: Float[Tensor, "b query_heads m dv"] | None = None,
) -> Float[Tensor, "b query_heads m dv"]:
    """Join the attention over packed tokens with that over exact ones.

    Args:
        query: The queries of `attend_packed`.
        packed: What it returned; None if there are no packed tokens.
        values: Plan of the packed values.
        exact: The other tokens.
        softmax: As there, with the sink logits.
        out: Where to write; the last axis is contiguous.

    Returns:
        ``out``, or a tensor in the dtype of the query that lies as ``[b, m, query_heads, dv]`` in memory.  Queries
        that attend to nothing get zeros.
    """
    batch, query_heads, queries, head_dim = query.shape
    heads, count = exact.keys.shape[1], exact.keys.shape[2]
    query = query if query.stride(-1) == 1 else query.contiguous()
    if out is None:
        out = query.new_empty(batch, queries, query_heads, values.head_dim).transpose(1, 2)
    mask, mask_strides = exact.mask, (0, 0, 0)
    boolean = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        mask_strides = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(1), mask.stride(2))
        mask = mask.view(torch.uint8) if boolean else mask
    combine_kernel[(batch * query_heads * queries,)](
        *((query, query) if packed is None else (packed.sums, packed.lse)),
        *(query, exact.keys, exact.values, mask),
        *(values.axes, values.step, values.factor, values.mean, softmax.sink_logits, out),
        *(0 if packed is None else len(packed.sums), count, softmax.scaling, softmax.softcap or 1.0),
        *query.stride()[:3],
        *exact.keys.stride()[:3],
        *exact.values.stride()[:3],
        *mask_strides,
        *shared_strides(values.axes),
        *out.stride()[:3],
        *(heads, query_heads // heads, queries),
        **_combine_shape(head_dim, values.head_dim),
        SOFTCAP=softmax.softcap is not None,
        BOOLEAN=boolean,
        **_combine_options(values.head_dim),
    )
    return out


def shared_strides(x: Tensor) -> tuple[int, int]:
    """Return the strides of the first two axes, 0 along those that have one element for all."""
    return (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)


def _combine_shape(head_dim: int, value_dim: int) -> dict[str, int]:
    return {
        "D": head_dim,
        "PADDED_D": triton.next_power_of_2(head_dim),
        "DV": value_dim,
        "PADDED_DV": triton.next_power_of_2(value_dim),
        "BLOCK": 32,
    }


def _combine_options(value_dim: int) -> dict[str, int]:
    wide = triton.next_power_of_2(value_dim) > 128  # the axes are held in registers
    return {"num_warps": 8 if wide else 4, "num_stages": 1, "enable_fp_fusion": True}


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def use_asm(device: torch.device) -> bool:
    """Tell whether kernels on this device may use instructions of NVIDIA's GPUs."""
    return device.type == "cuda" and torch.version.hip is None


@dataclass(frozen=True)
class _Launch:
    """How `attend_kernel` is launched."""

    rows: int
    splits: int
    per_split: int
    positions: Tensor | None
    constexprs: dict[str, Any]
    options: dict[str, int]

    @classmethod
    def of(
        cls,
        query: Tensor,
        keys: PackedOperand,
        values: PackedOperand,
        rope: RopeOperand | None,
        places: Places | None,
        splits: int | None,
        asm: bool | None,
    ) -> "_Launch":
        """Check the operands and choose the specialisation."""
        batch, query_heads, queries, head_dim = query.shape
        heads, tokens = keys.scales.shape[1:]
        if values.scales.shape != keys.scales.shape or keys.scales.shape[0] != batch or query_heads % heads:
            msg = (
                f"queries {tuple(query.shape)} do not fit packed keys and values of (batch, heads, tokens) "
                f"{tuple(keys.scales.shape)} and {tuple(values.scales.shape)}"
            )
            raise ShapeError(msg)
        if head_dim != keys.plan.head_dim:
            msg = f"queries have {head_dim} channels, the keys {keys.plan.head_dim}"
            raise ShapeError(msg)
        if tokens == 0:
            msg = "there is no packed token: `combine` alone attends to the exact ones"
            raise UnsupportedError(msg)
        if rope is not None and places is None:
            msg = "keys coded without their phase need the places of their tokens"
            raise UnsupportedError(msg)
        rows = query_heads // heads * queries
        phase, positions = 0, None
        if rope is not None and places is not None:
            phase, positions = (_CONTIGUOUS if places.positions is None else _BY_TOKEN), places.positions
        shape = shape_of(keys.plan, values.plan, rows, phase, rope)
        constexprs = shape | {
            "K_SHAPE": side_shape(keys.plan, even=keys.even),
            "V_SHAPE": side_shape(values.plan, even=values.even),
            "ASM": use_asm(query.device) if asm is None else asm,
        }
        options = attend_options(phase)
        programs = batch * heads * triton.cdiv(rows, shape["G"])
        if splits is None:
            wanted = _PROGRAMS[options["num_warps"]] * _multiprocessors(query.device)
            splits = min(triton.cdiv(wanted, programs), max(tokens // _LEAST_SPLIT, 1))
        per_split = triton.cdiv(triton.cdiv(tokens, splits), shape["BN"]) * shape["BN"]
        return cls(rows, triton.cdiv(tokens, per_split), per_split, positions, constexprs, options)


def side_shape(plan: SidePlan, *, even: bool) -> tuple[int, int, int, bool]:
    """Return what a kernel knows of a side when it is compiled."""
    return (plan.padded_blocks, plan.row_bytes, plan.rates, even)


def attend_options(phase: int) -> dict[str, int]:
    """Return the options that `attend_kernel` is compiled with."""
    return {"num_warps": 4 if phase else 1, "num_stages": 2, "enable_fp_fusion": True}


def shape_of(keys: SidePlan, values: SidePlan, rows: int, phase: int, rope: RopeOperand | None) -> dict[str, Any]:
    """Return the sizes that `attend_kernel` is compiled for."""
    pairs = 0 if rope is None or not phase else rope.pairs
    return {
        "D": keys.head_dim,
        "PADDED_D": triton.next_power_of_2(keys.head_dim),
        "DV": values.head_dim,
        "G": min(max(triton.next_power_of_2(rows), 8), _MOST_QUERIES),
        "BN": 64 if max(keys.padded_blocks, values.padded_blocks) <= 16 else 32,
        "PHASE": phase,
        "PAIRS": pairs,
        "PADDED_PAIRS": max(triton.next_power_of_2(pairs), 16) if pairs else 0,
        "INTERLEAVED": rope is not None and bool(phase) and rope.interleaved,
    }


def compile_cases() -> Iterator[CompileCase]:
    """Yield what a model with a group of 4 and the default bits would launch."""
    for name, head_dim, phase in (
        ("attend d=128 after the phase", 128, 0),
        ("attend d=64 after the phase", 64, 0),
        ("attend d=128 in the loop, contiguous", 128, _CONTIGUOUS),
        ("attend d=128 in the loop, by token", 128, _BY_TOKEN),
    ):
        blocks = head_dim // 8
        pairs = head_dim // 2 if phase else 0
        constexprs: dict[str, Any] = {
            "D": head_dim,
            "PADDED_D": head_dim,
            "DV": head_dim,
            "G": 8,
            "BN": 64,
            "K_SHAPE": (blocks, blocks * 7 // 4, _ALL_RATES, True),
            "V_SHAPE": (blocks, blocks * 9 // 4, _ALL_RATES, True),
            "PHASE": phase,
            "PAIRS": pairs,
            "PADDED_PAIRS": pairs,
            "INTERLEAVED": False,
            "SOFTCAP": False,
            "ASM": True,
            "hidden": None,
        }
        absent = ("positions",) if phase == _CONTIGUOUS else () if phase else ("positions", "low", "high")
        types = {
            **dict.fromkeys(("k_words", "k_scales", "v_words", "v_scales"), "*u8"),
            **dict.fromkeys(("k_numbers", "k_plans", "v_numbers", "v_plans", "positions"), "*i32"),
            **dict.fromkeys(("sums", "lse", "k_step", "k_factor", "low", "high"), "*fp32"),
            "query": "*bf16",
            "k_axes": "*i8",
            "k_mean": "*fp16",
            "scaling": "fp32",
            "softcap": "fp32",
        }
        constexprs |= dict.fromkeys(absent)
        yield compile_case(name, attend_kernel, types, constexprs, attend_options(phase), 64)
    types = {
        **dict.fromkeys(("query", "keys", "values", "out"), "*bf16"),
        **dict.fromkeys(("sums", "lse", "step", "factor"), "*fp32"),
        "axes": "*i8",
        "mean": "*fp16",
        "scaling": "fp32",
        "softcap": "fp32",
    }
    constexprs = _combine_shape(128, 128) | {"SOFTCAP": False, "BOOLEAN": False, "mask": None, "sink_logits": None}
    options = _combine_options(128)
    yield compile_case("combine d=128", combine_kernel, types, constexprs, options, constexprs["BLOCK"])
