"""What a layer shows of codes: tensors that are made anew each time, so that writing to them would be lost."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.states.metadata import writes


class Decoded(torch.Tensor):
    """Keys or values that were decoded from codes.  To write to them, or to a view of them, is an error.

    Everything else that is computed from them is a tensor of torch's.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        """Compute with a plain tensor.

        Raises:
            UnsupportedError: If the function writes to this one.
        """
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (writes(name) and args and isinstance(args[0], cls)) or isinstance(kwargs.get("out"), cls):
            msg = (
                "keys and values of a compressed layer are decoded anew at each access, so an edit would be lost. Edit "
                "a clone(), or override make_codec or make_policy to change what the cache holds."
            )
            raise UnsupportedError(msg)
        held = {_storage(x) for x in args if isinstance(x, cls)}
        result = func(*_plain(args), **_plain(kwargs))
        if type(result) in {tuple, list}:  # of views, as by `unbind`
            return type(result)(_shown(each, held) for each in result)
        return _shown(result, held)


def _shown(result: Any, held: set[int]) -> Any:  # noqa: ANN401 - what a torch function returns
    """Return a view of something decoded as such."""
    return result.as_subclass(Decoded) if isinstance(result, Tensor) and _storage(result) in held else result


def _plain(given: Any) -> Any:  # noqa: ANN401 - arguments of a torch function
    return tree_map_only(Decoded, lambda x: x.as_subclass(Tensor), given)


def _storage(x: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as torch's documentation has it
        return x.untyped_storage().data_ptr()
