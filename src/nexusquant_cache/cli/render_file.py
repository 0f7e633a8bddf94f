"""Saved caches, and stores of them, as tables."""

import json
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from nexusquant_cache.files import AtRest, FileSummary
from nexusquant_cache.files.checks import settings_of
from nexusquant_cache.files.schema import LayerMeta, StockMeta
from nexusquant_cache.files.state import describe_settings
from nexusquant_cache.presets import PRESETS
from nexusquant_cache.store.index import StoreEntry

_NONE = "-"
_SHORT = 8  # digits of a hash
_LONG = 200  # characters of a text that somebody has put into a file
_MOST_BYTES = 1 << 63  # more than any machine has
_TEXTS = {"kind", "codes", "stored as", "batch x heads x dims", "file", "model", "namespace", "settings"}


def file_renderables(path: Path, summary: FileSummary) -> Iterator[RenderableType]:
    """Yield what the header of a file says: what it is, its layers, and its parts."""
    meta = summary.meta
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    model = _NONE if meta.model is None else f"{meta.model.fields.get('model_type', '?')} {meta.model.fingerprint[:16]}"
    numbers = meta.statistics
    for name, text in (
        ("file", f"{path.name}, {summary.file_bytes:,} bytes"),
        ("content", f"sha256 {summary.sha256} (not checked: run verify)"),
        ("model", model),
        ("preset", f"{meta.preset}, {_settings(summary)}"),
        ("tokens", f"{meta.tokens_seen:,} seen, {_number(numbers.get('kept_tokens'))} kept"),
        ("prompt", _NONE if meta.tokens_hash is None else f"sha256 {meta.tokens_hash}"),
        ("held", f"{_number(numbers.get('held_bytes'))} bytes in memory, {_factor(summary)}"),
        *((f"({name})", _beginning(text)) for name, text in meta.user.items()),
    ):
        facts.add_row(_plain(name), _plain(text))
    yield facts
    yield _layers(summary)
    yield _kinds(summary)


def _settings(summary: FileSummary) -> str:
    settings = settings_of(summary.meta)
    bits = f"{settings.key_bits:g} / {settings.value_bits:g} bits for keys / values"
    return f"{bits}, {100 * settings.keep_ratio:g} % kept"


def printable(text: str) -> str:
    """Return a text with escapes in place of all that is no visible character: what a file says may be anything.

    Control characters would reach the terminal, and half a surrogate pair could not be written.
    """
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def _plain(text: str) -> Text:
    """Return what a cell shows of a text, in which nothing is markup."""
    return Text(printable(text))


def _beginning(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}... ({len(text):,} characters)"


def _number(value: object) -> str:
    return f"{value:,}" if type(value) is int and 0 <= value < _MOST_BYTES else _NONE


def _factor(summary: FileSummary) -> str:
    dense = summary.meta.statistics.get("dense_bytes")
    if type(dense) is not int or not 0 <= dense < _MOST_BYTES or not summary.file_bytes:
        return _NONE
    return f"{dense:,} as a plain 16-bit cache, {dense / summary.file_bytes:.1f}x the file"


def _layers(summary: FileSummary) -> Table:
    """Return a table with a line per run of layers that are alike."""
    table = _table(("layers", "kind", "batch x heads x dims", "seen", "exact", "packed", "codes"))
    rows = [_layer_cells(layer, summary) for layer in summary.meta.layers]
    start = 0
    for index, row in enumerate(rows):
        if index + 1 < len(rows) and rows[index + 1] == row:
            continue
        table.add_row(str(index) if index == start else f"{start}-{index}", *map(_plain, row))
        start = index + 1
    return table


def _layer_cells(layer: LayerMeta | StockMeta, summary: FileSummary) -> tuple[str, ...]:
    if isinstance(layer, StockMeta):
        shapes = {" x ".join(map(str, tensor.shape)) for tensor in layer.tensors}
        return layer.layer_class, ", ".join(sorted(shapes)) or _NONE, _NONE, _NONE, _NONE, _NONE
    if layer.shape is None:
        return "compressed", _NONE, "0", "0", "0", _NONE
    shape, body = layer.shape, layer.body
    dims = f"{shape.key_dim}" if shape.key_dim == shape.value_dim else f"{shape.key_dim}/{shape.value_dim}"
    codecs = [] if body is None or layer.used is None else [summary.meta.codecs[index].name for index in layer.used]
    rotations = [] if body is None else [body.keys.rotation, body.values.rotation]
    codes = " / ".join(f"{codec}, {rotation}" for codec, rotation in dict.fromkeys(zip(codecs, rotations, strict=True)))
    return (
        "compressed",
        f"{shape.batch} x {shape.heads} x {dims}",
        f"{layer.seen:,}",
        f"{(layer.sinks or 0) + layer.tail:,}",
        "0" if body is None else f"{body.kept + body.dense:,}",
        codes or _NONE,
    )


def _kinds(summary: FileSummary) -> Table:
    """Return a table with a line per kind of tensor."""
    table = _table(("part", "packed bytes", "at rest", "ratio", "stored as"))
    for row in summary.kinds:
        ratio = f"{row.stored_bytes / row.packed_bytes:.3f}" if row.packed_bytes else _NONE
        table.add_row(
            row.kind, f"{row.packed_bytes:,}", f"{row.stored_bytes:,}", ratio, _plain(", ".join(row.packings))
        )
    table.add_row("header", _NONE, f"{summary.header_bytes:,}", _NONE, "JSON")
    return table


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


def _table(columns: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        is_text = index == 0 or name in _TEXTS
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    return table
