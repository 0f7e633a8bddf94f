"""Pack the codes of blocks into rows of bytes and back: bits only, as `layout.CodeLayout` lays them out."""

from functools import lru_cache

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.errors import ShapeError


@lru_cache(maxsize=64)
def _sources(layout: CodeLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    blocks, shifts = zip(*layout.byte_sources, strict=True)
    return torch.tensor(blocks, device=device), torch.tensor(shifts, device=device)


def pack(codes: Int[Tensor, "*rows blocks"], layout: CodeLayout) -> UInt8[Tensor, "*rows bytes"]:
    """Lay the codes of each vector out as bytes.

    Args:
        codes: One integer per block, int64, in ``[0, 2 ** (8 * bits))``.  Codes of 0-bit blocks are ignored.
        layout: Bits and position of every block.

    Returns:
        Rows of ``layout.bytes_per_vector`` bytes.

    Raises:
        ShapeError: If the last axis is not ``layout.blocks`` long.
    """
    if codes.shape[-1] != layout.blocks:
        msg = f"expected {layout.blocks} codes per vector for this layout, got shape {tuple(codes.shape)}"
        raise ShapeError(msg)
    if layout.bytes_per_vector == 0:
        return codes.new_empty(*codes.shape[:-1], 0, dtype=torch.uint8)
    blocks, shifts = _sources(layout, codes.device)
    return ((codes.index_select(-1, blocks) >> shifts) & 0xFF).to(torch.uint8)


def unpack(words: UInt8[Tensor, "*rows bytes"], layout: CodeLayout) -> Int[Tensor, "*rows blocks"]:
    """Read the codes back: the inverse of `pack`.

    Raises:
        ShapeError: If a row does not have ``layout.bytes_per_vector`` bytes.
    """
    if words.shape[-1] != layout.bytes_per_vector:
        msg = f"expected {layout.bytes_per_vector} bytes per vector for this layout, got shape {tuple(words.shape)}"
        raise ShapeError(msg)
    codes = torch.zeros(*words.shape[:-1], layout.blocks, dtype=torch.int64, device=words.device)
    if layout.bytes_per_vector:
        blocks, shifts = _sources(layout, words.device)
        codes.index_add_(-1, blocks, words.long() << shifts)
    return codes
