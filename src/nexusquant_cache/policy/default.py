"""The policies of a cache that is given none."""

from nexusquant_cache.policy.base import EvictionPolicy
from nexusquant_cache.policy.combined import Averaged, Combined, EqualBudgets, IfReadAgain
from nexusquant_cache.policy.keys import LeveragePolicy
from nexusquant_cache.policy.queries import FarAttentionPolicy, RecentAttentionPolicy, ReconstructionPolicy


def _end_and(other: EvictionPolicy, pool: int, weights: tuple[float, float]) -> EvictionPolicy:
    """Return the mean of what the prompt's end attends to and another policy."""
    end = RecentAttentionPolicy(observation_window=64, aggregate="max", pool=pool)
    return Averaged((end, other), weights=weights)


def _default(pool: int) -> EvictionPolicy:
    return IfReadAgain(
        _end_and(ReconstructionPolicy(), pool, (0.3, 1.0)),
        otherwise=_end_and(FarAttentionPolicy(pool=pool), pool, (1.0, 0.3)),
    )


DEFAULT_POLICY: EvictionPolicy = _default(pool=21)
"""What the prompt's end attends to, which keeps predictions and what a question there asks for; and what keeps facts
for questions that come later: with less weight, what any part of the prompt looks back at from afar; or what a second
reading looks for, which then counts most (`benchmarks/facts.py`)."""

DEFAULT_BESIDE_WINDOWS: EvictionPolicy = EqualBudgets(_default(pool=1))
"""The same where other layers of the model see a sliding window only: token by token, with equal budgets.  The few
layers that see everything then look for single tokens, and one of them would take the budget of the others
(`benchmarks/facts.py`)."""

DEFAULTS = (DEFAULT_POLICY, DEFAULT_BESIDE_WINDOWS)
FORMER_DEFAULTS: tuple[EvictionPolicy, ...] = (
    Combined((LeveragePolicy(), RecentAttentionPolicy()), shares=(0.7, 0.3)),
    _end_and(FarAttentionPolicy(), 21, (1.0, 0.3)),
    DEFAULT_POLICY,  # beside windows, too
)
"""What took their place in earlier releases: files that were saved with them go on with the present one."""
