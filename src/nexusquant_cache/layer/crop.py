"""Taking the newest tokens of a layer back.  Codes are dropped, never decoded and encoded again."""

from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.compress import stop_waiting
from nexusquant_cache.layer.state import LayerState
from nexusquant_cache.layer.tokens import own


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


def remove(state: LayerState, count: int) -> int:
    """Remove the newest ``count`` tokens.

    Where tokens have been evicted, the heads of a layer may have kept different numbers of those before.  Each then
    keeps its newest, as many as the head with the fewest has.

    Args:
        state: The layer.
        count: At most as many as it has seen.

    Returns:
        How many tokens more than these the head that loses most has lost.

    Raises:
        UnsupportedError: If the batch is padded and the removal reaches the sinks of a row.
    """
    check_crop(state, count)
    end, lost = state.seen - count, 0
    if state.turn.pending_from is not None and end <= state.turn.pending_from:
        stop_waiting(state)
    state.observed.crop(end)
    if count <= state.tail_tokens or state.body is None:
        state.cut_tail(0, state.tail_tokens - count)
    else:
        lost = _remove_packed(state, end)
    state.seen = end
    state.shown = (min(state.shown[0], end), min(state.shown[1], end))
    return lost


def _remove_packed(state: LayerState, end: int) -> int:
    assert state.body is not None
    assert state.sinks is not None
    if end <= (0 if state.sink_positions is not None else state.sink_tokens):
        # Nothing packed is left: as if nothing had ever been.
        state.cut_tail(0, 0)
        state.tail = (own(state.sinks[0][:, :, :end]), own(state.sinks[1][:, :, :end]))
        state.pads = None  # that one knows of: these sinks are the first tokens of every row
        state.forget_packed()
        return 0
    before = state.body.kept_before(end)
    least, most = int(before.min()), int(before.max())
    state.body.positions.crop(end, least)
    state.cut_packed(least, before - least if most > least else None)
    state.cut_tail(0, 0)
    return most - least
