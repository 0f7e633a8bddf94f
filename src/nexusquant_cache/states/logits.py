"""What a model does with its logits between the keys and the values, where it does that by itself."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.states.metadata import METADATA
from nexusquant_cache.states.source import Source, are_last, hidden_in, is_visible
from nexusquant_cache.uncompiled import uncompiled

_MULTIPLIES = frozenset({"mul", "mul_", "multiply", "multiply_"})
_DIVIDES = frozenset({"div", "div_", "divide", "divide_", "true_divide", "true_divide_"})
_SCALES = _MULTIPLIES | _DIVIDES
_CHANGES_NO_NUMBER = frozenset({"to", "float", "type", "contiguous", "clone"})
# These leave minus infinity what it is, or the token out.  Others, as soft-capping, make a number of it.
_KEEPS_INFINITY = (
    _SCALES
    | _CHANGES_NO_NUMBER
    | {"add", "add_", "sub", "sub_", "masked_fill", "masked_fill_", "cat", "detach", "__get__"}
    | {f"__{sign}{name}__" for name in ("add", "sub", "mul", "truediv") for sign in ("", "i", "r")}
)


class Logits(torch.Tensor):
    """The product of queries and the keys of a cache, on its way to the softmax.

    It has real numbers, and every function computes with them.  On the way it learns what the scorer has to know: how
    the model scales its logits, and which new tokens no query attends to.  Evicted tokens are at minus infinity, and
    stay there when the model bounds its logits (soft-capping).
    """

    source: Source
    queries: Tensor
    scaling: float | None

    @staticmethod
    def of(
        logits: Float[Tensor, "b q m seen"],
        source: Source,
        queries: Float[Tensor, "b q m d"],
        scaling: float | None = None,
    ) -> "Logits":
        """Return logits that know what they come from, and how the model has scaled them up to now."""
        self = logits.as_subclass(Logits)
        self.source, self.queries, self.scaling = source, queries, scaling
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Compute, and go with the result as long as it is made of logits."""
        del types
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as torch's documentation has it
                return func(*args, **(kwargs or {}))
        return _compute(func, args, kwargs or {})


@uncompiled
def _compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    name = getattr(func, "__name__", "")
    if name == "matmul":  # these are weights already, of a softmax that was not seen
        return func(*(x.as_subclass(Tensor) if isinstance(x, Logits) else x for x in args), **kwargs)
    among = args[0] if args and isinstance(args[0], list | tuple) else args  # as `torch.cat` takes them
    given = next((x for x in among if isinstance(x, Logits)), None)
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as above
        if given is not None and name == "softmax":
            _show(given)
        result = func(*args, **kwargs)
        if given is None or name in {"softmax", "detach", "__get__"} or not _is_made_of(result, given):
            return result
        evicted = None if name in _KEEPS_INFINITY else given.source.evicted
        if evicted is not None:
            of_queries = evicted.repeat_interleave(result.shape[1] // evicted.shape[1], 1)
            result[..., : evicted.shape[3]].masked_fill_(of_queries, -torch.inf)
        return _follow(result, given, name, args)


def _follow(result: Tensor, given: Logits, name: str, args: tuple[Any, ...]) -> Logits:
    scaling = given.scaling
    if scaling is None and name not in _CHANGES_NO_NUMBER:
        factor = _number(args[1]) if name in _SCALES and len(args) > 1 and args[0] is given else None
        scaling = 1.0 if factor is None else 1 / factor if name in _DIVIDES else factor
    if name.endswith("_"):  # the model may go on with what it had
        given.scaling = scaling
    return Logits.of(result, given.source, given.queries, scaling)


def _number(x: object) -> float | None:
    """Return the value of a number, given as such or as a tensor of one."""
    if isinstance(x, Tensor):
        x = float(x) if x.numel() == 1 else None
    return float(x) if isinstance(x, int | float) and x else None


def _is_made_of(result: object, given: Tensor) -> bool:
    """Tell whether this may be logits of the same queries, perhaps with those of further tokens behind them."""
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return False
    found, before = result.shape, given.shape
    return found == before or (found[:-1] == before[:-1] and found[-1] >= before[-1])


def _show(logits: Logits) -> None:
    """Tell the source what the softmax is about to get."""
    source, pads = logits.source, None
    if source.fresh > 1:
        seen = source.held.seen
        newest = logits[..., seen - source.fresh : seen]
        if not are_last(newest[..., -1], logits.shape[2], source.fresh):
            return
        pads = hidden_in(is_visible(newest))
    source.note(logits.queries, 1.0 if logits.scaling is None else logits.scaling, pads)
