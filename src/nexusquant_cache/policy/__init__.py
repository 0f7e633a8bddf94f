"""Which tokens are kept: a policy scores, the base class does everything else.

A policy is one class with one method, `EvictionPolicy.score`.  Checks are the same for all of them and live in
`EvictionPolicy.checked_scores`; what is protected, how many tokens stay, and which, is the layer's work.
"""

from nexusquant_cache.policy.base import EvictionPolicy, PooledPolicy, ScoreInputs
from nexusquant_cache.policy.combined import (
    Averaged,
    Combined,
    EqualBudgets,
    IfReadAgain,
    SharedOverHeads,
    ValueAware,
)
from nexusquant_cache.policy.default import DEFAULT_BESIDE_WINDOWS, DEFAULT_POLICY
from nexusquant_cache.policy.keys import KeyDiffPolicy, KeyKeyPolicy, KeyNormPolicy, LeveragePolicy, MeanKeyKeyPolicy
from nexusquant_cache.policy.queries import (
    ExpectedAttentionPolicy,
    FarAttentionPolicy,
    RecentAttentionPolicy,
    ReconstructionPolicy,
    WindowAttentionPolicy,
)

__all__ = [
    "DEFAULT_BESIDE_WINDOWS",
    "DEFAULT_POLICY",
    "Averaged",
    "Combined",
    "EqualBudgets",
    "EvictionPolicy",
    "ExpectedAttentionPolicy",
    "FarAttentionPolicy",
    "IfReadAgain",
    "KeyDiffPolicy",
    "KeyKeyPolicy",
    "KeyNormPolicy",
    "LeveragePolicy",
    "MeanKeyKeyPolicy",
    "PooledPolicy",
    "RecentAttentionPolicy",
    "ReconstructionPolicy",
    "ScoreInputs",
    "SharedOverHeads",
    "ValueAware",
    "WindowAttentionPolicy",
]
