"""A whole cache as metadata and tensors, and back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from nexusquant_cache.errors import FormatError, OptionError, UnsupportedError
from nexusquant_cache.files.checks import check_numbers, check_tensors
from nexusquant_cache.files.contents import DTYPES, FileTensor, tensors_of
from nexusquant_cache.files.fingerprint import Besides, TokenIds, check_model, describe_model, hash_prompt
from nexusquant_cache.files.layers import layer_state, restore_given, restore_layer
from nexusquant_cache.files.schema import CacheMeta, LayerMeta, StockMeta, from_json, to_json
from nexusquant_cache.files.state import (
    Lists,
    Source,
    Tensors,
    describe_settings,
    phases_state,
    policy_name,
)
from nexusquant_cache.files.stock import restore_stock, stock_state
from nexusquant_cache.files.version_1 import restore_padding
from nexusquant_cache.layer.parts import CompressedPart, Part
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import LayerState
from nexusquant_cache.policy.default import DEFAULTS, FORMER_DEFAULTS

_MOST_TEXT = 1 << 20  # bytes of all texts given as metadata: a header that is longer than some MiB is not read


@dataclass(frozen=True)
class WholeCache:
    """What a file says of a cache.

    Attributes:
        parts: Its layers.
        shared: What they share.
        preset: Name of the preset, or ``"custom"``.
        config: The model's, for text; None if the cache has none.
        records_from_start: Whether past recording was asked for before there were layers to tell.
        statistics: What its report says, for information.
    """

    parts: list[Part]
    shared: Shared
    preset: str
    config: PretrainedConfig | None
    records_from_start: bool
    statistics: Mapping[str, int]


def export_cache(
    cache: WholeCache,
    *,
    token_ids: TokenIds | None = None,
    besides: Besides | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[CacheMeta, Tensors]:
    """Return all that a cache holds and counts; the tensors share memory with it.

    Raises:
        OptionError: If the metadata are no texts, or very long ones, or the token ids are not as many as were seen.
        UnsupportedError: If a file cannot hold a part of the cache.
        NonFiniteError: If an exact token holds NaN or infinity.
    """
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
    tokens_hash, tokens_seen = hash_prompt(token_ids, besides), max((part.seen for part in cache.parts), default=0)
    if token_ids is not None:
        _check_count(token_ids, max((part.rows for part in cache.parts), default=1), tokens_seen)
    lists, tensors = Lists(), Tensors()
    layers: list[LayerMeta | StockMeta] = []
    for part in cache.parts:
        described, found = _describe(part, cache.shared, lists)
        layers.append(described)
        tensors |= found
    phases, found = phases_state(lists)
    tensors |= found
    meta = CacheMeta(
        preset=cache.preset,
        settings=describe_settings(cache.shared.settings),
        when=cache.shared.when,
        model=None if cache.config is None else describe_model(cache.config.to_dict()),
        tokens_seen=tokens_seen,
        tokens_hash=tokens_hash,
        statistics=dict(cache.statistics),
        user=dict(metadata or {}),
        has_warned=cache.shared.has_warned,
        records_from_start=cache.records_from_start,
        policies=tuple(lists.policies),
        phases=phases,
        codecs=tuple(lists.codecs),
        layers=tuple(layers),
    )
    _check_readable(meta, tensors)
    return meta, tensors


def _check_count(token_ids: TokenIds, rows: int, seen: int) -> None:
    given = list(torch.atleast_2d(torch.as_tensor(token_ids)).shape)
    if given != [rows, seen]:
        msg = (
            f"token_ids are {given}, the cache has seen {[rows, seen]}: give the ids of all that it has seen. The last "
            "token that generate returns is not among them"
        )
        raise OptionError(msg)


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


def _describe(part: Part, shared: Shared, lists: Lists) -> tuple[LayerMeta | StockMeta, Tensors]:
    if part.state is None:
        return stock_state(part.layer, part.index)
    part.arrive()
    return layer_state(part.state, shared, lists)


def check_prompt(expected: str | None, token_ids: TokenIds | None, besides: Besides | None) -> None:
    """Raise FormatError if a file was not saved with these token ids, and what came besides."""
    found = hash_prompt(token_ids, besides)
    if found is None or expected == found:
        return
    what = "does not say of which tokens it is" if expected is None else "is of another prompt than this one"
    msg = (
        f"the file {what}: save and load with token_ids= the tokens that the cache has seen, and besides= what came "
        "with them, such as images"
    )
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


def import_cache(cache: WholeCache, meta: CacheMeta, source: Source, *, has_policy: bool) -> None:
    """Fill an empty cache, which has its layers already, with what a file holds.

    Args:
        cache: The cache.
        meta: What the file says.
        source: Its tensors.
        has_policy: Whether the cache was given a policy to go on with.

    Raises:
        FormatError: If the layers are of other kinds than those of the cache.
        OptionError: If the policy is another, and may have something to decide.
    """
    if len(meta.layers) != len(cache.parts):
        msg = f"the file holds {len(meta.layers)} layers, the cache of this model has {len(cache.parts)}"
        raise FormatError(msg)
    shared = cache.shared
    shared.has_warned = meta.has_warned
    shared.phases = list(source.phases)
    given = tuple(restore_given(layer, index, source) for index, layer in enumerate(meta.layers))
    shared.given_transforms = given if any(x is not None for x in given) else ()
    for part, described in zip(cache.parts, meta.layers, strict=True):
        if isinstance(part, CompressedPart) and isinstance(described, LayerMeta):
            restore_layer(part.layer, described, source)
            if meta.padding is not None:
                restore_padding(part.state, described, meta.padding, source)
            if not has_policy:
                _check_policy(part.state, shared, meta, described)
        elif (
            part.state is None
            and isinstance(described, StockMeta)
            and type(part.layer).__name__ == described.layer_class
        ):
            restore_stock(part.layer, part.index, described, source, meta.tokens_seen)
        else:
            msg = f"layer {part.index} of the file is of another kind than {type(part.layer).__name__}"
            raise FormatError(msg)


def _check_policy(state: LayerState, shared: Shared, meta: CacheMeta, described: LayerMeta) -> None:
    """Raise OptionError if the cache had another policy, and no policy is given to take its place."""
    if described.policy is None or state.policy is None or not shared.evicts:
        return
    name = meta.policies[described.policy]
    is_former = state.policy in DEFAULTS and name in map(policy_name, FORMER_DEFAULTS)
    if policy_name(state.policy) != name and not is_former:
        msg = f"the cache was saved with the policy {name[:200]}: give policy= the same, or the one to go on with"
        raise OptionError(msg)
