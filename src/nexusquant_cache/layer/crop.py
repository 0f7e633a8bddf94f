"""Taking the newest tokens of a layer back.  Codes are dropped, never decoded and encoded again."""

import torch
from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.compress import stop_waiting
from nexusquant_cache.layer.state import LayerState
from nexusquant_cache.layer.tokens import own


def check_crop(state: LayerState, count: int) -> None:
    """Raise UnsupportedError if the newest ``count`` tokens cannot be removed."""
    end = state.seen - count
    if not _is_padded(state) or state.sink_place is None or end <= 0:
        return
    last = int(state.sink_place[:, 0].max()) + state.sink_tokens
    if end < last:
        msg = (
            f"cannot remove the newest {count} of {state.seen} tokens: in a padded batch only tokens behind "
            f"position {last}, where the last row's first tokens end, can go. Start again after cache.reset()."
        )
        raise UnsupportedError(msg)


def kept_before(state: LayerState, count: int) -> Int[Tensor, "b h"] | None:
    """Return how many packed tokens each head has without the newest ``count``; None if all of these are exact."""
    if state.body is None or count <= state.tail_tokens:
        return None
    return state.body.kept_before(state.seen - count)


def remove(state: LayerState, count: int, packed_tokens: int | None = None) -> None:
    """Remove the newest ``count`` tokens.

    Args:
        state: The layer.
        count: At most as many as it has seen.
        packed_tokens: Packed tokens that every head shall have left if the removal reaches them: the number that all
            heads of all layers still have (see `kept_before`).  The oldest surplus ones are dropped.

    Raises:
        UnsupportedError: If the batch is padded and the removal reaches the sinks of a row.
    """
    check_crop(state, count)
    end = state.seen - count
    if state.turn.pending_from is not None and end <= state.turn.pending_from:
        stop_waiting(state)
    state.observed.crop(end)
    if count <= state.tail_tokens or state.body is None:
        state.cut_tail(0, state.tail_tokens - count)
    else:
        _remove_packed(state, end, packed_tokens)
    state.seen = end


def _remove_packed(state: LayerState, end: int, packed_tokens: int | None) -> None:
    assert state.body is not None
    assert state.sinks is not None
    if end <= (0 if _is_padded(state) else state.sink_tokens):
        # Nothing packed is left: as if nothing had ever been.
        state.tail = (own(state.sinks[0][:, :, :end]), own(state.sinks[1][:, :, :end]))
        state.forget_packed()
        return
    before = state.body.kept_before(end)
    least = int(before.min()) if packed_tokens is None else packed_tokens
    if state.sink_place is not None:
        # Rows that keep pads keep the same tokens in all heads.
        lost = (before[:, 0].cpu() - least).clamp_min(0)
        place = state.sink_place
        state.sink_place = torch.stack([place[:, 0], (place[:, 1] - lost).clamp_min(0)], 1)
    dropped = before - least
    state.body.positions.crop(end, least)
    state.cut_packed(least, dropped if int(dropped.max()) else None)
    state.cut_tail(0, 0)


def _is_padded(state: LayerState) -> bool:
    """Tell whether the sinks of any row do not stand at its beginning."""
    return state.sink_place is not None and bool(state.sink_place[:, 0].any())
