"""The attention function of `enable`: shows a cache its attention and answers from the codes, else calls another one.

For each stock implementation there is one of ours, named after it: ``nexusquant_sdpa``, ``nexusquant_eager``.  So the
name in the model's config says all there is to know, in a copy of the model too, and transformers still finds "flash"
in it where it looks for that.
"""

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.observations import scaled
from nexusquant_cache.states import answer
from nexusquant_cache.states.source import Source, are_last, pads_in
from nexusquant_cache.states.tensors import plain, source_of
from nexusquant_cache.uncompiled import uncompiled

PREFIX = "nexusquant_"
_EAGER = "eager_attention_forward"  # each file of transformers that has attention has its own, so named
# These take no account of the name in the config.
_NAMELESS = frozenset({"eager", "sdpa", "flex_attention"})
# Some layers of these compute the last queries only.  Where sdpa does without a mask, that would not be causal, which
# they avoid under the name "sdpa".
_CUTS_QUERIES = frozenset({"gemma4_text", "gemma4_unified_text"})

_UNDERSTOOD = frozenset(  # options; those that change no attention among them
    {
        "cache_position",
        "dropout",
        "is_causal",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "s_aux",
        "scaling",
        "sliding_window",
        "softcap",
        "use_cache",
    }
)
_AXES = 4  # batch, heads, queries, tokens

Attention = Callable[..., Any]


class Observer(ABC):
    """Sees what some attention modules, each with the index of its cache layer, compute from."""

    def __init__(self, modules: dict[nn.Module, int]) -> None:
        self.modules = modules

    @abstractmethod
    def observe(self, layer_idx: int, queries: Tensor, keys: Tensor) -> None:
        """See the queries and keys of one attention of one of the modules."""


class _Observers(threading.local):
    """Who sees the forwards of this thread."""

    def __init__(self) -> None:
        self.all: list[Observer] = []


OBSERVERS = _Observers()
_found: dict[tuple[type, str], Attention] = {}


def stock_of(name: str | None) -> str | None:
    """Return the stock implementation under one of ours; None if this is the name of another one."""
    return name.removeprefix(PREFIX) if name is not None and name.startswith(PREFIX) else None


def register(stock: str) -> str:
    """Register our implementation on top of a stock one, and its mask; return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415 - heavy; a model has it

    name = PREFIX + stock
    AttentionInterface.register(name, _attention_on(stock))
    masks = AttentionMaskInterface()
    if stock in masks:  # without one transformers makes no mask
        AttentionMaskInterface.register(name, masks[stock])
    return name


def _attention_on(stock: str) -> Attention:
    def attention(
        module: Any,  # noqa: ANN401 - an attention module of transformers
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,  # noqa: ANN401 - of a type for each implementation
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> Any:  # noqa: ANN401
        scaling = kwargs.get("scaling")
        for each in OBSERVERS.all:
            if module in each.modules:
                each.observe(each.modules[module], scaled(query.detach(), scaling), key)
        source = source_of(key, value)
        if source is not None:
            read = _seen(stock, query, source, attention_mask, kwargs)
            if read is not None:
                return read
            key, value = plain((key, value))
        compute = _found.get((type(module), stock)) or find_stock(type(module), stock)
        if stock == "sdpa" and attention_mask is None and module.config.model_type in _CUTS_QUERIES:
            attention_mask = _causal_mask(query, key)
        named = module if stock in _NAMELESS else _Renamed(module, stock)
        return compute(named, query, key, value, attention_mask, **kwargs)

    return attention


def _causal_mask(query: Tensor, key: Tensor) -> Tensor | None:
    """Return the mask of the last queries of a prompt; None for all or one of them, where sdpa needs none."""
    queries, tokens = query.shape[2], key.shape[2]
    if queries in {1, tokens}:
        return None
    return torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)


class _Renamed:
    """A module whose config names the stock implementation, for kernels that are found by that name."""

    def __init__(self, module: Any, stock: str) -> None:  # noqa: ANN401 - a module or its config
        self._module, self._attn_implementation = module, stock

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        found = getattr(self._module, name)
        return _Renamed(found, self._attn_implementation) if name == "config" else found


@uncompiled
def _seen(
    stock: str,
    query: Tensor,
    source: Source,
    mask: Any,  # noqa: ANN401 - of a type for each implementation
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None] | None:
    """Show the layer its attention, and return what the stock implementation would, read from the codes.

    None if the stock implementation has to compute it: there are no codes yet, or something is not understood here.

    Raises:
        UnsupportedError: If dropout is asked for, or something else that is not understood, and tokens were evicted.
    """
    queries, seen = query.shape[2], source.held.seen
    unknown = {name for name, given in options.items() if given is not None} - _UNDERSTOOD
    if unknown and not source.held.is_whole:
        msg = (
            f"the attention of a compressed cache was asked for with {', '.join(sorted(unknown))}, which is not "
            "understood, and tokens have been evicted: leave that out, or use the preset 'quant', which evicts nothing"
        )
        raise UnsupportedError(msg)
    if unknown or not _is_understood(mask, seen):
        return None
    scaling, is_packed = options.get("scaling"), source.is_packed
    visible = None
    if is_packed or queries != source.fresh:
        visible = _dense_mask(
            mask, query, seen, window=options.get("sliding_window") or None, is_causal=stock != "eager"
        )
    if are_last(visible if visible is None else visible[..., -1], queries, source.fresh):
        source.show(query.detach(), scaling, _pads_in(mask, source.fresh, queries))
    if not is_packed:
        return None
    answer.check_dropout(options.get("dropout") or 0.0)
    answer.check_gradients(query, mask if isinstance(mask, Tensor) else None, options.get("s_aux"))
    bounded = stock != "sdpa"  # which passes over softcap and sink logits
    softmax = Softmax(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=options.get("softcap") if bounded else None,
        sink_logits=options.get("s_aux") if bounded else None,
    )
    if stock == "eager":  # which tells its weights
        out, weights = answer.attend_with_weights(query, source.held, visible, softmax)
        return out.transpose(1, 2).contiguous(), weights
    return answer.attend(query, source.held, visible, softmax).transpose(1, 2).contiguous(), None


def _is_understood(mask: Any, seen: int) -> bool:  # noqa: ANN401 - anything
    """Tell whether this is no mask, or one of logits, of tokens (flash attention), or of blocks (flex attention)."""
    if isinstance(mask, Tensor):
        return mask.ndim in {2, _AXES} and mask.shape[-1] == seen
    return mask is None or (type(mask).__name__ == "BlockMask" and mask.shape[-1] == seen)


def _pads_in(mask: Any, fresh: int, queries: int) -> Tensor | None:  # noqa: ANN401 - one that is understood
    """Return which of the newest tokens a mask hides from all queries, as `states.source.pads_in`."""
    if fresh == 1 or mask is None:
        return None
    if not isinstance(mask, Tensor):
        mask = _of_blocks(mask, queries)
    return ~mask[:, -fresh:].bool() if mask.ndim == 2 else pads_in(mask, fresh)  # noqa: PLR2004 - batch, tokens


def _dense_mask(
    mask: Any,  # noqa: ANN401 - one that is understood
    query: Tensor,
    seen: int,
    *,
    window: int | None,
    is_causal: bool,
) -> Tensor | None:
    """Return a mask of logits that says the same; None if every query may see all tokens."""
    queries = query.shape[2]
    if isinstance(mask, Tensor) and mask.ndim == _AXES:
        return mask
    if mask is not None and not isinstance(mask, Tensor):
        return _of_blocks(mask, queries)
    visible = None
    if window is not None and window >= seen:
        window = None  # it hides nothing
    if is_causal and (queries > 1 or window is not None):  # masks of logits have both already
        order = torch.arange(seen, device=query.device)
        distance = (order[-queries:, None] - order)[None, None]
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
    if mask is None:
        return visible
    padding = mask[:, None, None].bool()
    return padding if visible is None else visible & padding


def _of_blocks(mask: Any, queries: int) -> Tensor:  # noqa: ANN401 - torch's BlockMask
    from torch.nn.attention.flex_attention import create_mask  # noqa: PLC0415 - heavy, and imported by who has a mask

    batch, heads, _, tokens = mask.shape
    return create_mask(mask.mask_mod, batch, heads, queries, tokens, device=str(mask.kv_num_blocks.device))


def has_interface(attention: type) -> bool:
    """Tell whether a class of modules finds its attention function by name."""
    return "ALL_ATTENTION_FUNCTIONS" in _forward_of(attention).__code__.co_names


def find_stock(attention: type, stock: str) -> Attention:
    """Return the function that a class of attention modules would call under a stock implementation.

    It is looked up as transformers does it: in the interface of the file that the class is from, with the function of
    that file as the eager one.

    Raises:
        UnsupportedError: If there is none.
    """
    forward = _forward_of(attention)
    eager = next((name for name in forward.__code__.co_names if name.endswith(_EAGER)), _EAGER)
    interface = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    found: Attention | None = interface.get(stock, forward.__globals__.get(eager) if stock == "eager" else None)
    if found is None:
        msg = f"{attention.__name__} has no attention function for {stock!r}"
        raise UnsupportedError(msg)
    _found[attention, stock] = found
    return found


def _forward_of(attention: Any) -> Any:  # noqa: ANN401 - a class of modules, a function
    return inspect.unwrap(attention.forward)
