"""Decoding by Triton kernels: the vectors of `codec.torch.decode`, up to rounding."""

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.codec.triton import kernels_decode
from nexusquant_cache.codec.triton.support import operand


def decode(
    packed: PackedVectors, transform: VectorTransform, layouts: tuple[CodeLayout, ...]
) -> Float[Tensor, "b h n d"]:
    """Return the vectors as a new float32 tensor; arguments as in plain torch."""
    shape = (*packed.scales.shape, layouts[0].head_dim)
    out = torch.empty(shape, dtype=torch.float32, device=packed.words.device)
    kernels_decode.decode(operand(packed, transform, layouts), out)
    return out
