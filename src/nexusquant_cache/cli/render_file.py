"""Saved caches, and stores of them, as tables."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from nexusquant_cache.files import AtRest, FileSummary
from nexusquant_cache.files.rows import LAYER_COLUMNS, PART_COLUMNS, TEXT_COLUMNS, fact_rows, layer_rows, part_rows
from nexusquant_cache.files.state import describe_settings
from nexusquant_cache.pages.elements import printable
from nexusquant_cache.presets import PRESETS
from nexusquant_cache.store.index import StoreEntry

_NONE = "-"
_SHORT = 8  # digits of a hash
_TEXTS = {*TEXT_COLUMNS, "file", "model", "namespace", "settings"}


def file_renderables(path: Path, summary: FileSummary) -> Iterator[RenderableType]:
    """Yield what the header of a file says: what it is, its layers, and its parts."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, text in fact_rows(path, summary):
        facts.add_row(_plain(name), _plain(text))
    yield facts
    yield _filled(LAYER_COLUMNS, layer_rows(summary))
    yield _filled(PART_COLUMNS, part_rows(summary))


def _filled(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = _table(columns)
    for row in rows:
        table.add_row(*map(_plain, row))
    return table


def _plain(text: str) -> Text:
    """Return what a cell shows of a text, in which nothing is markup."""
    return Text(printable(text))


def store_renderables(folder: Path, entries: tuple[StoreEntry, ...]) -> Iterator[RenderableType]:
    """Yield what the index of a store says.

    Args:
        folder: The folder of the store.
        entries: Its entries; that which was used longest ago comes first.
    """
    name = folder.absolute().name
    yield _plain(f"{name}: {len(entries):,} entries, {sum(entry.nbytes for entry in entries):,} bytes")
    table = _table(("last used", "file", "tokens", "bytes", "model", "namespace", "settings"))
    for place, entry in enumerate(reversed(entries), 1):
        table.add_row(
            f"{place:,}",
            _plain(f"{entry.file[:_SHORT]}..."),
            f"{entry.tokens:,}",
            f"{entry.nbytes:,}",
            _plain(entry.model[:_SHORT] or _NONE),
            _plain(entry.namespace or _NONE),
            _plain(_settings_in_short(entry)),
        )
    yield table


def _settings_in_short(entry: StoreEntry) -> str:
    settings = json.loads(entry.settings)
    preset = next((name for name, known in PRESETS.items() if describe_settings(known) == settings), "custom")
    bits = f"{settings['key_bits']:g} / {settings['value_bits']:g} bits"
    kept = f"{100 * settings['keep_ratio']:.3g} % kept"
    return ", ".join(part for part in (preset, bits, kept, entry.policy) if part)


def converted_renderables(before: int, report: AtRest) -> Iterator[RenderableType]:
    """Yield what a conversion has come to."""
    table = _table(("part", "packed bytes", "at rest", "stored as"))
    for kind, (packed, stored) in report.kinds.items():
        table.add_row(kind, f"{packed:,}", f"{stored:,}", ", ".join(report.packings(kind)))
    yield table
    yield Text(f"{before:,} bytes before, {report.total_bytes:,} now")


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        is_text = index == 0 or name in _TEXTS
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    return table
