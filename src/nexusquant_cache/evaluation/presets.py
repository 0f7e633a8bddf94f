"""The caches of this package as candidates."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from transformers import DynamicCache, PretrainedConfig

from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.evaluation.caches import PLAIN, Candidate
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.policy import EvictionPolicy
from nexusquant_cache.presets import PRESETS, CacheConfig, resolve_preset

PLAIN_CANDIDATE = Candidate(PLAIN, DynamicCache)


def nexusquant_candidate(
    name: str,
    settings: str | CacheConfig,
    config: PretrainedConfig,
    policy: EvictionPolicy | None = None,
) -> Candidate:
    """Return a `NexusQuantCache` as a candidate.

    Args:
        name: What to call it.
        settings: A preset's name, or settings.
        config: The model's config.
        policy: Which tokens to keep; the cache's default if None.

    Raises:
        OptionError: If there is no such preset.
    """
    resolved = resolve_preset(settings)
    return Candidate(
        name,
        lambda: NexusQuantCache(resolved, config=config, policy=policy),
        settings=describe(resolved, policy),
    )


def preset_candidates(loaded: LoadedModel, names: Iterable[str] = ()) -> tuple[Candidate, ...]:
    """Return these presets as candidates, all if none is named.

    Raises:
        OptionError: If there is no such preset.
    """
    return tuple(nexusquant_candidate(name, name, loaded.model.config) for name in (tuple(names) or PRESETS))


def describe(settings: CacheConfig, policy: EvictionPolicy | None = None) -> dict[str, Any]:
    """Return the settings of a cache as they stand in a result file."""
    plain: dict[str, Any] = json.loads(
        json.dumps({**asdict(settings), "policy": repr(policy) if policy else "default"})
    )  # tuples become lists, as in the file
    return plain
