"""A KV cache for Hugging Face transformers that holds 6 to 33 times fewer bytes.

>>> from nexusquant_cache import NexusQuantCache
>>> cache = NexusQuantCache(preset="balanced")
>>> cache.get_seq_length()
0
"""

from nexusquant_cache import attention as attention
from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.cache.report import LayerReport, MemoryReport
from nexusquant_cache.codec.registry import register_codec
from nexusquant_cache.dropin import compressed_generation
from nexusquant_cache.errors import (
    CacheStateError,
    DtypeError,
    FormatError,
    NexusQuantError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnsupportedError,
)
from nexusquant_cache.layer.tokens import LayerTransforms
from nexusquant_cache.policy import (
    DEFAULT_BESIDE_WINDOWS,
    DEFAULT_POLICY,
    Averaged,
    Combined,
    EqualBudgets,
    EvictionPolicy,
    ExpectedAttentionPolicy,
    FarAttentionPolicy,
    IfReadAgain,
    KeyDiffPolicy,
    KeyKeyPolicy,
    KeyNormPolicy,
    LeveragePolicy,
    MeanKeyKeyPolicy,
    PooledPolicy,
    RecentAttentionPolicy,
    ReconstructionPolicy,
    ScoreInputs,
    SharedOverHeads,
    ValueAware,
    WindowAttentionPolicy,
)
from nexusquant_cache.presets import PRESETS, CacheConfig
from nexusquant_cache.store.index import StoreEntry
from nexusquant_cache.store.store import PrefixMatch, PrefixStore

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_BESIDE_WINDOWS",
    "DEFAULT_POLICY",
    "PRESETS",
    "Averaged",
    "CacheConfig",
    "CacheStateError",
    "Combined",
    "DtypeError",
    "EqualBudgets",
    "EvictionPolicy",
    "ExpectedAttentionPolicy",
    "FarAttentionPolicy",
    "FormatError",
    "IfReadAgain",
    "KeyDiffPolicy",
    "KeyKeyPolicy",
    "KeyNormPolicy",
    "LayerReport",
    "LayerTransforms",
    "LeveragePolicy",
    "MeanKeyKeyPolicy",
    "MemoryReport",
    "NexusQuantCache",
    "NexusQuantError",
    "NonFiniteError",
    "OptionError",
    "PooledPolicy",
    "PrefixMatch",
    "PrefixStore",
    "RecentAttentionPolicy",
    "ReconstructionPolicy",
    "ScoreInputs",
    "ShapeError",
    "SharedOverHeads",
    "StoreEntry",
    "UnsupportedError",
    "ValueAware",
    "WindowAttentionPolicy",
    "compressed_generation",
    "register_codec",
]
