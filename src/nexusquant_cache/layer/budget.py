"""How the layers of a cache share what they keep of a prompt."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from nexusquant_cache.layer.compress import evicts_now
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.selection import Scope, Scores, Selection, shared_counts


def compress_together(layers: Sequence[NexusQuantLayer]) -> None:
    """Compress layers that wait, all now: what they keep together is shared out where their scores can be compared.

    An error, or an interrupt, leaves all of them as they are now: those that still wait would choose otherwise alone.
    """
    selections, saved = _selections(layers), [(layer.state, layer.state.snapshot()) for layer in layers]
    try:
        for layer in layers:
            layer.compress(selections.pop(layer.layer_idx, None))
    except BaseException:
        for state, before in saved:
            state.restore(before)
        raise


def crop_together(layers: Sequence[NexusQuantLayer], count: int) -> None:
    """Remove the newest ``count`` tokens of layers; those that have waited for it are then compressed together."""
    layers = [layer for layer in layers if layer.is_initialized]
    for layer in layers:
        layer.take_off(count)
    turns = [(layer, layer.state.turn) for layer in layers]
    selections = _selections([layer for layer, turn in turns if turn.record_past and turn.expects_prompt])
    for layer in layers:
        layer.settle(selections.pop(layer.layer_idx, None))


def _selections(layers: Sequence[NexusQuantLayer]) -> dict[int, Selection]:
    """Return what each layer keeps, by index; layers that choose for themselves are not among them."""
    sharing = [layer for layer in layers if evicts_now(layer.state, layer.shared) and _is_comparable(layer)]
    if len(sharing) <= 1:
        return {}
    scopes: list[Scope] = []
    found: list[Scores] = []
    for layer in sharing:
        state = layer.state
        with layer.residency.at_home(codes=False), torch.autocast(state.home.type, enabled=False):
            scope = Scope.of(state, layer.shared)
            if scope.can_shrink:
                scopes.append(scope)
                found.append(scope.scores())
    if not found:
        return {}
    return {
        scope.state.layer_idx: replace(Selection.of(scores.scores, counts), scope=scope)
        for scope, scores, counts in zip(scopes, found, shared_counts(found), strict=True)
    }


def _is_comparable(layer: NexusQuantLayer) -> bool:
    policy = layer.state.policy
    return policy is not None and policy.scores_are_comparable
