"""Device functions that turn packed rows into float16 numbers, two at a time.

Half a block, four channels, is a *half-word* of four fields (`layout`), and two half-words of one rate share a 32-bit
number: the halves of a block where products run over channels (`key_planes`), or the same halves of neighbouring tokens
where they run over tokens (`value_planes`).  The same integer instructions then decode both.  Four *planes* come out,
one for each field: plane ``i`` holds the channels ``4 * column + i``, where a block has two columns, and is the operand
of a matrix product as it is.

All numbers that depend on a block's rate are data, the same for all rows, so that heads of different plans share a
launch; which rates occur at all is known when a kernel is compiled.

A field ``t`` is decoded by its definition: ``step * t + offset`` is the pattern of a float16, and its sign bit is
``t & 1`` xor the sign of the block.  With 2 ** 15 added to the step, the lowest bit of a field goes to the sign bit by
itself; the others run over into the half above, where they change none but the lowest four bits, which are 0 in every
pattern.
"""

from typing import no_type_check

import triton
import triton.language as tl

from nexusquant_cache.codec.operands import NUMBERS

_PATTERN: tl.constexpr = tl.constexpr(0xFFF0FFF0 - (1 << 32))
_BOTH_SIGNS: tl.constexpr = tl.constexpr((1 << 31 | 1 << 15) - (1 << 32))
# Rows of the numbers of a layout.
_WORD: tl.constexpr = tl.constexpr(NUMBERS.index("word"))
_SECOND: tl.constexpr = tl.constexpr(NUMBERS.index("second"))
_BYTE: tl.constexpr = tl.constexpr(NUMBERS.index("byte"))
_BITS: tl.constexpr = tl.constexpr(NUMBERS.index("bits"))
_FIELD: tl.constexpr = tl.constexpr(NUMBERS.index("field"))
_STEP: tl.constexpr = tl.constexpr(NUMBERS.index("step"))
_OFFSET: tl.constexpr = tl.constexpr(NUMBERS.index("offset"))
_SIGN: tl.constexpr = tl.constexpr(NUMBERS.index("sign"))
_KEY_WORD: tl.constexpr = tl.constexpr(NUMBERS.index("key_word"))
_KEY_LEFT: tl.constexpr = tl.constexpr(NUMBERS.index("key_left"))
_KEY_LEFT_MASK: tl.constexpr = tl.constexpr(NUMBERS.index("key_left_mask"))
_KEY_TOP: tl.constexpr = tl.constexpr(NUMBERS.index("key_top"))
_KEY_SECOND: tl.constexpr = tl.constexpr(NUMBERS.index("key_second"))
_KEY_BYTE: tl.constexpr = tl.constexpr(NUMBERS.index("key_byte"))
_VALUE_NEXT: tl.constexpr = tl.constexpr(NUMBERS.index("value_next"))
_VALUE_RIGHT: tl.constexpr = tl.constexpr(NUMBERS.index("value_right"))
_VALUE_RIGHT_MASK: tl.constexpr = tl.constexpr(NUMBERS.index("value_right_mask"))
_VALUE_TOP: tl.constexpr = tl.constexpr(NUMBERS.index("value_top"))
_VALUE_BYTE: tl.constexpr = tl.constexpr(NUMBERS.index("value_byte"))

COUNT_BITS: tl.constexpr = tl.constexpr("popc.b32 $0, $1;")


@triton.jit
@no_type_check
def _number(numbers, which: tl.constexpr, PADDED: tl.constexpr):
    """Return a number of each block, ``[1, blocks]``."""
    return tl.load(numbers + which * PADDED + tl.arange(0, PADDED))[None, :]


@triton.jit
@no_type_check
def _bit_count(bits, asm: tl.constexpr):
    """Return a number of the parity of the number of bits set, below 2 ** 15."""
    if asm:
        count = tl.inline_asm_elementwise(COUNT_BITS, "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)
    else:
        count = bits ^ (bits >> 16)
        count = count ^ (count >> 8)
        count = count ^ (count >> 4)
        count = count ^ (count >> 2)
        count = (count ^ (count >> 1)) & 1
    return count


@triton.jit
@no_type_check
def _load_byte(rows, place, step):
    return tl.load(rows + place + step).to(tl.int32)


@triton.jit
@no_type_check
def _load_word(rows, place, step, row_bytes: tl.constexpr, even: tl.constexpr):
    if even:
        word = tl.load((rows + place + step).to(tl.pointer_type(tl.uint16))).to(tl.int32)
    else:
        # Blocks without a word read the first byte, which may be the only one.
        second = tl.minimum(place + 1, row_bytes - 1)
        word = _load_byte(rows, place, step) | (_load_byte(rows, second, step) << 8)
    return word


@triton.jit
@no_type_check
def _load(words, last, numbers, first: tl.constexpr, every: tl.constexpr, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Return first word, second word and byte of each block in the rows ``first + every * i``, ``[ROWS, blocks]``.

    What does not occur in the launch is 0; what a block does not have is anything.
    """
    PADDED: tl.constexpr = SHAPE[0]
    row_bytes: tl.constexpr = SHAPE[1]
    rates: tl.constexpr = SHAPE[2]
    even: tl.constexpr = SHAPE[3]
    # Two rows side by side, which a warp reads at once, and the others above each other, at constant distances.
    i, pair = tl.arange(0, ROWS // 2)[:, None, None], tl.arange(0, 2)[None, :, None]
    if last is None:
        rows = words + (pair * every + first) * row_bytes
        step = i * (2 * every * row_bytes)
    else:
        rows = words + tl.minimum((2 * i + pair) * every + first, last) * row_bytes
        step = 0
    word, second, byte = 0, 0, 0
    if rates & 0b11100:
        word = tl.reshape(
            _load_word(rows, _number(numbers, _WORD, PADDED)[None], step, row_bytes, even), [ROWS, PADDED]
        )
    if rates & 0b10000:
        place = _number(numbers, _SECOND, PADDED)[None]
        second = tl.reshape(_load_word(rows, place, step, row_bytes, even), [ROWS, PADDED])
    if rates & 0b01010:
        byte = tl.reshape(_load_byte(rows, _number(numbers, _BYTE, PADDED)[None], step), [ROWS, PADDED])
    return word, second, byte


@triton.jit
@no_type_check
def _decode(code, signed, numbers, PADDED: tl.constexpr):
    """Return four numbers of two float16 each for pairs of half-words, and for the sign and offset of both."""
    width = _number(numbers, _BITS, PADDED)
    # The second of two fields is multiplied where it lies: steps are multiples of 2 ** 5.
    step, field = _number(numbers, _STEP, PADDED), _number(numbers, _FIELD, PADDED)
    next_step, next_field = step >> width, field << width
    plane0 = ((code & field) * step + signed) & _PATTERN
    plane1 = ((code & next_field) * next_step + signed) & _PATTERN
    code = code >> (2 * width)
    plane2 = ((code & field) * step + signed) & _PATTERN
    plane3 = ((code & next_field) * next_step + signed) & _PATTERN
    return plane0, plane1, plane2, plane3


@triton.jit
@no_type_check
def _halves(pair, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return two float16 columns for each number, the lower half first."""
    parts = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
    return tl.reshape(parts, [ROWS, COLUMNS]).to(tl.float16, bitcast=True)


@triton.jit
@no_type_check
def key_planes(words, last, numbers, BN: tl.constexpr, SHAPE: tl.constexpr, asm: tl.constexpr):
    """Return the four planes of a tile of rows, float16 ``[BN, 2 * blocks]``, in units of 2 ** -24.

    Args:
        words: Address of the first row.
        last: Row to read in place of those behind it; None if all are there.
        numbers: Of the layout of the head (`operands.SidePlan`).
        BN: Rows.
        SHAPE: Padded blocks, bytes of a row, rates that occur (bit ``b`` for ``b`` bits), and whether rows begin at
            even addresses.
        asm: Whether instructions of NVIDIA's GPUs may be used.
    """
    PADDED: tl.constexpr = SHAPE[0]
    rates: tl.constexpr = SHAPE[2]
    word, second, byte = _load(words, last, numbers, 0, 1, BN, SHAPE)
    # The second half of a block goes into the upper 16 bits; above the fields of the first half may be anything.
    code = byte * _number(numbers, _KEY_BYTE, PADDED)
    if rates & 0b11100:
        if rates & 0b00010:
            code += word * _number(numbers, _KEY_WORD, PADDED)
        else:
            code += word
        if rates & 0b01100:
            left = word * _number(numbers, _KEY_LEFT, PADDED)
            code |= left & _number(numbers, _KEY_LEFT_MASK, PADDED)
        if rates & 0b01000:
            code |= (word << 12) & _number(numbers, _KEY_TOP, PADDED)
        if rates & 0b10000:
            code += second * _number(numbers, _KEY_SECOND, PADDED)
    count = _bit_count(code & _number(numbers, _SIGN, PADDED), asm)
    signed = ((count * _BOTH_SIGNS) & _BOTH_SIGNS) | _number(numbers, _OFFSET, PADDED)
    plane0, plane1, plane2, plane3 = _decode(code, signed, numbers, PADDED)
    return (
        _halves(plane0, BN, 2 * PADDED),
        _halves(plane1, BN, 2 * PADDED),
        _halves(plane2, BN, 2 * PADDED),
        _halves(plane3, BN, 2 * PADDED),
    )


@triton.jit
@no_type_check
def value_planes(words, last, numbers, BN: tl.constexpr, SHAPE: tl.constexpr, asm: tl.constexpr):
    """Return four planes of a tile of rows upright, float16 ``[2 * blocks, BN]``; arguments as of `key_planes`.

    The first halves of all blocks come before the second halves: `value_channels`.
    """
    PADDED: tl.constexpr = SHAPE[0]
    rates: tl.constexpr = SHAPE[2]
    word, second, byte = _load(words, last, numbers, 0, 2, BN // 2, SHAPE)
    next_word, next_second, next_byte = _load(words, last, numbers, 1, 2, BN // 2, SHAPE)
    # By multiplication, like shifts to the left in `key_planes`: other units than those for bits have time to spare.
    up = _number(numbers, _VALUE_NEXT, PADDED)
    word, second, byte = word + next_word * up, second + next_second * up, byte + next_byte * up
    # Above the fields of a half-word may be anything.
    low, high = byte, (byte * _number(numbers, _VALUE_BYTE, PADDED)) >> 4
    if rates & 0b11100:
        bits = _number(numbers, _BITS, PADDED)
        low = tl.where(bits == 1, byte, word) if rates & 0b00010 else word
        right = word >> _number(numbers, _VALUE_RIGHT, PADDED)
        high |= right & _number(numbers, _VALUE_RIGHT_MASK, PADDED)
        if rates & 0b01000:
            high |= (word >> 4) & _number(numbers, _VALUE_TOP, PADDED)
        if rates & 0b10000:
            high = tl.where(bits == 4, second, high)
    odd = (low ^ high) & _number(numbers, _SIGN, PADDED)
    count = _bit_count(odd & 0xFFFF, asm) + _bit_count(odd & ~0xFFFF, asm) * up
    signed = ((count << 15) & _BOTH_SIGNS) | _number(numbers, _OFFSET, PADDED)
    low0, low1, low2, low3 = _decode(low, signed, numbers, PADDED)
    high0, high1, high2, high3 = _decode(high, signed, numbers, PADDED)
    return (
        _upright(low0, high0, BN, PADDED),
        _upright(low1, high1, BN, PADDED),
        _upright(low2, high2, BN, PADDED),
        _upright(low3, high3, BN, PADDED),
    )


@triton.jit
@no_type_check
def _upright(low, high, BN: tl.constexpr, PADDED: tl.constexpr):
    """Return float16 ``[2 * blocks, BN]`` from the two halves of blocks ``[BN / 2, blocks]`` of two tokens each."""
    both = tl.join(low, high)
    parts = tl.join(both.to(tl.int16), (both >> 16).to(tl.int16))  # pair of tokens, block, half, token
    parts = tl.permute(parts, (2, 1, 0, 3))
    return tl.reshape(parts, [2 * PADDED, BN]).to(tl.float16, bitcast=True)


@triton.jit
@no_type_check
def value_channels(PADDED: tl.constexpr):
    """Return the first channel of each row of the planes of `value_planes`; the next three are in the other planes."""
    row = tl.arange(0, 2 * PADDED)
    return 8 * (row % PADDED) + 4 * (row // PADDED)


@triton.jit
@no_type_check
def relative_scale(codes):
    """Return the scale of each code relative to the reference scale."""
    exponent = (codes.to(tl.float32) - 128.0) * 0.0625
    return tl.where(codes == 0, 0.0, tl.exp2(exponent))
