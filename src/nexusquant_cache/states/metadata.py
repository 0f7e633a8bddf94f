"""What a torch function does with a tensor: whether it looks at numbers, or writes them."""

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

_WRITES = frozenset(
    {"__set__", "__setitem__"}
    | {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
    | {f"__i{name}__" for name in ("lshift", "rshift", "matmul")}
)
_WRITES_NOTHING = frozenset({"detach_", "requires_grad_", "share_memory_"})


def writes(name: str) -> bool:
    """Tell whether a torch function of this name writes to its first tensor."""
    return name in _WRITES or (name.endswith("_") and not name.endswith("__") and name not in _WRITES_NOTHING)
