"""A kernel that stores what the decoders of the attention kernels make of packed rows."""

from typing import no_type_check

import triton
import triton.language as tl

from nexusquant_cache.codec.triton import kernels_codes as codes


@triton.jit
@no_type_check
def planes_kernel(  # noqa: ANN202, PLR0913, PLR0917 - jitted
    words,  # noqa: ANN001
    numbers,  # noqa: ANN001
    out,  # noqa: ANN001
    rows,  # noqa: ANN001
    TILE: tl.constexpr,  # noqa: N803
    SHAPE: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    ASM: tl.constexpr,  # noqa: N803
):
    """Store float16 levels channel by channel, ``[rows, padded channels]``, decoded as keys or as values are."""
    first = tl.program_id(0) * TILE
    words += first * SHAPE[1]
    row = first + tl.arange(0, TILE)
    if KEYS:
        p0, p1, p2, p3 = codes.key_planes(words, rows - 1 - first, numbers, TILE, SHAPE, ASM)
        channel = 4 * tl.arange(0, 2 * SHAPE[0])[None, :]
        out += row[:, None] * (8 * SHAPE[0]) + channel
        inside = (row < rows)[:, None] & (channel >= 0)
    else:
        p0, p1, p2, p3 = codes.value_planes(words, rows - 1 - first, numbers, TILE, SHAPE, ASM)
        channel = codes.value_channels(SHAPE[0])[:, None]
        out += row[None, :] * (8 * SHAPE[0]) + channel
        inside = (row < rows)[None, :] & (channel >= 0)
    tl.store(out, p0, mask=inside)
    tl.store(out + 1, p1, mask=inside)
    tl.store(out + 2, p2, mask=inside)
    tl.store(out + 3, p3, mask=inside)
