"""Which tokens of a prompt the model looks at when it reads the prompt once more, as if to repeat it."""

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from nexusquant_cache.attention.enable import attention_modules
from nexusquant_cache.attention.function import Observer
from nexusquant_cache.attention.recording import observing
from nexusquant_cache.errors import CacheStateError, OptionError, ShapeError, UnsupportedError
from nexusquant_cache.layer.checks import are_integers
from nexusquant_cache.layer.observations import greatest_attention
from nexusquant_cache.layer.parts import CompressedPart, compressed
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.releases import CACHE, cache_names


@torch.no_grad()
def reconstruct(  # noqa: PLR0913 - all but three have defaults
    model: nn.Module,
    cache: Cache,
    input_ids: Int[Tensor, "b n"],
    *,
    chunk: int = 2048,
    repeat_prompt_ids: Int[Tensor, "*one m"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Find out what in a prompt the model needs to repeat it, for policies that keep just that.

    `NexusQuantCache.read_again` is the short way; this is for an instruction of your own, and policies of your own.

    The prompt is read a second time, chunk by chunk, each behind the whole prompt, and for each token in the cache the
    greatest attention that any of these queries pays it is kept for the coming compression (`ReconstructionPolicy`).
    Unlike the attention of the last queries, it does not depend on what the prompt ends with, so it serves questions
    that come later::

        cache = NexusQuantCache(config=model.config, policy=ReconstructionPolicy())
        with torch.no_grad():
            model(context_ids, cache=cache)
        attention.reconstruct(model, cache, context_ids)
        model.generate(torch.cat([context_ids, question_ids], -1), cache=cache)

    The cache gets one number per token and head, which its memory report counts and the compression frees; an error
    leaves it as it was.  Tokens that come later count as fully attended.  The cost is that of a second prefill, with up
    to twice as many keys to attend to.

    Args:
        model: The model that has read the prompt; `enable` selects the attention for the time of the call.
        cache: A `NexusQuantCache`, into which it was read: the prompt, all of it and nothing else, not yet compressed.
        input_ids: The tokens of the prompt.  Images are not shown again.
        chunk: Tokens that are read at once.
        repeat_prompt_ids: An instruction to read before each chunk, like "Repeat the previous context:", one row for
            all.  By default there is none.
        progress: Called after every chunk with the tokens read and how many there are.

    Raises:
        OptionError: If the cache is of another kind, the tokens are no integers, the model is not the one that has read
            the prompt, or ``chunk`` is below 1.
        ShapeError: If the tokens are not as many as the cache has seen.
        CacheStateError: If the cache is empty, compressed already, or records a past, as in assisted decoding.
        UnsupportedError: If the queries of the model cannot be seen.

    References:
        Kim et al. (2025), "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv:2505.23416,
        section 3.  There each chunk is scored by attention within the chunk and its repetition alone; here the softmax
        runs over the whole prompt.
    """
    parts = _parts_of(cache)
    _check(cache, parts, input_ids, chunk)
    ours = {part.index: part for part in parts}
    if not ours:
        return  # sliding windows only
    context = _real(next(iter(ours.values())), input_ids)
    readers = [
        _Reader(ours[index]) if index in ours and ours[index].layer.is_initialized else layer
        for index, layer in enumerate(cache.layers)
    ]
    observer = _GreatestAttention(attention_modules(model), [each for each in readers if isinstance(each, _Reader)])
    instruction = input_ids[:, :0]
    if repeat_prompt_ids is not None:
        instruction = repeat_prompt_ids.to(input_ids.device).reshape(1, -1).expand(len(input_ids), -1)
    done = 0
    with observing(model, observer):
        for ids, real in zip(input_ids.split(chunk, 1), context.split(chunk, 1), strict=True):
            observer.real = torch.cat([context, torch.ones_like(instruction, dtype=torch.bool), real], 1)
            _read(model, readers, torch.cat([instruction, ids], 1), observer.real)
            done += ids.shape[1]
            if progress is not None:
                progress(done, input_ids.shape[1])
    observer.store()


def _parts_of(cache: Any) -> list[CompressedPart]:  # noqa: ANN401 - whatever was given
    """Return the compressed layers of a cache of ours, which imports this module."""
    if not isinstance(getattr(cache, "shared", None), Shared):
        msg = f"cache must be a NexusQuantCache, got {type(cache).__name__}"
        raise OptionError(msg)
    return list(compressed(cache.parts()))


def _check(cache: Any, parts: list[CompressedPart], input_ids: Tensor, chunk: int) -> None:  # noqa: ANN401 - as above
    if chunk < 1:
        msg = f"chunk must be at least 1 token, got {chunk}"
        raise OptionError(msg)
    given: object = input_ids  # whatever the annotation says
    if not isinstance(given, Tensor) or not are_integers(given):
        what = given.dtype if isinstance(given, Tensor) else type(given).__name__
        msg = f"input_ids must be a tensor of integers, [batch, tokens], got {what}"
        raise OptionError(msg)
    parts = [part for part in parts if part.layer.is_initialized]
    if any(part.state.body is not None and part.state.turn.pending_from != 0 for part in parts):
        msg = "the cache is compressed already: call reconstruct between the prompt and the first generation step"
        raise CacheStateError(msg)
    if any(part.layer.record_past for part in parts):
        msg = "the cache records a past, as in assisted decoding: call reconstruct before that"
        raise CacheStateError(msg)
    if cache.get_seq_length() == 0 or not all(part.is_pending for part in parts):
        msg = "no prompt waits for its compression: let the model read it into the cache first"
        raise CacheStateError(msg)
    expected = [(part.rows, part.seen) for part in parts]
    if any(tuple(input_ids.shape) != shape for shape in expected):
        msg = f"input_ids must be what the cache has seen, {list(expected[0])}, got shape {tuple(input_ids.shape)}"
        raise ShapeError(msg)


def _real(part: CompressedPart, input_ids: Tensor) -> Bool[Tensor, "b n"]:
    """Tell which tokens are not padding, as the prefill's mask had it."""
    pads = part.state.pads
    return torch.ones_like(input_ids, dtype=torch.bool) if pads is None else ~pads.to(input_ids.device)


def _read(model: Any, layers: list[Any], ids: Tensor, real: Bool[Tensor, "b n"]) -> None:  # noqa: ANN401 - any model
    """Let the model read tokens behind what the layers hold, and forget them."""
    options: dict[str, Any] = {}
    if not bool(real.all()):
        positions = real.long().cumsum(1).sub(1).clamp_min(0)
        options = {"attention_mask": real.long(), "position_ids": positions[:, -ids.shape[1] :]}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # As a tensor: for a number, some models compute no other queries in their last layers.
        options["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
    cache = _SecondReading(layers=[layer if isinstance(layer, _Reader) else copy.deepcopy(layer) for layer in layers])
    name = next(iter(cache_names(model)), CACHE)
    model(input_ids=ids, use_cache=True, **{name: cache}, **options)


class _SecondReading(Cache):
    """What the model reads into."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return what the layer does.

        Raises:
            OptionError: If there is none of this number or shape: the prompt was read by another model.
        """
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer is None or (isinstance(layer, _Reader) and not layer.fits(key_states, value_states)):
            raise _another_model(layer_idx)
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found


def _another_model(layer_idx: int) -> OptionError:
    return OptionError(
        f"the model is not the one that has read the prompt: layer {layer_idx} of cache and model do not fit each other"
    )


class _Reader(DynamicLayer):
    """Shows the exact tokens of a layer, and new ones for the time of one attention."""

    def __init__(self, part: CompressedPart) -> None:
        """Read from a layer that is not compressed."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = part
        self.is_initialized = True
        self.returned: weakref.ref[Tensor] | None = None
        self.attention: Tensor | None = None

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.part.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (seen + new tokens, 0)."""
        return self.part.seen + query_length, 0

    def fits(self, *states: Tensor) -> bool:
        """Tell whether keys and values are of this layer's rows, heads and dimensions."""
        exact = self.part.state.exact
        return all(x.shape[:2] == y.shape[:2] and x.shape[3] == y.shape[3] for x, y in zip(states, exact, strict=True))

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return the prompt's keys and values and the new ones behind them; store nothing."""
        keys, values = self.part.dense()
        joined = torch.cat([keys, key_states], 2)
        self.returned = weakref.ref(joined)
        return joined, torch.cat([values, value_states], 2)


class _GreatestAttention(Observer):
    """Notes in each reader the greatest attention that was paid to its tokens."""

    def __init__(self, modules: dict[nn.Module, int], readers: list[_Reader]) -> None:
        super().__init__(modules)
        self.readers = readers
        self.real: Bool[Tensor, "b n"] | None = None  # of all tokens of the coming forward

    def observe(self, layer_idx: int, queries: Tensor, keys: Tensor) -> None:
        """Look at the attention to keys that a reader has returned; layers may share them."""
        del layer_idx
        for reader in self.readers:
            if reader.returned is not None and reader.returned() is keys:
                assert self.real is not None
                impl = reader.part.layer.shared.settings.impl
                found = greatest_attention(queries, keys, self.real, by=impl)[..., : reader.part.seen]
                reader.attention = found if reader.attention is None else torch.maximum(reader.attention, found)

    def store(self) -> None:
        """Hand everything to the layers.

        Raises:
            OptionError: If the model has not asked for one.
            UnsupportedError: If the attention of one was not seen.
        """
        for reader in self.readers:
            if reader.returned is None:
                raise _another_model(reader.part.index)
        if any(reader.attention is None for reader in self.readers):
            msg = "the model changes keys between cache and attention, as in latent attention: nothing can be seen"
            raise UnsupportedError(msg)
        for reader in self.readers:
            assert reader.attention is not None
            reader.part.observe_reconstruction(reader.attention)
