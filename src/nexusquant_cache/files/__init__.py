"""Compressed caches at rest: one safetensors file, checked before anything is believed (docs/file_format.md).

What a file holds of a layer follows from `nexusquant_cache.layer.state.TENSORS` and the metadata (`files.contents`).
This room knows layers, and no cache: `files.saving` is given what a cache holds, and gives it back.
"""

from nexusquant_cache.files.commands import FileSummary, KindSummary, convert_file, inspect_file, verify_file
from nexusquant_cache.files.fingerprint import hash_tokens
from nexusquant_cache.files.saved_page import write_page
from nexusquant_cache.files.writer import AtRest

__all__ = [
    "AtRest",
    "FileSummary",
    "KindSummary",
    "convert_file",
    "hash_tokens",
    "inspect_file",
    "verify_file",
    "write_page",
]
