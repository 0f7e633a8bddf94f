"""What kernels are given: packed tokens with their plans, rotations and phases, as plain numbers and tensors.

What never changes while tokens are added is made once (`SidePlan`); a step adds views of the stored bytes
(`PackedOperand`).  No implementation is imported here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int8, Int32, UInt8
from torch import Tensor

from nexusquant_cache.codec.layout import BLOCK, COMPANDER, CodeLayout
from nexusquant_cache.errors import ShapeError

_LEAST_BLOCKS = 8  # columns of a matrix product come in sixteens, two for each block
_LEVEL = 2.0**24  # levels are float16 numbers in units of 2 ** -24
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class SidePlan:
    """What all packed keys, or all packed values, of one layer share.

    A decoded vector is ``factor * 2 ** ((scale - 128) / 16) * sum(y[c] * step[c] * axes[c]) + mean``, where ``y`` are
    the float16 numbers of the levels.

    Attributes:
        head_dim: Channels per vector.
        row_bytes: Bytes of a packed row, the same for all heads.
        rates: Which rates occur in any head: bit ``b`` for blocks of ``b`` bits per channel.
        numbers: For each layout, by block, the numbers of `NUMBERS`.  Padded with blocks without bits.
        plans: Which of the layouts each head has.
        axes: What each coded channel adds to a vector, as whole numbers, ``[b, h, d, d]`` with axes of length 1 where
            all have the same.
        step: Unit of each axis relative to the largest of the head, from 0 to 1.
        factor: Largest unit times the reference scale.
        mean: Added to every vector.
    """

    head_dim: int
    row_bytes: int
    rates: int
    numbers: Int32[Tensor, "layouts numbers padded_blocks"]
    plans: Int32[Tensor, "b h"]
    axes: Int8[Tensor, "b_or_1 h_or_1 d d"]
    step: Float32[Tensor, "b h d"]
    factor: Float32[Tensor, "b h"]
    mean: Float[Tensor, "b h 1 d"] | None

    @property
    def padded_blocks(self) -> int:
        """Blocks rounded up to a power of two, at least 8."""
        return self.numbers.shape[2]


def side_plan(  # noqa: PLR0913, PLR0917 - what a layer has fitted, piece by piece
    reference: Float[Tensor, "b h 1"],
    axes: Int8[Tensor, "b_or_1 h_or_1 d d"],
    step: Float[Tensor, "*heads d"],
    mean: Float[Tensor, "b h 1 d"] | None,
    layouts: Sequence[CodeLayout],
    plans: UInt8[Tensor, "b h"] | None,
) -> SidePlan:
    """Return the plan of one side of a layer, on the device of ``reference``.

    Args:
        reference: Scale that scale byte 128 stands for.
        axes: Row ``c`` is what coded channel ``c`` adds to a vector, in units of ``step``: principal axes, or a +-1
            matrix.
        step: Unit of each axis for channels of unit variance, ``[d]`` or anything that broadcasts to ``[b, h, d]``.
        mean: Added to every vector.
        layouts: Layouts of equal size.
        plans: Index of each head's layout, on the CPU; None if all have the first.

    Raises:
        ShapeError: If the layouts differ in size.
    """
    sizes = {(layout.head_dim, layout.bytes_per_vector) for layout in layouts}
    if len(sizes) != 1:
        msg = f"the layouts of a layer must have one size, got (head_dim, bytes): {sorted(sizes)}"
        raise ShapeError(msg)
    ((head_dim, row_bytes),) = sizes
    device, heads = reference.device, reference.shape[:2]
    index = torch.zeros(heads, dtype=torch.int64, device="cpu") if plans is None else plans.to("cpu", torch.int64)
    used = sorted(set(index.flatten().tolist()))
    units = torch.tensor([_units(layout) for layout in layouts], dtype=torch.float32, device="cpu")[index].to(device)
    steps = step.to(device, torch.float32).expand(*heads, head_dim) * units
    largest = steps.amax(-1, keepdim=True)
    return SidePlan(
        head_dim=head_dim,
        row_bytes=row_bytes,
        rates=sum(1 << bits for bits in {bits for plan in used for bits in layouts[plan].block_bits} - {0}),
        numbers=torch.tensor([_numbers(layout) for layout in layouts], dtype=torch.int32, device="cpu").to(device),
        plans=index.to(device, torch.int32),
        axes=axes.contiguous(),
        step=(steps / largest.clamp_min(_TINY)).contiguous(),
        factor=(largest * _LEVEL * reference)[..., 0].contiguous(),
        mean=mean,
    )


def _units(layout: CodeLayout) -> list[float]:
    """Return the length of a level unit in each channel; 0 where nothing is stored."""
    return [COMPANDER[bits][2] if bits else 0.0 for bits in layout.block_bits for _ in range(BLOCK)]


def _numbers(layout: CodeLayout) -> list[list[int]]:
    """Return by block, for blocks rounded up, what it is decoded with, in the order of `NUMBERS`."""
    padded = _LEAST_BLOCKS
    while padded < layout.blocks:
        padded *= 2
    place: dict[str, list[int]] = {name: [0] * padded for name in ("word", "second", "byte")}
    for index, (block, shift) in enumerate(layout.byte_sources):
        bits = layout.block_bits[block]
        if bits % 2 and shift == BLOCK * (bits - 1):
            place["byte"][block] = index
        elif shift in (0, _WORD):
            place["second" if shift else "word"][block] = index
    rates = [*layout.block_bits, *[0] * (padded - layout.blocks)]
    by_rate = {name: [_signed(_OF_RATE[name][bits]) for bits in rates] for name in NUMBERS if name in _OF_RATE}
    return [(place | by_rate)[name] for name in NUMBERS]


def _both(*numbers: int) -> tuple[int, ...]:
    """Return each number twice, in the lower and in the upper half."""
    return tuple(number << _WORD | number for number in numbers)


def _signed(number: int) -> int:
    """Return the 32-bit integer of these bits."""
    return number - (1 << 32) if number >> 31 else number


_WORD = 16
_OF_RATE = {
    "bits": (0, 1, 2, 3, 4),
    "field": _both(0, 1, 3, 7, 15),
    # With 2 ** 15 added, the lowest bit of a field goes to the sign bit.
    "step": (0, *(COMPANDER[bits][0] + (1 << 15) for bits in (1, 2, 3, 4))),
    "offset": _both(0, *(COMPANDER[bits][1] for bits in (1, 2, 3, 4))),
    # The lowest two bits of the fields of half a block, whose parity is its part of the sign.
    "sign": _both(0, 0xF, 0xFF, 0x6DB, 0x3333),
    # Of a block in one number, the second half above.
    "key_word": (0, 0, 1, 1, 1),
    "key_left": (0, 0, 1 << 8, 1 << 4, 0),
    "key_left_mask": (0, 0, 0xFF << _WORD, 0x7 << _WORD, 0),
    "key_top": (0, 0, 0, 0x800 << _WORD, 0),
    "key_second": (0, 0, 0, 0, 1 << _WORD),
    "key_byte": (0, 1 << 12 | 1, 0, 1 << 19, 0),
    # Above the token's number, the next token's.
    "value_next": (1 << _WORD,) * 5,
    # Of two tokens in one number, the first halves in one and the second halves in another.
    "value_right": (0, 0, 8, 12, 0),
    "value_right_mask": _both(0, 0, 0xFF, 0x7, 0),
    "value_top": _both(0, 0, 0, 0x800, 0),
    "value_byte": (0, 1, 0, 1 << 7, 0),
}
NUMBERS = ("word", "second", "byte", *_OF_RATE)
"""Numbers of a block, by their place in `SidePlan.numbers`: where its bytes lie, then those of its rate."""


@dataclass(frozen=True, eq=False)
class PackedOperand:
    """The packed keys, or the packed values, of one layer.

    Attributes:
        plan: What all tokens share.
        words: Packed rows; a view of a larger buffer may have any strides along batch and heads.
        scales: Scale bytes; any strides along batch and heads.
    """

    plan: SidePlan
    words: UInt8[Tensor, "b h n bytes"]
    scales: UInt8[Tensor, "b h n"]

    def __post_init__(self) -> None:
        """Refuse rows that are not laid out as kernels read them.

        Raises:
            ShapeError: If rows or scales of a head are not one behind the other, or have another length than the plan.
        """
        rows = (self.words.shape[3], *self.words.stride()[2:])
        expected = (self.plan.row_bytes, self.plan.row_bytes, 1)
        # The stride of a single token or byte says nothing.
        stored = min(self.words.shape) > 0 and self.words.shape[2] > 1
        if rows[0] != expected[0] or (stored and rows[1] != expected[1]) or (rows[0] > 1 and rows[2] != 1):
            msg = f"packed rows of a head must lie one behind the other (length, strides {expected}), got {rows}"
            raise ShapeError(msg)
        if self.scales.shape != self.words.shape[:3] or (stored and self.scales.stride(2) != 1):
            msg = (
                f"one scale per row, one behind the other: got {tuple(self.scales.shape)} for {tuple(self.words.shape)}"
            )
            raise ShapeError(msg)

    @property
    def even(self) -> bool:
        """Whether all rows begin at an even address, so that words can be loaded as such."""
        places = (self.words.data_ptr(), self.plan.row_bytes, *self.words.stride()[:2])
        return all(place % 2 == 0 for place in places)


@dataclass(frozen=True, eq=False)
class RopeOperand:
    """The rotary phase of each position: the product of two rows ``(cos | sin)``.

    Attributes:
        low: Phases of positions 0, 1, ... 255.
        high: Phases of positions 0, 256, 512, ...; as many as the largest position needs.
        interleaved: Pair ``i`` is channels ``(2 i, 2 i + 1)`` if true, else ``(i, i + pairs)``.
    """

    low: Float32[Tensor, "256 channels"]
    high: Float32[Tensor, "rows channels"]
    interleaved: bool = False

    @property
    def pairs(self) -> int:
        """Number of pairs of channels that turn."""
        return self.low.shape[1] // 2


@dataclass(frozen=True, eq=False)
class Places:
    """Where packed tokens stand, for the phase of their keys.

    Attributes:
        start: Position of the first token, if the others follow one by one.
        positions: Position of each token, as `positions.kept_positions` makes them; None if they follow one by one.
    """

    start: int = 0
    positions: Int32[Tensor, "b h n"] | None = None


@dataclass(frozen=True, eq=False)
class ExactTokens:
    """Tokens beside the packed ones: the sinks, the tail and the queries' own.

    Attributes:
        keys: Keys in any dtype; the last axis is contiguous.
        values: Values.
        mask: For each query which of these it attends to, or what is added to the logits; None if it attends to all.
    """

    keys: Float[Tensor, "b h e d"]
    values: Float[Tensor, "b h e dv"]
    mask: Bool[Tensor, "b_or_1 m e"] | Float[Tensor, "b_or_1 m e"] | None = None
