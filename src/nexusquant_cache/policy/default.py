"""The policies of a cache that is given none."""

from nexusquant_cache.policy.base import EvictionPolicy
from nexusquant_cache.policy.combined import Averaged, Combined, EqualBudgets, IfReadAgain
from nexusquant_cache.policy.keys import LeveragePolicy
from nexusquant_cache.policy.queries import FarAttentionPolicy, RecentAttentionPolicy, ReconstructionPolicy


def _once(window: int, pool: int) -> Averaged:
    """Return what scores a prompt that is read once."""
    return Averaged((_end(window, pool), FarAttentionPolicy(pool=pool)), weights=(1.0, 0.3))


def _twice(window: int, pool: int) -> Averaged:
    """Return what scores a prompt that has been read a second time."""
    return Averaged((_end(window, pool), ReconstructionPolicy()), weights=(0.3, 1.0))


def _end(window: int, pool: int) -> RecentAttentionPolicy:
    return RecentAttentionPolicy(observation_window=window, aggregate="max", pool=pool)


DEFAULT_POLICY = IfReadAgain(_twice(window=64, pool=21), otherwise=_once(window=64, pool=21))
"""What the prompt's end attends to, which keeps predictions and what a question there asks for; and what keeps facts
for questions that come later: with less weight, what any part of the prompt looks back at from afar; or what a second
reading looks for, which then counts most (`benchmarks/facts.py`)."""

DEFAULT_BESIDE_WINDOWS: EvictionPolicy = Combined(
    (_once(window=256, pool=1), _end(window=16, pool=21)), shares=(0.8, 0.2)
)
"""The same where other layers of the model see a sliding window only: token by token, with a wider end and equal
budgets, and a fifth of the places for what the last few queries attend to, with its neighbours.  The layers that see
everything then look for single tokens, seldom, and one of them would take the budget of the others.  But the model
looks for an answer of many tokens one after the other: when the cache chooses, it has looked for the first alone.  A
second reading makes answers worse there, and counts nothing.  Chosen on one such model, Gemma 3 270M
(`benchmarks/eviction.py`, `benchmarks/facts.py`)."""

DEFAULTS = (DEFAULT_POLICY, DEFAULT_BESIDE_WINDOWS)
FORMER_DEFAULTS: tuple[EvictionPolicy, ...] = (
    Combined((LeveragePolicy(), RecentAttentionPolicy()), shares=(0.7, 0.3)),
    DEFAULT_POLICY.otherwise,
    DEFAULT_POLICY,  # beside windows, too
    EqualBudgets(IfReadAgain(_twice(window=256, pool=1), otherwise=_once(window=256, pool=1))),
)
"""What took their place in earlier releases: files that were saved with them go on with the present one."""
