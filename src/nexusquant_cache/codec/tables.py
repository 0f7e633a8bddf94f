"""Decode packed rows by table look-up: how the torch implementation decodes.

Half a block, four channels, is looked up at once: its bits and the sign of the block are the index.  The halves of all
blocks of a row, whatever their rates, are one look-up in one table, which writes the decoded row as it lies in memory.
The table is built with `blocks.decode_blocks`, so the results are those of the definition, bit for bit; it can hold
the result of the first Hadamard stages, which stay inside a half (see `hadamard.apply_hadamard_rows`).

Tables are constants of the process: at most 2.3 MiB each, shared by all caches, and counted in no report.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nexusquant_cache.codec.blocks import decode_blocks
from nexusquant_cache.codec.hadamard import hadamard_stages
from nexusquant_cache.codec.layout import BLOCK, MAX_BITS, CodeLayout, block_code

_WORD = 16
_HALF = BLOCK // 2  # channels


def covered_stages(order: int) -> int:
    """Return the first Hadamard stride that `decode_rows` can leave to do.

    Args:
        order: Order of the Sylvester factor of the rotation; no stage reaches beyond it.
    """
    return min(order, _HALF)


def decode_rows(
    words: UInt8[Tensor, "rows bytes"], layout: CodeLayout, first_stride: int = 1
) -> Float[Tensor, "rows d"]:
    """Return the codewords of packed rows for channels of unit variance, in float32.

    Args:
        words: Packed rows.
        layout: Their layout.
        first_stride: Apply the Hadamard stages below this stride; at most `covered_stages`.
    """
    return decode_heads(words[None], (layout,), (0,), first_stride)[0]


def decode_heads(
    words: UInt8[Tensor, "heads n bytes"],
    layouts: tuple[CodeLayout, ...],
    plans: tuple[int, ...],
    first_stride: int = 1,
) -> Float[Tensor, "heads n d"]:
    """Return the codewords of several heads, of which each has its own layout.

    Args:
        words: Packed rows.
        layouts: Layouts of one size.
        plans: The index of each head's layout.
        first_stride: As in `decode_rows`.
    """
    heads, tokens, _ = words.shape
    index = _half_block_index(words, _plan(layouts, plans, words.device))
    top = max(max(layout.block_bits) for layout in layouts)
    table = _table(top, first_stride, words.device)
    return table.index_select(0, index.flatten()).view(heads, tokens, layouts[0].head_dim)


@dataclass(frozen=True)
class _Plan:
    """What decodes each block of each head, one row for each: ``heads * blocks``.

    Attributes:
        bytes: For the first to fourth byte of the code, the byte of each head's row, counted through the heads; the one
            behind the last stands for a byte that is not there.
        parity: Sign bits of the code.
        mask: Of the four fields of half a block.
        shift: From the first half to the second.
        base: Table row of the first half, and of the second, for a block of even parity; as many rows further as a half
            has values, ``1 << shift``, are those for odd parity.
    """

    bytes: tuple[Int[Tensor, " blocks"], ...]
    parity: Int[Tensor, "blocks 1"]
    mask: Int[Tensor, "blocks 1"]
    shift: Int[Tensor, "blocks 1"]
    base: tuple[Int[Tensor, "blocks 1"], Int[Tensor, "blocks 1"]]


@lru_cache(maxsize=256)
def _plan(layouts: tuple[CodeLayout, ...], plans: tuple[int, ...], device: torch.device) -> _Plan:
    size = layouts[0].bytes_per_vector
    top = max(1, *(max(layouts[plan].block_bits) for plan in plans))  # at least one byte, if only an absent one
    absent = len(plans) * size
    places: list[list[int]] = []
    for head, plan in enumerate(plans):
        for block in range(layouts[plan].blocks):
            own = [head * size + at for at, (of, _) in enumerate(layouts[plan].byte_sources) if of == block]
            places.append(own + [absent] * (top - len(own)))
    rates = [bits for plan in plans for bits in layouts[plan].block_bits]

    def column(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)[:, None]

    masks = [block_code(bits).parity_mask if bits else 0 for bits in rates]
    return _Plan(
        bytes=tuple(torch.tensor(each, dtype=torch.int32, device=device) for each in zip(*places, strict=True)),
        parity=column([mask - (1 << 32) if mask >> 31 else mask for mask in masks]),
        mask=column([(1 << (_HALF * bits)) - 1 for bits in rates]),
        shift=column([_HALF * bits for bits in rates]),
        base=(column([_start(bits) for bits in rates]), column([_start(bits, second=True) for bits in rates])),
    )


def _half_block_index(words: UInt8[Tensor, "heads n bytes"], plan: _Plan) -> Int[Tensor, "heads n halves"]:
    """Return which row of the table each half of each block decodes to."""
    heads, tokens, size = words.shape
    # Byte by byte, so that every operation runs along all vectors.
    columns = torch.empty(heads * size + 1, tokens, dtype=torch.int32, device=words.device)
    columns[:-1].view(heads, size, tokens).copy_(words.mT)
    columns[-1] = 0
    code = columns.index_select(0, plan.bytes[0])
    for place, rows in enumerate(plan.bytes[1:], 1):
        code |= columns.index_select(0, rows).bitwise_left_shift_(8 * place)
    signs = code & plan.parity
    if len(plan.bytes) > _WORD // 8:
        signs ^= signs >> _WORD
        signs &= (1 << _WORD) - 1
    offset = _parities(words.device).index_select(0, signs.flatten()).view(code.shape).bitwise_left_shift_(plan.shift)
    index = torch.empty(heads, tokens, code.shape[0] // heads, 2, dtype=torch.int32, device=words.device)
    by_block = index.permute(3, 0, 2, 1)
    for half, place in enumerate(by_block):
        fields = (code >> plan.shift if half else code) & plan.mask
        fields += plan.base[half]
        torch.add(fields.view(place.shape), offset.view(place.shape), out=place)
    return index.flatten(2)


@lru_cache(maxsize=16)
def _parities(device: torch.device) -> Int[Tensor, "65536"]:
    x = torch.arange(1 << _WORD, dtype=torch.int32, device="cpu")
    for shift in (8, 4, 2, 1):
        x = x ^ x >> shift
    return (x & 1).to(device)


def _start(bits: int, *, second: bool = False) -> int:
    """Return the first table row of a rate, for the first or the second half of a block.

    Row 0 is that of blocks without bits.  A rate of ``b`` bits has ``2 ** (4 b)`` rows for blocks of even parity and as
    many for those of odd parity; at 3 bits, whose code has the fields of the second half in another order, that half
    has a table of its own.
    """
    if bits == 0:
        return 0
    start = 1
    for lower in range(1, bits):
        start += (2 << (_HALF * lower)) * (1 + (lower == 3))  # noqa: PLR2004 - the one rate whose fields cross the word
    return start + (second and bits == 3) * (2 << (_HALF * bits))  # noqa: PLR2004


@lru_cache(maxsize=32)
def _table(top: int, first_stride: int, device: torch.device) -> Float[Tensor, "rows 4"]:
    """Return four channels for each index, for rates up to ``top``."""
    assert top <= MAX_BITS
    parts = [torch.zeros(1, _HALF, dtype=torch.float32, device="cpu")]
    for bits in range(1, top + 1):
        fields = torch.arange(1 << (_HALF * bits), device="cpu")
        halves = [(fields, slice(0, _HALF))]
        if bits == 3:  # noqa: PLR2004
            halves.append((fields << (_HALF * bits), slice(_HALF, BLOCK)))
        for codes, channels in halves:
            # The signs of a block whose other bits are 0 depend on the parity of these; the index has the parity of
            # the whole block.
            own = codes & block_code(bits).parity_mask
            parity = _parities(own.device).index_select(0, ((own ^ own >> _WORD) & 0xFFFF).int())
            plus = decode_blocks(codes, bits)[:, channels] * (1.0 - 2.0 * parity.float())[:, None]
            parts += [plus, -plus]
    return hadamard_stages(torch.cat(parts), 1, first_stride).to(device)
