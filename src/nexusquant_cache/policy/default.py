"""The policies of a cache that is given none."""

from nexusquant_cache.policy.base import EvictionPolicy
from nexusquant_cache.policy.combined import Averaged, Combined, EqualBudgets, IfReadAgain
from nexusquant_cache.policy.keys import LeveragePolicy
from nexusquant_cache.policy.queries import FarAttentionPolicy, RecentAttentionPolicy, ReconstructionPolicy


def _default(window: int, pool: int) -> IfReadAgain:
    end = RecentAttentionPolicy(observation_window=window, aggregate="max", pool=pool)
    read_again = Averaged((end, ReconstructionPolicy()), weights=(0.3, 1.0))
    return IfReadAgain(read_again, otherwise=Averaged((end, FarAttentionPolicy(pool=pool)), weights=(1.0, 0.3)))


DEFAULT_POLICY = _default(window=64, pool=21)
"""What the prompt's end attends to, which keeps predictions and what a question there asks for; and what keeps facts
for questions that come later: with less weight, what any part of the prompt looks back at from afar; or what a second
reading looks for, which then counts most (`benchmarks/facts.py`)."""

DEFAULT_BESIDE_WINDOWS: EvictionPolicy = EqualBudgets(_default(window=256, pool=1))
"""The same where other layers of the model see a sliding window only: token by token, with a wider end and equal
budgets.  The layers that see everything then look for single tokens, seldom, and one of them would take the budget of
the others.  Chosen on one such model, Gemma 3 270M (`benchmarks/eviction.py`)."""

DEFAULTS = (DEFAULT_POLICY, DEFAULT_BESIDE_WINDOWS)
FORMER_DEFAULTS: tuple[EvictionPolicy, ...] = (
    Combined((LeveragePolicy(), RecentAttentionPolicy()), shares=(0.7, 0.3)),
    DEFAULT_POLICY.otherwise,
    DEFAULT_POLICY,  # beside windows, too
)
"""What took their place in earlier releases: files that were saved with them go on with the present one."""
