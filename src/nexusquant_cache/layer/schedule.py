"""When a layer is compressed, and how many of its tokens then stay: lengths alone decide."""

from math import ceil

from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import LayerState


def is_due(state: LayerState, shared: Shared, query_length: int) -> bool:
    """Tell whether an update of so many tokens begins by making room in the tail."""
    if state.seen == 0 or state.turn.is_recording:
        return False
    return query_length == 1 or is_due_early(state, shared)


def is_due_early(state: LayerState, shared: Shared) -> bool:
    """Tell whether to compress before the prefill is over: only if enough tokens wait, and all pads would go."""
    padding = shared.padding
    if shared.when == "post_prefill" or not state.turn.is_pending or not padding.is_settled(state.seen):
        return False
    waiting = candidates(state, shared)
    if waiting < shared.settings.min_tokens:
        return False
    evicts = shared.evicts and padding.may_evict(state.seen)
    return state.body is not None or not evicts or waiting - kept_of(waiting, state, shared) >= padding.most


def candidates(state: LayerState, shared: Shared) -> int:
    """Return how many tokens of the tail a compression would take: those between the sinks and the residual."""
    sinks = 0 if state.sinks is not None else shared.settings.sink_tokens
    return state.tail_tokens - shared.settings.residual_length - sinks


def kept_of(count: int, state: LayerState, shared: Shared) -> int:
    """Return how many of so many candidates a compression keeps."""
    padding = shared.padding
    # transformers' mask takes as many of a row's first slots for pads as there are pads not evicted yet.  Later
    # evictions would have to take packed pads, one by one in each row; such a batch is rather kept whole.
    keeps_pads = state.body is not None and state.seen - state.kept < padding.most
    if keeps_pads or not padding.may_evict(state.seen):
        return count
    return ceil(shared.settings.keep_ratio * count)


def planned_eviction(state: LayerState, shared: Shared, query_length: int) -> int:
    """Return how many tokens the next update, of so many tokens, will evict."""
    count = candidates(state, shared)
    if not state.turn.is_pending or not is_due(state, shared, query_length) or count < shared.settings.min_tokens:
        return 0
    return count - kept_of(count, state, shared)


def wants_queries(state: LayerState, shared: Shared) -> bool:
    """Tell whether tokens wait for a compression in which the policy will look at their queries."""
    return state.turn.is_pending and shared.evicts and state.policy is not None and state.policy.wants_queries
