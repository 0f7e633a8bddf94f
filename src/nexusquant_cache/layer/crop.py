"""Taking the newest tokens of a layer back.  Codes are dropped, never decoded and encoded again."""

from nexusquant_cache.errors import ShapeError, UnsupportedError
from nexusquant_cache.layer.compress import stop_waiting
from nexusquant_cache.layer.state import LayerState
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
    state.observed.crop(end, max(end - (state.seen - state.tail_tokens), 0))
    if count <= state.tail_tokens or state.body is None:
        state.cut_tail(0, state.tail_tokens - count)
    else:
        _remove_packed(state, end)
    state.seen = end
    state.shown = (min(state.shown[0], end), min(state.shown[1], end))


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
