"""Which tokens a file's cache has kept, layer by layer and head by head; no model is needed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.errors import OptionError
from nexusquant_cache.files.contents import HIDDEN
from nexusquant_cache.files.schema import CacheMeta, LayerMeta, StockMeta
from nexusquant_cache.files.version_1 import sink_positions


@dataclass(frozen=True)
class KeptTokens:
    """What one row of a batch has kept.

    Attributes:
        by_head: Kept tokens of each head of each layer; no heads for layers that hold no keys.
        counts: For each token seen, how many heads of how many layers have kept it.
        heads: How many heads there are in these layers: those that are compressed, or all if none is.
    """

    by_head: tuple[tuple[int, ...], ...]
    counts: Int[Tensor, " seen"]
    heads: int


def rows_of(meta: CacheMeta) -> int:
    """Return how many rows the batch of a cache has; 1 before its first update."""
    for layer in meta.layers:
        if isinstance(layer, LayerMeta) and layer.shape is not None:
            return layer.shape.batch
        keys = _stock_keys(layer) if isinstance(layer, StockMeta) else None
        if keys is not None:
            return keys[0]
    return 1


def kept_tokens(meta: CacheMeta, tensors: Mapping[str, Tensor], row: int) -> KeptTokens:
    """Return what a row of the batch has kept.

    Args:
        meta: What the file says.
        tensors: Those of its tensors that tell which tokens are kept, checked (`reader.read_positions`).
        row: The row, from 0.

    Raises:
        OptionError: If there is no such row.
    """
    rows = rows_of(meta)
    if not 0 <= row < rows:
        msg = f"the cache in the file has {rows} row{'s' * (rows > 1)}: row must be from 0 to {rows - 1}, got {row}"
        raise OptionError(msg)
    is_compressed = any(isinstance(layer, LayerMeta) and layer.shape is not None for layer in meta.layers)
    by_head: list[tuple[int, ...]] = []
    counts, heads = torch.zeros(meta.tokens_seen, dtype=torch.int64), 0
    for index, layer in enumerate(meta.layers):
        if isinstance(layer, LayerMeta):
            kept = None if layer.shape is None else _kept(layer, f"layers.{index}", tensors, row)
        else:
            kept = _kept_of_stock(layer, meta.tokens_seen)
        by_head.append(() if kept is None else tuple(kept.sum(1).tolist()))
        if kept is not None and isinstance(layer, LayerMeta) == is_compressed:
            counts += kept.sum(0)
            heads += len(kept)
    return KeptTokens(tuple(by_head), counts, heads)


def _kept(layer: LayerMeta, name: str, tensors: Mapping[str, Tensor], row: int) -> Bool[Tensor, "heads seen"]:
    """Return which tokens each head of a compressed layer keeps."""
    assert layer.shape is not None
    kept = torch.zeros(layer.shape.heads, layer.seen, dtype=torch.bool)
    kept[:, layer.seen - layer.tail :] = True
    body = layer.body
    if body is None:
        return kept
    positions = PositionMap(body.start, body.covered, body.kept, body.dense)
    packed = kept[:, body.start : positions.end]
    if body.bitmap:
        bits = positions.bits_of(tensors[f"{name}.kept"][row : row + 1])[0]
        hidden = tensors.get(f"{name}.{HIDDEN}")
        if hidden is not None:
            bits &= ~positions.bits_of(hidden[row : row + 1])[0]
        packed[:, : body.covered] = bits
    packed[:, body.covered :] = True
    kept[:, _sinks(layer, name, tensors, row)] = True
    return kept


def _sinks(layer: LayerMeta, name: str, tensors: Mapping[str, Tensor], row: int) -> Int[Tensor, " sinks"]:
    """Return the positions of the exact first tokens."""
    sinks = layer.sinks or 0
    if f"{name}.sink_positions" in tensors:
        return tensors[f"{name}.sink_positions"][row]
    if layer.sink_place:
        return sink_positions(tensors[f"{name}.sink_place"], sinks)[row]
    return torch.arange(sinks)


def _kept_of_stock(layer: StockMeta, seen: int) -> Bool[Tensor, "heads seen"] | None:
    """Return which tokens a layer of transformers' own holds: the newest ones; None if it holds no keys."""
    keys = _stock_keys(layer)
    if keys is None:
        return None
    _, heads, tokens = keys
    kept = torch.zeros(heads, seen, dtype=torch.bool)
    kept[:, max(seen - tokens, 0) :] = tokens > 0
    return kept


def _stock_keys(layer: StockMeta) -> tuple[int, int, int] | None:
    """Return rows, heads and tokens of the keys of a layer of transformers' own, if it holds any."""
    for tensor in layer.tensors:
        if tensor.name == "keys" and len(tensor.shape) == 4:  # noqa: PLR2004 - batch, heads, tokens, channels
            batch, heads, tokens, _ = tensor.shape
            return batch, heads, tokens
    return None
