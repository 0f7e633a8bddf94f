"""Compressed prefixes on disk."""

from nexusquant_cache.store.store import PrefixMatch, PrefixStore, StoreEntry

__all__ = ["PrefixMatch", "PrefixStore", "StoreEntry"]
