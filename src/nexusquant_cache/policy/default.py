"""The policy of a cache that is given none."""

from nexusquant_cache.policy.base import EvictionPolicy
from nexusquant_cache.policy.combined import Averaged, Combined, IfReadAgain
from nexusquant_cache.policy.keys import LeveragePolicy
from nexusquant_cache.policy.queries import FarAttentionPolicy, RecentAttentionPolicy, ReconstructionPolicy

_END = RecentAttentionPolicy(observation_window=64, aggregate="max")

DEFAULT_POLICY: EvictionPolicy = IfReadAgain(
    Averaged((_END, ReconstructionPolicy()), weights=(0.3, 1.0)),
    otherwise=Averaged((_END, FarAttentionPolicy()), weights=(1.0, 0.3)),
)
"""What the prompt's end attends to, which keeps predictions and what a question there asks for; and what keeps facts
for questions that come later: with less weight, what any part of the prompt looks back at from afar; or what a second
reading looks for, which then counts most (`benchmarks/facts.py`)."""

FORMER_DEFAULTS: tuple[EvictionPolicy, ...] = (
    Combined((LeveragePolicy(), RecentAttentionPolicy()), shares=(0.7, 0.3)),
    Averaged((_END, FarAttentionPolicy()), weights=(1.0, 0.3)),
)
"""What took this place in earlier releases: files that were saved with them go on with the present one."""
