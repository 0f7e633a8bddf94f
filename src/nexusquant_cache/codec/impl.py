"""Whether the kernels can be used, and what is said where they cannot."""

import logging
import os
from collections.abc import Callable, Hashable
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.errors import UnsupportedError

Impl = Literal["auto", "torch", "triton"]
"""Kernels where they can run, never, or always."""

_LOG = logging.getLogger("nexusquant_cache")
_LEAST_CAPABILITY = (8, 0)  # bfloat16 and the matrix instructions that the kernels are made of
MOST_CHANNELS = 256
"""The largest head dimension that the kernels cover."""


def why_not(device: torch.device, *head_dims: int) -> str | None:
    """Return why kernels cannot run on this device for these head dimensions; None if they can."""
    too_wide = [head_dim for head_dim in head_dims if head_dim > MOST_CHANNELS]
    if too_wide:
        return f"the kernels cover head dimensions up to {MOST_CHANNELS}, not {too_wide[0]}"
    return _why_no_kernels(device)


@lru_cache(maxsize=16)
def _why_no_kernels(device: torch.device) -> str | None:
    if not _has_triton():
        return "triton is not installed (pip install 'nexusquant-cache[triton]')"
    if device.type != "cuda":
        # The interpreter runs kernels on the CPU, slowly, for tests.
        is_interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if is_interpreted else f"a {device.type} device has no kernels"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        own = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"the kernels need compute capability {least}, this card has {own}"
    return None


def _has_triton() -> bool:
    return find_spec("triton") is not None


def are_wanted(impl: Impl, device: torch.device) -> bool:
    """Tell whether kernels were asked for; by default on every device but a CPU, which has none."""
    return impl == "triton" or (impl == "auto" and device.type != "cpu")


def refuse(impl: Impl, reason: str) -> None:
    """Say, once for each reason, why plain torch computes where kernels were wanted; results are the same.

    Args:
        impl: What was asked for.
        reason: Why kernels cannot be used, see `why_not`.

    Raises:
        UnsupportedError: If ``impl`` is ``"triton"``.
    """
    if impl == "triton":
        msg = f"impl='triton' was asked for, but {reason}. impl='auto' computes the same in plain torch."
        raise UnsupportedError(msg)
    _say_once(reason)


def is_right(impl: Impl, key: Hashable, error: Callable[[], float], most: float) -> bool:
    """Tell whether a kernel computes what plain torch computes; found out at the first use of each specialisation.

    A compiler or a card that nobody has tried then costs time, and no answer.

    Args:
        impl: What was asked for, ``"auto"`` or ``"triton"``.
        key: What the kernel was specialised for, and the device.
        error: Compares the two.
        most: The largest error that rounding explains.

    Raises:
        UnsupportedError: If ``impl`` is ``"triton"`` and the kernel is wrong.
    """
    if key not in _ERRORS:
        _ERRORS[key] = error()
    if _ERRORS[key] <= most:  # not so for NaN
        return True
    refuse(impl, f"a kernel differs from plain torch on this device, by {_ERRORS[key]:.2g} for {key}; please report it")
    return False


_ERRORS: dict[Hashable, float] = {}


def distance(found: Float[Tensor, "*shape"], expected: Float[Tensor, "*shape"]) -> float:
    """Return the distance between two results, relative to the length of the second."""
    length = expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.double() - expected.double()).norm() / length)


@lru_cache(maxsize=64)
def _say_once(reason: str) -> None:
    _LOG.warning("compressed caches are computed in plain torch, which is slower: %s", reason)
