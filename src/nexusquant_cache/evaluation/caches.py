"""Prefill once with a plain cache, fill other caches from it, and weigh them."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from nexusquant_cache.attention import record_queries
from nexusquant_cache.errors import CacheStateError, UnsupportedError
from nexusquant_cache.evaluation.clock import now
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.releases import CACHE

CacheFactory: TypeAlias = Callable[[], Cache]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the tokens (or steps) done and their total."""
Prepare: TypeAlias = Callable[[Cache, LoadedModel, Tensor], None]
"""Called with a filled cache, the model and the ids ``[1, n]`` of the tokens in the cache."""

PLAIN = "plain"
_PREFILL_CHUNK = 512
_HALF_BYTES = 2  # every ratio is against a plain cache in 16 bit, whatever dtype the model runs in


@runtime_checkable
class Compressible(Protocol):
    """A cache that can be told to compress now."""

    def compress(self) -> object:
        """Compress what is held."""


@dataclass(frozen=True)
class Candidate:
    """A cache to measure.

    Attributes:
        name: What to call it.  Plots join those that share what stands before an ``@``, as in ``"ours@2bit"``.
        factory: Makes a new cache each time.
        prepare: Called once the prompt is in the cache and before anything is compressed, with the cache, the
            model and the tokens; a recipe that no `Cache.update` can follow changes the cache in place here.
        settings: What decides its results, as plain containers for JSON.  A result file keeps the rows of a
            candidate as long as they stay the same.
    """

    name: str
    factory: CacheFactory
    prepare: Prepare | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefilled:
    """A prompt that the model has read, in full precision; every cache measured starts from it.

    Attributes:
        cache: The plain cache.
        queries: The queries of every layer, with their rotary phase.
        ids: The tokens in the cache.
    """

    cache: DynamicCache
    queries: tuple[Float[Tensor, "1 _ _ _"], ...]
    ids: Int[Tensor, "1 n"]


@dataclass(frozen=True)
class Footprint:
    """What a cache holds.

    Attributes:
        seen_tokens: Tokens the cache has seen.
        kept_tokens: Tokens that are still there.
        held_bytes: Bytes of all tensors held; for a plain cache what it would hold in 16 bit.
        dense_bytes: Bytes of a plain 16-bit cache of the tokens seen.
    """

    seen_tokens: int
    kept_tokens: int
    held_bytes: int
    dense_bytes: int

    @property
    def compression_factor(self) -> float:
        """How many times smaller than a plain 16-bit cache."""
        return self.dense_bytes / self.held_bytes if self.held_bytes else float("nan")


@dataclass(frozen=True)
class Compressed:
    """A cache that holds a prompt, as its candidate would hold it from now on.

    Attributes:
        cache: The cache.
        footprint: What it holds.
        seconds: Time that storing, preparing and compressing took; None if nothing is prepared or compressed.
    """

    cache: Cache
    footprint: Footprint
    seconds: float | None


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "1 n"],
    *,
    start: Prefilled | None = None,
    progress: Progress | None = None,
) -> Prefilled:
    """Run the model over a prompt; return its plain cache and its queries.

    The prompt goes through in chunks, which bounds memory and lets ``progress`` move.

    Args:
        model: A causal language model of transformers.
        input_ids: One prompt.
        start: The beginning of the prompt, to go on from; it is copied, not changed.
        progress: Called after every chunk with the tokens done and the total.
    """
    cache = DynamicCache() if start is None else copy.deepcopy(start.cache)
    total = input_ids.shape[1]
    done = 0
    with record_queries(model, None) as recorded:
        for chunk in input_ids.to(model.device).split(_PREFILL_CHUNK, dim=1):
            model(input_ids=chunk, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            done += chunk.shape[1]
            if progress is not None:
                progress(done, total)
    queries = tuple(recorded[index] for index in range(len(cache.layers)))
    if start is None:
        return Prefilled(cache, queries, input_ids)
    joined = (torch.cat(pair, dim=-2) for pair in zip(start.queries, queries, strict=True))
    return Prefilled(cache, tuple(joined), torch.cat([start.ids, input_ids], dim=1))


@torch.no_grad()
def fill(factory: CacheFactory, plain: Prefilled) -> Cache:
    """Return a new cache that has seen what ``plain`` has, as if it had been there during the prefill.

    Keys and values are copied, so nothing done to the new cache reaches ``plain``.  What `update` returns is attended
    to with its queries, as the model would: a cache of ours sees them so.

    Raises:
        UnsupportedError: If ``plain`` holds anything but keys and values of all its tokens.
        CacheStateError: If ``plain`` is empty, or the factory returned a cache that has seen tokens.
    """
    cache = _empty(factory, plain)
    _read(cache, plain)
    return cache


def _empty(factory: CacheFactory, plain: Prefilled) -> Cache:
    """Return a new cache, checked."""
    if not plain.cache.get_seq_length():
        msg = "the plain cache is empty: prefill it first"
        raise CacheStateError(msg)
    cache = factory()
    if cache.get_seq_length():
        msg = f"the factory must return a new cache each time, got one that has seen {cache.get_seq_length()} tokens"
        raise CacheStateError(msg)
    return cache


def _read(cache: Cache, plain: Prefilled) -> float:
    """Let a cache see what ``plain`` has; return the seconds that its updates took, in which it may compress."""
    seconds, seen = 0.0, int(cache.get_seq_length())  # a tensor, of some caches
    if seen == plain.ids.shape[1]:
        return seconds
    for index, (keys, values) in enumerate(_exact_layers(plain.cache)):
        given = keys[:, :, seen:].clone(), values[:, :, seen:].clone()
        start = now()
        states = cache.update(*given, index)
        seconds += now() - start
        _attend(cache, states, index, plain.queries[index][:, :, seen:], given[0].shape[2])
    return seconds


@torch.no_grad()
def update(
    cache: Cache,
    keys: Float[Tensor, "b h n d"],
    values: Float[Tensor, "b h n dv"],
    layer_idx: int,
    queries: Float[Tensor, "b q w d"] | None = None,
) -> None:
    """Update a cache without a model, and attend to what it returns, as a model would: a cache of ours sees that.

    Args:
        cache: The cache.
        keys: New keys.
        values: New values.
        layer_idx: The layer.
        queries: Those of the new tokens, or of the last of them; the keys by default.
    """
    states = cache.update(keys, values, layer_idx)
    _attend(cache, states, layer_idx, keys if queries is None else queries, keys.shape[2])


def _attend(cache: Cache, states: tuple[Tensor, Tensor], layer_idx: int, queries: Tensor, fresh: int) -> None:
    if type(states[0]) is Tensor is type(states[1]):
        return  # nobody sees it
    count, seen = queries.shape[2], int(cache.get_seq_length(layer_idx))
    is_causal, mask = count == fresh == seen > 1, None  # half the work
    if seen > fresh > 1:
        mask = torch.ones(count, seen, dtype=torch.bool, device=queries.device).tril(seen - count)
    F.scaled_dot_product_attention(queries, *states, attn_mask=mask, is_causal=is_causal, enable_gqa=True)


@torch.no_grad()
def fill_and_compress(
    loaded: LoadedModel, candidate: Candidate, plain: Prefilled, *, start: Cache | None = None
) -> Compressed:
    """Return a new cache of a candidate that has read the prompt, was prepared, and has been compressed.

    Args:
        loaded: Model and tokenizer.
        candidate: The cache.
        plain: The prompt; not changed.
        start: A cache of this candidate that has seen the beginning of the prompt, or all of it, and was not told to
            compress; it is copied, not changed.
    """
    cache = _empty(candidate.factory, plain) if start is None else copy.deepcopy(start)
    seconds, began = _read(cache, plain), now()
    if candidate.prepare is not None:
        candidate.prepare(cache, loaded, plain.ids)
    is_compressed = compress(cache)
    seconds += now() - began
    # What encoding took while the beginning was read is not known.
    does_something = start is None and (is_compressed or candidate.prepare is not None)
    return Compressed(cache, footprint(cache), seconds if does_something else None)


def compress(cache: Cache) -> bool:
    """Compress the cache if it has a method for it; say whether it has.  Other caches are left alone."""
    if not isinstance(cache, Compressible):
        return False
    cache.compress()
    return True


def footprint(cache: Cache) -> Footprint:
    """Return what a cache holds: by its ``memory_report``, or by its keys and values if it has none.

    Raises:
        UnsupportedError: If the cache has no report and holds anything but keys and values of all its tokens.
    """
    if hasattr(cache, "memory_report"):
        report = cache.memory_report()
        return Footprint(report.seen_tokens, report.kept_tokens, report.held_bytes, report.dense_bytes)
    seen = cache.get_seq_length()
    held = sum(_HALF_BYTES * (keys.numel() + values.numel()) for keys, values in _exact_layers(cache))
    return Footprint(seen, seen, held, held)


def _exact_layers(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    seen = cache.get_seq_length()
    pairs = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.shape[-2] != seen:
            msg = (
                f"layer {index} ({type(layer).__name__}) does not hold the keys and values of all {seen} tokens; "
                "only models with full attention in every layer can be measured"
            )
            raise UnsupportedError(msg)
        pairs.append((keys, values))
    return pairs
