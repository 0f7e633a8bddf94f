"""Caches of other packages, each with a report of the bytes it holds; imported only where they are installed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from _codes import dense_bytes, head_dim_of
from transformers import Cache, QuantizedCache
from transformers.cache_utils import DynamicLayer

from nexusquant_cache.cache.report import storage_bytes, tensors_of
from nexusquant_cache.evaluation import Candidate

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from nexusquant_cache.evaluation import LoadedModel

_HALF_BYTES = 2


@dataclass(frozen=True)
class PeerReport:
    """What a cache of another package holds.

    Attributes:
        seen_tokens: Tokens seen.
        kept_tokens: Tokens that attention still sees.
        held_bytes: What tables and plots show: the bytes of all tensors; for a cache that quantizes and keeps the
            rounded numbers, what its codes would take if they were packed.
        dense_bytes: Bytes of a plain 16-bit cache.
        stored_bytes: Bytes really held.
        half_bytes: ``held_bytes`` if the model, and so scales and exact tokens, were in 16 bit.
    """

    seen_tokens: int
    kept_tokens: int
    held_bytes: int
    dense_bytes: int
    stored_bytes: int
    half_bytes: int


def plain_tensors(thing: object) -> Iterator[Tensor]:
    """Yield the tensors reachable from an object; those of a subclass that only wraps others are taken apart."""
    for tensor in tensors_of(thing):
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        if parts:
            yield from plain_tensors([getattr(tensor, name) for name in parts])
        else:
            yield tensor


class MeasuredQuantizedCache(QuantizedCache):
    """transformers' quantized cache, which does not say what it holds."""

    def __init__(self, backend: str, config: PretrainedConfig, **options: Any) -> None:
        """Make an empty cache."""
        super().__init__(backend, config, **options)
        self.model_config = config

    def memory_report(self) -> PeerReport:
        """Return the bytes held."""
        tensors = list(plain_tensors([vars(layer) for layer in self.layers]))
        held = storage_bytes(tensors)
        full = sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.float32)
        seen = self.get_seq_length()
        return PeerReport(seen, seen, held, dense_bytes(self.model_config, seen), held, held - full // 2)


def quantized_candidate(name: str, package: str, backend: str, config: PretrainedConfig, **options: Any) -> Candidate:
    """Return a quantized cache of transformers; it quantizes the prompt as it is filled."""
    return Candidate(
        name,
        partial(MeasuredQuantizedCache, backend, config, **options),
        settings={"backend": backend, **options, "package": f"{package} {metadata.version(package)}"},
    )


class MaskedLayer(DynamicLayer):
    """A plain layer without the tokens that the mask hides.

    Attributes:
        evicted: How many those are.
    """

    evicted = 0

    def get_seq_length(self) -> int:
        """Return the tokens seen."""
        return super().get_seq_length() + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the tokens to mask, and where they begin."""
        return super().get_seq_length() + query_length, self.evicted

    def keep(self, tokens: Tensor) -> None:
        """Leave these tokens alone."""
        self.evicted = self.keys.shape[2] - len(tokens)
        self.keys, self.values = (x.index_select(2, tokens.to(x.device)) for x in (self.keys, self.values))


class MaskedCache(Cache):
    """Holds what nexusquant-kv has rounded, without the tokens that its mask hides: attention gives them nothing.

    Attributes:
        vector_bytes: What a key and a value would take if their codes were packed.
    """

    def __init__(self, config: PretrainedConfig, vector_bytes: tuple[int, int]) -> None:
        """Make an empty cache."""
        super().__init__(layer_class_to_replicate=MaskedLayer)
        self.model_config = config
        self.vector_bytes = vector_bytes

    def memory_report(self) -> PeerReport:
        """Return what the codes would take, and a bit for each token for the one mask of all layers."""
        config, seen = self.model_config, self.get_seq_length()
        kept = self.layers[0].keys.shape[2]
        packed = kept * config.num_hidden_layers * config.num_key_value_heads * sum(self.vector_bytes) + -(-seen // 8)
        dense = dense_bytes(config, seen)
        return PeerReport(seen, kept, packed, dense, dense, packed)  # all slots stay, in 16 bit


@dataclass(frozen=True)
class NexusQuantKv:
    """A preset of nexusquant-kv, applied to a prompt that was read exactly.

    Its own hook rounds keys and values while the prompt is still being read, so later layers and the first token see
    another prompt; and it asks its user to pass the mask of evicted tokens on.  Here both are as it means them.

    Attributes:
        key_bits: Its "bits" of keys.
        value_bits: Its "bits" of values.
        eviction_rate: Part of the tokens to evict.
    """

    key_bits: int
    value_bits: int
    eviction_rate: float

    def vector_bytes(self, head_dim: int) -> tuple[int, int]:
        """Return the bytes of a packed key and value: the fewest whole bytes its points fit in, and a 16-bit scale."""
        codes = (math.ceil(head_dim // 8 * _block_bits(bits) / 8) for bits in (self.key_bits, self.value_bits))
        keys, values = (each + _HALF_BYTES for each in codes)
        return keys, values

    def prepare(self, cache: Cache, loaded: LoadedModel, ids: Tensor) -> None:
        """Let the package score, evict and round, then drop what its mask hides."""
        from nexusquant import NexusQuantEvict  # noqa: PLC0415 - optional
        from nexusquant.core.rope_utils import resolve_rope_config  # noqa: PLC0415

        del ids
        rope = resolve_rope_config(loaded.model.config)
        recipe = NexusQuantEvict(
            head_dim=head_dim_of(loaded.model.config),
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            eviction_rate=self.eviction_rate,
            rope_base=rope["rope_theta"],
            rope_scaling=rope["rope_scaling"],
        )
        recipe.set_model_config(loaded.model.config)
        _, mask = recipe.compress(cache)
        kept = mask[0].nonzero()[:, 0]
        for layer in cache.layers:
            layer.keep(kept)


def _block_bits(bits: int) -> float:
    """Return the bits that tell its points of 8 channels apart: whole ones of even sum, or any halves between them.

    With ``2 ** bits`` "levels" a channel has one whole value more than that, or as many halves.
    """
    levels = 2**bits
    return math.log2((levels + 1) ** 8 / 2 + levels**8)


def nexusquant_kv_candidate(name: str, preset: NexusQuantKv, config: PretrainedConfig) -> Candidate:
    """Return a preset of nexusquant-kv."""
    return Candidate(
        name,
        partial(MaskedCache, config, preset.vector_bytes(head_dim_of(config))),
        prepare=preset.prepare,
        settings={**vars(preset), "package": f"nexusquant-kv {metadata.version('nexusquant-kv')}"},
    )
