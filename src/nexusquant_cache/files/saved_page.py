"""A saved cache as one HTML page that needs no other file."""

import os
from collections.abc import Iterator
from html import escape
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.errors import FormatError, OptionError, UnsupportedError
from nexusquant_cache.files.commands import FileSummary, summary_of
from nexusquant_cache.files.fingerprint import Besides, TokenIds, hash_prompt
from nexusquant_cache.files.ids import TOKEN_IDS, unpacked_ids
from nexusquant_cache.files.kept import KeptTokens, kept_tokens, rows_of
from nexusquant_cache.files.prompt import Tokenizer, legend, strip_html, text_html
from nexusquant_cache.files.reader import Promise, read_positions
from nexusquant_cache.files.rows import LAYER_COLUMNS, PART_COLUMNS, TEXT_COLUMNS, fact_rows, layer_rows, part_rows
from nexusquant_cache.files.schema import CacheMeta, LayerMeta
from nexusquant_cache.layer.kinds import kind_of
from nexusquant_cache.pages.elements import details, figure, page, printable, table, why_no_pictures

_CAPTION = (
    "Above, the bytes of each layer by kind, as the cache holds them in memory, without room to grow. Below, the "
    "tokens that each of its heads keeps."
)

_HOW_TO_READ = (
    "Point at a place to see positions, and the share of heads that keep them. Small numbers count tokens from 0."
)


def write_page(  # noqa: PLR0913 - all but two have defaults
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    token_ids: TokenIds | None = None,
    besides: Besides | None = None,
    row: int = 0,
) -> Path:
    """Write a page about a saved cache: what it is, its bytes by layer and kind, and what it keeps of the prompt.

    The page needs no other file, no network and no script.  With a tokenizer it shows the prompt, coloured by the share
    of all heads in all layers that have kept each token, otherwise a dot for each position.  No model is loaded, and of
    the file only the header and the kept positions are read; `verify_file` reads and checks all.

    Args:
        path: The saved cache.
        output: The page; an older file is replaced.
        tokenizer: The tokenizer of the model.
        token_ids: The tokens that the cache has seen, if the file does not hold them (``save(...,
            keep_token_ids=True)``).
        besides: What the prompt is made of besides ``token_ids``, as given to `NexusQuantCache.save`.
        row: Of a batch, the row whose prompt is shown, from 0.

    Returns:
        The page.

    Raises:
        UnsupportedError: If matplotlib is missing.
        FormatError: If the file is no saved cache, is damaged, or is of other tokens than these.
        OptionError: If there is no such row, the prompt's token ids are needed and nowhere, or the tokenizer does not
            know them.
        OSError: If a file cannot be read or written.
    """
    missing = why_no_pictures("the page of a saved cache")
    if missing:
        raise UnsupportedError(missing)
    source, target = Path(path), Path(output)
    promise, tensors = read_positions(source)
    if target.exists() and target.samefile(source):
        msg = f"{target} is the saved cache itself: give the page another name"
        raise OptionError(msg)
    kept = kept_tokens(promise.meta, tensors, row)
    ids = None
    if tokenizer is not None:
        ids = _token_ids(promise.meta, token_ids, besides)[row]
    elif token_ids is not None:
        msg = "token_ids are shown as a text, for which a tokenizer is needed: give tokenizer= that of the model"
        raise OptionError(msg)
    prompt = strip_html(kept) if tokenizer is None or ids is None else text_html(ids.tolist(), tokenizer, kept)
    parts = _parts(source, promise, kept, row, prompt)
    target.write_text(page(printable(source.name), parts), encoding="utf-8")
    return target


def _token_ids(meta: CacheMeta, given: TokenIds | None, besides: Besides | None) -> Int[Tensor, "rows tokens"]:
    rows, tokens = rows_of(meta), meta.tokens_seen
    if given is None:
        if TOKEN_IDS in meta.user:
            return unpacked_ids(meta.user[TOKEN_IDS], tokens, rows=rows)
        msg = (
            "the file does not hold the token ids of its prompt, so no tokenizer can say what they mean: save it with "
            "token_ids= and keep_token_ids=True, or call nexusquant_cache.files.write_page with token_ids="
        )
        raise OptionError(msg)
    found = hash_prompt(given, besides)
    ids = torch.as_tensor(given).to("cpu")
    ids = ids[None] if ids.ndim == 1 else ids
    if tuple(ids.shape) != (rows, tokens) or meta.tokens_hash not in {None, found}:
        msg = (
            f"the file is of another prompt than these token_ids of shape {list(ids.shape)}: give those of all "
            f"{tokens:,} tokens that the cache has seen, in {rows} row{'s' * (rows > 1)}, and besides= as for save"
        )
        raise FormatError(msg)
    return ids


def _parts(path: Path, promise: Promise, kept: KeptTokens, row: int, prompt: str) -> Iterator[str]:
    summary, rows = summary_of(promise), rows_of(promise.meta)
    facts = ((f"<strong>{_cell(name)}</strong>", _cell(text)) for name, text in fact_rows(path, summary))
    layers, shared = _bytes(promise)
    of_row = f" of row {row} of {rows}" if rows > 1 else ""
    yield f"<h1>{_cell(path.name)}</h1>"
    yield f'<p class="lead">A saved cache{_cell(_lead(summary))}.</p>'
    yield table(("", ""), facts, words=True)
    yield f"<h2>What is held</h2>\n{_picture(layers, shared, kept, of_row)}"
    yield details("The same in numbers", _numbers(layers, shared, kept))
    yield f"<h2>What was kept of the prompt{of_row}</h2>\n{legend()}"
    yield f'<p class="soft">{_HOW_TO_READ}</p>\n{prompt}'
    yield f"<h2>Layers</h2>\n{_table(LAYER_COLUMNS, layer_rows(summary))}"
    yield f"<h2>Parts of the file</h2>\n{_table(PART_COLUMNS, part_rows(summary))}"


def _lead(summary: FileSummary) -> str:
    meta = summary.meta
    return f", preset {meta.preset}: {meta.tokens_seen:,} tokens in {summary.file_bytes:,} bytes"


def _bytes(promise: Promise) -> tuple[list[dict[str, int]], int]:
    """Return the bytes of each layer by kind, as they are in memory, and those that belong to no layer."""
    layers: list[dict[str, int]] = [{} for _ in promise.meta.layers]
    shared = 0
    for spec, _, _ in promise.tensors:
        room, _, rest = spec.name.partition(".")
        if room != "layers":
            shared += spec.nbytes
            continue
        index = int(rest.partition(".")[0])
        is_ours = isinstance(promise.meta.layers[index], LayerMeta)
        kind = kind_of(spec.name, spec.kind) if is_ours else "not compressed"
        layers[index][kind] = layers[index].get(kind, 0) + spec.nbytes
    return layers, shared


def _picture(layers: list[dict[str, int]], shared: int, kept: KeptTokens, of_row: str) -> str:
    from nexusquant_cache.pages.held import held_figure  # noqa: PLC0415 - matplotlib is optional
    from nexusquant_cache.pages.pictures import svg_of  # noqa: PLC0415 - as above

    drawn = held_figure(
        layers,
        [list(map(float, heads)) for heads in kept.by_head],
        shared,
        f"Bytes by layer and kind, and kept tokens{of_row} by head",
    )
    return figure(svg_of(drawn, "held"), _CAPTION)


def _numbers(layers: list[dict[str, int]], shared: int, kept: KeptTokens) -> str:
    """Return a table with a line per layer."""
    kinds = list(dict.fromkeys(kind for layer in layers for kind in layer))
    heads = range(max(map(len, kept.by_head), default=0))
    lines = [
        [
            str(index),
            *(f"{layer.get(kind, 0):,}" for kind in kinds),
            f"{sum(layer.values()):,}",
            *(f"{tokens[head]:,}" if head < len(tokens) else "" for head in heads),
        ]
        for index, (layer, tokens) in enumerate(zip(layers, kept.by_head, strict=True))
    ]
    sums, empty = [sum(layer.get(kind, 0) for layer in layers) for kind in kinds], [""] * len(heads)
    if shared:
        lines.append(["shared", *("" for _ in kinds), f"{shared:,}", *empty])
    lines.append(["all", *(f"{size:,}" for size in sums), f"{sum(sums) + shared:,}", *empty])
    return table(("layer", *kinds, "bytes", *(f"kept by head {head}" for head in heads)), lines)


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    return table(head, ([_cell(text) for text in row] for row in rows), texts=TEXT_COLUMNS)


def _cell(text: str) -> str:
    return escape(printable(text))
