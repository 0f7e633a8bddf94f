"""How the layers of a cache share what they keep of a prompt."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from nexusquant_cache.layer.compress import choice, choose_alone, stop_waiting
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.selection import Scope, Scores, shared_counts


@contextmanager
def _all_or_none(layers: Sequence[NexusQuantLayer]) -> Iterator[None]:
    """Let an error, or an interrupt, leave all layers as they are now."""
    saved = [(layer.state, layer.state.snapshot()) for layer in layers]
    try:
        yield
    except BaseException:
        for state, before in saved:
            state.restore(before)
        raise


def compress_together(layers: Sequence[NexusQuantLayer]) -> None:
    """Compress layers that wait, all now: what they keep together is shared out where their scores can be compared.

    An error, or an interrupt, leaves all of them as they are now: those that still wait would choose otherwise alone.
    """
    with _all_or_none(layers):
        for layer in layers:
            layer.encode()
        _choose(layers)
        for layer in layers:
            stop_waiting(layer.state)


def crop_together(layers: Sequence[NexusQuantLayer], count: int) -> None:
    """Remove the newest ``count`` tokens of layers; those that have waited for it are then compressed together.

    An error, or an interrupt, leaves all of them as they are now.
    """
    layers = [layer for layer in layers if layer.is_initialized]
    with _all_or_none(layers):
        for layer in layers:
            layer.take_off(count)
        prompts = [layer for layer in layers if layer.state.turn.record_past and layer.state.turn.expects_prompt]
        compress_together([layer for layer in prompts if layer.state.seen])
        for layer in layers:
            layer.settle()


def _choose(layers: Sequence[NexusQuantLayer]) -> None:
    """Drop the tokens of a prompt that layers do not keep."""
    scopes: list[tuple[NexusQuantLayer, Scope]] = []
    found: list[Scores] = []
    for layer in layers:
        policy = layer.state.policy
        with layer.residency.at_home(), torch.autocast(layer.state.home.type, enabled=False):
            if policy is None or not policy.scores_are_comparable:
                choose_alone(layer.state, layer.shared)
                continue
            scope = choice(layer.state, layer.shared)
            if scope is not None:
                scopes.append((layer, scope))
                found.append(scope.scores())
    if not found:
        return
    for (layer, scope), scores, counts in zip(scopes, found, shared_counts(found), strict=True):
        with layer.residency.at_home():
            scope.keep(scores.best(counts))
