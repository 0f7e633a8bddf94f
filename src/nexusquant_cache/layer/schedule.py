"""When a layer is compressed, and how many of its tokens then leave the tail: lengths alone decide."""

from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import LayerState


def is_due(state: LayerState, shared: Shared, query_length: int) -> bool:
    """Tell whether an update of so many tokens begins by making room in the tail."""
    if state.seen == 0 or state.turn.is_recording:
        return False
    return state.turn.is_step(query_length) or is_due_early(state, shared)


def is_due_early(state: LayerState, shared: Shared) -> bool:
    """Tell whether to compress before the prefill is over: only if enough tokens wait, in every row."""
    if shared.when == "post_prefill" or not state.turn.is_pending:
        return False
    count, settings = candidates(state, shared), shared.settings
    # What begins short gets more bits, and so does all that comes later: a first chunk waits to see whether it does.
    is_short = state.body is None and shared.evicts and count <= settings.min_kept
    if count < settings.min_tokens or is_short:
        return False
    # The first compression fits the transforms of a row, which it cannot do to padding.
    if state.body is not None or state.pads is None:
        return True
    return int((~state.pads).sum(1).amin()) > shared.settings.sink_tokens


def candidates(state: LayerState, shared: Shared) -> int:
    """Return how many tokens of the tail a compression would take: those between the sinks and the residual."""
    sinks = 0 if state.sinks is not None else shared.settings.sink_tokens
    return state.tail_tokens - shared.settings.residual_length - sinks


def wants_queries(state: LayerState, shared: Shared) -> bool:
    """Tell whether tokens wait for a compression in which the policy will look at their queries."""
    return state.turn.is_pending and shared.evicts and state.policy is not None and state.policy.wants_queries


def wants_far(state: LayerState, shared: Shared) -> bool:
    """Tell whether tokens wait for a compression in which the policy will look at far attention."""
    return state.turn.is_pending and shared.evicts and state.policy is not None and state.policy.wants_far_attention
