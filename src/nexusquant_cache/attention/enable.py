"""Select the attention implementation of a model, and the one that it had before."""

import inspect
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nexusquant_cache.attention.function import find_stock, has_interface, register, stock_of
from nexusquant_cache.errors import OptionError, UnsupportedError

_SEEN = {None, "sdpa", "eager"}  # of these the states that a cache returns are asked by torch
# What a module says that computes something else if its implementation is not called by the stock name.
_ASKS_FOR_NAME = re.compile(r"config\._attn_implementation (?:==|in \()")
_lock = threading.Lock()
_users: dict[int, tuple[Any, int]] = {}  # by the identity of a config: the config, and for how many it is enabled
# Files of transformers where that does no harm: it concerns `reorder_and_upcast_attn` only, which is refused below;
# queries that are cut, see `implementation`; a part without a cache.
_ASKS_IN_VAIN = frozenset({"gpt2", "decision_transformer", "gemma4", "gemma4_unified", "qwen2_5_omni"})


def enable(model: nn.Module) -> None:
    """Let compressed caches see an attention that is not torch's own: flash, flex, kernels of other libraries.

    Call it before the prompt: tokens are evicted only if their attention was seen.  Where there are codes, attention is
    then answered from them; more than 16 queries at once decode them first.  All other outputs are bit for bit those of
    the implementation that is selected now; `disable` selects it again.  In a model that reads images, only the part
    that writes text changes.  Other caches work as before.  Calling it twice changes nothing, and neither does calling
    it for sdpa or eager attention, but for roundings: caches see these by themselves.

    Args:
        model: The model, or a wrapper around it, as of PEFT.

    Raises:
        OptionError: If this is no model of transformers.
        UnsupportedError: If the model has an encoder, computes attention without transformers' `AttentionInterface`
            (Bloom, and GPT-J before 5.24), or computes it in another way if its implementation has another name
            (DeepSeek V3.2).
    """
    _enable(model)
    with _lock:
        _users.pop(id(text_config(model)), None)  # it stays enabled, whoever else enables it meanwhile


def _enable(model: nn.Module) -> None:
    text = text_config(model)
    if text.is_encoder_decoder:
        msg = f"{text.model_type} is an encoder-decoder model; attention.enable serves decoders"
        raise UnsupportedError(msg)
    configs = _configs(model, type(text))
    stocks = [stock_of(_name(config)) or _name(config) or "sdpa" for config in configs]
    for stock in set(stocks):
        _check(model, type(text), stock)
    for config, stock in zip(configs, stocks, strict=True):
        _set_name(config, register(stock))


def disable(model: nn.Module) -> None:
    """Select the attention implementation that a model had before `enable`; nothing happens if it is not enabled.

    Raises:
        OptionError: If this is no model of transformers.
    """
    for config in _configs(model, type(text_config(model))):
        stock = stock_of(_name(config))
        if stock is not None:
            _set_name(config, stock)


@contextmanager
def enabled(model: nn.Module) -> Iterator[None]:
    """Have a model enabled meanwhile.  Of several users, of several threads too, the last one to end disables it.

    Args:
        model: As for `enable`.  If it is enabled already, it stays so.

    Raises:
        OptionError: As by `enable`.
        UnsupportedError: Likewise.
    """
    config = text_config(model)
    with _lock:
        _, users = _users.get(id(config), (config, 0))
        is_ours = users > 0 or not is_enabled(model)
        if is_ours:
            _enable(model)
            _users[id(config)] = config, users + 1
    try:
        yield
    finally:
        with _lock:
            if is_ours and id(config) in _users:
                left = _users.pop(id(config))[1] - 1
                if left:
                    _users[id(config)] = config, left
                else:
                    disable(model)


def is_enabled(model: nn.Module) -> bool:
    """Tell whether a model shows its queries."""
    return all(stock_of(_name(config)) is not None for config in _configs(model, type(text_config(model))))


def is_seen(model: nn.Module) -> bool:
    """Tell whether a model has an attention that torch shows to a cache, without ours."""
    return {_name(config) for config in _configs(model, type(text_config(model)))} <= _SEEN


def text_config(model: nn.Module) -> Any:  # noqa: ANN401 - a PreTrainedConfig
    """Return the config of the part that writes text.

    Raises:
        OptionError: If this is no model of transformers.
    """
    from transformers import PreTrainedModel  # noqa: PLC0415 - heavy, and imported by whoever has a model

    given: Any = model  # whatever the annotation says
    modules = given.modules() if isinstance(given, nn.Module) else ()
    found = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if found is None:
        msg = f"model must be a model of transformers, got {type(given).__name__}; of a pipeline, give its .model"
        raise OptionError(msg)
    return found.config.get_text_config(decoder=True)


def attention_modules(model: nn.Module) -> dict[nn.Module, int]:
    """Return the modules of the text part that compute attention, each with the index of its cache layer."""
    kind = type(text_config(model))
    modules: Any = model.modules()
    return {
        module: module.layer_idx
        for module in modules
        if isinstance(getattr(module, "config", None), kind)
        and isinstance(getattr(module, "layer_idx", None), int)
        and has_interface(type(module))
    }


def _configs(model: nn.Module, kind: type) -> list[Any]:
    """Return the configs of the text part; its model may hold a copy of what the whole model's config holds."""
    modules: Any = model.modules()
    held = (getattr(module, "config", None) for module in modules)
    found = [text_config(model), *(config for config in held if isinstance(config, kind))]
    return list({id(config): config for config in found}.values())


def _name(config: Any) -> str | None:  # noqa: ANN401 - a PreTrainedConfig
    name: str | None = config._attn_implementation  # noqa: SLF001 - transformers has no other reader
    return name


def _set_name(config: Any, name: str) -> None:  # noqa: ANN401 - a PreTrainedConfig
    """Set the name of this config, and of none inside it.

    Not by the model's `set_attn_implementation`, which tries to load kernels that are mentioned in a name.
    """
    config._attn_implementation = {"": name}  # noqa: SLF001


def _check(model: nn.Module, kind: type, stock: str) -> None:
    """Refuse a model whose attention ours cannot stand in for.

    Raises:
        UnsupportedError: If this is one.
    """
    classes = {type(module) for module in attention_modules(model)}
    name = type(model).__name__
    if not classes:
        msg = f"{name} computes attention without transformers' AttentionInterface, so its queries cannot be seen"
        raise UnsupportedError(msg)
    for attention in classes:
        find_stock(attention, stock)
    modules: Any = model.modules()
    parts = [module for module in modules if isinstance(getattr(module, "config", None), kind)]
    asks = any(_asks_for_name(file) for file in {type(part).__module__ for part in parts})
    if asks or any(getattr(part.config, "reorder_and_upcast_attn", False) for part in parts):
        msg = f"{name} computes attention in another way if its implementation is not named {stock!r}"
        raise UnsupportedError(msg)


def _asks_for_name(file: str) -> bool:
    """Tell whether what a Python module does depends on the name of the attention implementation."""
    if file.rpartition(".modeling_")[2] in _ASKS_IN_VAIN:
        return False
    try:
        source = inspect.getsource(sys.modules[file])
    except (KeyError, OSError, TypeError):  # typed into an interpreter
        return False
    return bool(_ASKS_FOR_NAME.search(source))
