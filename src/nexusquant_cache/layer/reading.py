"""What attention sees of a layer."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec.held import CodedSide, HeldTokens
from nexusquant_cache.layer.residency import Residency
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import LayerState
from nexusquant_cache.states import HeldStates


def held(state: LayerState, shared: Shared, residency: Residency) -> HeldTokens:
    """Return all kept tokens as they are now, oldest first, on the device of the layer."""
    residency.fetch()
    if state.body is None or state.codecs is None:
        return HeldTokens(state.exact)
    before = None if state.sink_place is None else tuple(state.sink_place[:, 1].tolist())
    return HeldTokens(
        tail=state.exact,
        sinks=state.sinks,
        keys=CodedSide(state.codecs[0], state.body.keys.packed(), state.body.keys.transform),
        values=CodedSide(state.codecs[1], state.body.values.packed(), state.body.values.transform),
        positions=replace(state.body.positions),
        phase=state.phase,
        pads=shared.padding.pads,
        before_sinks=before if before is not None and any(before) else None,
    )


def dense(
    state: LayerState, shared: Shared, residency: Residency
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]]:
    """Return all kept keys and values in the dtypes they came in, oldest first."""
    with residency.at_home():
        tokens = held(state, shared, residency)
        return tokens.dense_keys(), tokens.dense_values()


def visible(state: LayerState, shared: Shared, residency: Residency) -> tuple[Tensor, Tensor]:
    """Return what attention shall see: decoded, unless it has shown that it can read codes."""
    if state.body is None or not state.codes_are_read:
        return dense(state, shared, residency)
    tokens = held(state, shared, residency)
    return HeldStates(tokens, "keys"), HeldStates(tokens, "values")
