"""The tensors that `update` returns."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from nexusquant_cache.codec.held import Side
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.states import answer
from nexusquant_cache.states.exact import ExactAttention
from nexusquant_cache.states.form import Form
from nexusquant_cache.states.logits import Logits
from nexusquant_cache.states.metadata import METADATA, writes
from nexusquant_cache.states.source import Source, are_last, pads_in
from nexusquant_cache.uncompiled import uncompiled

Function: TypeAlias = Callable[..., Any]

_AXES = 4  # batch, heads, tokens, channels
_AS_STORED = Form()
_MT: Any = getattr(torch.Tensor, "mT").__get__  # noqa: B009 - to mypy it is a tensor


class States(torch.Tensor):
    """The keys or the values of a layer, ``[batch, kv_heads, tokens seen, channels]``, for attention.

    Attention by `scaled_dot_product_attention`, or by two products around a softmax, is seen by the layer and, once
    there are codes, answered from them.  What models do to states on the way there is followed (`Form`).  Every other
    torch function gets a plain tensor, and what it returns is none of ours.

    Attributes:
        source: Where they come from.
        side: Which they are.
        form: What has been done to them since.
    """

    source: Source
    side: Side
    form: Form

    def plain(self) -> Tensor:
        """Return the tensor that this one stands for."""
        raise NotImplementedError

    def formed(self, form: Form, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "States":
        """Return these states in another form, which the function makes of them."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Function, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        """Answer attention; compute everything else with plain tensors."""
        del types
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as torch's documentation has it
                return func(*args, **(kwargs or {}))
        return _compute(func, args, kwargs or {})


class ExactStates(States):
    """States with numbers of their own, which any code may read."""

    @staticmethod
    def of(tensor: Tensor, source: Source, side: Side, form: Form = _AS_STORED) -> "ExactStates":
        """Return a tensor, sharing its memory, as the states that it is."""
        self = tensor.as_subclass(ExactStates)
        self.source, self.side, self.form = source, side, form
        return self

    def plain(self) -> Tensor:
        """Return the same numbers as a tensor of torch's."""
        return self.as_subclass(Tensor)

    def formed(self, form: Form, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> States:
        """Let the function do it."""
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as above
            return ExactStates.of(function(self, *args, **kwargs), self.source, self.side, form)


def _shortcut(name: str) -> Function:
    """Return a method that does what the torch function of this name does by way of `__torch_function__`."""
    function = getattr(torch.Tensor, name)

    @uncompiled
    def method(self: "HeldStates", *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        form = self.form.after(name, self.source.shapes[self.side], args, kwargs)
        if form is not None:
            return self.formed(form, function, args, kwargs)
        found = function(self.plain(), *args, **kwargs)
        self.source.note_read()
        return found

    return method


class HeldStates(States):
    """States that are decoded only if something else than attention looks at them.

    Shape, dtype and device are there at once.
    """

    _shape: torch.Size
    _dtype: torch.dtype
    _decoded: Tensor | None

    @staticmethod
    def of(source: Source, side: Side, form: Form = _AS_STORED, dtype: torch.dtype | None = None) -> "HeldStates":
        """Stand for one side of what a layer holds."""
        like = source.held.tail[0 if side == "keys" else 1]
        dtype = dtype or like.dtype
        shape = torch.Size(form.shape(source.shapes[side]))
        self: HeldStates = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - as torch's documentation has it
            HeldStates, shape, dtype=dtype, device=like.device
        )
        self.source, self.side, self.form = source, side, form
        self._shape, self._dtype, self._decoded = shape, dtype, None
        return self

    def plain(self) -> Tensor:
        """Return all vectors, decoded.

        Raises:
            UnsupportedError: If tokens have been evicted: what looks at the states would take the others for them.
        """
        if self._decoded is None:
            held, form = self.source.held, self.form
            if not held.is_whole:
                msg = (
                    f"something else than attention that can be seen looks at the {self.side} of a cache from which "
                    f"{held.seen - held.tokens} of {held.seen} tokens have been evicted. Call "
                    "nexusquant_cache.attention.enable(model), or use the preset 'quant', which evicts nothing."
                )
                raise UnsupportedError(msg)
            found = held.dense_keys(by_tables=True) if self.side == "keys" else held.dense_values()
            found = found.mT if form.is_transposed else found
            if form.is_split:
                found = found[:, :, None].expand(-1, -1, form.repeats, -1, -1)
            elif form.repeats > 1:
                found = found.repeat_interleave(form.repeats, 1)
            self._decoded = found.to(self._dtype)
        return self._decoded

    def formed(self, form: Form, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> States:
        """Stand for the same in another form."""
        del function, args, kwargs
        return HeldStates.of(self.source, self.side, form, self._dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        """Say what it is without decoding it."""
        return f"HeldStates({self.side}, shape={tuple(self.shape)}, dtype={self.dtype})"

    # At each step models ask each layer for these.  The way through torch to `__torch_function__` would take most of
    # the time, so it is cut short.

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Batch, heads, tokens and channels, in this form."""
        return self._shape

    __getitem__ = _shortcut("__getitem__")
    expand = _shortcut("expand")
    reshape = _shortcut("reshape")
    transpose = _shortcut("transpose")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch's documentation has it
        cls, func: Function, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        """Compute with decoded tensors what does not come through torch's functions in Python."""
        del types
        found = func(*plain(args), **plain(kwargs or {}))
        _note_read((args, kwargs))
        return found


@uncompiled
def _compute(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    name = getattr(func, "__name__", "")
    found = None
    if args and isinstance(args[0], States) and args[0].source.is_packed and writes(name):
        msg = (
            f"{name} would write to the {args[0].side} that a compressed cache returns, and attention is answered from "
            "the codes: change a clone() of them, or what is given to the cache."
        )
        raise UnsupportedError(msg)
    if name == "scaled_dot_product_attention":
        found = _attention(func, *args, **kwargs)
    elif name == "matmul" and len(args) == 2 and not kwargs and isinstance(args[1], States):  # noqa: PLR2004
        found = _product(args[0], args[1])
    elif args and isinstance(args[0], States):
        found = _followed(func, name, args[0], args[1:], kwargs)
    if found is not None:
        return found
    result = func(*plain(args), **plain(kwargs))
    if name != "__get__" and any(isinstance(x, Tensor) for x in tree_leaves(result)):  # attributes tell no numbers
        _note_read((args, kwargs))
    return result


def _note_read(given: Any) -> None:  # noqa: ANN401 - arguments of a torch function
    """Tell the layers whose states were given that something else than attention looks at them."""
    for x in tree_leaves(given):
        if isinstance(x, States):
            x.source.note_read()


def _followed(
    func: Function, name: str, states: States, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> States | None:
    """Return the states in the form that a function gives them; None if it does something else."""
    if name == "type" and not args and not kwargs:  # which tells the name of the dtype
        form: Form | None = None
    elif name == "contiguous" or (name in _CASTS and isinstance(states, ExactStates)):
        form = states.form
    elif name == "to" and _is_there(states, args, kwargs):
        return states
    elif name in _CASTS:
        dtype = _CASTS[name](args, kwargs)
        return None if dtype is None else HeldStates.of(states.source, states.side, states.form, dtype)
    elif name == "__get__":
        form = states.form.after("transpose", (), (-2, -1), {}) if func == _MT else None
    else:
        form = states.form.after(name, states.source.shapes[states.side], args, kwargs)
    return None if form is None else states.formed(form, func, args, kwargs)


def _is_there(states: States, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether `Tensor.to` is asked for nothing but the device that the states are on."""
    given = (*args, *kwargs.values())
    if len(given) != 1 or not isinstance(given[0], torch.device | str):
        return False
    device, own = torch.device(given[0]), states.device
    return device.type == own.type and device.index in {None, own.index}


def _dtype_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """Return what `Tensor.to` casts to, if it does nothing else."""
    given = (*args, *kwargs.values())
    return given[0] if len(given) == 1 and isinstance(given[0], torch.dtype) and given[0].is_floating_point else None


_CASTS: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], torch.dtype | None]] = {
    "to": _dtype_of,
    "type": _dtype_of,
    "float": lambda *_: torch.float32,
}


def _attention(  # noqa: PLR0913, PLR0917 - torch's own signature
    function: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Show and answer `scaled_dot_product_attention`; None if it is none that is understood."""
    source = source_of(key, value)
    if source is None or key.form != value.form or key.form.is_split or key.form.is_transposed:  # type: ignore[attr-defined]
        return None
    heads, rows = source.held.tail[0].shape[1], query.shape[2]
    if isinstance(query, States) or query.ndim != _AXES or query.shape[1] % heads:
        return None
    # Of a single token, transformers may put the query heads of a group in the place of queries.
    is_regrouped = source.fresh == 1 and rows > 1 and query.shape[1] == heads
    queries = query.reshape(len(query), heads * rows, 1, query.shape[3]) if is_regrouped else query
    mask = attn_mask
    if mask is not None and mask.ndim < _AXES:
        mask = mask[(None,) * (_AXES - mask.ndim)]
    # torch refuses a mask together with is_causal.
    if mask is not None and (is_causal or mask.shape[3] != source.held.seen):
        return None
    if is_regrouped and mask is not None and mask.shape[2] > 1:
        mask = mask.expand(-1, heads, -1, -1).flatten(1, 2)[:, :, None]
    found = log_sums = None
    if not source.is_packed:
        exact = ExactAttention(attn_mask, dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        found, log_sums = exact.attend(function, query, *plain((key, value)))
    # Without a mask, and causal, queries are those of the first tokens.
    is_first = is_causal and rows < source.held.seen
    if not is_first and are_last(None if mask is None else mask[..., -1], queries.shape[2], source.fresh):
        source.show(queries, scale, pads_in(mask, source.fresh), log_sums)
    if found is not None:
        return found
    answer.check_dropout(dropout_p)
    answer.check_gradients(query, mask)
    if is_causal:
        mask = torch.ones(rows, source.held.seen, dtype=torch.bool, device=query.device).tril()[None, None]
    softmax = Softmax(query.shape[-1] ** -0.5 if scale is None else scale)
    out = answer.attend(queries, source.held, mask, softmax)
    return out.view(len(out), *query.shape[1:3], out.shape[3])


def source_of(key: object, value: object) -> Source | None:
    """Return where keys and values come from, if both come from one update."""
    if isinstance(key, States) and isinstance(value, States) and (key.side, value.side) == ("keys", "values"):
        return key.source if key.source is value.source else None
    return None


def _product(x: Any, states: States) -> Tensor | None:  # noqa: ANN401 - any tensor
    """Show and answer the products around a softmax; None if this is none that is understood."""
    form, source = states.form, states.source
    heads = source.held.tail[0].shape[1] * form.repeats
    if type(x) is not Tensor or x.ndim != _AXES or form.is_split or heads not in {1, x.shape[1]}:
        return None
    if states.side == "keys":
        return _logits(x, states) if form.is_transposed else None
    if form.is_transposed or x.shape[3] != source.held.seen:
        return None
    source.show_noted()
    if not source.is_packed:
        return x @ states.plain()
    answer.check_gradients(x)
    return answer.weighted_values(x, source.held)


def _logits(queries: Float[Tensor, "b q m d"], keys: States) -> Tensor:
    source = keys.source
    if not source.is_packed:
        found = queries @ keys.plain()
    else:
        answer.check_gradients(queries)
        found = answer.logits(queries, source.held)
    return Logits.of(found, source, queries)


def plain(given: Any) -> Any:  # noqa: ANN401 - arguments of a torch function
    """Return what is given with plain tensors in the place of states."""
    return tree_map_only(States, lambda x: x.plain(), given)
