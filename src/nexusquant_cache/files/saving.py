"""A whole cache as metadata and tensors, and back; `cache.state` does its parts."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from nexusquant_cache.errors import CacheStateError, FormatError, OptionError, UnsupportedError
from nexusquant_cache.files.checks import check_numbers, check_tensors
from nexusquant_cache.files.contents import DTYPES, FileTensor, tensors_of
from nexusquant_cache.files.fingerprint import TokenIds, check_model, describe_model, hash_tokens
from nexusquant_cache.files.schema import CacheMeta, LayerMeta, StockMeta, from_json, to_json
from nexusquant_cache.files.state import (
    Lists,
    Source,
    Tensors,
    describe_settings,
    padding_state,
    phases_state,
    policy_name,
    restore_given,
    restore_padding,
    restore_stock,
    stock_state,
)
from nexusquant_cache.layer.layer import NexusQuantLayer

_MOST_TEXT = 1 << 20  # bytes of all texts given as metadata: a header that is longer than some MiB is not read


def export_cache(
    cache: Any,  # noqa: ANN401 - a NexusQuantCache, whose module imports this one
    *,
    token_ids: TokenIds | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[CacheMeta, Tensors]:
    """Return all that a cache holds and counts; the tensors share memory with it.

    Raises:
        CacheStateError: If an earlier forward failed half-way through a compression.
        OptionError: If the metadata are no texts, or very long ones.
        UnsupportedError: If a file cannot hold a part of the cache.
        NonFiniteError: If an exact token holds NaN or infinity.
    """
    if cache._is_broken:  # noqa: SLF001 - this is the cache's own way out
        msg = "an earlier forward failed half-way through a compression: there is nothing to save"
        raise CacheStateError(msg)
    texts: list[object] = [text for pair in (metadata or {}).items() for text in pair]
    if not all(isinstance(text, str) for text in texts):
        msg = f"metadata must be texts by name, got {metadata!r}"
        raise OptionError(msg)
    size = len(json.dumps(texts))
    if size > _MOST_TEXT:
        msg = (
            f"metadata may be {_MOST_TEXT:,} bytes long in all, got {size:,}: keep a name in it, and the rest elsewhere"
        )
        raise OptionError(msg)
    lists, tensors = Lists(), Tensors()
    layers: list[LayerMeta | StockMeta] = []
    for index, layer in enumerate(cache.layers):
        is_ours = isinstance(layer, NexusQuantLayer)
        meta, found = layer.state(lists) if is_ours else stock_state(layer, index)
        layers.append(meta)
        tensors |= found
    padding, found = padding_state(cache.padding)
    tensors |= found
    phases, found = phases_state(lists)
    tensors |= found
    meta = CacheMeta(
        preset=cache.preset,
        settings=describe_settings(cache.cache_config),
        when=cache.when,
        model=None if cache.model_config is None else describe_model(cache.model_config.to_dict()),
        tokens_seen=cache.get_seq_length() if cache.layers else 0,
        tokens_hash=None if token_ids is None else hash_tokens(token_ids),
        statistics=_statistics(cache),
        user=dict(metadata or {}),
        padding=padding,
        has_warned=cache._has_warned,  # noqa: SLF001
        records_from_start=cache._records_from_start,  # noqa: SLF001
        policies=tuple(lists.policies),
        phases=phases,
        codecs=tuple(lists.codecs),
        layers=tuple(layers),
    )
    _check_readable(meta, tensors)
    return meta, tensors


def _check_readable(meta: CacheMeta, tensors: Tensors) -> None:
    """Check all that reading will check, while there is still a cache to go on with.

    Raises:
        UnsupportedError: If a file of this would be refused.
    """
    try:
        read = from_json(to_json(meta))
        check_numbers(read)
        for spec in tensors_of(read).values():
            _check_tensor(spec, tensors[spec.name])
        check_tensors(read, tensors)
    except (FormatError, ValueError) as error:  # JSON has no infinity
        msg = f"a file cannot hold this cache: {error}"
        raise UnsupportedError(msg) from error


def _check_tensor(spec: FileTensor, tensor: Tensor) -> None:
    if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype][1]:
        msg = f"{spec.name} is {tensor.dtype} {list(tensor.shape)}, not {spec.dtype} {list(spec.shape)}"
        raise FormatError(msg)


def _statistics(cache: Any) -> dict[str, Any]:  # noqa: ANN401
    report = cache.memory_report()
    names = ("held_bytes", "dense_bytes", "seen_tokens", "kept_tokens", "peak_bytes")
    return {name: getattr(report, name) for name in names}


def check_tokens(expected: str | None, token_ids: TokenIds | None) -> None:
    """Raise FormatError if a file was not saved with these token ids."""
    if token_ids is None or expected == hash_tokens(token_ids):
        return
    what = "does not say of which tokens it is" if expected is None else "is of other tokens than these"
    msg = f"the file {what}: save with token_ids= the tokens that the cache has seen"
    raise FormatError(msg)


def check_config(meta: CacheMeta, config: PretrainedConfig | None) -> None:
    """Check that a file belongs to the model of a config, or that it can be loaded without.

    Raises:
        FormatError: If the file belongs to another model.
        OptionError: If there is no config and one is needed.
    """
    if config is not None:
        check_model(meta.model, config.get_text_config(decoder=True).to_dict())
        return
    waits = any(not isinstance(layer, LayerMeta) or layer.body is None for layer in meta.layers)
    if meta.model is not None and (waits or not meta.layers):
        msg = (
            "this file needs the model's config, config=model.config: its prompt was not compressed yet, or some "
            "layers are not compressed at all"
        )
        raise OptionError(msg)


def import_cache(
    cache: Any,  # noqa: ANN401 - a NexusQuantCache, whose module imports this one
    meta: CacheMeta,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Fill an empty cache with what `export_cache` returned.

    Raises:
        FormatError: If the layers are of other kinds than those of the cache.
        OptionError: If the policy is another, and may have something to decide.
    """
    if cache.model_config is not None and len(meta.layers) != len(cache.layers):
        msg = f"the file holds {len(meta.layers)} layers, the cache of this model has {len(cache.layers)}"
        raise FormatError(msg)
    source = Source.of(meta, tensors, device, dtype)
    cache.preset, cache.padding = meta.preset, restore_padding(meta.padding, source)
    cache._has_warned, cache._records_from_start = meta.has_warned, meta.records_from_start  # noqa: SLF001
    cache._phases = list(source.phases)  # noqa: SLF001
    given = tuple(restore_given(layer, index, source) for index, layer in enumerate(meta.layers))
    cache._given_transforms = given if any(x is not None for x in given) else ()  # noqa: SLF001
    layers = [cache.layer_for_file(index) for index in range(len(meta.layers))]
    for index, (layer, part) in enumerate(zip(layers, meta.layers, strict=True)):
        if isinstance(layer, NexusQuantLayer) and isinstance(part, LayerMeta):
            layer.restore(part, source)
            _check_policy(cache, layer, meta, part)
        elif isinstance(part, StockMeta) and type(layer).__name__ == part.layer_class:
            restore_stock(layer, index, part, source, meta.tokens_seen)
        else:
            msg = f"layer {index} of the file is of another kind than {type(layer).__name__}"
            raise FormatError(msg)


def _check_policy(cache: Any, layer: NexusQuantLayer, meta: CacheMeta, part: LayerMeta) -> None:  # noqa: ANN401
    """Raise OptionError if the cache had another policy, and no policy is given to take its place."""
    if part.policy is None or cache.policy is not None or cache.cache_config.keep_ratio == 1:
        return
    name = meta.policies[part.policy]
    if policy_name(layer.policy) != name:
        msg = f"the cache was saved with the policy {name[:200]}: give policy= the same, or the one to go on with"
        raise OptionError(msg)
