"""Whether the kernels can be used, and what is said where they cannot."""

import logging
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch

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
        return None if os.environ.get("TRITON_INTERPRET") == "1" else f"a {device.type} device has no kernels"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        own = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"the kernels need compute capability {least}, this card has {own}"
    return None


def _has_triton() -> bool:
    return find_spec("triton") is not None


def uses_kernels(impl: Impl, device: torch.device, reason: str | None) -> bool:
    """Decide between kernels and plain torch.

    With ``"auto"`` a GPU that has to do without kernels is told so, once for each reason; results are the same.

    Args:
        impl: What was asked for.
        device: Where the tensors are.
        reason: Why kernels cannot be used here, see `why_not`; None if they can.

    Raises:
        UnsupportedError: If ``impl`` is ``"triton"`` and there is a reason against it.
    """
    if impl == "torch":
        return False
    if reason is None:
        return impl == "triton" or device.type == "cuda"
    if impl == "triton":
        msg = f"impl='triton' was asked for, but {reason}. impl='auto' computes the same in plain torch."
        raise UnsupportedError(msg)
    if device.type != "cpu":
        _say_once(reason)
    return False


@lru_cache(maxsize=64)
def _say_once(reason: str) -> None:
    _LOG.warning("compressed caches are computed in plain torch, which is slower: %s", reason)
