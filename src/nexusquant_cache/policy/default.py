"""The policy of a cache that is given none."""

from nexusquant_cache.policy.base import EvictionPolicy
from nexusquant_cache.policy.combined import Averaged
from nexusquant_cache.policy.queries import FarAttentionPolicy, RecentAttentionPolicy

DEFAULT_POLICY: EvictionPolicy = Averaged(
    (RecentAttentionPolicy(observation_window=64, aggregate="max"), FarAttentionPolicy()), weights=(1.0, 0.3)
)
"""What the prompt's end attends to, which keeps predictions and what a question there asks for; and, with less weight,
what any part of the prompt looks back at from afar, which keeps facts for questions that come later
(`benchmarks/ablations.py`)."""
