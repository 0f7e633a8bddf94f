"""Decoding by compiled functions: the vectors of `codec.torch.decode`, up to rounding."""

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.cpu import kernels_read
from nexusquant_cache.codec.cpu.support import rows_of, side_of
from nexusquant_cache.codec.cpu.workers import share, workers_for
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.transform import VectorTransform


def decode(
    packed: PackedVectors, transform: VectorTransform, layouts: tuple[CodeLayout, ...]
) -> Float[Tensor, "b h n d"]:
    """Return the vectors as a new float32 tensor; arguments as in plain torch."""
    out = torch.empty(*packed.scales.shape, layouts[0].head_dim, dtype=torch.float32, device="cpu")
    if out.numel():
        rows = rows_of(packed)
        given = (*rows, *side_of(transform, layouts))
        share(
            lambda worker, workers: kernels_read.decode(*given, worker, workers, out.flatten(0, 1).numpy()),
            workers_for(packed.scales.numel() // kernels_read.CHUNK),
        )
    return out
