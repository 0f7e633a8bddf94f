"""What `update` returns: tensors that know their layer."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nexusquant_cache.codec.held import HeldTokens, Side

Function: TypeAlias = Callable[..., object]
Args: TypeAlias = tuple[object, ...]
Kwargs: TypeAlias = dict[str, object]


class HeldStates(torch.Tensor):
    """The keys or the values of a `HeldTokens`, decoded when anything but our attention looks at them.

    Shape, dtype and device are there at once.  Every torch function gets the decoded tensor in place of this one, so a
    model that knows nothing of all this computes what it would have computed.
    """

    held: HeldTokens
    side: Side
    _decoded: Tensor | None

    @staticmethod
    def __new__(cls: "type[HeldStates]", held: HeldTokens, side: Side) -> "HeldStates":  # noqa: PYI034 - Python 3.10
        """Stand for one side of these tokens."""
        like = held.tail[0 if side == "keys" else 1]
        shape = (*like.shape[:2], held.tokens, like.shape[3])
        self: HeldStates = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - as torch's documentation has it
            cls, shape, dtype=like.dtype, device=like.device
        )
        self.held, self.side, self._decoded = held, side, None
        return self

    def decoded(self) -> Tensor:
        """Return all vectors in the dtype they came in."""
        if self._decoded is None:
            self._decoded = self.held.dense_keys() if self.side == "keys" else self.held.dense_values()
        return self._decoded

    def __repr__(self) -> str:  # type: ignore[override]
        """Say what it is without decoding it."""
        return f"HeldStates({self.side}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        """Compute with the decoded tensor, but for what is known without it."""
        del types
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as torch's documentation has it
                return func(*args, **(kwargs or {}))
        return func(*_decode(args), **_decode(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch's documentation has it
        cls, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        """Do the same for calls that do not come through torch's functions in Python."""
        del types
        return func(*_decode(args), **_decode(kwargs or {}))


def _decode(given: Any) -> Any:  # noqa: ANN401 - arguments of a torch function
    return tree_map_only(HeldStates, HeldStates.decoded, given)


def _getters(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names}


_METADATA = _getters("shape", "dtype", "device", "ndim", "is_cuda", "is_cpu", "is_mps", "layout", "requires_grad") | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
    torch.Tensor.__repr__,
}
"""What is asked without a look at the numbers."""
