"""A KV cache for Hugging Face transformers that holds 6 to 33 times fewer bytes.

>>> from nexusquant_cache import NexusQuantCache
>>> cache = NexusQuantCache(preset="balanced")
>>> cache.get_seq_length()
0
"""

from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.cache.dropin import compressed_generation
from nexusquant_cache.cache.report import LayerReport, MemoryReport
from nexusquant_cache.errors import (
    CacheStateError,
    DtypeError,
    NexusQuantError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnsupportedError,
)
from nexusquant_cache.policy import EvictionPolicy, KeyKeyPolicy, KeyNormPolicy, MeanKeyKeyPolicy, ScoreInputs
from nexusquant_cache.presets import PRESETS, CacheConfig

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CacheConfig",
    "CacheStateError",
    "DtypeError",
    "EvictionPolicy",
    "KeyKeyPolicy",
    "KeyNormPolicy",
    "LayerReport",
    "MeanKeyKeyPolicy",
    "MemoryReport",
    "NexusQuantCache",
    "NexusQuantError",
    "NonFiniteError",
    "OptionError",
    "ScoreInputs",
    "ShapeError",
    "UnsupportedError",
    "compressed_generation",
]
