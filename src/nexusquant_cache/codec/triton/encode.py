"""Encoding by Triton kernels: what `codec.torch.encode` returns, up to rounding."""

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.codec.triton import kernels_encode
from nexusquant_cache.codec.triton.support import operand


def encode(
    vectors: Float[Tensor, "b h n d"],
    transform: VectorTransform,
    layouts: tuple[CodeLayout, ...],
    candidates: tuple[float, ...],
) -> PackedVectors:
    """Return finite vectors, encoded; arguments as in plain torch."""
    batch, heads, tokens, head_dim = vectors.shape
    words = torch.empty(batch, heads, tokens, layouts[0].bytes_per_vector, dtype=torch.uint8, device=vectors.device)
    packed = PackedVectors(words, words.new_empty(batch, heads, tokens))
    out = operand(packed, transform, layouts)
    # What the rotation makes of each channel's unit vector: the matrix of any rotation.
    unit = torch.eye(head_dim, device=vectors.device, dtype=torch.float32).expand(batch, heads, -1, -1)
    forward = transform.rotation.rotate(unit)
    given = kernels_encode.encode_operand(out.plan, forward, transform.reference, transform.rotation.block_variances)
    kernels_encode.encode(vectors, given, candidates, out)
    return packed
