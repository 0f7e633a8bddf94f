"""When tokens of a layer are encoded, and how many then leave the tail: lengths alone decide."""

from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import LayerState


def is_due(state: LayerState, query_length: int) -> bool:
    """Tell whether an update of so many tokens is a step, which begins with a compression."""
    return state.seen > 0 and not state.turn.is_recording and state.turn.is_step(query_length)


def is_due_early(state: LayerState, shared: Shared) -> bool:
    """Tell whether to encode before the prefill is over: only if enough tokens are there, in every row."""
    turn = state.turn
    # What is recorded may be taken back without a trace, and in training nothing may come after this forward.
    if shared.when == "post_prefill" or not turn.is_pending or turn.record_past or state.is_detached:
        return False
    if not are_enough(state, shared):
        return False
    # What begins short gets more bits, and so does all that comes later: a first chunk waits to see whether it does.
    if state.body is None and shared.evicts and candidates(state, shared) <= shared.settings.min_kept:
        return False
    # The first compression fits the transforms of a row, which it cannot do to padding.
    if state.body is not None or state.pads is None:
        return True
    return int((~state.pads).sum(1).amin()) > shared.settings.sink_tokens


def are_enough(state: LayerState, shared: Shared) -> bool:
    """Tell whether the tail holds so many tokens that some of them are encoded."""
    settings = shared.settings
    return candidates(state, shared) >= (settings.min_tokens if state.body is None else settings.flush_length)


def candidates(state: LayerState, shared: Shared) -> int:
    """Return how many tokens of the tail are there to be encoded: those between the sinks and the residual."""
    sinks = 0 if state.sinks is not None else shared.settings.sink_tokens
    return state.tail_tokens - shared.settings.residual_length - sinks


def wants_queries(state: LayerState, shared: Shared) -> bool:
    """Tell whether tokens wait for a compression in which the policy will look at their queries."""
    return state.turn.is_pending and shared.evicts and state.policy is not None and state.policy.wants_queries


def wants_far(state: LayerState, shared: Shared) -> bool:
    """Tell whether tokens wait for a compression in which the policy will look at far attention."""
    return state.turn.is_pending and shared.evicts and state.policy is not None and state.policy.wants_far_attention
