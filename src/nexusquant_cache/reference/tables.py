"""Decode packed rows by table look-up: the fast path of the torch implementation.

A table holds the codewords of all values of a few bits of the row, built with `blocks.decode_blocks`, so
the results are those of the definition, bit for bit.  The tables also hold the result of the first
Hadamard stages, which stay inside the looked-up channels (see `hadamard.apply_hadamard_rows`).

Tables are process-wide constants like code: at most 2 MiB each, shared by every cache.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nexusquant_cache.layout import BLOCK, CodeLayout, block_code
from nexusquant_cache.reference.blocks import decode_blocks
from nexusquant_cache.reference.hadamard import hadamard_stages

_WORD = 16
_HALF = 12  # bits of the four fields that a 3-bit table looks up


def covered_stages(layout: CodeLayout, order: int) -> int:
    """Return the first Hadamard stride that `decode_rows` leaves to do.

    Args:
        layout: The layout of the rows.
        order: Order of the Sylvester factor of the rotation; no stage reaches beyond it.
    """
    if not layout.is_uniform:
        return 1
    return min(order, BLOCK if layout.block_bits[0] <= 2 else BLOCK // 2)  # noqa: PLR2004 - see `_lookup`


def decode_rows(
    words: UInt8[Tensor, "rows bytes"], layout: CodeLayout, first_stride: int = 1
) -> Float[Tensor, "rows d"]:
    """Return the codewords of packed rows for channels of unit variance, in float32.

    Args:
        words: Packed rows.
        layout: Their layout.
        first_stride: Apply the Hadamard stages below this stride; at most `covered_stages`.
    """
    if layout.is_uniform:
        return _lookup(words, layout.block_bits[0], first_stride).view(words.shape[0], layout.head_dim)
    values = torch.zeros(words.shape[0], layout.blocks, BLOCK, dtype=torch.float32, device=words.device)
    for bits in sorted(set(layout.block_bits) - {0}):
        columns, blocks = _columns(layout, bits, words.device)
        found = _lookup(words.index_select(1, columns), bits, 1)
        values.index_copy_(1, blocks, found.view(len(words), len(blocks), BLOCK))
    return hadamard_stages(values.view(words.shape[0], layout.head_dim), 1, first_stride)


@lru_cache(maxsize=128)
def _columns(layout: CodeLayout, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the bytes of a row that hold the blocks of one rate, laid out as in a uniform row, and the blocks."""
    blocks = [block for block, given in enumerate(layout.block_bits) if given == bits]
    columns = [column for column, (block, _) in enumerate(layout.byte_sources) if block in blocks]
    return torch.tensor(columns, device=device), torch.tensor(blocks, device=device)


def _lookup(words: UInt8[Tensor, "rows bytes"], bits: int, first_stride: int) -> Tensor:
    device = words.device
    if bits == 1:
        return _block_table(bits, first_stride, device).index_select(0, words.flatten().int())
    blocks = words.shape[1] // bits
    word = _words(words[:, : 2 * blocks * (bits // 2)])
    if bits == 2:  # noqa: PLR2004 - one case per rate
        return _block_table(bits, first_stride, device).index_select(0, word)
    # 3 and 4 bits: two tables of four channels each; one more bit of the index carries the block's sign.
    if bits == 3:  # noqa: PLR2004
        byte = words[:, 2 * blocks :].flatten().int()
        sign = _parity(bits, device).take(word.long()) ^ _parity_high(bits, device).take(byte.long())
        sign = sign.int() << _HALF
        low = (word & ((1 << _HALF) - 1)) | sign
        high = (word >> _HALF) | (byte << (_WORD - _HALF)) | sign
    else:
        word = word.view(-1, 2)
        low, high = word[:, 0], word[:, 1]
        parity = _parity(bits, device)
        sign = (parity.take(low.long()) ^ parity.take(high.long())).int() << _WORD
        low, high = low | sign, high | sign
    table = _half_table(bits, first_stride, device)
    return table.index_select(0, torch.stack([low, high + table.shape[0] // 2], 1).flatten())


def _words(rows: UInt8[Tensor, "rows bytes"]) -> Tensor:
    flat = rows.flatten()
    if flat.storage_offset() % 2:  # a 16-bit view must start at an even byte
        flat = flat.clone()
    return flat.view(torch.int16).int() & 0xFFFF


@lru_cache(maxsize=64)
def _block_table(bits: int, first_stride: int, device: torch.device) -> Tensor:
    values = decode_blocks(torch.arange(1 << (BLOCK * bits), device="cpu"), bits)
    return hadamard_stages(values, 1, first_stride).to(device)


@lru_cache(maxsize=16)
def _parity(bits: int, device: torch.device) -> Tensor:
    return _bit_parity(torch.arange(1 << _WORD, device="cpu") & block_code(bits).parity_mask).to(device)


@lru_cache(maxsize=16)
def _parity_high(bits: int, device: torch.device) -> Tensor:
    return _bit_parity(torch.arange(256, device="cpu") << _WORD & block_code(bits).parity_mask).to(device)


def _bit_parity(x: Tensor) -> Tensor:
    for shift in (16, 8, 4, 2, 1):
        x = x ^ (x >> shift)
    return (x & 1).to(torch.uint8)


@lru_cache(maxsize=64)
def _half_table(bits: int, first_stride: int, device: torch.device) -> Tensor:
    """Return the tables of channels 0-3 and 4-7, one after the other, indexed by bits and the block's sign."""
    size = 1 << (_HALF if bits == 3 else _WORD)  # noqa: PLR2004
    index = torch.arange(size, device="cpu")
    low, high = index, index << _WORD
    if bits == 3:  # noqa: PLR2004
        high = (index & 15) << _HALF | (index >> 4) << _WORD
    tables = []
    for codes, half in ((low, slice(0, 4)), (high, slice(4, 8))):
        # The sign of these bits alone is taken out again: the index says what the whole block's is.
        mask = codes & block_code(bits).parity_mask
        own = 1.0 - 2.0 * _bit_parity(mask).float()
        plus = decode_blocks(codes, bits)[:, half] * own[:, None]
        tables.append(hadamard_stages(torch.cat([plus, -plus]), 1, min(first_stride, 4)).to(device))
    return torch.cat(tables)
