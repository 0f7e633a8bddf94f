"""What a layer shows of codes: tensors that are made anew each time, so that writing to them would be lost."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.states.metadata import writes


class Decoded(torch.Tensor):
    """Keys or values that were decoded from codes.  To write to them, or to a view of them, is an error.

    So is attention to them by torch's own functions where tokens have been evicted: it would take the others for all
    there are, and the zeros of heads that keep fewer for tokens.  Cross-attention of transformers takes keys from a
    layer in this way.

    Everything else that is computed from them is a tensor of torch's.

    Attributes:
        is_whole: Whether no token is missing.
    """

    is_whole: bool = True

    @staticmethod
    def of(tensor: Tensor, *, is_whole: bool) -> "Decoded":
        """Return a tensor, sharing its memory, as what was decoded."""
        self = tensor.as_subclass(Decoded)
        self.is_whole = is_whole
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        """Compute with a plain tensor.

        Raises:
            UnsupportedError: If the function writes to this one, or attends to it and tokens are missing.
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
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)]
        is_whole = all(x.is_whole for x in given)
        if name in _ATTENDS and not is_whole:
            msg = (
                "tokens of this layer have been evicted, and attention to the keys and values that it shows would take "
                "the others for all there are. Attention is answered for what update() returns; for cross-attention "
                "use the preset 'quant', which evicts nothing. To compute with what is kept, take a clone()."
            )
            raise UnsupportedError(msg)
        held = {_storage(x) for x in given}
        result = func(*_plain(args), **_plain(kwargs))

        def shown(x: Any) -> Any:  # noqa: ANN401 - what a torch function returns
            if not isinstance(x, Tensor):
                return x
            is_same = _storage(x) in held or (not is_whole and name in _COPIES)
            return Decoded.of(x, is_whole=is_whole) if is_same else x

        # A list or a tuple is of views, as by `unbind`.
        return type(result)(map(shown, result)) if type(result) in {tuple, list} else shown(result)


_ATTENDS = {"scaled_dot_product_attention", "matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_COPIES = _CASTS | {"contiguous", "expand", "repeat", "repeat_interleave", "reshape"}
"""What models do to keys and values on their way to attention that may be no view."""


def _plain(given: Any) -> Any:  # noqa: ANN401 - arguments of a torch function
    return tree_map_only(Decoded, lambda x: x.as_subclass(Tensor), given)


def _storage(x: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as torch's documentation has it
        return x.untyped_storage().data_ptr()
