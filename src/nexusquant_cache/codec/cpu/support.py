"""Where compiled functions run, and what they are given of a codec."""

from collections.abc import Hashable
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors, RaggedVectors
from nexusquant_cache.codec.layout import BLOCK, CodeLayout
from nexusquant_cache.codec.transform import VectorTransform


def is_wanted(device: torch.device) -> bool:
    """Tell whether ``impl="auto"`` shall use compiled functions on this device: on any CPU."""
    return device.type == "cpu"


def why_not(layouts: tuple[CodeLayout, ...], transform: VectorTransform) -> str | None:
    """Return why compiled functions cannot compute with these layouts and this transform; None if they can."""
    del layouts
    reason = why_not_on(transform.reference.device)
    if reason is None and transform.rotation.axes(transform.reference.device) is None:
        reason = f"{type(transform.rotation).__name__} is not written as whole numbers (Rotation.axes)"
    return reason


def why_not_on(device: torch.device) -> str | None:
    """Return why compiled functions cannot run on this device; None if they can."""
    if device.type != "cpu":
        return f"functions that numba compiles run on a CPU, not on a {device.type} device"
    return None if _has_numba() else "numba is not installed (pip install 'nexusquant-cache[cpu]')"


@lru_cache(maxsize=1)
def _has_numba() -> bool:
    return find_spec("numba") is not None


def specialisation(layouts: tuple[CodeLayout, ...], transform: VectorTransform) -> Hashable:
    """Return what decides which ways functions that encode and decode with these take: the rates that occur."""
    rates = 0
    for plan in set(transform.plan_of_heads) or {0}:
        rates |= _rates(layouts[plan])
    return layouts[0].head_dim, rates


@lru_cache(maxsize=256)
def _rates(layout: CodeLayout) -> int:
    return sum(1 << bits for bits in set(layout.block_bits))


class Side(NamedTuple):
    """What the packed keys, or values, of a layer share, as compiled functions take it: views of what the layer holds.

    Attributes:
        axes: What each coded channel adds to a vector, in whole numbers, ``[b or 1, h or 1, d, d]``.
        steps: Unit of each axis for channels of unit variance, ``[b or 1, h or 1, d]``.
        reference: Scale that scale byte 128 stands for, ``[b, h]``.
        mean: Mean vector, ``[b or 1, h or 1, d]``.
        plans: Which of the layouts each head has, ``[b, h]``.
        layouts: For each layout the bits of each block, its first byte in a row, and its odd byte.
    """

    axes: NDArray[np.int8]
    steps: NDArray[np.float32]
    reference: NDArray[np.float32]
    mean: NDArray[np.float32]
    plans: NDArray[np.uint8]
    layouts: NDArray[np.int32]


def side_of(transform: VectorTransform, layouts: tuple[CodeLayout, ...]) -> Side:
    """Return a transform as compiled functions take it; only where `why_not` returns None."""
    found = transform.rotation.axes(transform.reference.device)
    assert found is not None, "why_not has found nothing"
    (axes, steps), reference = found, transform.reference[..., 0]
    steps = steps[None, None] if steps.ndim == 1 else steps
    mean = (
        _none(layouts[0].head_dim) if transform.mean is None else transform.mean[:, :, 0].float().contiguous().numpy()
    )
    plans = _first_layout(reference.shape) if transform.plans is None else transform.plans.contiguous().numpy()
    tables = _tables(tuple(layout.block_bits for layout in layouts))
    axes, steps, reference = axes.contiguous(), steps.contiguous(), reference.contiguous()
    return Side(axes.numpy(), steps.numpy(), reference.numpy(), mean, plans, tables)


@lru_cache(maxsize=16)
def _none(dim: int) -> NDArray[np.float32]:
    return np.zeros((1, 1, dim), np.float32)


@lru_cache(maxsize=16)
def _first_layout(shape: torch.Size) -> NDArray[np.uint8]:
    return np.zeros(shape, np.uint8)


@lru_cache(maxsize=64)
def _tables(plans: tuple[tuple[int, ...], ...]) -> NDArray[np.int32]:
    layouts = (CodeLayout(BLOCK * len(plan), plan) for plan in plans)
    return np.array([_places(layout) for layout in layouts], np.int32)


def _places(layout: CodeLayout) -> tuple[tuple[int, ...], ...]:
    """Return bits, first byte and odd byte of each block."""
    words, odd = [0] * layout.blocks, [0] * layout.blocks
    for index, (block, shift) in enumerate(layout.byte_sources):
        bits = layout.block_bits[block]
        if bits % 2 and shift == BLOCK * (bits - 1):
            odd[block] = index
        elif shift == 0:
            words[block] = index
    return layout.block_bits, tuple(words), tuple(odd)


class Rows(NamedTuple):
    """Packed vectors as compiled functions read them: bytes, and where among them the rows of each head begin.

    Attributes:
        words: Packed codes, and all bytes between them.
        scales: Scale bytes, likewise.
        where: Of each head, counted through the batch, the first byte of its codes, its first scale, and how many rows
            it has.
    """

    words: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    where: NDArray[np.int64]


def rows_of(packed: PackedVectors) -> Rows:
    """Return where the rows of each head are; those of one head lie one behind the other."""
    words, scales = packed.words, packed.scales
    if words.shape[2] > 1 and (words.stride()[2:] != (words.shape[3], 1) or scales.stride(2) != 1):
        words, scales = words.contiguous(), scales.contiguous()
    where = _where(words.shape[:3], words.stride()[:2], scales.stride()[:2])
    return Rows(_bytes_of(words), _bytes_of(scales), where)


def ragged_rows_of(packed: RaggedVectors) -> Rows:
    """Return where the rows of each head are that the prompt has left: one head behind the other."""
    starts, counts = packed.starts.flatten().numpy(), packed.counts.flatten().numpy()
    where = np.stack([starts * packed.words.shape[1], starts, counts])
    return Rows(_bytes_of(packed.words.contiguous()), _bytes_of(packed.scales.contiguous()), where)


@lru_cache(maxsize=64)
def _where(shape: tuple[int, ...], of_words: tuple[int, ...], of_scales: tuple[int, ...]) -> NDArray[np.int64]:
    batch, heads, tokens = shape
    rows, heads_of_row = np.divmod(np.arange(batch * heads), heads)
    starts = [rows * row + heads_of_row * head for row, head in (of_words, of_scales)]
    return np.stack([*starts, np.full(batch * heads, tokens)])


def _bytes_of(x: Tensor) -> NDArray[np.uint8]:
    """Return all bytes from the first to the last of a tensor."""
    size = sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return torch.as_strided(x, (size if x.numel() else 0,), (1,)).numpy()
