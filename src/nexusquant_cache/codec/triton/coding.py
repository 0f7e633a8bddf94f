"""The E8 codec by kernels: the same codes and vectors as in plain torch, up to rounding."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec import impl as support
from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.operands import PackedOperand
from nexusquant_cache.codec.transform import VectorTransform


def why_not(layouts: tuple[CodeLayout, ...], transform: VectorTransform) -> str | None:
    """Return why kernels cannot do the work of a codec with these layouts; None if they can."""
    reason = support.why_not(transform.reference.device, layouts[0].head_dim)
    if reason is None and transform.side_plan(layouts) is None:
        reason = f"{type(transform.rotation).__name__} is not written as whole numbers (Rotation.axes)"
    return reason


def operand(layouts: tuple[CodeLayout, ...], packed: PackedVectors, transform: VectorTransform) -> PackedOperand:
    """Return codes as kernels read them; only if `why_not` has nothing against it."""
    plan = transform.side_plan(layouts)
    assert plan is not None
    return PackedOperand(plan, packed.words, packed.scales)


def encode(
    vectors: Float[Tensor, "b h n d"],
    transform: VectorTransform,
    layouts: tuple[CodeLayout, ...],
    candidates: tuple[float, ...],
    gain: Literal["least_squares", "norm", "unbiased"],
) -> PackedVectors:
    """Return the codes of finite vectors."""
    from nexusquant_cache.codec.triton import encode as kernel  # noqa: PLC0415 - imports triton

    batch, heads, tokens, head_dim = vectors.shape
    words = torch.empty(batch, heads, tokens, layouts[0].bytes_per_vector, dtype=torch.uint8, device=vectors.device)
    packed = PackedVectors(words, words.new_empty(batch, heads, tokens))
    out = operand(layouts, packed, transform)
    # What the rotation makes of each channel's unit vector: the matrix of any rotation.
    unit = torch.eye(head_dim, device=vectors.device).expand(batch, heads, -1, -1)
    forward = transform.rotation.rotate(unit)
    given = kernel.encode_operand(out.plan, forward, transform.reference, transform.rotation.block_variances)
    kernel.encode(vectors, given, candidates, gain, out)
    return packed


def decode(
    packed: PackedVectors, transform: VectorTransform, layouts: tuple[CodeLayout, ...]
) -> Float[Tensor, "b h n d"]:
    """Return the vectors of codes as a new float32 tensor."""
    from nexusquant_cache.codec.triton import decode as dense  # noqa: PLC0415 - imports triton

    shape = (*packed.scales.shape, layouts[0].head_dim)
    out = torch.empty(shape, dtype=torch.float32, device=packed.words.device)
    dense.decode(operand(layouts, packed, transform), out)
    return out
