"""Encoding by compiled functions: what `codec.torch.encode` returns."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.cpu import kernels_encode
from nexusquant_cache.codec.cpu.support import side_of
from nexusquant_cache.codec.cpu.workers import share, workers_for
from nexusquant_cache.codec.layout import BLOCK, MAX_BITS, CodeLayout, block_code
from nexusquant_cache.codec.rotation import PrincipalRotation
from nexusquant_cache.codec.scale import encode_scales
from nexusquant_cache.codec.transform import VectorTransform

_WEIGHT = 4  # a chunk takes as long to encode as so many to read


def encode(
    vectors: Float[Tensor, "b h n d"],
    transform: VectorTransform,
    layouts: tuple[CodeLayout, ...],
    candidates: tuple[float, ...],
) -> PackedVectors:
    """Return finite vectors, encoded; arguments as in plain torch."""
    shape = vectors.shape[:3]
    words = torch.empty(*shape, layouts[0].bytes_per_vector, dtype=torch.uint8, device="cpu")
    scales = torch.empty(shape, dtype=torch.float32, device="cpu")
    given = (
        *_to_rotate(vectors, transform),
        _weights(transform, layouts),
        _blocks(transform, layouts),
        np.array(candidates, np.float32),
        _shifts(),
    )
    out = (words.flatten(0, 1).numpy(), scales.flatten(0, 1).numpy())
    share(
        lambda worker, workers: kernels_encode.encode(*given, worker, workers, *out),
        workers_for(shape.numel() // kernels_encode.CHUNK * _WEIGHT),
    )
    return PackedVectors(words, encode_scales(scales, transform.reference))


def _to_rotate(
    vectors: Float[Tensor, "b h n d"], transform: VectorTransform
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Return vectors, their mean, axes, and the inverse lengths of these, as `kernels_encode.encode` takes them.

    Rotations without axes of their own for each head, and those of users, have rotated the vectors already.
    """
    if type(transform.rotation) is not PrincipalRotation:
        rotated = transform.forward(vectors).flatten(0, 1).numpy()
        return rotated, np.zeros((0, 0), np.float32), np.zeros((0, 0, 0)), np.zeros((0, 0))
    units, lengths = transform.rotation.units()
    heads, head_dim = vectors.shape[:2], vectors.shape[3]
    none = vectors.new_zeros(1, 1, head_dim, dtype=torch.float32)
    mean = none if transform.mean is None else transform.mean[:, :, 0].float()
    means, axes, inverse_lengths = (
        x.expand(*heads, *x.shape[2:]).flatten(0, 1).contiguous().numpy()
        for x in (mean, units, lengths[..., 0].reciprocal())
    )
    return vectors.float().flatten(0, 1).numpy(), means, axes, inverse_lengths


def _blocks(transform: VectorTransform, layouts: tuple[CodeLayout, ...]) -> NDArray[np.int32]:
    """Return for each block of each head its bits, its first byte in a row, and its odd byte."""
    side = side_of(transform, layouts)
    return side.layouts[side.plans].reshape(-1, *side.layouts.shape[1:])


def _weights(transform: VectorTransform, layouts: tuple[CodeLayout, ...]) -> NDArray[np.float32]:
    """Return how much each block of each head weighs; 0 for those without bits."""
    bits = _blocks(transform, layouts)[:, 0]
    variances = transform.rotation.block_variances if transform.heads_by_plan else None
    weights = np.ones(bits.shape, np.float32) if variances is None else variances.flatten(0, 1).numpy()
    return (weights * (bits > 0)).astype(np.float32)


@lru_cache(maxsize=1)
def _shifts() -> NDArray[np.uint32]:
    """Return, by rate and channel, the place of each bit of its field in the code of a block."""
    shifts = np.zeros((MAX_BITS + 1, BLOCK, MAX_BITS), np.uint32)
    for bits in range(1, MAX_BITS + 1):
        shifts[bits, :, :bits] = block_code(bits).field_shifts
    return shifts
