"""The compiled search for codes and scales: that of `codec.torch.encode`, operation by operation.

Some dozens of vectors are encoded together, channel by channel.  Sums have the order that they have in plain torch and
nothing is fused, so that the codes are the same.
"""

import numpy as np
from numba import types

from nexusquant_cache.codec.cpu.compiled import array, entry, exact_part

CHUNK = 128
"""Vectors that are encoded together."""

_BLOCK = 8
_ZERO, _ONE = np.float32(0), np.float32(1)
_TINY = np.finfo(np.float32).tiny
_NONE = np.uint8(_BLOCK)  # no channel takes its second choice


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
def _nearest(x, thresholds, values, odd, work, cells, sums, flags, q, choices):
    """Find the codewords nearest to blocks of 8 channels; see `codec.blocks.nearest`.

    Args:
        x: Channels, scaled.
        thresholds: Where the candidates of a channel change.
        values: First and second candidate in coset 0, then in coset 1, between thresholds.
        odd: Parity of the first ones: of coset 0 in bit 0, of coset 1 in bit 4.
        work: Room for two numbers of each channel.
        cells: Room for a number of each channel.
        sums: Room for four numbers of each block.
        flags: Room for five numbers of each block.
        q: Where to: the values.
        choices: Where to: which candidates these are.
    """
    cells[:] = 0
    for threshold in thresholds:
        for i in range(_BLOCK * CHUNK):
            cells[i] += x[i] > threshold
    parity, repairs, channel, best_channel, wide = flags[0], flags[1], flags[2], flags[3], flags[4]
    least, total, best_total = sums[0], sums[1], sums[2]
    parity[:] = 0
    for k in range(_BLOCK):
        cell = cells[k * CHUNK : (k + 1) * CHUNK]
        for i in range(CHUNK):
            parity[i] += odd[cell[i]]
    errors, costs = work[0], work[1]
    count = len(thresholds) + 1
    for coset in range(2):
        first, second = values[2 * coset * count :], values[(2 * coset + 1) * count :]
        for i in range(_BLOCK * CHUNK):
            a, b = x[i] - first[cells[i]], x[i] - second[cells[i]]
            errors[i] = a * a
            costs[i] = b * b - a * a
        least[:], channel[:] = costs[:CHUNK], 0
        for k in range(1, _BLOCK):
            cost = costs[k * CHUNK : (k + 1) * CHUNK]
            for i in range(CHUNK):
                is_less = cost[i] < least[i]
                channel[i] = np.uint8(k) if is_less else channel[i]
                least[i] = cost[i] if is_less else least[i]
        _sum_rows(errors, _BLOCK)
        for i in range(CHUNK):
            repairs[i] = (parity[i] >> np.uint8(4 * coset) & 1) != coset
            total[i] = errors[i] + (least[i] if repairs[i] else _ZERO)
            channel[i] = channel[i] if repairs[i] else _NONE
        if coset == 0:
            best_total[:], best_channel[:], wide[:] = total, channel, 0
        else:
            for i in range(CHUNK):
                is_nearer = total[i] < best_total[i]  # a tie goes to coset 0
                best_channel[i] = channel[i] if is_nearer else best_channel[i]
                wide[i] = is_nearer
    for k in range(_BLOCK):
        place = slice(k * CHUNK, (k + 1) * CHUNK)
        cell, choice, value = cells[place], choices[place], q[place]
        for i in range(CHUNK):
            choice[i] = cell[i] + (2 * wide[i] + (best_channel[i] == k)) * count
        for i in range(CHUNK):
            value[i] = values[choice[i]]


@exact_part
def _write_words(choices, code_bits, bits, word, odd, count, words):
    """Write the codes of a block of some vectors."""
    for i in range(count):
        code = 0
        for k in range(_BLOCK):
            code |= code_bits[k, choices[k * CHUNK + i]]
        row = words[i]
        for byte in range(2 * (bits // 2)):
            row[word + byte] = code >> 8 * byte & 0xFF
        if bits % 2:
            row[odd] = code >> 8 * (bits - 1) & 0xFF


@entry(
    array(types.float32, 3, strided=True),
    array(types.float32, 2),
    array(types.int32, 3),
    array(types.float32, 1),
    array(types.float32, 2),
    array(types.float32, 2),
    array(types.uint8, 2),
    array(types.int64, 3),
    array(types.int64, 1),
    types.int64,
    types.int64,
    array(types.uint8, 3),
    array(types.float32, 2),
)
def encode(
    vectors, weights, blocks, candidates, thresholds, values, odd, code_bits, counts, worker, workers, words, scales
):
    """Encode rotated vectors.

    Args:
        vectors: Coded channels, ``[heads, n, d]``, finite.
        weights: How much each block weighs in products; 0 for blocks without bits.
        blocks: For each head and block its bits, its first byte in a row, and its odd byte.
        candidates: Scales to try, relative to the root mean square.
        thresholds: By rate, see `_nearest`; as many as ``counts`` says.
        values: By rate.
        odd: By rate.
        code_bits: By rate and channel, what each choice adds to the code.
        counts: How many thresholds each rate has.
        worker: Number of this thread.
        workers: How many there are.
        words: Where to: the packed rows.
        scales: Where to: the scales.
    """
    heads, tokens, dim = vectors.shape
    size, several = dim // _BLOCK, -(-tokens // CHUNK)
    y, scaled, q = (np.empty(dim * CHUNK, np.float32), np.empty(_BLOCK * CHUNK, np.float32),
                    np.empty(_BLOCK * CHUNK, np.float32))  # fmt: skip
    work, cells = np.empty((2, _BLOCK * CHUNK), np.float32), np.empty(_BLOCK * CHUNK, np.uint8)
    sums, flags = np.empty((4, CHUNK), np.float32), np.empty((5, CHUNK), np.uint8)
    inner, norm = np.empty(size * CHUNK, np.float32), np.empty(size * CHUNK, np.float32)
    choices, best_choices = np.empty(dim * CHUNK, np.uint8), np.empty(dim * CHUNK, np.uint8)
    peak, power, inverse = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    fit, best_fit = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    now_inner, now_norm, best_norm = (
        np.empty(CHUNK, np.float32),
        np.empty(CHUNK, np.float32),
        np.empty(CHUNK, np.float32),
    )
    coded, factor, better = np.empty(size, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint8)
    begin, end = heads * several * worker // workers, heads * several * (worker + 1) // workers
    for number in range(begin, end):
        head, at = number // several, number % several * CHUNK
        count, place = min(CHUNK, tokens - at), blocks[head]
        peak[:] = _TINY
        y[:] = _ZERO
        _by_channel(vectors[head, at : at + count], y)
        for c in range(dim):
            row = y[c * CHUNK : (c + 1) * CHUNK]
            for i in range(CHUNK):
                peak[i] = max(peak[i], abs(row[i]))
        channels = 0
        for block in range(size):
            coded[block] = _ONE if place[0, block] else _ZERO
            channels += _BLOCK if place[0, block] else 0
            for k in range(_BLOCK):
                row = y[(block * _BLOCK + k) * CHUNK : (block * _BLOCK + k + 1) * CHUNK]
                square = scaled[k * CHUNK : (k + 1) * CHUNK]
                for i in range(CHUNK):
                    row[i] /= peak[i]
                    square[i] = row[i] * row[i]
            _sum_rows(scaled, _BLOCK)
            inner[block * CHUNK : (block + 1) * CHUNK] = scaled[:CHUNK]
        for block in range(size):
            row = inner[block * CHUNK : (block + 1) * CHUNK]
            for i in range(CHUNK):
                row[i] *= coded[block]
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
                    own = y[block * _BLOCK * CHUNK : (block + 1) * _BLOCK * CHUNK]
                    for k in range(_BLOCK):
                        given, row = own[k * CHUNK : (k + 1) * CHUNK], scaled[k * CHUNK : (k + 1) * CHUNK]
                        for i in range(CHUNK):
                            row[i] = given[i] * factor[i]
                    limits = counts[bits]
                    _nearest(
                        scaled, thresholds[bits, :limits], values[bits], odd[bits], work, cells, sums,
                        flags, q, choices[block * _BLOCK * CHUNK :],
                    )  # fmt: skip
                    for i in range(_BLOCK * CHUNK):
                        scaled[i], q[i] = own[i] * q[i], q[i] * q[i]
                    _sum_rows(scaled, _BLOCK)
                    _sum_rows(q, _BLOCK)
                    inner[block * CHUNK : (block + 1) * CHUNK] = scaled[:CHUNK]
                    norm[block * CHUNK : (block + 1) * CHUNK] = q[:CHUNK]
            _weighted_sum(inner, size, weights[head], now_inner)
            _weighted_sum(norm, size, weights[head], now_norm)
            for i in range(CHUNK):
                fit[i] = now_inner[i] * now_inner[i] / max(now_norm[i], _TINY)
            if trial == 0:
                best_fit[:], best_norm[:], best_choices[:] = fit, now_norm, choices
            else:
                for i in range(CHUNK):
                    better[i] = fit[i] > best_fit[i]
                    best_fit[i] = fit[i] if better[i] else best_fit[i]
                    best_norm[i] = now_norm[i] if better[i] else best_norm[i]
                for c in range(dim):
                    best, new = best_choices[c * CHUNK : (c + 1) * CHUNK], choices[c * CHUNK : (c + 1) * CHUNK]
                    for i in range(CHUNK):
                        best[i] = new[i] if better[i] else best[i]
        for i in range(count):
            scale = np.sqrt(power[i] / max(best_norm[i], _TINY)) if power[i] > _ZERO else _ZERO
            scales[head, at + i] = scale * peak[i]
        for block in range(size):
            bits = place[0, block]
            if bits:
                _write_words(
                    best_choices[block * _BLOCK * CHUNK :], code_bits[bits], bits, place[1, block], place[2, block],
                    count, words[head, at:],
                )  # fmt: skip
