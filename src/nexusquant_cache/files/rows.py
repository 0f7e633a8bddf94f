"""What the header of a file says, as texts for tables; texts of the file stand in them as they are."""

from collections.abc import Iterator
from pathlib import Path

from nexusquant_cache.files.checks import settings_of
from nexusquant_cache.files.commands import FileSummary
from nexusquant_cache.files.ids import TOKEN_IDS
from nexusquant_cache.files.schema import BodyMeta, LayerMeta, StockMeta

LAYER_COLUMNS = ("layers", "kind", "batch x heads x dims", "seen", "exact", "packed", "codes")
"""Headings of `layer_rows`; tokens are counted for each head, on average."""
PART_COLUMNS = ("part", "packed bytes", "at rest", "ratio", "stored as")
"""Headings of `part_rows`."""
TEXT_COLUMNS = ("kind", "batch x heads x dims", "codes", "stored as")
"""Those of them that are over texts; the others are over numbers."""

_NONE = "-"
_LONG = 200  # characters of a text that somebody has put into a file
_MOST_BYTES = 1 << 63  # more than any machine has


def fact_rows(path: Path, summary: FileSummary) -> Iterator[tuple[str, str]]:
    """Yield what a file is: names and texts."""
    meta = summary.meta
    numbers = meta.statistics
    yield "file", f"{path.name}, {summary.file_bytes:,} bytes"
    yield "content", f"sha256 {summary.sha256} (not checked: run verify)"
    model = _NONE if meta.model is None else f"{meta.model.fields.get('model_type', '?')} {meta.model.fingerprint[:16]}"
    yield "model", model
    yield "preset", f"{meta.preset}, {_settings(summary)}"
    yield "tokens", f"{meta.tokens_seen:,} seen, {_number(numbers.get('kept_tokens'))} kept"
    prompt = _NONE if meta.tokens_hash is None else f"sha256 {meta.tokens_hash}"
    yield "prompt", f"{prompt}, with its token ids" if TOKEN_IDS in meta.user else prompt
    yield "held", f"{_number(numbers.get('held_bytes'))} bytes in memory, {_factor(summary)}"
    for name, text in meta.user.items():
        if name != TOKEN_IDS:
            yield f"({name})", text if len(text) <= _LONG else f"{text[:_LONG]}... ({len(text):,} characters)"


def layer_rows(summary: FileSummary) -> Iterator[tuple[str, ...]]:
    """Yield a row per run of layers that are alike."""
    rows = [_layer_cells(layer, summary) for layer in summary.meta.layers]
    start = 0
    for index, row in enumerate(rows):
        if index + 1 < len(rows) and rows[index + 1] == row:
            continue
        yield str(index) if index == start else f"{start}-{index}", *row
        start = index + 1


def part_rows(summary: FileSummary) -> Iterator[tuple[str, ...]]:
    """Yield a row per kind of tensor, and one for the header."""
    for row in summary.kinds:
        ratio = f"{row.stored_bytes / row.packed_bytes:.3f}" if row.packed_bytes else _NONE
        yield row.kind, f"{row.packed_bytes:,}", f"{row.stored_bytes:,}", ratio, ", ".join(row.packings)
    yield "header", _NONE, f"{summary.header_bytes:,}", _NONE, "JSON"


def _settings(summary: FileSummary) -> str:
    settings = settings_of(summary.meta)
    bits = f"{settings.key_bits:g} / {settings.value_bits:g} bits for keys / values"
    return f"{bits}, {100 * settings.keep_ratio:g} % kept"


def _number(value: object) -> str:
    return f"{value:,}" if type(value) is int and 0 <= value < _MOST_BYTES else _NONE


def _factor(summary: FileSummary) -> str:
    dense = summary.meta.statistics.get("dense_bytes")
    if type(dense) is not int or not 0 <= dense < _MOST_BYTES or not summary.file_bytes:
        return _NONE
    return f"{dense:,} as a plain 16-bit cache, {dense / summary.file_bytes:.1f}x the file"


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
        "0" if body is None else f"{_packed(body, shape.batch * shape.heads):,}",
        codes or _NONE,
    )


def _packed(body: BodyMeta, heads: int) -> int:
    """Return how many packed tokens each head of a layer has, on average."""
    return body.kept + body.dense if body.total is None else round(body.total / max(heads, 1))
