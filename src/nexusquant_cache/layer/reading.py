"""What attention sees of a layer."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec.held import CodedSide, HeldTokens
from nexusquant_cache.layer.residency import Residency
from nexusquant_cache.layer.state import LayerState, Pair
from nexusquant_cache.states.source import Source
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


def newest(state: LayerState, side: int, count: int) -> Float[Tensor, "b h n d"]:
    """Return keys (0) or values (1) of the newest tokens of a layer on its device, all of which are held, decoded."""
    if count <= state.tail_tokens:
        return state.exact[side][:, :, state.tail_tokens - count :]
    tokens = held(state)
    whole = tokens.dense_values() if side else tokens.dense_keys()
    return whole[:, :, whole.shape[2] - count :]


def states(source: Source, *, given: Pair | None, was_shown: bool) -> Pair:
    """Return what an update hands to attention.

    Args:
        source: What keys and values have in common; all of it is on the layer's device.
        given: Keys and values of the update, if they are all that the layer holds: they may need gradients.
        was_shown: Whether the attention to the tokens before was shown.

    Returns:
        States without numbers where attention is known to be answered from codes, and where there is nothing that
        they could be decoded to: of evicted tokens nothing is left.
    """
    tokens = source.held
    if tokens.keys is not None and (was_shown or not tokens.is_whole):
        return HeldStates.of(source, "keys"), HeldStates.of(source, "values")
    if given is None:
        given = tokens.dense_keys(by_tables=True), tokens.dense_values()
    return ExactStates.of(given[0], source, "keys"), ExactStates.of(given[1], source, "values")
