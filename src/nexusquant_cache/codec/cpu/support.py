"""Where compiled functions run, and what they are given of a codec."""

from collections.abc import Hashable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.layout import BLOCK, CodeLayout
from nexusquant_cache.codec.operands import SidePlan
from nexusquant_cache.codec.transform import VectorTransform

UNITS = (0, 128, 128, 64, 16)
"""What the whole numbers that compiled functions decode levels to count, in units of ``2 ** -24``, by rate."""
_LEVEL, _INT16 = 2.0**-24, 2**15 - 1


def is_wanted(device: torch.device) -> bool:
    """Tell whether ``impl="auto"`` shall use compiled functions on this device: on a CPU."""
    return device.type == "cpu"


def why_not(layouts: tuple[CodeLayout, ...], transform: VectorTransform) -> str | None:
    """Return why compiled functions cannot compute with these layouts and this transform; None if they can."""
    reason = why_not_on(transform.reference.device)
    if reason is None and transform.side_plan(layouts) is None:
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
    """Return what decides which ways functions that encode and decode with these take."""
    plan = transform.side_plan(layouts)
    assert plan is not None, "why_not has found nothing"
    return plan.head_dim, plan.rates


class Side(NamedTuple):
    """What the packed keys, or values, of a layer share, as compiled functions take it.

    A decoded vector is ``scale * sum(level[c] * units[c] * axes[c]) + mean``, where levels are whole numbers of `UNITS`
    and scales relative to the reference.

    Attributes:
        axes: What each coded channel adds to a vector, ``[b or 1, h or 1, d, d]``.
        units: Their units, ``[b, h, d]``.
        whole_units: Units in units of the block, in which axes are whole numbers of 16 bits, ``[b, h, d]``.
        mean: Mean vector, ``[b, h, d]``.
        unit: The unit of each block, ``[b, h, blocks]``.
        blocks: For each head and block its bits, its first byte in a row, and its odd byte, ``[b, h, 3, blocks]``.
    """

    axes: NDArray[np.int8]
    units: NDArray[np.float32]
    whole_units: NDArray[np.float32]
    mean: NDArray[np.float32]
    unit: NDArray[np.float32]
    blocks: NDArray[np.int32]


def side_of(transform: VectorTransform, layouts: tuple[CodeLayout, ...]) -> Side:
    """Return a transform as compiled functions take it, made once; only where `why_not` returns None."""
    plan = transform.side_plan(layouts)
    assert plan is not None, "why_not has found nothing"
    if plan not in _SIDES:
        _SIDES[plan] = _side(plan, layouts)
    return _SIDES[plan]


_SIDES: WeakKeyDictionary[SidePlan, Side] = WeakKeyDictionary()


def _side(plan: SidePlan, layouts: tuple[CodeLayout, ...]) -> Side:
    blocks = np.array([_places(layout) for layout in layouts], np.int32)[plan.plans.numpy()]
    bits = blocks[:, :, 0].repeat(BLOCK, -1)
    units = plan.step.double().numpy() * plan.factor.double().numpy()[..., None] * np.array(UNITS)[bits] * _LEVEL
    # Products of 16 bits with eight levels add up to less than 31.
    largest = (units * plan.axes.abs().amax(-1).numpy()).reshape(*blocks.shape[:2], -1, BLOCK).max(-1)
    unit = np.where(largest > 0, largest, 1.0) / _INT16
    mean = np.zeros(units.shape) if plan.mean is None else plan.mean[:, :, 0].float().numpy()

    def single(x: NDArray[Any]) -> NDArray[np.float32]:
        return np.ascontiguousarray(x, np.float32)

    whole_units = units / unit.repeat(BLOCK, -1)
    return Side(plan.axes.numpy(), single(units), single(whole_units), single(mean), single(unit), blocks)


@lru_cache(maxsize=64)
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
