"""Where Triton kernels run, and what they need to know of a codec."""

import os
from collections.abc import Hashable
from functools import lru_cache
from importlib.util import find_spec

import torch

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.operands import PackedOperand
from nexusquant_cache.codec.transform import VectorTransform

_LEAST_CAPABILITY = (8, 0)  # bfloat16 and the matrix instructions that the kernels are made of
MOST_CHANNELS = 256
"""The largest head dimension that Triton kernels cover."""


def is_wanted(device: torch.device) -> bool:
    """Tell whether ``impl="auto"`` shall use Triton kernels on this device: on every one but a CPU."""
    return device.type != "cpu"


def why_not(layouts: tuple[CodeLayout, ...], transform: VectorTransform) -> str | None:
    """Return why Triton kernels cannot compute with these layouts and this transform; None if they can."""
    head_dim = layouts[0].head_dim
    if head_dim > MOST_CHANNELS:
        return f"Triton kernels cover head dimensions up to {MOST_CHANNELS}, not {head_dim}"
    reason = why_not_on(transform.reference.device)
    if reason is None and transform.side_plan(layouts) is None:
        reason = f"{type(transform.rotation).__name__} is not written as whole numbers (Rotation.axes)"
    return reason


@lru_cache(maxsize=16)
def why_not_on(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on this device; None if they can."""
    if not _has_triton():
        return "triton is not installed (pip install 'nexusquant-cache[triton]')"
    if device.type != "cuda":
        # The interpreter runs kernels on the CPU, slowly, for tests.
        is_interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if is_interpreted else f"a {device.type} device has no Triton kernels"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        own = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"Triton kernels need compute capability {least}, this card has {own}"
    return None


def _has_triton() -> bool:
    return find_spec("triton") is not None


def specialisation(layouts: tuple[CodeLayout, ...], transform: VectorTransform) -> Hashable:
    """Return what kernels that encode and decode with these are compiled for, besides the device and the dtype."""
    plan = transform.side_plan(layouts)
    assert plan is not None, "why_not has found nothing"
    return plan.head_dim, plan.rates, plan.row_bytes % 2


def operand(packed: PackedVectors, transform: VectorTransform, layouts: tuple[CodeLayout, ...]) -> PackedOperand:
    """Return encoded vectors as kernels read them; only where `why_not` returns None."""
    plan = transform.side_plan(layouts)
    assert plan is not None, "why_not has found nothing"
    return PackedOperand(plan, packed.words, packed.scales)
