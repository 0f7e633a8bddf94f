"""Compiled attention on the codes, and decoding: some dozens of tokens of a head at a time.

All is channel by channel, and the innermost loops run along the tokens of a chunk: they vectorize whatever the head
dimension, and a chunk stays in the first two levels of a core's cache.  For each head and chunk

- a block of 8 channels is decoded by arithmetic, without tables: its levels are small whole numbers (`_decode_block`);
- their products with the axes of the head, whole numbers too, are added up (`add_whole_products`).  That is
  the largest part of the work, and done only for keys, and of these for channels that turn with the position.  For the
  others the axes are folded into the queries, once for each head;
- the phase is put back, by sines that are computed on the way (`_turn`): no table of positions is made or kept;
- the softmax goes on from chunk to chunk (`_weigh`);
- values are summed as coded channels; the sum is rotated at the end.

Blocks without bits cost nothing.  The work may be shared between threads: each takes a range of the chunks of all heads
(`attend`), and what they have found is put together (`_finish`).

References:
    Milakov & Gimelshein (2018), "Online normalizer calculation for softmax", arXiv:1805.02867.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nexusquant_cache.codec.cpu.compiled import array, entry, exact_part, part
from nexusquant_cache.codec.layout import COMPANDER

CHUNK = 64
"""Tokens of a head that are treated together: with so few, sums of products stay in the first level of a cache."""
SHARE, BOTH, FINISH = 0, 1, 2
"""Stages of `attend`."""
_BLOCK = 8
_PAIRS = 4  # of channels that are turned together

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_INT16 = np.float32(32767)
_FAR = np.float32(-np.inf)

# The levels of a rate in units of `_UNITS`: ``step * field + offset``, and more beyond a bound, as in `layout`.
_UNITS = (0, 128, 128, 64, 16)  # in units of 2 ** -24
_LEVELS = np.array([COMPANDER[bits][2] * unit if bits else 0 for bits, unit in enumerate(_UNITS)], np.float32)
_STEPS = np.array([0, 4, 6, 6, 14], np.int16)
_OFFSETS = np.array([0, 3, 3, 3, 7], np.int16)

_SCALES = np.exp2((np.arange(256) - 128) / 16).astype(np.float32)
_SCALES[0] = 0

# exp by Cody and Waite: a power of two, and a polynomial found by least squares, to 1e-7.
_LEAST = np.float32(-87)
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = np.float32(1.5 * 2**23)  # a number added to it is rounded to a whole one, in its lowest bits
_E5, _E4, _E3, _E2 = (np.float32(x) for x in (0.008312422568, 0.041889963256, 0.166671148143, 0.499992328724))

# sin(2 pi x) for |x| <= 1/4, found likewise, to 6e-7.
_S7, _S5, _S3, _S1 = (np.float32(x) for x in (-70.9934303559, 81.3407685692, -41.3371423612, 6.28316404423))
_QUARTER = np.float32(0.25)
_TURN = np.float32(2.0**-32)
_TURNS, _WHOLE = 1 / (2 * math.pi), 2.0**32


# Instructions


def _same_bits(target, kind):
    """Return what generates code that takes the 32 bits of a number for those of another type."""

    def generate(context, builder, signature, arguments):
        del context, signature
        return builder.bitcast(arguments[0], kind)

    return target, generate


@intrinsic
def float_of(typing_context, bits):
    """Return the float32 of 32 bits."""
    del typing_context, bits
    target, generate = _same_bits(types.float32, ir.FloatType())
    return target(types.uint32), generate


@intrinsic
def bits_of(typing_context, number):
    """Return the 32 bits of a float32."""
    del typing_context, number
    target, generate = _same_bits(types.uint32, ir.IntType(32))
    return target(types.float32), generate


@intrinsic
def shifted(typing_context, bits, places):
    """Return 16 bits, shifted down by fewer than 16 places; Python's shift is one of 64 bits here."""
    del typing_context, bits, places

    def generate(context, builder, signature, arguments):
        del context, signature
        return builder.lshr(*arguments)

    return types.uint16(types.uint16, types.uint16), generate


@intrinsic
def add_whole_products(
    typing_context,
    pairs,
    factors,
    unit,
    sums,
    rows,
):
    """Add to each row of sums that of 8 channels, each times its factor for that row, times a unit.

    It is written for the compiler because none makes of loops over 16-bit numbers what processors have for them: an
    instruction that multiplies pairs of them and adds the two products.  Two rows are done at once, to load channels
    for both.

    Args:
        typing_context: The compiler's.
        pairs: Channels of tokens: for each two channels `CHUNK` pairs, int16.
        factors: For each row those of the 8 channels, int16.
        unit: Unit of the factors, float32.
        sums: For each row those of `CHUNK` tokens, float32.
        rows: How many rows there are; an even number.
    """
    del typing_context
    return types.void(pairs, factors, unit, sums, rows), _generate_products


def _generate_products(context, builder, signature, arguments):
    pairs, factors, sums = (
        builder.bitcast(context.make_array(signature.args[k])(context, builder, arguments[k]).data, kind.as_pointer())
        for k, kind in ((0, _I32), (1, _I32), (3, _F32))
    )
    rows, index = arguments[4], arguments[4].type
    unit = _spread(builder, arguments[2], _SUMS)

    def number(value):
        return ir.Constant(index, value)

    def at(start, place, kind):
        return builder.bitcast(builder.gep(start, [place]), kind.as_pointer())

    with cgutils.for_range(builder, builder.udiv(rows, number(2))) as half:
        row = builder.mul(half.index, number(2))
        first = builder.mul(row, number(4))
        spread = []
        for k in range(8):
            factor = builder.load(builder.gep(factors, [builder.add(first, number(k))]))
            spread.append(builder.bitcast(_spread(builder, factor, _DOTS), _TWOS))
        with cgutils.for_range(builder, number(CHUNK // _LANES)) as loop:
            token = builder.mul(loop.index, number(_LANES))
            loaded = [builder.load(at(pairs, builder.add(token, number(k * CHUNK)), _TWOS), align=2) for k in range(4)]
            for k in range(2):
                start = builder.mul(builder.add(row, number(k)), number(CHUNK))
                place = at(sums, builder.add(start, token), _SUMS)
                total = _two_products(context, builder, loaded[0], spread[4 * k])
                for x, y in zip(loaded[1:], spread[4 * k + 1 : 4 * k + 4], strict=True):
                    total = builder.add(total, _two_products(context, builder, x, y))
                added = builder.fmul(builder.sitofp(total, _SUMS), unit, flags=("contract",))
                builder.store(builder.fadd(builder.load(place, align=4), added, flags=("contract",)), place, align=4)
    return context.get_dummy_value()


_LANES = 8
_I32, _F32 = ir.IntType(32), ir.FloatType()
_TWOS, _DOTS = ir.VectorType(ir.IntType(16), 2 * _LANES), ir.VectorType(_I32, _LANES)
_SUMS = ir.VectorType(_F32, _LANES)


def _spread(builder, one, kind):
    """Return a number in all lanes."""
    empty = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(empty, one, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(_DOTS, [0] * _LANES))


def _two_products(context, builder, x, y):
    """Return the sum of the two products of each lane."""
    if _has_dots(context):
        kind = ir.FunctionType(_DOTS, [_TWOS, _TWOS])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd"), [x, y])
    found = []
    for first in (0, 1):
        lanes = ir.Constant(_DOTS, [2 * lane + first for lane in range(_LANES)])
        a, b = (builder.sext(builder.shuffle_vector(z, z, lanes), _DOTS) for z in (x, y))
        found.append(builder.mul(a, b))
    return builder.add(*found)


def _has_dots(context) -> bool:
    """Tell whether the processor has one instruction for that, by the name that we call."""
    return "+avx2" in context.codegen().magic_tuple()[2].split(",")


# Decoding


@part
def _decode_block(words, at, row_bytes, count, place, scratch, y):
    """Decode 8 channels of some rows, to whole numbers of `_UNITS`.

    Args:
        words: Packed rows.
        at: First byte of the first row.
        row_bytes: Bytes of a row.
        count: Rows.
        place: Bits of the block, its first byte in a row, and its odd byte.
        scratch: Room for three numbers of each row.
        y: Where to: each channel of `CHUNK` rows; those behind ``count`` get some level.
    """
    bits, word, odd = place[0], place[1], place[2]
    low, high, flips = scratch[0], scratch[1], scratch[2]
    low[:], high[:] = 0, 0
    if bits == 1:
        _copy_bytes(words, at + odd, row_bytes, count, low)
    else:
        _copy_words(words, at + word, row_bytes, count, low)
    if bits == 3:  # fields 5 to 7 are in the odd byte, but for one bit
        _copy_bytes(words, at + odd, row_bytes, count, high)
        for i in range(CHUNK):
            high[i] |= np.uint16(np.uint16(low[i] >> 15) << 8)
    elif bits == 4:
        _copy_words(words, at + word + 2, row_bytes, count, high)
    _parities(low, high, bits, flips)
    in_low = _BLOCK if bits < 3 else 8 - bits  # fields
    for k in range(_BLOCK):
        codes, place = (low, k) if k < in_low else (high, k - in_low)
        _decode_field(codes, flips, bits * place, bits, y[k * CHUNK : (k + 1) * CHUNK])


@part
def _copy_bytes(words, at, step, count, out):
    for i in range(count):
        out[i] = words[np.uint64(at + i * step)]  # unsigned: nothing is counted from the end


@part
def _copy_words(words, at, step, count, out):
    for i in range(count):
        p = np.uint64(at + i * step)
        out[i] = np.uint16(words[p]) | np.uint16(np.uint16(words[p + np.uint64(1)]) << 8)


@part
def _parities(low, high, bits, flips):
    """Write 1 for each block whose signs are flipped: the parity of the lowest two bits of all its fields."""
    of_low = np.uint16(0x36DB if bits == 3 else 0x3333 if bits == 4 else 0xFFFF)
    of_high = np.uint16(0x00DB if bits == 3 else 0x3333)
    for i in range(CHUNK):
        x = np.uint16((low[i] & of_low) ^ (high[i] & of_high))
        x = np.uint16(x ^ (x >> 8))
        x = np.uint16(x ^ (x >> 4))
        x = np.uint16(x ^ (x >> 2))
        flips[i] = np.uint16((x ^ (x >> 1)) & 1)


@part
def _decode_field(codes, flips, shift, bits, y):
    """Write the signed level of the field at one place."""
    field, step, offset = np.uint16((1 << bits) - 1), _STEPS[bits], _OFFSETS[bits]
    shift = np.uint16(shift)
    if bits == 1:
        for i in range(CHUNK):
            t = np.int16(shifted(codes[i], shift) & field)
            level = np.int16(step * t + offset)
            minus = np.int16(-((t ^ flips[i]) & 1))
            y[i] = np.int16((level ^ minus) - minus)
    elif bits == 4:
        for i in range(CHUNK):
            t = np.int16(shifted(codes[i], shift) & field)
            level = np.int16(step * t + offset)
            level = max(level, np.int16(2 * level - 128), np.int16(4 * level - 512))
            minus = np.int16(-((t ^ flips[i]) & 1))
            y[i] = np.int16((level ^ minus) - minus)
    else:
        bound = np.int16(16 if bits == 2 else 32)
        for i in range(CHUNK):
            t = np.int16(shifted(codes[i], shift) & field)
            level = np.int16(step * t + offset)
            level = max(level, np.int16(2 * level - bound))
            minus = np.int16(-((t ^ flips[i]) & 1))
            y[i] = np.int16((level ^ minus) - minus)


@part
def _interleave(y, pairs):
    """Put each two channels of a block side by side, as `add_whole_products` reads them."""
    for k in range(_BLOCK // 2):
        a, b = y[2 * k * CHUNK : (2 * k + 1) * CHUNK], y[(2 * k + 1) * CHUNK : (2 * k + 2) * CHUNK]
        out = pairs[2 * k * CHUNK : 2 * (k + 1) * CHUNK]
        for i in range(CHUNK):
            out[2 * i] = a[i]
            out[2 * i + 1] = b[i]


@part
def _to_float(y, out):
    for i in range(_BLOCK * CHUNK):
        out[i] = np.float32(y[i])


@part
def _add_products(channels, factors, channel, rows, out):
    """Add to each row the sum of 8 channels of `CHUNK` tokens, each times its factor for that row."""
    for row in range(rows):
        f0, f1 = factors[channel, row], factors[channel + 1, row]
        f2, f3 = factors[channel + 2, row], factors[channel + 3, row]
        f4, f5 = factors[channel + 4, row], factors[channel + 5, row]
        f6, f7 = factors[channel + 6, row], factors[channel + 7, row]
        sums, x = out[row * CHUNK : (row + 1) * CHUNK], channels
        for i in range(CHUNK):
            total = f0 * x[i] + f1 * x[i + CHUNK] + f2 * x[i + 2 * CHUNK] + f3 * x[i + 3 * CHUNK]
            total += f4 * x[i + 4 * CHUNK] + f5 * x[i + 5 * CHUNK] + f6 * x[i + 6 * CHUNK] + f7 * x[i + 7 * CHUNK]
            sums[i] += total


@part
def _scales(scales, at, count, out):
    """Write the scale of each row, relative to the reference, and 0 behind them."""
    for i in range(count):
        out[i] = _SCALES[scales[at + i]]
    for i in range(count, CHUNK):
        out[i] = _ZERO


# Axes


@part
def _of_head(x, row, head):
    """Return what a head has of its own, or shares with the other heads or rows."""
    return x[min(row, x.shape[0] - 1), min(head, x.shape[1] - 1)]


@part
def _units(axes, steps, reference, blocks, units, factors, unit):
    """Write what a level counts in each coded channel, and how axes are whole numbers of 16 bits.

    Args:
        axes: What each coded channel adds to a vector.
        steps: Unit of each axis for channels of unit variance.
        reference: Scale of byte 128.
        blocks: Bits of each block, and its places.
        units: Where to: unit of each axis for levels.
        factors: Where to: the same in a unit of the block, in which axes are numbers of 16 bits.
        unit: Where to: the unit of each block.
    """
    for block in range(blocks.shape[1]):
        level, largest = _LEVELS[blocks[0, block]] * reference, _ZERO
        for c in range(block * _BLOCK, (block + 1) * _BLOCK):
            units[c] = steps[c] * level
            most = np.int32(0)
            for number in axes[c]:
                most = max(most, abs(np.int32(number)))
            largest = max(largest, np.float32(most) * units[c])
        unit[block] = largest / _INT16 if largest > _ZERO else _ONE
        for c in range(block * _BLOCK, (block + 1) * _BLOCK):
            factors[c] = units[c] / unit[block]


@part
def _whole_axes(axes, factors, blocks, turning, interleaved, out):
    """Write the first channels of a head's axes in whole numbers, for `add_whole_products`.

    Args:
        axes: What each coded channel adds to a vector.
        factors: Of each axis, its unit in that of the result.
        blocks: Bits of each block, and its places.
        turning: How many channels of vectors are wanted.
        interleaved: Whether they stand in the result as here; else those of a pair ``(i, i + pairs)`` stand together.
        out: Where to: for each block and channel the 8 axes of the block.
    """
    pairs = turning // 2
    for c in range(axes.shape[0]):
        if blocks[0, c // _BLOCK]:
            axis, factor, to = axes[c], factors[c], (c // _BLOCK) * turning * _BLOCK + c % _BLOCK
            for second in range(2):
                for pair in range(pairs):
                    channel = 2 * pair + second if interleaved else pair + second * pairs
                    value = factor * np.float32(axis[channel])
                    out[to + (2 * pair + second) * _BLOCK] = np.int16(value + (_HALF if value > _ZERO else -_HALF))


# Phase


@part
def _turn(products, row, scales, mean, inv_freq, first, offsets, keys):
    """Write four pairs of channels of keys, turned: the first channels of the pairs, then the second ones.

    Args:
        products: Sums of products of levels and axes; those of a pair stand in rows one behind the other.
        row: The first row.
        scales: Scale of each key.
        mean: Mean key, by row.
        inv_freq: Radians per position of each pair.
        first: A position.
        offsets: Positions of the keys, from that one on.
        keys: Where to.
    """
    for k in range(_PAIRS):
        a, b = keys[k * CHUNK : (k + 1) * CHUNK], keys[(_PAIRS + k) * CHUNK : (_PAIRS + k + 1) * CHUNK]
        pair = row // 2 + k
        if pair >= len(inv_freq):
            a[:], b[:] = _ZERO, _ZERO
            continue
        x, y = products[2 * pair * CHUNK :], products[(2 * pair + 1) * CHUNK :]
        mean_x, mean_y = mean[2 * pair], mean[2 * pair + 1]
        # The angle in units of 2 ** -32 turns: whole turns drop out by themselves.
        turns = np.float64(inv_freq[pair]) * _TURNS
        start = np.uint32(np.int64((first * turns - np.floor(first * turns)) * _WHOLE))
        speed = np.uint32(np.int64((turns - np.floor(turns)) * _WHOLE))
        for i in range(CHUNK):
            turn = np.float32(np.int32(start + np.uint32(offsets[i]) * speed)) * _TURN
            size = abs(turn)
            c, s = _QUARTER - size, _QUARTER - abs(size - _QUARTER)
            c2, s2 = c * c, s * s
            cos = c * (_S1 + c2 * (_S3 + c2 * (_S5 + c2 * _S7)))
            sin = s * (_S1 + s2 * (_S3 + s2 * (_S5 + s2 * _S7)))
            sin = -sin if turn < _ZERO else sin
            u, v = x[i] * scales[i] + mean_x, y[i] * scales[i] + mean_y
            a[i] = u * cos - v * sin
            b[i] = v * cos + u * sin


# Softmax


@exact_part
def _exp(x):
    """Return exp of a number that is not positive; 0 below -87, NaN for NaN."""
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    value = _ONE + r + r * r * (_E2 + r * (_E3 + r * (_E4 + r * _E5)))
    power = float_of(np.uint32(np.uint32(bits_of(shifted) + np.uint32(127)) << np.uint32(23)))
    return _ZERO if x < _LEAST else value * power


@exact_part
def _cap(logits, softcap):
    """Bound logits."""
    for i in range(len(logits)):
        x = logits[i] / softcap
        e = _exp(-(abs(x) + abs(x)))
        bounded = softcap * ((_ONE - e) / (_ONE + e))
        logits[i] = -bounded if x < _ZERO else bounded


@exact_part
def _weigh(logits, count, maximum):
    """Turn the first logits into weights relative to the largest, of these or of those before, and the rest into 0.

    Returns:
        The new maximum, what earlier sums have to be multiplied with, and the sum of the weights.
    """
    found = maximum
    for i in range(count):
        found = logits[i] if logits[i] > found or np.isnan(logits[i]) else found
    if found == _FAR:  # nothing may be seen
        logits[:] = _ZERO
        return found, _ZERO, _ZERO
    for i in range(CHUNK):
        logits[i] = _exp(logits[i] - found)
    for i in range(count, CHUNK):
        logits[i] = _ZERO
    total = _ZERO
    for i in range(count):
        total += logits[i]
    return found, (_ZERO if maximum == _FAR else _exp(maximum - found)), total


@part
def _add_values(y, weights, rows, sums, first):
    """Add 8 channels of values, each times the weights, over all tokens of the chunk, for all queries."""
    for row in range(rows):
        w = weights[row * CHUNK : (row + 1) * CHUNK]
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = _ZERO
        for i in range(CHUNK):
            s0 += w[i] * y[i]
            s1 += w[i] * y[i + CHUNK]
            s2 += w[i] * y[i + 2 * CHUNK]
            s3 += w[i] * y[i + 3 * CHUNK]
            s4 += w[i] * y[i + 4 * CHUNK]
            s5 += w[i] * y[i + 5 * CHUNK]
            s6 += w[i] * y[i + 6 * CHUNK]
            s7 += w[i] * y[i + 7 * CHUNK]
        out = sums[row]
        out[first] += s0
        out[first + 1] += s1
        out[first + 2] += s2
        out[first + 3] += s3
        out[first + 4] += s4
        out[first + 5] += s5
        out[first + 6] += s6
        out[first + 7] += s7


# Positions and masks


@exact_part
def _places(bitmap, start, covered, tokens, positions):
    """Write where the kept tokens of a head stand; see `codec.positions.PositionMap`."""
    found = 0
    for byte in range((covered + 7) // 8):
        bits = bitmap[byte]
        for k in range(8):
            if bits >> k & 1 and found < tokens:
                positions[found] = start + 8 * byte + k
                found += 1
    for i in range(found, tokens):
        positions[i] = start + covered + i - found


@exact_part
def _mask(logits, count, positions, kind, shown, added):
    """Hide tokens, or add the mask's numbers to their logits.

    Args:
        logits: Of some tokens, for one query.
        count: How many.
        positions: Where these stand.
        kind: 0 for no mask, 1 for one that says what is shown, 2 for numbers.
        shown: What the query may see, by position.
        added: Numbers to add, by position.
    """
    for i in range(count):
        if kind == 2:
            logits[i] += added[positions[i]]
        if kind == 1 and not shown[positions[i]]:
            logits[i] = _FAR


# Attention


@part
def _fold_queries(q, axes, units, mean, blocks, rotary, interleaved, turned, folded, constants, means):
    """Write what products with queries are made of.

    Args:
        q: Scaled queries of the head, ``[rows, d]``.
        axes: Axes of the head.
        units: Their units.
        mean: Mean key.
        blocks: Bits of each block, and its places.
        rotary: How many channels turn.
        interleaved: How they are paired.
        turned: Channels of queries that turn, in the order that `_turn` writes keys in.
        folded: What each coded channel adds to a logit by channels that do not turn.
        constants: What the mean key adds by these.
        means: The mean key's channels that turn, those of a pair side by side.
    """
    rows, dim = q.shape
    turned[:], folded[:], constants[:] = _ZERO, _ZERO, _ZERO
    for row in range(rotary):
        pair, second = row // 2, row % 2
        channel = row if interleaved else pair + second * (rotary // 2)
        means[row] = mean[channel]
        to = pair // _PAIRS * 2 * _PAIRS + second * _PAIRS + pair % _PAIRS
        for r in range(rows):
            turned[to, r] = q[r, channel]
    if rotary == dim:
        return
    for c in range(dim):
        if blocks[0, c // _BLOCK]:
            for r in range(rows):
                total = _ZERO
                for j in range(rotary, dim):
                    total += np.float32(axes[c, j]) * q[r, j]
                folded[c, r] = total * units[c]
    for r in range(rows):
        total = _ZERO
        for j in range(rotary, dim):
            total += mean[j] * q[r, j]
        constants[r] = total


@part
def _dot(x, y):
    total = _ZERO
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@part
def _add_row(x, factor, out):
    for i in range(len(out)):
        out[i] += factor * np.float32(x[i])


@exact_part
def _larger(x, y):
    """Return the larger number, or NaN if one is."""
    return y if y > x or np.isnan(y) else x


@part
def _finish(
    parts, place, axes, units, mean, query, scaling, softcap, sink_logit, mask_kind, shown, added,
    sink_keys, sink_values, tail_keys, tail_values, sink_positions, seen, out,
):  # fmt: skip
    """Put together what threads have found for one query, add exact tokens, and write the output; see `attend`."""
    sinks, tail = sink_keys.shape[0], tail_keys.shape[0]
    logits = np.empty(sinks + tail, np.float32)
    positions = np.empty(sinks + tail, np.int64)
    for i in range(sinks):
        logits[i], positions[i] = scaling * _dot(query, sink_keys[i]), sink_positions[i]
    for i in range(tail):
        logits[sinks + i], positions[sinks + i] = scaling * _dot(query, tail_keys[i]), seen - tail + i
    if softcap > _ZERO:
        _cap(logits, softcap)
    _mask(logits, sinks + tail, positions, mask_kind, shown, added)
    largest = sink_logit
    for worker in range(parts.shape[0]):
        largest = _larger(largest, parts[worker, place, 0])
    for logit in logits:
        largest = _larger(largest, logit)
    out[:] = _ZERO
    if largest == _FAR:  # nothing may be seen
        return
    coded, packed = np.zeros(len(units), np.float32), _ZERO
    for worker in range(parts.shape[0]):
        factor = _exp(parts[worker, place, 0] - largest)
        packed += factor * parts[worker, place, 1]
        _add_row(parts[worker, place, 2:], factor, coded)
    for c in range(len(units)):
        if coded[c] != _ZERO:
            _add_row(axes[c], coded[c] * units[c], out)
    _add_row(mean, packed, out)
    total = packed + (_ZERO if sink_logit == _FAR else _exp(sink_logit - largest))
    for i in range(sinks + tail):
        weight = _exp(logits[i] - largest)
        total += weight
        _add_row(sink_values[i] if i < sinks else tail_values[i - sinks], weight, out)
    for j in range(len(out)):
        out[j] /= total


_BYTES, _FLOATS = array(types.uint8, 1), array(types.float32, 1)
_ROWS = (_BYTES, _BYTES, array(types.int64, 2))
_SIDE = (
    array(types.int8, 4),
    array(types.float32, 3),
    array(types.float32, 2),
    array(types.float32, 3),
    array(types.uint8, 2),
    array(types.int32, 3),
)
_EXACT = array(types.float32, 4)


@entry(
    *(array(types.float32, 4), types.float32, types.float32, _FLOATS),
    *(*_ROWS, *_ROWS, *_ROWS, *_ROWS, *_SIDE, *_SIDE, _FLOATS, types.boolean),
    *(types.int64, types.int64, array(types.uint8, 3, strided=True), array(types.int64, 1)),
    *(types.int64, array(types.uint8, 4, strided=True), array(types.float32, 4, strided=True)),
    *(_EXACT, _EXACT, _EXACT, _EXACT, array(types.int64, 2, strided=True), types.int64),
    *(types.int64, types.int64, array(types.float32, 3), types.int64, array(types.float32, 4)),
)
def attend(
    queries, scaling, softcap, sink_logits,
    key_words0, key_scales0, keys0, value_words0, value_scales0, values0,
    key_words1, key_scales1, keys1, value_words1, value_scales1, values1,
    key_axes, key_steps, key_reference, key_mean, key_plans, key_layouts,
    value_axes, value_steps, value_reference, value_mean, value_plans, value_layouts,
    inv_freq, interleaved,
    start, covered, bitmap, origins,
    mask_kind, shown, added,
    sink_keys, sink_values, tail_keys, tail_values, sink_positions, seen,
    worker, workers, parts, stage, out,
):  # fmt: skip
    """Attend to packed tokens, and perhaps put together what all threads have found and write the output.

    Args:
        queries: Of the newest tokens, by query head.
        scaling: Factor of the logits.
        softcap: Bound of the logits; 0 if there is none.
        sink_logits: A further logit of each query head; empty if there is none.
        key_words0: Packed keys, and all bytes between them.
        key_scales0: Their scales.
        keys0: For each row of the batch and head, where in these its first key is, and how many it has.
        value_words0: Packed values.
        value_scales0: Their scales.
        values0: Where these are.
        key_words1: Keys of further tokens behind those, and so on.
        key_scales1: Their scales.
        keys1: Where these are.
        value_words1: Values.
        value_scales1: Their scales.
        values1: Where these are.
        key_axes: What each coded channel adds to a key, in whole numbers; rows and heads may share them.
        key_steps: Unit of each axis for channels of unit variance; likewise.
        key_reference: Scale of byte 128, by row and head.
        key_mean: Mean key; likewise.
        key_plans: Which of the layouts each head has.
        key_layouts: For each layout the bits of each block, its first byte in a row, and its odd byte.
        value_axes: The same of values.
        value_steps: Units.
        value_reference: Scales.
        value_mean: Mean value.
        value_plans: Layouts of heads.
        value_layouts: Layouts.
        inv_freq: Radians per position of each pair of channels that turns; empty if keys were coded with their phase.
        interleaved: Whether pairs are neighbours.
        start: Position of the first token that was not a sink.
        covered: How many positions the bitmaps cover; after those, all tokens are kept.
        bitmap: Which are kept.
        origins: Position of the first token of each row; empty if all count from 0.
        mask_kind: 0 for no mask, 1 for ``shown``, 2 for ``added``.
        shown: What may be seen, by position.
        added: What is added to logits.
        sink_keys: Exact keys of the first tokens.
        sink_values: Exact values.
        tail_keys: Exact keys of the newest tokens.
        tail_values: Exact values.
        sink_positions: Where the first tokens stand.
        seen: How many tokens have been seen.
        worker: Number of this thread.
        workers: How many there are.
        parts: What each has found: by row, head and query, the largest logit, the sum of the weights, and the sum of
            the values in coded channels.
        stage: `SHARE` to attend to packed tokens, `FINISH` to put all together, or `BOTH`.
        out: The output.
    """
    batch, query_heads, count, key_dim = queries.shape
    heads, value_dim, rotary = key_reference.shape[1], value_axes.shape[2], 2 * len(inv_freq)
    rows = query_heads // heads * count
    groups = -(-len(inv_freq) // _PAIRS)

    scratch, levels = np.empty((3, CHUNK), np.uint16), np.empty(_BLOCK * CHUNK, np.int16)
    pairs, channels = np.empty(_BLOCK * CHUNK, np.int16), np.empty(_BLOCK * CHUNK, np.float32)
    scales, offsets = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int32)
    products, logits = np.empty(rotary * CHUNK, np.float32), np.empty(rows * CHUNK, np.float32)
    whole, means = np.empty(key_dim * rotary, np.int16), np.empty(rotary, np.float32)
    turned, folded = np.empty((2 * _PAIRS * groups, rows), np.float32), np.empty((key_dim, rows), np.float32)
    constants, q = np.empty(rows, np.float32), np.empty((rows, key_dim), np.float32)
    positions = np.empty(0, np.int64)
    units, factors = np.empty(key_dim, np.float32), np.empty(key_dim, np.float32)
    unit = np.empty(key_dim // _BLOCK, np.float32)

    total = 0
    for index in range(batch * heads):
        total += -(-keys0[2, index] // CHUNK) - (-keys1[2, index] // CHUNK)
    begin, end, number = total * worker // workers, total * (worker + 1) // workers, 0
    for index in range(batch * heads if stage != FINISH else 0):
        row, head = index // heads, index % heads
        state = parts[worker, index * rows : (index + 1) * rows]
        state[:, 0], state[:, 1:] = _FAR, _ZERO
        chunks0, chunks1 = -(-keys0[2, index] // CHUNK), -(-keys1[2, index] // CHUNK)
        first_number, number = number, number + chunks0 + chunks1
        if number <= begin or first_number >= end:
            continue
        axes, mean = _of_head(key_axes, row, head), _of_head(key_mean, row, head)
        places, value_places = key_layouts[key_plans[row, head]], value_layouts[value_plans[row, head]]
        _units(axes, _of_head(key_steps, row, head), key_reference[row, head], places, units, factors, unit)
        key_bytes, value_bytes = places[0].sum(), value_places[0].sum()
        for r in range(rows):
            for j in range(key_dim):
                q[r, j] = queries[row, head * (rows // count) + r // count, r % count, j] * scaling
        _whole_axes(axes, factors, places, rotary, interleaved, whole)
        _fold_queries(q, axes, units, mean, places, rotary, interleaved, turned, folded, constants, means)
        tokens = keys0[2, index] + keys1[2, index]
        if mask_kind > 0 or rotary:
            if len(positions) < tokens:
                positions = np.empty(tokens, np.int64)
            _places(bitmap[row, head], start, covered, tokens, positions)
        origin = origins[row] if len(origins) else 0
        for step in range(max(begin - first_number, 0), min(end - first_number, chunks0 + chunks1)):
            is_first = step < chunks0
            at = step * CHUNK if is_first else (step - chunks0) * CHUNK
            of_keys, of_values = (keys0, values0) if is_first else (keys1, values1)
            key_words, key_scales = (key_words0, key_scales0) if is_first else (key_words1, key_scales1)
            value_words, value_scales = (value_words0, value_scales0) if is_first else (value_words1, value_scales1)
            size, token = min(CHUNK, of_keys[2, index] - at), at if is_first else keys0[2, index] + at

            _scales(key_scales, of_keys[1, index] + at, size, scales)
            logits[:], products[:] = _ZERO, _ZERO
            for block in range(places.shape[1]):
                if places[0, block]:
                    _decode_block(
                        key_words,
                        of_keys[0, index] + at * key_bytes,
                        key_bytes,
                        size,
                        places[:, block],
                        scratch,
                        levels,
                    )
                    if rotary:
                        _interleave(levels, pairs)
                        add_whole_products(pairs, whole[block * rotary * _BLOCK :], unit[block], products, rotary)
                    if rotary < key_dim:
                        _to_float(levels, channels)
                        _add_products(channels, folded, block * _BLOCK, rows, logits)
            if rotary < key_dim:
                for r in range(rows):
                    for i in range(CHUNK):
                        logits[r * CHUNK + i] = logits[r * CHUNK + i] * scales[i] + constants[r]
            if rotary:
                first = max(positions[token] - origin, 0)
                for i in range(size):
                    offsets[i] = max(positions[token + i] - origin, 0) - first
                for i in range(size, CHUNK):
                    offsets[i] = 0
                for group in range(groups):
                    _turn(products, 2 * _PAIRS * group, scales, means, inv_freq, np.float64(first), offsets, channels)
                    _add_products(channels, turned, 2 * _PAIRS * group, rows, logits)

            _scales(value_scales, of_values[1, index] + at, size, scales)
            for r in range(rows):
                own = logits[r * CHUNK : (r + 1) * CHUNK]
                if softcap > _ZERO:
                    _cap(own, softcap)
                if mask_kind > 0:
                    g, m = head * (rows // count) + r // count, r % count
                    _mask(
                        own, size, positions[token:], mask_kind,
                        shown[row, g, m], added[row, g, m],
                    )  # fmt: skip
                largest, earlier, weight = _weigh(own, size, state[r, 0])
                state[r, 0] = largest
                if earlier != _ONE:
                    for c in range(1, value_dim + 2):
                        state[r, c] *= earlier
                state[r, 1] += weight
                for i in range(CHUNK):
                    own[i] *= scales[i]
            for block in range(value_places.shape[1]):
                if value_places[0, block]:
                    first_byte = of_values[0, index] + at * value_bytes
                    _decode_block(value_words, first_byte, value_bytes, size, value_places[:, block], scratch, levels)
                    _to_float(levels, channels)
                    _add_values(channels, logits, rows, state, 2 + block * _BLOCK)
    if stage != SHARE:
        for index in range(batch * heads):
            row, head = index // heads, index % heads
            axes, mean = _of_head(value_axes, row, head), _of_head(value_mean, row, head)
            steps, level = _of_head(value_steps, row, head), value_layouts[value_plans[row, head]]
            value_units = np.empty(value_dim, np.float32)
            for c in range(value_dim):
                value_units[c] = steps[c] * (_LEVELS[level[0, c // _BLOCK]] * value_reference[row, head])
            for r in range(rows):
                g, m = head * (rows // count) + r // count, r % count
                _finish(
                    parts, index * rows + r, axes, value_units, mean,
                    queries[row, g, m], scaling, softcap, sink_logits[g] if len(sink_logits) else _FAR,
                    mask_kind, shown[row, g, m], added[row, g, m],
                    sink_keys[row, head], sink_values[row, head], tail_keys[row, head], tail_values[row, head],
                    sink_positions[row], seen, out[row, g, m],
                )  # fmt: skip


# Decoding alone


@entry(*_ROWS, *_SIDE, types.int64, types.int64, array(types.float32, 3))
def decode(words, scales, rows, axes, steps, reference, mean, plans, layouts, worker, workers, out):
    """Decode the vectors of some heads.

    Args:
        words: Packed vectors, and all other bytes between them.
        scales: Their scales.
        rows: For each row of the batch and head, where in these its first vector is, and how many there are.
        axes: As of `attend`.
        steps: Units.
        reference: Scales.
        mean: Mean vector.
        plans: Layouts of heads.
        layouts: Layouts.
        worker: Number of this thread, which decodes every so many-th head.
        workers: How many there are.
        out: The vectors of each row and head.
    """
    (batch, heads), dim = reference.shape, axes.shape[2]
    scratch, levels = np.empty((3, CHUNK), np.uint16), np.empty(_BLOCK * CHUNK, np.int16)
    channels, vectors = np.empty(_BLOCK * CHUNK, np.float32), np.empty(dim * CHUNK, np.float32)
    factors, own_scales = np.empty((dim, dim), np.float32), np.empty(CHUNK, np.float32)
    for index in range(worker, batch * heads, workers):
        row, head = index // heads, index % heads
        places, own, own_mean = layouts[plans[row, head]], _of_head(axes, row, head), _of_head(mean, row, head)
        size, step = places[0].sum(), _of_head(steps, row, head)
        for c in range(dim):
            unit = step[c] * (_LEVELS[places[0, c // _BLOCK]] * reference[row, head])
            for j in range(dim):
                factors[c, j] = np.float32(own[c, j]) * unit
        for at in range(0, rows[2, index], CHUNK):
            count = min(CHUNK, rows[2, index] - at)
            _scales(scales, rows[1, index] + at, count, own_scales)
            vectors[:] = _ZERO
            for block in range(places.shape[1]):
                if places[0, block]:
                    _decode_block(words, rows[0, index] + at * size, size, count, places[:, block], scratch, levels)
                    _to_float(levels, channels)
                    _add_products(channels, factors, block * _BLOCK, dim, vectors)
            for i in range(count):
                vector = out[index, at + i]
                for j in range(dim):
                    vector[j] = own_scales[i] * vectors[j * CHUNK + i] + own_mean[j]
