"""Encoding by compiled functions: what `codec.torch.encode` returns."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.blocks import cells_of
from nexusquant_cache.codec.cpu import kernels_encode
from nexusquant_cache.codec.cpu.support import side_of
from nexusquant_cache.codec.cpu.workers import share, workers_for
from nexusquant_cache.codec.layout import MAX_BITS, CodeLayout
from nexusquant_cache.codec.scale import encode_scales
from nexusquant_cache.codec.transform import VectorTransform

_WEIGHT = 8  # a chunk takes as long to encode as so many to read


def encode(
    vectors: Float[Tensor, "b h n d"],
    transform: VectorTransform,
    layouts: tuple[CodeLayout, ...],
    candidates: tuple[float, ...],
) -> PackedVectors:
    """Return finite vectors, encoded; arguments as in plain torch."""
    y = transform.forward(vectors)
    shape = y.shape[:3]
    words = torch.empty(*shape, layouts[0].bytes_per_vector, dtype=torch.uint8, device="cpu")
    scales = torch.empty(shape, dtype=torch.float32, device="cpu")
    given = (
        y.flatten(0, 1).numpy(),
        _weights(transform, layouts),
        _blocks(transform, layouts),
        np.array(candidates, np.float32),
        *_tables(),
    )
    out = (words.flatten(0, 1).numpy(), scales.flatten(0, 1).numpy())
    share(
        lambda worker, workers: kernels_encode.encode(*given, worker, workers, *out),
        workers_for(shape.numel() // kernels_encode.CHUNK * _WEIGHT),
    )
    return PackedVectors(words, encode_scales(scales, transform.reference))


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


class _Tables(NamedTuple):
    """The cells of each rate, see `kernels_encode.encode`; behind those of a rate there are zeros."""

    thresholds: NDArray[np.float32]
    values: NDArray[np.float32]
    odd: NDArray[np.uint8]
    code_bits: NDArray[np.int64]
    counts: NDArray[np.int64]


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    rates = range(1, MAX_BITS + 1)
    cells = {bits: cells_of(bits, torch.device("cpu")) for bits in rates}
    most = max(len(x.thresholds) for x in cells.values())
    tables = _Tables(
        np.zeros((MAX_BITS + 1, most), np.float32),
        np.zeros((MAX_BITS + 1, 4 * (most + 1)), np.float32),
        np.zeros((MAX_BITS + 1, most + 1), np.uint8),
        np.zeros((MAX_BITS + 1, 8, 4 * (most + 1)), np.int64),
        np.zeros(MAX_BITS + 1, np.int64),
    )
    for bits, cell in cells.items():
        count = len(cell.thresholds)
        tables.thresholds[bits, :count] = cell.thresholds
        tables.values[bits, : 4 * (count + 1)] = cell.values.flatten()
        tables.odd[bits, : count + 1] = cell.odd
        tables.code_bits[bits, :, : 4 * (count + 1)] = cell.codes
        tables.counts[bits] = count
    return tables
