"""Compressed prefixes on disk."""

from nexusquant_cache.store.index import StoreEntry
from nexusquant_cache.store.store import PrefixMatch, PrefixStore

__all__ = ["PrefixMatch", "PrefixStore", "StoreEntry"]
