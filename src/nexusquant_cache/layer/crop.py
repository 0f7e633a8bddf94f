"""Taking the newest tokens of a layer back.  Codes are dropped, never decoded and encoded again."""

from dataclasses import replace
from typing import Any

from nexusquant_cache.errors import ShapeError, UnsupportedError
from nexusquant_cache.layer.compress import stop_waiting
from nexusquant_cache.layer.observations import Observations
from nexusquant_cache.layer.state import LayerState, Turn
from nexusquant_cache.layer.tokens import own


def check_sign(tokens_to_remove: int) -> None:
    """Raise ShapeError if the number is positive: an absolute length, which transformers gave up."""
    if tokens_to_remove > 0:
        msg = f"crop takes 0 or a negative number of tokens to remove, got {tokens_to_remove}"
        raise ShapeError(msg)


def check_crop(state: LayerState, count: int) -> None:
    """Raise UnsupportedError if the newest ``count`` tokens cannot be removed."""
    end = state.seen - count
    if state.sink_positions is None or end <= 0:
        return
    last = int(state.sink_positions[:, -1].max()) + 1
    if end < last:
        msg = (
            f"cannot remove the newest {count} of {state.seen} tokens: in a padded batch only tokens behind "
            f"position {last}, where the last row's first tokens end, can go. Start again after cache.reset()."
        )
        raise UnsupportedError(msg)


def remove(state: LayerState, count: int) -> None:
    """Remove the newest ``count`` tokens, at most as many as it has seen.

    Raises:
        UnsupportedError: If the batch is padded and the removal reaches the sinks of a row.
    """
    check_crop(state, count)
    end = state.seen - count
    if state.turn.pending_from is not None and end <= state.turn.pending_from:
        stop_waiting(state)
    start, left = state.turn.pending_from, max(state.waiting_tokens - count, 0)
    state.observed.crop(end, 0 if start is None else end - start)
    state.pads = None if state.pads is None else own(state.pads[:, :left])
    if count <= state.tail_tokens or state.body is None:
        state.cut_tail(0, state.tail_tokens - count)
    else:
        _remove_packed(state, end)
    state.seen = end
    state.forget_shown_from(end)


def take_back_update(state: LayerState, count: int) -> None:
    """Undo the last update, which has brought so many tokens, all of them still exact."""
    remove(state, count)
    state.turn.take_back_update()
    state.shown = state.shown_before


def before_update(state: LayerState, count: int) -> dict[str, Any]:
    """Return what `bring_back` needs to undo the last update when its tokens are encoded.

    The codes of earlier tokens are not held twice: those to come are behind them, and can be cut off.
    """
    before = LayerState(**vars(state))
    before.turn, before.observed = Turn(**vars(state.turn)), Observations(**vars(state.observed))
    take_back_update(before, count)
    positions = None if state.body is None else replace(state.body.positions)
    before.body = None
    return before.snapshot() | {"positions": positions}


def bring_back(state: LayerState, saved: dict[str, Any]) -> None:
    """Hold and count what `before_update` has saved."""
    positions, body = saved["positions"], state.body
    if positions is None:
        body = None
    elif body is not None:
        for buffer in state.buffers:
            buffer.crop(positions.tokens)
        body.positions = positions
    state.restore({name: value for name, value in saved.items() if name != "positions"} | {"body": body})


def _remove_packed(state: LayerState, end: int) -> None:
    assert state.body is not None
    assert state.sinks is not None
    if end <= (0 if state.sink_positions is not None else state.sink_tokens):
        # Nothing packed is left: as if nothing had ever been.
        state.cut_tail(0, 0)
        state.tail = (own(state.sinks[0][:, :, :end]), own(state.sinks[1][:, :, :end]))
        state.pads = None  # that one knows of: these sinks are the first tokens of every row
        state.forget_packed()
        return
    stay = state.body.positions.crop(end)
    if isinstance(stay, int):
        for buffer in state.buffers:
            buffer.crop(stay)
    else:
        state.body.choose(stay)
    state.cut_tail(0, 0)
