"""Attention by compiled functions: what `codec.torch.attend` computes, from the words to the output in one call."""

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from torch import Tensor

from nexusquant_cache.codec.base import RaggedVectors
from nexusquant_cache.codec.cpu import kernels_read, support
from nexusquant_cache.codec.cpu.support import Side, ragged_rows_of, rows_of, side_of
from nexusquant_cache.codec.cpu.workers import share, workers_for
from nexusquant_cache.codec.held import CodedSide, HeldTokens
from nexusquant_cache.codec.softmax import Softmax

Array = NDArray[Any]


def attend(
    queries: Float[Tensor, "b q m d"],
    held: HeldTokens,
    mask: Shaped[Tensor, "#b #q #m seen"] | None,
    softmax: Softmax,
) -> tuple[Float[Tensor, "b q m dv"], None]:
    """Return the attention output in float32, and no weights.

    Args:
        queries: Queries of the newest tokens.
        held: What they attend to.
        mask: True for what may be seen, or numbers to add to the logits, of all tokens seen; None if all may be seen.
        softmax: What varies between models.
    """
    assert held.keys is not None
    assert held.values is not None
    batch, query_heads, count, _ = queries.shape
    value_dim = held.tail[1].shape[3]
    out = torch.empty(batch, query_heads, count, value_dim, dtype=torch.float32, device="cpu")
    given = (
        _floats(queries),
        np.float32(softmax.scaling),
        np.float32(softmax.softcap or 0),
        _NO_FLOATS if softmax.sink_logits is None else _floats(softmax.sink_logits),
        *_segments(held.keys, held.values),
        *_side(held.keys),
        *_side(held.values),
        *_phase(held),
        *_positions(held),
        *_mask(mask, queries.shape),
        *_exact(held),
    )
    workers = workers_for(batch * held.tail[0].shape[1] * held.packed_tokens // kernels_read.CHUNK)
    parts, found = np.empty((workers, batch * query_heads * count, value_dim + 2), np.float32), out.numpy()
    if workers == 1:
        kernels_read.attend(*given, 0, 1, parts, kernels_read.BOTH, found)
    else:
        share(
            lambda worker, workers: kernels_read.attend(*given, worker, workers, parts, kernels_read.SHARE, found),
            workers,
        )
        kernels_read.attend(*given, 0, workers, parts, kernels_read.FINISH, found)
    return out, None


def specialisation(queries: Float[Tensor, "b q m d"], held: HeldTokens) -> Hashable:
    """Return what decides which ways through the compiled function are taken."""
    assert held.keys is not None
    assert held.values is not None
    sides = (support.specialisation(side.codec.layouts, side.transform) for side in (held.keys, held.values))
    phase = held.phase is not None and (held.phase.rotary_dim, held.phase.interleaved)
    return (*sides, queries.shape[2] > 1, phase)


_NO_FLOATS = np.empty(0, np.float32)
_NO_BYTES = np.empty(0, np.uint8)
_NO_NUMBERS = np.empty(0, np.int64)


def _segments(keys: CodedSide, values: CodedSide) -> tuple[Array, ...]:
    """Return the packed tokens: what the prompt has left of each head, and what came behind; or all in one run."""
    packed = keys.packed, values.packed
    if isinstance(packed[0], RaggedVectors) and isinstance(packed[1], RaggedVectors):
        fronts = ragged_rows_of(packed[0]), ragged_rows_of(packed[1])
        behind = rows_of(packed[0].rest), rows_of(packed[1].rest)
        return tuple(array for rows in (*fronts, *behind) for array in rows)
    key_rows, value_rows = rows_of(keys.packed.rectangle()), rows_of(values.packed.rectangle())
    nothing = (_NO_BYTES, _NO_BYTES, np.zeros_like(key_rows.where))
    return *key_rows, *value_rows, *nothing, *nothing


def _side(side: CodedSide) -> Side:
    return side_of(side.transform, side.codec.layouts)


def _phase(held: HeldTokens) -> tuple[Array, bool]:
    """Return the frequencies of pairs of channels, and whether pairs are neighbours."""
    return (_NO_FLOATS, False) if held.phase is None else (_floats(held.phase.inv_freq), held.phase.interleaved)


def _positions(held: HeldTokens) -> tuple[int, int, Array, Array]:
    """Return where packed tokens stand: first one, how many are covered, which of these are kept, and origins."""
    assert held.positions is not None
    places, (batch, heads) = held.positions, held.tail[0].shape[:2]
    none = _no_bitmap(batch, heads)
    origins = _NO_NUMBERS if held.origins is None else held.origins.to(torch.int64).numpy()
    if places.bitmap is None:  # all follow one another
        return places.start, 0, none, origins
    return places.start, places.covered, places.bitmap.numpy(), origins


@lru_cache(maxsize=8)
def _no_bitmap(batch: int, heads: int) -> Array:
    return np.empty((batch, heads, 0), np.uint8)


def _mask(mask: Tensor | None, shape: torch.Size) -> tuple[int, Array, Array]:
    """Return what kind of mask this is, what it shows, and what it adds, for each query head and query."""
    shown, added = _no_mask(shape[:3])
    if mask is None:
        return 0, shown, added
    full = mask.detach().expand(*shape[:3], -1)
    if mask.dtype == torch.bool:
        return 1, full.view(torch.uint8).numpy(), added
    return 2, shown, full.float().numpy()


@lru_cache(maxsize=8)
def _no_mask(shape: tuple[int, ...]) -> tuple[Array, Array]:
    return np.broadcast_to(_NO_BYTES, (*shape, 0)), np.broadcast_to(_NO_FLOATS, (*shape, 0))


def _exact(held: HeldTokens) -> tuple[Array | int, ...]:
    """Return sinks and tail, where the sinks stand, and how many tokens have been seen."""
    assert held.sinks is not None
    batch, sinks = held.tail[0].shape[0], held.sinks[0].shape[2]
    positions = _first(batch, sinks) if held.sink_positions is None else held.sink_positions.numpy()
    return *(_floats(x) for x in (*held.sinks, *held.tail)), positions, held.seen


@lru_cache(maxsize=8)
def _first(batch: int, sinks: int) -> Array:
    return np.tile(np.arange(sinks), (batch, 1))


def _floats(x: Tensor) -> Array:
    x = x.detach()
    return (x if x.dtype == torch.float32 else x.float()).contiguous().numpy()
