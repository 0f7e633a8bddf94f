"""`compressed_generation`: a compressed cache where none can be passed, put in by torch's module hooks."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, QuantizedCache, StaticCache

from nexusquant_cache.attention.enable import enabled, is_seen
from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.errors import CacheStateError, OptionError, UnsupportedError
from nexusquant_cache.layer.parts import compressed
from nexusquant_cache.layer.shared import When
from nexusquant_cache.policy import EvictionPolicy
from nexusquant_cache.presets import CacheConfig
from nexusquant_cache.releases import CACHE_NAMES, cache_names, is_continuous_batching

_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")  # kinds of PEFT's adapters
_ELSEWHERE = "Leave that out, or generate outside the with block."


@contextmanager
def compressed_generation(
    model: nn.Module,
    preset: str | CacheConfig = "balanced",
    *,
    policy: EvictionPolicy | None = None,
    when: When = "during_prefill",
    **overrides: Any,  # noqa: ANN401 - checked against the fields of CacheConfig
) -> Iterator["CompressedGeneration"]:
    """Give every generation of a model inside a ``with`` block a compressed cache of its own.

    For libraries that call `generate` and offer no way to pass a cache::

        with compressed_generation(model) as compressed:
            answer = library.answer(model, question)
        print(compressed.cache.memory_report())

    It is as if a `NexusQuantCache` had been passed.  All threads are served.  So are calls of the model itself, without
    `generate`: where it would make a cache of its own (``use_cache`` is on, and it is not in training mode), and where
    it is given an empty DynamicCache, which becomes a compressed one.

    Where the model's attention is not torch's own (flash, flex, kernels), `nexusquant_cache.attention.enable` is called
    for the time of the block, so that the caches see it; models that it refuses are left as they are.

    Other caches that are passed are left alone.  Blocks may be nested: the inner one wins.  When a block ends, also by
    an exception, its hooks are gone; the caches made inside it stay compressed.

    Args:
        model: The model, or a wrapper around it, as of PEFT.
        preset: As for `NexusQuantCache`, like all that follow.
        policy: Which tokens to keep.
        when: When to encode.
        **overrides: Fields of `CacheConfig` that replace those of the preset.

    Yields:
        An object whose ``cache`` is the cache made last.

    Raises:
        OptionError: If an option is wrong.
        UnsupportedError: If the model has an encoder, or none of its parts generates with a cache of keys and values,
            or it has an adapter of PEFT's prefix tuning, which is a cache.
            Inside the block: if `generate` was told to make a cache of another kind.
    """
    block = _Block({"preset": preset, "policy": policy, "when": when} | overrides)
    with ExitStack() as hooks:
        for module, config in _served_modules(model):
            if all(block.new_cache(config).is_linear):  # a wrong option is found here
                raise _keeps_no_keys(module)
            hook = _Hook(block, module, config)
            hooks.callback(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
            hooks.enter_context(_seen_attention(module))
        try:
            yield CompressedGeneration(block)
        finally:
            block.has_ended = True


@contextmanager
def _seen_attention(module: nn.Module) -> Iterator[None]:
    """Let caches see the attention of a model meanwhile, unless torch shows it, or the model is refused."""
    with ExitStack() as stack:
        if not is_seen(module):
            with suppress(UnsupportedError):
                stack.enter_context(enabled(module))
        yield


class _Block:
    """What the hooks of one ``with`` block share."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.cache: NexusQuantCache | None = None
        self.has_ended = False

    def new_cache(self, config: PretrainedConfig) -> "_ServedCache":
        return _ServedCache(config=config, **self.options)


class CompressedGeneration:
    """What a block of `compressed_generation` has to show."""

    def __init__(self, block: _Block) -> None:
        self._block = block

    @property
    def cache(self) -> NexusQuantCache:
        """The cache made last, in whatever thread; it is held until the next one is made or this object is gone.

        Raises:
            CacheStateError: If none has been made yet.
        """
        if self._block.cache is None:
            msg = (
                "no compressed cache has been made in this block. Generate with this very model, without a cache of "
                "your own and without use_cache=False."
            )
            raise CacheStateError(msg)
        return self._block.cache


class _Hook:
    """Sees the arguments of a model before each forward, and puts in the cache."""

    def __init__(self, block: _Block, module: nn.Module, config: PretrainedConfig) -> None:
        self.block = block
        self.names = list(inspect.signature(module.forward).parameters)
        self.cache_names = cache_names(module) or CACHE_NAMES  # a wrapper may pass on what it does not name
        self.config = config

    @property
    def serves_caches(self) -> bool:
        """Whether a model without a cache gets one of ours."""
        return not self.block.has_ended

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        """Return this very hook: in a copy of the model it stops together with that of the original."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be saved, since a saved model would keep the hook.

        Raises:
            UnsupportedError: Always.
        """
        msg = "a model cannot be pickled inside compressed_generation: do it outside the with block"
        raise UnsupportedError(msg)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return other arguments for the forward, or None to leave them as they are."""
        if self.block.has_ended:  # a copy of the model that was made inside the block
            return None
        given = dict(zip(self.names, args, strict=False)) | kwargs
        _refuse_paged(given)
        cache = next((given[name] for name in self.cache_names if given.get(name) is not None), None)
        if cache is None:
            if _trains(module) or not self._uses_cache(given):
                return None
            cache = self.block.cache = self.block.new_cache(self.config)
            args, kwargs = self._with(cache, args, kwargs)
        elif _is_made_by_generate(cache):
            _refuse_kind(cache)
            self._take_over(cache, given)
            self.block.cache = cache
        return args, kwargs

    def _uses_cache(self, given: dict[str, Any]) -> bool:
        """Tell whether the model would make a cache of its own."""
        asked = given.get("use_cache")
        if asked is None:
            asked = getattr(self.config.get_text_config(decoder=True), "use_cache", False)
        return bool(asked)

    def _with(
        self, cache: NexusQuantCache, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the cache among them."""
        name = next((name for name in self.cache_names if name in kwargs), self.cache_names[0])  # None under that name
        if name in self.names[: len(args)]:
            place = self.names.index(name)
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        return args, kwargs | {name: cache}

    def _take_over(self, cache: DynamicCache, given: dict[str, Any]) -> None:
        """Turn a plain cache that nothing has been stored in into one of ours.

        The same object, and not another one in its place: whoever made it may go on using it, as custom decoding loops
        do.
        """
        flags = [layer.record_past for layer in cache.layers if hasattr(layer, "record_past")]
        cache.__class__ = _ServedCache
        served: Any = cache
        served.__init__(config=self.config, **self.block.options)
        if any(flags) or _is_assisted():
            served.activate_past_recording()
        elif not flags:
            shape = _shape(given)
            served.recording_shows_at = None if shape is None else shape[1]


class _ServedCache(NexusQuantCache):
    """A cache that was put in.

    Assisted decoding calls `activate_past_recording` on the plain cache, before the first forward and so before we see
    it.  Some layer kinds remember that; full-attention layers do not, since to them it makes no difference.  So we look
    who calls.  Another decoder that records is known by its crop right after the first forward, of which all but the
    newest tokens are encoded then.
    """

    recording_shows_at: int | None = None  # tokens of the first forward, if nothing else shows a recording

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the newest tokens; right behind the first forward, take it for the beginning of a recording."""
        if self.recording_shows_at == self.get_seq_length():
            for part in compressed(self.parts()):
                part.layer.activate_past_recording()
        self.recording_shows_at = None
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.recording_shows_at = None
        super().reset()


def _is_assisted() -> bool:
    """Tell whether transformers' assisted decoding, or prompt lookup, is at work."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_assisted_decoding":
        frame = frame.f_back
    return frame is not None


def _served_modules(model: nn.Module) -> list[tuple[nn.Module, PretrainedConfig]]:
    """Return the modules to hook, the outermost first, each with its config.

    Raises:
        OptionError: If this is no module.
        UnsupportedError: If one of them cannot be served.
    """
    given: object = model  # whatever the annotation says
    if not isinstance(given, nn.Module):
        msg = f"model must be a torch module, got {type(given).__name__}; of a pipeline, give its .model"
        raise OptionError(msg)
    found: list[tuple[nn.Module, PretrainedConfig]] = []
    modules: Any = model.modules()
    for module in modules:
        _refuse_prefix(module)
        if _is_model(module) and module.can_generate():
            _check(module)
            found.append((module, module.config))
    if not found:
        msg = f"{type(model).__name__} has no part that transformers can generate with"
        raise UnsupportedError(msg)
    if found[0][0] is not model:
        # A wrapper may call the forward of what it wraps, which hooks of the inner module do not see.
        parameters = inspect.signature(model.forward).parameters
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if "input_ids" in parameters and (passes_on or cache_names(model)):
            found.insert(0, (model, found[0][1]))
    return found


def _is_model(module: object) -> bool:
    """Tell whether this is a model of transformers."""
    from transformers import PreTrainedModel  # noqa: PLC0415 - heavy, and imported by whoever has a model

    return isinstance(module, PreTrainedModel)


def _check(module: Any) -> None:  # noqa: ANN401 - a PreTrainedModel, see _is_model
    """Refuse a module whose generation cannot be served.

    Raises:
        UnsupportedError: If it has an encoder, or takes no cache of keys and values.
    """
    name = type(module).__name__
    if module.config.is_encoder_decoder:
        msg = (
            f"{name} is an encoder-decoder model. Its cache has two parts; compressed_generation serves decoders, "
            "whose cache has one."
        )
        raise UnsupportedError(msg)
    if not cache_names(module):
        raise _keeps_no_keys(module)


def _refuse_prefix(module: Any) -> None:  # noqa: ANN401 - whatever is inside the model
    """Refuse a wrapper of PEFT whose adapter consists of keys and values.

    Raises:
        UnsupportedError: If it does.
    """
    adapter = getattr(module, "active_peft_config", None)
    if getattr(adapter, "peft_type", None) in _PREFIXES:
        msg = (
            "PEFT's prefix tuning puts a cache of its own in the place of any other. Give a cache of yours the keys "
            "and values that get_prompt() returns, and generate with get_base_model(): docs/scale_out.md shows how."
        )
        raise UnsupportedError(msg)


def _keeps_no_keys(module: nn.Module) -> UnsupportedError:
    """Return the error for a model without a cache of keys and values, as of linear attention alone."""
    return UnsupportedError(f"{type(module).__name__} does not generate with a cache of keys and values")


def _trains(module: nn.Module) -> bool:
    """Tell whether the model is in training mode; what wraps it may have been made later and not know."""
    return any(part.training for part in module.modules() if _is_model(part))


def _is_made_by_generate(cache: object) -> bool:
    """Tell whether `generate` has made this cache, to the best of our knowledge.

    It marks those that it was given.  A cache that holds tokens already, or is of another class, was made
    by somebody who knows what they want.
    """
    if not isinstance(cache, Cache) or getattr(cache, "_is_user_defined", False):
        return False
    if type(cache) is DynamicCache:
        return not any(layer.is_initialized for layer in cache.layers if isinstance(layer, DynamicLayer))
    return type(cache) in {StaticCache, QuantizedCache} and int(cache.get_seq_length()) == 0


def _refuse_kind(cache: Cache) -> None:
    kind = type(cache).__name__
    if kind != "DynamicCache" or cache.offloading:
        offloaded = "an offloading " if cache.offloading else "a "
        msg = (
            f"generate was told to use {offloaded}{kind} (cache_implementation, also in model.generation_config), and "
            f"compressed_generation to use a NexusQuantCache. {_ELSEWHERE}"
        )
        raise UnsupportedError(msg)


def _refuse_paged(given: dict[str, Any]) -> None:
    if is_continuous_batching(given):
        msg = f"continuous batching (generate_batch, or 'paged') has a cache of its own. {_ELSEWHERE}"
        raise UnsupportedError(msg)


def _shape(given: dict[str, Any]) -> tuple[int, int] | None:
    """Return batch and tokens of a forward, or None if they do not show."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(given.get(name), Tensor) and given[name].ndim > 1:
            return tuple(given[name].shape[:2])
    return None
