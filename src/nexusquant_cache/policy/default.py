"""The policy of a cache that is given none."""

from nexusquant_cache.policy.base import EvictionPolicy
from nexusquant_cache.policy.combined import Combined
from nexusquant_cache.policy.keys import LeveragePolicy
from nexusquant_cache.policy.queries import RecentAttentionPolicy

DEFAULT_POLICY: EvictionPolicy = Combined((LeveragePolicy(), RecentAttentionPolicy()), shares=(0.7, 0.3))
"""Seven in ten places for what no other key resembles, which keeps facts whoever asks for them later; three for what
the newest tokens attend to, which keeps predictions (`benchmarks/ablations.py`)."""
