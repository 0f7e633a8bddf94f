"""The compiled search for codes and scales: that of `codec.torch.encode`.

Some vectors are rotated and encoded together, channel by channel, so that every operation is one of vector
instructions.  The search itself has the order of operations of plain torch, and fuses none, so that the codes are the
same; rotated channels are rounded once, from float64.
"""

import numpy as np
import torch
from numba import types

from nexusquant_cache.codec.blocks import cells_of
from nexusquant_cache.codec.cpu.compiled import Function, array, entry, exact_part, inlined, part
from nexusquant_cache.codec.layout import block_code

CHUNK = 32
"""Vectors that are encoded together: the channels of so many stay in the nearest cache of a core."""

_BLOCK = 8
_LANES = np.uint64(CHUNK)
# Where things are in the room for a block of vectors: of both cosets first and second choices, errors and costs, ...
_ROW = np.uint64(_BLOCK * CHUNK)
_SCALED = np.uint64(8 * _BLOCK * CHUNK)  # ... what is coded, ...
_VALUE = np.uint64(9 * _BLOCK * CHUNK)  # ... its code's values, ...
_TOTALS = np.uint64(10 * _BLOCK * CHUNK)  # ... of each vector and coset a sum, ...
_MOVED = np.uint64((10 * _BLOCK + 2) * CHUNK)  # ... and the channel that takes its second choice.
_ROOM = (10 * _BLOCK + 4) * CHUNK
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_TINY = np.finfo(np.float32).tiny
_NONE = np.float32(_BLOCK)  # no channel takes its second choice


@part
def _rotate(vectors, mean, axes, inverse_lengths, x, sums, y):
    """Write the products of centred vectors with axes of length 1, over the lengths, channel by channel.

    Args:
        vectors: ``[n, d]``, at most `CHUNK`.
        mean: What is subtracted.
        axes: ``[d, d]`` float64, one in a row.
        inverse_lengths: Of the axes, float64.
        x: Room for the vectors in float64.
        sums: Room for four channels of them.
        y: Where to.
    """
    dim = vectors.shape[1]
    for i in range(vectors.shape[0]):
        vector = vectors[i]
        for c in range(dim):
            x[np.uint64(c * CHUNK + i)] = vector[c] - mean[c]
    s0, s1, s2, s3 = sums[:CHUNK], sums[CHUNK : 2 * CHUNK], sums[2 * CHUNK : 3 * CHUNK], sums[3 * CHUNK : 4 * CHUNK]
    for c in range(0, dim, 4):
        sums[:] = 0.0
        for k in range(0, dim, 4):
            a0, a1, a2, a3 = axes[c, k], axes[c, k + 1], axes[c, k + 2], axes[c, k + 3]
            b0, b1, b2, b3 = axes[c + 1, k], axes[c + 1, k + 1], axes[c + 1, k + 2], axes[c + 1, k + 3]
            c0, c1, c2, c3 = axes[c + 2, k], axes[c + 2, k + 1], axes[c + 2, k + 2], axes[c + 2, k + 3]
            d0, d1, d2, d3 = axes[c + 3, k], axes[c + 3, k + 1], axes[c + 3, k + 2], axes[c + 3, k + 3]
            four = x[k * CHUNK :]
            for i in range(CHUNK):
                x0, x1, x2, x3 = four[i], four[CHUNK + i], four[2 * CHUNK + i], four[3 * CHUNK + i]
                s0[i] += (x0 * a0 + x1 * a1) + (x2 * a2 + x3 * a3)
                s1[i] += (x0 * b0 + x1 * b1) + (x2 * b2 + x3 * b3)
                s2[i] += (x0 * c0 + x1 * c1) + (x2 * c2 + x3 * c3)
                s3[i] += (x0 * d0 + x1 * d1) + (x2 * d2 + x3 * d3)
        for j in range(4):
            over_length = inverse_lengths[c + j]
            for i in range(CHUNK):
                y[np.uint64((c + j) * CHUNK + i)] = sums[np.uint64(j * CHUNK + i)] * over_length


@exact_part
def _by_channel(vectors, y):
    """Write vectors channel by channel."""
    for i in range(vectors.shape[0]):
        vector = vectors[i]
        for c in range(vectors.shape[1]):
            y[np.uint64(c * CHUNK + i)] = vector[c]


@exact_part
def _sum_rows(x, rows):
    """Sum over rows of `CHUNK` numbers, by halves, into the first row."""
    while rows > 1:
        half = rows // 2
        more = x[half * CHUNK :]
        for i in range(half * CHUNK):
            x[i] += more[i]
        if rows % 2:
            x[half * CHUNK : (half + 1) * CHUNK] = x[2 * half * CHUNK : (2 * half + 1) * CHUNK]
        rows = half + rows % 2


@exact_part
def _weighted_sum(by_block, blocks, weights, out):
    """Sum over blocks, each times its weight."""
    for block in range(blocks):
        weight = weights[block]
        row = by_block[block * CHUNK : (block + 1) * CHUNK]
        for i in range(CHUNK):
            row[i] *= weight
    _sum_rows(by_block, blocks)
    out[:] = by_block[:CHUNK]


@exact_part
def _add_peaks(y, at, peak):
    """Let each vector's peak be no less than a channel of a block."""
    for i in range(_LANES):
        most = peak[i]
        for k in range(np.uint64(_BLOCK)):
            here = abs(y[at + k * _LANES + i])
            most = here if here > most else most  # noqa: FURB136 - `max` is no vector instruction here
        peak[i] = most


@exact_part
def _normalise(y, at, peak, factor, squares):
    """Divide a block by its vector's peak, and write the sum of its squares, times a factor."""
    for k in range(np.uint64(_BLOCK)):
        for i in range(_LANES):
            y[at + k * _LANES + i] /= peak[i]
    for i in range(_LANES):
        x0, x1, x2, x3 = y[at + i], y[at + _LANES + i], y[at + 2 * _LANES + i], y[at + 3 * _LANES + i]
        x4, x5, x6, x7 = (
            y[at + 4 * _LANES + i], y[at + 5 * _LANES + i], y[at + 6 * _LANES + i], y[at + 7 * _LANES + i]
        )  # fmt: skip
        first, second = (x0 * x0 + x4 * x4) + (x2 * x2 + x6 * x6), (x1 * x1 + x5 * x5) + (x3 * x3 + x7 * x7)
        squares[at // np.uint64(_BLOCK) + i] = (first + second) * factor


@inlined
def _sum_channels(x, i):
    """Sum the eight channels of a vector's block, by halves."""
    first = (x[i] + x[4 * _LANES + i]) + (x[2 * _LANES + i] + x[6 * _LANES + i])
    second = (x[_LANES + i] + x[5 * _LANES + i]) + (x[3 * _LANES + i] + x[7 * _LANES + i])
    return first + second


def _ladder(values, thresholds):
    """Return a function of a number: the last of these values whose threshold is below it, or the first value.

    Both are constants to the compiler, which unrolls the loop: comparisons are left, and no branch.
    """
    steps, lowest = len(thresholds), np.float32(values[0])
    values, thresholds = np.array(values[1:], np.float32), np.array(thresholds, np.float32)

    @inlined
    def found(x):
        value = lowest
        for step in range(steps):
            value = values[step] if x > thresholds[step] else value
        return value

    return found


def _chooser(coset: int, first_of: Function, second_of: Function, number_of: Function) -> Function:
    """Return a function that finds the two levels of a coset that are nearest to each channel."""
    first, second, error, cost = (np.uint64((4 * coset + row) * _ROW) for row in range(4))
    total = np.uint64(_TOTALS + coset * CHUNK)

    @exact_part
    def choose(room):
        for i in range(_ROW):
            x = room[_SCALED + i]
            near, next_to_it = first_of(x), second_of(x)
            a, b = x - near, x - next_to_it
            room[first + i] = near
            room[second + i] = next_to_it
            room[error + i] = a * a
            room[cost + i] = b * b - a * a
            room[_VALUE + i] = number_of(x)
        for i in range(_LANES):
            room[total + i] = _sum_channels(room, _VALUE + i)

    return choose


def _repairer(coset: int) -> Function:
    """Return a function that finds a vector's error in a coset, and the channel that takes its second choice."""
    error, cost = (np.uint64((4 * coset + row) * _ROW) for row in (2, 3))
    total, moved = np.uint64(_TOTALS + coset * CHUNK), np.uint64(_MOVED + coset * CHUNK)

    @exact_part
    def repair(room):
        for i in range(_LANES):
            least, channel = room[cost + i], _ZERO
            for k in range(1, _BLOCK):
                here = room[cost + np.uint64(k) * _LANES + i]
                is_less = here < least
                channel = np.float32(k) if is_less else channel
                least = here if is_less else least
            half = (room[total + i] + np.float32(coset)) * _HALF  # coset 0 wants an even sum, coset 1 an odd one
            is_right = half == np.floor(half)
            room[moved + i] = _NONE if is_right else channel
            room[total + i] = _sum_channels(room, error + i) + (_ZERO if is_right else least)

    return repair


@exact_part
def _take(y, at, room, q, inner, norm, block):
    """Take the nearer coset; coset 0 if both are equally near."""
    for i in range(_LANES):
        is_wide = room[_TOTALS + _LANES + i] < room[_TOTALS + i]
        one, two = room[_MOVED + i], room[_MOVED + _LANES + i]
        room[_MOVED + i] = two if is_wide else one
        room[_TOTALS + i] = _ONE if is_wide else _ZERO
    for k in range(np.uint64(_BLOCK)):
        here = k * _LANES
        for i in range(_LANES):
            is_wide, is_moved = room[_TOTALS + i] > _ZERO, room[_MOVED + i] == np.float32(k)
            # All four are read, so that it is a choice between numbers, and no branch.
            first, second = room[here + i], room[_ROW + here + i]
            wide, second_wide = room[4 * _ROW + here + i], room[5 * _ROW + here + i]
            first, second = wide if is_wide else first, second_wide if is_wide else second
            value = second if is_moved else first
            room[_VALUE + here + i] = value
            room[3 * _ROW + here + i] = value * value
    for i in range(_ROW):
        q[at + i] = room[_VALUE + i]
    for i in range(_ROW):
        room[2 * _ROW + i] = y[at + i] * room[_VALUE + i]
    for i in range(_LANES):
        inner[block + i] = _sum_channels(room, 2 * _ROW + i)
    for i in range(_LANES):
        norm[block + i] = _sum_channels(room, 3 * _ROW + i)


_repair_0, _repair_1 = _repairer(0), _repairer(1)


def _at_rate(bits: int) -> tuple[Function, Function]:
    """Return the two functions for blocks of so many bits per channel."""
    cells = cells_of(bits, torch.device("cpu"))
    thresholds = np.array(cells.thresholds, np.float32)

    def ladder(values, numbers=False):
        changes = values[1:] != values[:-1]
        steps = [values[0], *values[1:][changes]]
        return _ladder(range(len(steps)) if numbers else steps, thresholds[changes])

    values = cells.values.numpy()
    choose_0 = _chooser(0, ladder(values[0]), ladder(values[1]), ladder(values[0], numbers=True))
    choose_1 = _chooser(1, ladder(values[2]), ladder(values[3]), ladder(values[2], numbers=True))
    magnitudes = np.array(block_code(bits).magnitudes)
    field_of = _ladder(range(len(magnitudes)), (magnitudes[1:] + magnitudes[:-1]) / 2)

    @exact_part
    def nearest(y, at, factor, room, q, inner, norm, block):
        """Find the codewords nearest to blocks of 8 channels; see `codec.blocks.nearest`.

        Args:
            y: Channels of the vectors.
            at: Where those of the blocks begin among them.
            factor: What to multiply the vectors with.
            room: `_ROOM` numbers.
            q: Where to: the values, at the same place as the channels.
            inner: Where to, at ``block``: their products with the vectors, summed.
            norm: Where to, at ``block``: their squares, summed.
            block: Which block it is, times `CHUNK`.
        """
        for k in range(np.uint64(_BLOCK)):
            here = k * _LANES
            for i in range(_LANES):
                room[_SCALED + here + i] = y[at + here + i] * factor[i]
        choose_0(room)
        choose_1(room)
        _repair_0(room)
        _repair_1(room)
        _take(y, at, room, q, inner, norm, block)

    @exact_part
    def code_of(q, fields, shifts, code):
        """Write the codes of some blocks.

        Args:
            q: Their values.
            fields: Room for a number of each channel.
            shifts: For each channel, the place of each bit of its field.
            code: Where to.
        """
        for i in range(_ROW):
            fields[i] = field_of(abs(q[i]))
        for i in range(_LANES):
            code[i] = 0
        for k in range(np.uint64(_BLOCK)):
            for bit in range(bits):
                place = np.uint32(1 << shifts[k, bit])
                for i in range(_LANES):
                    code[i] |= place if fields[k * _LANES + i] >> bit & 1 else np.uint32(0)

    return nearest, code_of


_nearest_1, _code_1 = _at_rate(1)
_nearest_2, _code_2 = _at_rate(2)
_nearest_3, _code_3 = _at_rate(3)
_nearest_4, _code_4 = _at_rate(4)


@exact_part
def _nearest(bits, y, at, factor, room, q, inner, norm, block):
    if bits == 1:
        _nearest_1(y, at, factor, room, q, inner, norm, block)
    elif bits == 2:
        _nearest_2(y, at, factor, room, q, inner, norm, block)
    elif bits == 3:
        _nearest_3(y, at, factor, room, q, inner, norm, block)
    else:
        _nearest_4(y, at, factor, room, q, inner, norm, block)


@exact_part
def _write_words(bits, q, fields, shifts, code, word, odd, count, words):
    """Write the codes of a block of some vectors into their rows."""
    if bits == 1:
        _code_1(q, fields, shifts, code)
    elif bits == 2:
        _code_2(q, fields, shifts, code)
    elif bits == 3:
        _code_3(q, fields, shifts, code)
    else:
        _code_4(q, fields, shifts, code)
    for i in range(count):
        row, number = words[i], code[i]
        for byte in range(2 * (bits // 2)):
            row[word + byte] = number >> np.uint32(8 * byte) & 0xFF
        if bits % 2:
            row[odd] = number >> np.uint32(8 * (bits - 1)) & 0xFF


@entry(
    array(types.float32, 3, strided=True),
    array(types.float32, 2),
    array(types.float64, 3),
    array(types.float64, 2),
    array(types.float32, 2),
    array(types.int32, 3),
    array(types.float32, 1),
    array(types.uint32, 3),
    types.int64,
    types.int64,
    array(types.uint8, 3),
    array(types.float32, 2),
)
def encode(vectors, mean, axes, inverse_lengths, weights, blocks, candidates, shifts, worker, workers, words, scales):
    """Rotate and encode vectors.

    Args:
        vectors: ``[heads, n, d]``, finite.
        mean: What is subtracted from the vectors of each head.
        axes: Those of each head, with length 1; none if the vectors are rotated already.
        inverse_lengths: Of the axes.
        weights: How much each block weighs in products; 0 for blocks without bits.
        blocks: For each head and block its bits, its first byte in a row, and its odd byte.
        candidates: Scales to try, relative to the root mean square.
        shifts: By rate, for each channel, the place of each bit of its field.
        worker: Number of this thread.
        workers: How many there are.
        words: Where to: the packed rows.
        scales: Where to: the scales.
    """
    heads, tokens, dim = vectors.shape
    size, several = dim // _BLOCK, -(-tokens // CHUNK)
    x, sums = np.zeros(dim * CHUNK, np.float64), np.empty(4 * CHUNK, np.float64)
    y, q, best_q = np.zeros((3, dim * CHUNK), np.float32)
    room = np.empty(_ROOM, np.float32)
    fields, code = np.empty(_BLOCK * CHUNK, np.int32), np.empty(CHUNK, np.uint32)
    inner, norm = np.empty((2, size * CHUNK), np.float32)
    peak, power, inverse, factor, better = np.empty((5, CHUNK), np.float32)
    fit, best_fit, now_inner, now_norm, best_norm = np.empty((5, CHUNK), np.float32)
    begin, end = heads * several * worker // workers, heads * several * (worker + 1) // workers
    for number in range(begin, end):
        head, at = number // several, number % several * CHUNK
        count, place = min(CHUNK, tokens - at), blocks[head]
        if len(axes):
            _rotate(vectors[head, at : at + count], mean[head], axes[head], inverse_lengths[head], x, sums, y)
        else:
            _by_channel(vectors[head, at : at + count], y)
        peak[:] = _TINY
        channels = 0
        for block in range(size):
            _add_peaks(y, np.uint64(block) * _ROW, peak)
        for block in range(size):
            _normalise(y, np.uint64(block) * _ROW, peak, _ONE if place[0, block] else _ZERO, inner)
            channels += _BLOCK if place[0, block] else 0
        norm[:] = inner
        _sum_rows(norm, size)
        for i in range(CHUNK):
            rms = np.sqrt(norm[i] / np.float32(max(channels, 1)))
            inverse[i] = _ONE / rms if rms > _ZERO else _ZERO
        _weighted_sum(inner, size, weights[head], power)
        for trial in range(len(candidates)):
            inner[:], norm[:] = _ZERO, _ZERO
            for i in range(CHUNK):
                factor[i] = inverse[i] / candidates[trial]
            for block in range(size):
                bits = place[0, block]
                if bits:
                    at_block = np.uint64(block) * _LANES
                    _nearest(bits, y, at_block * np.uint64(_BLOCK), factor, room, q, inner, norm, at_block)
            _weighted_sum(inner, size, weights[head], now_inner)
            _weighted_sum(norm, size, weights[head], now_norm)
            for i in range(CHUNK):
                fit[i] = now_inner[i] * now_inner[i] / max(now_norm[i], _TINY)
            if trial == 0:
                best_fit[:], best_norm[:] = fit, now_norm
                best_q, q = q, best_q
            else:
                for i in range(CHUNK):
                    better[i] = _ONE if fit[i] > best_fit[i] else _ZERO
                    best_norm[i] = now_norm[i] if fit[i] > best_fit[i] else best_norm[i]
                    best_fit[i] = max(fit[i], best_fit[i])
                for c in range(dim):
                    best, new = best_q[c * CHUNK : (c + 1) * CHUNK], q[c * CHUNK : (c + 1) * CHUNK]
                    for i in range(CHUNK):
                        value, other = best[i], new[i]
                        best[i] = other if better[i] > _ZERO else value
        for i in range(count):
            scale = np.sqrt(power[i] / max(best_norm[i], _TINY)) if power[i] > _ZERO else _ZERO
            scales[head, at + i] = scale * peak[i]
        for block in range(size):
            bits = place[0, block]
            if bits:
                _write_words(
                    bits, best_q[block * _BLOCK * CHUNK :], fields, shifts[bits], code, place[1, block],
                    place[2, block], count, words[head, at:],
                )  # fmt: skip
