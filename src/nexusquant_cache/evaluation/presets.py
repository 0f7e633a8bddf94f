"""The caches of this package as candidates."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig

from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.evaluation.caches import PLAIN, Candidate
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.policy import DEFAULT_POLICY, EvictionPolicy
from nexusquant_cache.presets import PRESETS, CacheConfig, preset_names, resolve_preset

PLAIN_CANDIDATE = Candidate(PLAIN, DynamicCache)


def nexusquant_candidate(
    name: str,
    settings: str | CacheConfig,
    config: PretrainedConfig,
    policy: EvictionPolicy | None = None,
    *,
    reads_again: bool = False,
) -> Candidate:
    """Return a `NexusQuantCache` as a candidate.

    Args:
        name: What to call it.
        settings: A preset's name, or settings.
        config: The model's config.
        policy: Which tokens to keep; the cache's default if None.
        reads_again: Whether the model reads every prompt a second time, see `NexusQuantCache.read_again`.

    Raises:
        OptionError: If there is no such preset.
        UnsupportedError: If the model's cache cannot be made with it, as where a bias by distance allows no eviction.
    """
    resolved = resolve_preset(settings)

    def make() -> NexusQuantCache:
        return NexusQuantCache(resolved, config=config, policy=policy)

    described = describe(resolved, make().make_policy(0))
    return Candidate(
        name,
        make,
        prepare=read_again if reads_again else None,
        settings={**described, "reads_again": True} if reads_again else described,
    )


def read_again(cache: Cache, loaded: LoadedModel, ids: Tensor) -> None:
    """Let the model read a prompt a second time."""
    assert isinstance(cache, NexusQuantCache)
    cache.read_again(loaded.model, ids)


AGAIN = "again@"
"""What the names of presets begin with for which every prompt is read a second time."""


def preset_candidates(
    loaded: LoadedModel, names: Iterable[str] = (), *, read_again: bool = False
) -> tuple[Candidate, ...]:
    """Return these presets as candidates, all if none is named.

    Args:
        loaded: The model.
        names: The presets.
        read_again: Whether to add those that evict once more, with every prompt read a second time.

    Raises:
        OptionError: If there is no such preset.
    """
    config, names = loaded.model.config, preset_names(names) or tuple(PRESETS)
    once = [nexusquant_candidate(name, name, config) for name in names]
    evicting = [name for name in names if read_again and resolve_preset(name).keep_ratio < 1]
    again = [nexusquant_candidate(AGAIN + name, name, config, reads_again=True) for name in evicting]
    return (*once, *again)


def describe(settings: CacheConfig, policy: EvictionPolicy = DEFAULT_POLICY) -> dict[str, Any]:
    """Return the settings of a cache as they stand in a result file."""
    plain: dict[str, Any] = json.loads(
        json.dumps({**asdict(settings), "policy": "default" if policy == DEFAULT_POLICY else repr(policy)})
    )  # tuples become lists, as in the file
    return plain
