"""The bit layout of packed codes: the only definition, read by every implementation and file.

**Block.**  A block is 8 channels.  At ``b`` bits per channel its code is an integer of ``8 b`` bits
holding one field ``t_i`` of ``b`` bits per channel.  All bits are free: every integer is the code of
a codeword, the 8 values of its block.  With ``s`` the parity of the lowest two bits of all fields (of
the only bit at ``b = 1``)

    value_i = (-1) ** (t_i + s) * magnitude(t_i)

Writing ``t = 2 k`` for ``k >= 0`` and ``t = -2 k - 1`` for ``k < 0``, the uniform form of the levels is
``(-1) ** s * (k + 1/4)``, and ``s`` is the parity of ``k_0 + ... + k_7``: the points are those of the
mirror image of E8 (last coordinate negated) shifted by 1/4, cut to ``2 ** b`` levels per channel.

**Magnitudes** are companded.  ``magnitude(t)`` is the float16 whose bit pattern is ``step * t + offset``
(`BlockCode`), in units of ``2 ** -24``: the patterns walk over the boundary between subnormal and
normal numbers, which widens the outer levels as a Lloyd-Max quantizer of a Gaussian does, and costs a
kernel one multiplication and no table.

**Row.**  The codes of one vector lie in ``bytes_per_vector = sum(bits)`` bytes: first ``b // 2``
little-endian 16-bit words per block, in block order, then one byte for each block of odd ``b``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from struct import pack, unpack
from typing import TypeAlias

from nexusquant_cache.errors import OptionError, ShapeError

BLOCK = 8
"""Channels per block."""

Bits: TypeAlias = int | float
"""Mean bits per channel; whole numbers are the usual ones."""

MAX_BITS = 4

COMPANDER = {
    1: (512, 384, 1.2476e-3),
    2: (768, 384, 5.7576e-4),
    3: (384, 192, 6.3753e-4),
    4: (224, 112, 5.2328e-4),
}
"""Step and offset of the float16 bit patterns at each rate, and the length of one level unit (2 ** -24) for a channel
of unit variance.  Found by `benchmarks/levels.py`, which minimises the distortion on a Gaussian."""

DISTORTION = (1.0, 0.3406, 0.0986, 0.0277, 0.0074)
"""Mean squared error per channel of a unit Gaussian at 0, 1, ... 4 bits (`benchmarks/levels.py`)."""

_OCTAVES = (0, 2, 4, 6, 8)  # how far the variance falls from the first block to the last, in the plans of a rate


@dataclass(frozen=True)
class BlockCode:
    """How the code of a block is made at ``bits`` bits per channel: its levels, and where its fields are.

    Raises:
        OptionError: If ``bits`` is not 1, 2, 3 or 4.
    """

    bits: int

    def __post_init__(self) -> None:
        """Refuse other rates."""
        given: object = self.bits  # whatever the annotation says
        if type(given) is not int or given not in COMPANDER:
            msg = f"a block has 1 to {MAX_BITS} whole bits per channel, got {self.bits!r}"
            raise OptionError(msg)

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """Magnitude of each field value for a channel of unit variance; strictly increasing."""
        step, offset, unit = COMPANDER[self.bits]
        patterns = (step * t + offset for t in range(1 << self.bits))
        return tuple(unpack("<e", pack("<H", pattern))[0] * 2.0**24 * unit for pattern in patterns)

    @cached_property
    def field_shifts(self) -> tuple[tuple[int, ...], ...]:
        """For each of the 8 fields, the bit position in the code of its bits, lowest first.

        At 3 bits the fields 0-4 and the top bit of field 7 fill the 16-bit word and the rest the
        byte, so that a kernel decodes five channels without reading the byte.
        """
        if self.bits == 3:  # noqa: PLR2004 - the one rate whose fields cross the word
            head = [(3 * i, 3 * i + 1, 3 * i + 2) for i in range(5)]
            return (*head, (16, 17, 18), (19, 20, 21), (22, 23, 15))
        return tuple(tuple(self.bits * i + j for j in range(self.bits)) for i in range(BLOCK))

    @cached_property
    def parity_mask(self) -> int:
        """Bits of the code whose parity is ``s``."""
        return sum(1 << shift for field in self.field_shifts for shift in field[:2])


@dataclass(frozen=True)
class CodeLayout:
    """How many bits each 8-channel block of a vector has, and where in the row they lie.

    Args:
        head_dim: Channels per vector, a multiple of 8.
        block_bits: Bits per channel of each block, 0 (nothing stored, decodes to 0) to 4.

    Raises:
        ShapeError: If ``head_dim`` is not a positive multiple of 8 or the plan has another length.
        OptionError: If a block has an impossible number of bits.
    """

    head_dim: int
    block_bits: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the plan against the head dimension."""
        if self.head_dim <= 0 or self.head_dim % BLOCK:
            msg = (
                f"head_dim must be a positive multiple of {BLOCK}, got {self.head_dim}: channels are coded in "
                f"blocks of {BLOCK}. Models with other head dimensions cannot be compressed."
            )
            raise ShapeError(msg)
        if len(self.block_bits) != self.head_dim // BLOCK:
            msg = (
                f"a bit plan needs one entry per {BLOCK}-channel block: head_dim {self.head_dim} has "
                f"{self.head_dim // BLOCK} blocks, the plan has {len(self.block_bits)}"
            )
            raise ShapeError(msg)
        for bits in self.block_bits:
            if bits != 0:
                BlockCode(bits)

    @classmethod
    def uniform(cls, head_dim: int, bits: int) -> "CodeLayout":
        """Return the layout that gives every block ``bits`` bits per channel."""
        return cls(head_dim, (bits,) * max(head_dim // BLOCK, 0))

    @classmethod
    def flat(cls, head_dim: int, bits: Bits) -> "CodeLayout":
        """Return the layout for channels of equal variance at a mean of ``bits`` bits per channel.

        Where the mean is not whole, the first blocks get one bit more than the others.

        Raises:
            OptionError: If the mean is outside 1/8 to 4 bits, or less than one bit in one block.
        """
        blocks = max(head_dim // BLOCK, 0)
        total = whole_bits(blocks, bits) if blocks else 0
        return cls(head_dim, tuple(total // blocks + (index < total % blocks) for index in range(blocks)))

    @property
    def blocks(self) -> int:
        """Number of 8-channel blocks."""
        return len(self.block_bits)

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of the packed row, exactly the bits of the plan, without padding."""
        return sum(self.block_bits)

    @property
    def bits_per_channel(self) -> float:
        """Mean bits per channel, without scales."""
        return self.bytes_per_vector / self.blocks

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks have the same number of bits, and at least one."""
        return len(set(self.block_bits)) == 1 and self.block_bits[0] > 0

    @cached_property
    def byte_sources(self) -> tuple[tuple[int, int], ...]:
        """For each byte of the row, its block and the position of its lowest bit in that block's code."""
        words = [(block, 8 * byte) for block, bits in enumerate(self.block_bits) for byte in range(2 * (bits // 2))]
        tail = [(block, 8 * (bits - 1)) for block, bits in enumerate(self.block_bits) if bits % 2]
        return (*words, *tail)


def whole_bits(blocks: int, bits: Bits) -> int:
    """Return how many bits the channels of a vector get together, in eighths: one for a bit in each of 8 channels.

    Raises:
        OptionError: If that is none, or more than `MAX_BITS` for each block.
    """
    total = round(blocks * bits)
    if not 1 <= total <= MAX_BITS * blocks:
        most = MAX_BITS * blocks
        msg = f"{bits:g} bits per channel give {total} bits to {blocks} blocks; from 1 to {most} are possible"
        raise OptionError(msg)
    return total


@lru_cache(maxsize=64)
def sloped_layouts(head_dim: int, total: int) -> tuple[CodeLayout, ...]:
    """Return layouts of one size for channels sorted by falling variance, from flat to steep.

    Each has the bits that reverse water-filling gives to a variance that falls by a fixed number of octaves from the
    first block to the last.  A few such plans serve every spectrum nearly as well as a plan of its own would.

    Args:
        head_dim: Channels per vector.
        total: Bytes per vector: the sum of the blocks' bits.

    References:
        Cover & Thomas (2006), "Elements of Information Theory", theorem 10.3.3 (reverse water-filling), in whole
        bits: each goes where it lowers the distortion most.
    """
    blocks = head_dim // BLOCK
    steps = [index / max(blocks - 1, 1) for index in range(blocks)]
    plans = (fill_with_bits([2.0 ** (-octaves * step) for step in steps], total) for octaves in _OCTAVES)
    return tuple(CodeLayout(head_dim, plan) for plan in dict.fromkeys(plans))


def fill_with_bits(variances: Sequence[float], total: int) -> tuple[int, ...]:
    """Give ``total`` bits to blocks of these variances, one by one where the distortion falls most; ties go first."""
    plan = [0] * len(variances)
    for _ in range(total):
        gains = [
            variance * (DISTORTION[bits] - DISTORTION[bits + 1]) if bits < MAX_BITS else -1.0
            for variance, bits in zip(variances, plan, strict=True)
        ]
        plan[gains.index(max(gains))] += 1
    return tuple(plan)


@lru_cache(maxsize=64)
def block_code(bits: int) -> BlockCode:
    """Return the `BlockCode` of this rate, of which there is one."""
    return BlockCode(bits)
