"""Positions of the kept tokens from the bitmap that says which they are, without waiting for the device."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int32, UInt8
from torch import Tensor

_PART: int = 2048  # tokens seen that a program looks at
_COUNTED: tl.constexpr = tl.constexpr(4096)  # bytes of the bitmap counted at once


@triton.jit
@no_type_check
def _bit_counts(byte):
    """Return the number of bits set in each byte."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0xF


@triton.jit(do_not_specialize=["start", "covered", "tokens", "bitmap_b", "bitmap_h"])
@no_type_check
def positions_kernel(
    bitmap, origins, out, start, covered, tokens, bitmap_b, bitmap_h, heads, PART: tl.constexpr
):  # fmt: skip
    """Write the positions of those kept of ``PART`` tokens seen, of one head: grid (parts, b * h)."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    first = tl.program_id(0) * PART
    seen = first + tl.arange(0, PART)
    kept = tl.full([PART], 1, tl.int32)
    before = first
    if bitmap is not None:
        bitmap += b * bitmap_b + h * bitmap_h
        # Each program counts for itself what is kept before its part: far less than the packed tokens that are read.
        before = tl.maximum(first - covered, 0)
        size = (tl.minimum(first, covered) + 7) // 8
        for counted in range(0, size, _COUNTED):
            place = counted + tl.arange(0, _COUNTED)
            byte = tl.load(bitmap + place, mask=place < size, other=0).to(tl.int32)
            before += tl.sum(_bit_counts(byte), 0)
        inside = seen < covered
        byte = tl.load(bitmap + seen // 8, mask=inside, other=0).to(tl.int32)
        kept = tl.where(inside, (byte >> (seen % 8)) & 1, 1)
    position = start + seen
    if origins is not None:
        position = tl.maximum(position - tl.load(origins + b), 0)
    index = before + tl.cumsum(kept, 0) - kept
    tl.store(out + head * tokens + index, position, mask=(kept != 0) & (index < tokens))


def kept_positions(
    heads: tuple[int, ...],
    bitmap: UInt8[Tensor, "b h bytes"] | None,
    *,
    start: int,
    covered: int,
    tokens: int,
    origins: Int32[Tensor, " b"] | None = None,
    device: torch.device | None = None,
) -> Int32[Tensor, "b h n"]:
    """Return the position of each kept token, ascending.

    Args:
        heads: Batch and heads.
        bitmap: Bit ``i % 8`` of byte ``i // 8`` says whether token ``start + i`` is kept; None if all are.  Every head
            keeps the same number, and behind the covered ones all tokens are kept.
        start: Position of the first token.
        covered: Tokens that the bitmap covers.
        tokens: Tokens kept in all.
        origins: Where each row begins to count: what to subtract from its positions, which are 0 at least.
        device: Where to write; by default where the bitmap is, or the origins.
    """
    batch, count = heads
    given = bitmap if bitmap is not None else origins
    if device is None and given is not None:
        device = given.device
    out = torch.empty(batch, count, tokens, dtype=torch.int32, device=device)
    if out.numel() == 0:
        return out
    if bitmap is not None and bitmap.stride(-1) != 1:
        bitmap = bitmap.contiguous()
    # How many of the covered tokens are kept only the device knows.
    most = tokens if bitmap is None else covered + tokens
    positions_kernel[(triton.cdiv(most, _PART), batch * count)](
        *(bitmap, origins, out, start, covered, tokens),
        *((0, 0) if bitmap is None else bitmap.stride()[:2]),
        count,
        PART=_PART,
        enable_fp_fusion=True,
    )
    return out
