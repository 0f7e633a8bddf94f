"""The greatest attention weight that each token gets from any query of a prompt; no matrix of weights is written.

One kernel finds what the softmax of each query divides by, as flash attention does (Dao et al., 2022,
"FlashAttention", arXiv:2205.14135, section 3.1).  The other has a tile of tokens and goes through all queries behind
it: with the sums known, the greatest logarithm is enough, and needs no order.
"""

from collections.abc import Iterator
from math import log2
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nexusquant_cache.codec.triton.compile_case import CompileCase, compile_case
from nexusquant_cache.errors import UnsupportedError

_TILE = 64  # queries, and tokens
_WIDE = 128  # channels; with more of them in float32, such a tile would not fit into the shared memory of every card
_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
_LOG2_E = log2(2.718281828459045)


@triton.jit
@no_type_check
def _tile(rows, row, count, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Return some vectors of ``[count, D]``; what is beyond the last, or beyond their channels, is 0."""
    channel = tl.arange(0, CHANNELS)
    inside = (row < count)[:, None] & (channel < D)[None, :]
    return tl.load(rows + row.to(tl.int64)[:, None] * D + channel[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def sums_kernel(
    queries,
    keys,
    sums,
    group,
    count,
    tokens,
    first,
    every,
    scale,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the logarithm, to base 2, of what the softmax of each query divides by."""
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)  # a query head
    row = tile * BM + tl.arange(0, BM)
    place = first + row * every
    q = _tile(queries + head * count * D, row, count, D, CHANNELS)
    own_keys = keys + head // group * tokens * D
    greatest, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    end = tl.minimum(first + (tl.minimum((tile + 1) * BM, count) - 1) * every + 1, tokens)
    for start in range(0, end, BN):
        token = start + tl.arange(0, BN)
        k = _tile(own_keys, token, tokens, D, CHANNELS)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        logits = tl.where(token[None, :] <= place[:, None], logits, float("-inf"))
        now = tl.maximum(greatest, tl.max(logits, 1))
        total = total * tl.exp2(greatest - now) + tl.sum(tl.exp2(logits - now[:, None]), 1)
        greatest = now
    tl.store(sums + head * count + row, greatest + tl.log2(total), mask=row < count)


@triton.jit
@no_type_check
def greatest_kernel(
    queries,
    keys,
    sums,
    found,
    group,
    count,
    tokens,
    first,
    every,
    distance,
    scale,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the greatest weight of each token, over the query heads of its KV head; 0 where no query looks."""
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)  # a KV head
    token = tile * BN + tl.arange(0, BN)
    k = tl.trans(_tile(keys + head * tokens * D, token, tokens, D, CHANNELS))
    greatest = tl.full([BN], float("-inf"), tl.float32)
    # The first query that is far enough behind the first of these tokens.
    begin = tl.maximum(tile * BN + distance - first + every - 1, 0) // every
    for member in range(group):
        query_head = head * group + member
        for start in range(begin, count, BM):
            row = start + tl.arange(0, BM)
            q = _tile(queries + query_head * count * D, row, count, D, CHANNELS)
            divisor = tl.load(sums + query_head * count + row, mask=row < count, other=float("inf"))
            logs = tl.dot(q, k, input_precision=PRECISION) * scale - divisor[:, None]
            is_far = (first + row * every)[:, None] - token[None, :] >= distance
            greatest = tl.maximum(greatest, tl.max(tl.where(is_far, logs, float("-inf")), 0))
    # Of huge logits a rounding makes no weight larger than 1.
    tl.store(found + head * tokens + token, tl.exp2(tl.minimum(greatest, 0.0)), mask=token < tokens)


def greatest_attention(
    queries: Float[Tensor, "b q m d"], keys: Float[Tensor, "b h n d"], asked: range, least_distance: int
) -> Float[Tensor, "b h n"]:
    """Return the greatest attention weight of each token, see `layer.observations.greatest_attention`.

    Args:
        queries: Those that are asked, of one dtype with the keys; they give logits at ``head_dim ** -0.5``.
        keys: All keys.
        asked: Places of the queries among the keys.
        least_distance: A token counts if it is so many tokens before a query; at least 0.

    Raises:
        UnsupportedError: If the shared memory of the card is too small.
    """
    batch, heads, tokens, head_dim = keys.shape
    group, count = queries.shape[1] // heads, len(asked)
    found = torch.zeros(batch, heads, tokens, dtype=torch.float32, device=keys.device)
    if not found.numel() or not count:
        return found
    queries, keys = queries.contiguous(), keys.contiguous()  # little beside all their products
    sums = found.new_empty(batch, heads * group, count)
    shared = (group, count, tokens, asked.start, asked.step)
    scale = head_dim**-0.5 * _LOG2_E
    how = _constexprs(head_dim, fine=keys.dtype == torch.float32)
    try:
        sums_kernel[batch * heads * group, triton.cdiv(count, how["BM"])](
            queries, keys, sums, *shared, scale, **how, **_OPTIONS
        )
        greatest_kernel[batch * heads, triton.cdiv(tokens, how["BN"])](
            queries, keys, sums, found, *shared, least_distance, scale, **how, **_OPTIONS
        )
    except OutOfResources as error:
        msg = f"the card is too small for a kernel: {error}"
        raise UnsupportedError(msg) from error
    return found


def _constexprs(head_dim: int, *, fine: bool) -> dict[str, Any]:
    channels = max(triton.next_power_of_2(head_dim), 16)
    size = _TILE // 2 if fine and channels > _WIDE else _TILE
    return {"D": head_dim, "CHANNELS": channels, "BM": size, "BN": size, "PRECISION": "ieee" if fine else "tf32"}


def compile_cases() -> Iterator[CompileCase]:
    """Yield what a model with heads of 128 channels would launch."""
    types = {"queries": "*bf16", "keys": "*bf16", "sums": "*fp32", "found": "*fp32", "scale": "fp32"}
    for name, kernel in (("sums", sums_kernel), ("greatest", greatest_kernel)):
        yield compile_case(f"{name} d=128", kernel, types, _constexprs(128, fine=False), _OPTIONS, _TILE)
