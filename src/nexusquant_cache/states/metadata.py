"""What torch is asked about a tensor without a look at its numbers."""

from typing import Any

import torch


def _getters(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names}


METADATA = _getters("shape", "dtype", "device", "ndim", "is_cuda", "is_cpu", "is_mps", "layout", "requires_grad") | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
    torch.Tensor.__repr__,
}
"""Functions that need no answer of a subclass."""
