"""Compressed caches at rest: one safetensors file, checked before anything is believed (docs/file_format.md).

This package knows the file and what its metadata promises, and nothing of transformers or of living caches;
`nexusquant_cache.files.state` turns one into the other.
"""

from nexusquant_cache.files.commands import FileSummary, KindSummary, convert_file, inspect_file, verify_file
from nexusquant_cache.files.fingerprint import hash_tokens
from nexusquant_cache.files.writer import AtRest

__all__ = [
    "AtRest",
    "FileSummary",
    "KindSummary",
    "convert_file",
    "hash_tokens",
    "inspect_file",
    "verify_file",
]
