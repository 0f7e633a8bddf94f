"""What attention sees of a layer."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec.held import CodedSide, HeldTokens
from nexusquant_cache.layer.residency import Residency
from nexusquant_cache.layer.state import LayerState, Pair
from nexusquant_cache.states.source import See, Source
from nexusquant_cache.states.tensors import ExactStates, HeldStates


def held(state: LayerState) -> HeldTokens:
    """Return all kept tokens of a layer that is on its device, as they are now."""
    if state.body is None or state.codecs is None:
        return HeldTokens(state.exact, state.seen)
    return HeldTokens(
        tail=state.exact,
        seen=state.seen,
        sinks=state.sinks,
        keys=CodedSide(state.codecs[0], state.body.keys.packed(), state.body.keys.transform),
        values=CodedSide(state.codecs[1], state.body.values.packed(), state.body.values.transform),
        positions=replace(state.body.positions),
        phase=state.phase,
        sink_positions=state.sink_positions,
        origins=state.origins,
    )


def dense(state: LayerState, residency: Residency) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]]:
    """Return all kept keys and values in the dtypes they came in, oldest first."""
    with residency.at_home():
        tokens = held(state)
        return tokens.dense_keys(), tokens.dense_values()


def states(state: LayerState, fresh: int, see: See, *, given: Pair | None, was_shown: bool) -> Pair:
    """Return what an update hands to attention.

    Args:
        state: The layer, with the new tokens, on its device.
        fresh: How many tokens are new.
        see: What is to be shown their attention.
        given: Keys and values of the update, if they are all that the layer holds: they may need gradients.
        was_shown: Whether the attention to the tokens before was shown.

    Returns:
        States without numbers where attention is known to be answered from codes, and where there is nothing that
        they could be decoded to: of evicted tokens nothing is left.
    """
    tokens = held(state)
    source = Source(tokens, fresh, see)
    if tokens.keys is not None and (was_shown or not tokens.is_whole):
        return HeldStates.of(source, "keys"), HeldStates.of(source, "values")
    if given is None:
        given = tokens.dense_keys(), tokens.dense_values()
    return ExactStates.of(given[0], source, "keys"), ExactStates.of(given[1], source, "values")
