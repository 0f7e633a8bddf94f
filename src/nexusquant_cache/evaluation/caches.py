"""Prefill once with a plain cache, fill other caches from it, and weigh them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from nexusquant_cache.errors import CacheStateError, UnsupportedError

CacheFactory: TypeAlias = Callable[[], Cache]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the tokens (or steps) done and their total."""

_PREFILL_CHUNK = 512
_HALF_BYTES = 2  # every ratio is against a plain cache in 16 bit, whatever dtype the model runs in


@runtime_checkable
class Compressible(Protocol):
    """A cache that can be told to compress now."""

    def compress(self) -> object:
        """Compress what is held."""


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


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "1 n"],
    *,
    cache: DynamicCache | None = None,
    progress: Progress | None = None,
) -> DynamicCache:
    """Run the model over a prompt and return its plain cache.

    The prompt goes through in chunks, which bounds memory and lets ``progress`` move.

    Args:
        model: A causal language model of transformers.
        input_ids: One prompt.
        cache: A plain cache to continue, changed in place; a new one if None.
        progress: Called after every chunk with the tokens done and the total.

    Returns:
        The cache, holding all tokens in full precision.
    """
    cache = DynamicCache() if cache is None else cache
    total = input_ids.shape[1]
    done = 0
    for chunk in input_ids.to(model.device).split(_PREFILL_CHUNK, dim=1):
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        done += chunk.shape[1]
        if progress is not None:
            progress(done, total)
    return cache


@torch.no_grad()
def fill(factory: CacheFactory, plain: DynamicCache) -> Cache:
    """Return a new cache that has seen what ``plain`` has, as if it had been there during the prefill.

    The keys and values are copied, so nothing done to the new cache reaches ``plain``.

    Raises:
        UnsupportedError: If ``plain`` holds anything but keys and values of all its tokens.
        CacheStateError: If ``plain`` is empty, or the factory returned a cache that has seen tokens.
    """
    seen = plain.get_seq_length()
    if not seen:
        msg = "the plain cache is empty: prefill it first"
        raise CacheStateError(msg)
    cache = factory()
    if cache.get_seq_length():
        msg = f"the factory must return a new cache each time, got one that has seen {cache.get_seq_length()} tokens"
        raise CacheStateError(msg)
    for index, (keys, values) in enumerate(_exact_layers(plain)):
        cache.update(keys.clone(), values.clone(), index)
    return cache


def compress(cache: Cache) -> None:
    """Compress the cache if it has a method for it; other caches are left alone."""
    if isinstance(cache, Compressible):
        cache.compress()


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
