"""What a layer refuses."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nexusquant_cache.errors import DtypeError, NonFiniteError, OptionError, ShapeError, no_gradients
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import LayerState

AXES = 4  # batch, kv_heads, tokens, head_dim


def check_kind(layer_idx: int, key_states: Tensor, value_states: Tensor) -> None:
    """Refuse tensors that are no keys and values.

    Raises:
        ShapeError: If they do not have four axes, or differ in one of the first three.
        DtypeError: If one is not floating.
    """
    for name, states in (("key_states", key_states), ("value_states", value_states)):
        if not states.is_floating_point():
            msg = f"{name} must be a floating tensor, got {states.dtype} in layer {layer_idx}"
            raise DtypeError(msg)
        if states.ndim != AXES:
            msg = f"{name} must be [batch, kv_heads, tokens, head_dim], got shape {tuple(states.shape)}"
            raise ShapeError(msg)
    if key_states.shape[:3] != value_states.shape[:3]:
        msg = (
            "key_states and value_states must agree in batch, kv_heads and tokens, got "
            f"{tuple(key_states.shape)} and {tuple(value_states.shape)} in layer {layer_idx}"
        )
        raise ShapeError(msg)


def check_update(state: LayerState, key_states: Tensor, value_states: Tensor) -> None:
    """Refuse tensors that do not go on where earlier updates have been.

    Raises:
        ShapeError: As in `check_kind`, or if batch, KV heads or head dimension changed.
        DtypeError: If one is not floating, or its dtype changed.
    """
    check_kind(state.layer_idx, key_states, value_states)
    given = (("key_states", key_states), ("value_states", value_states))
    for (name, states), stored in zip(given, state.exact, strict=True):
        found = (*states.shape[:2], states.shape[3])
        expected = (*stored.shape[:2], stored.shape[3])
        if found != expected:
            msg = (
                f"{name} of layer {state.layer_idx} changed (batch, kv_heads, head_dim) from {expected} to {found}. "
                "A cache belongs to one model and one batch: call cache.reset() or use a new cache."
            )
            raise ShapeError(msg)
        if states.dtype != stored.dtype:
            msg = (
                f"{name} of layer {state.layer_idx} changed dtype from {stored.dtype} to {states.dtype}. "
                "Call cache.reset() or use a new cache."
            )
            raise DtypeError(msg)


def needs_gradients(*states: Tensor) -> bool:
    """Tell whether what is computed from one of these is to have gradients, or carries tangents of forward mode."""
    return any((torch.is_grad_enabled() and x.requires_grad) or _has_tangent(x) for x in states)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # noqa: SLF001


def are_integers(x: Tensor) -> bool:
    """Tell whether numbers are whole, as token ids are."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


class _WithoutGradient(torch.autograd.Function):
    """Shows tokens that a layer holds without the gradients that came with them; to ask for these is an error."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, anchor: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        """Return the states as they are."""
        del ctx, anchor
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:  # noqa: ANN401 - as above
        """Refuse.

        Raises:
            UnsupportedError: Always.
        """
        del ctx, gradients
        raise no_gradients("these tokens were stored without")


def without_gradient(states: Tensor) -> Tensor:
    """Return states to which no gradient can flow: a backward pass through them is an error, not silently nothing."""
    shown: Tensor = _WithoutGradient.apply(states, torch.zeros(0, requires_grad=True))  # type: ignore[no-untyped-call]
    return shown


def check_gradients(state: LayerState, key_states: Tensor, value_states: Tensor) -> None:
    """Refuse a forward in which gradients would have to flow to tokens that are stored without them.

    Raises:
        UnsupportedError: If this is one: a later update, of which new or old tokens need gradients.
    """
    if not state.seen:
        return
    if (state.is_detached and torch.is_grad_enabled()) or needs_gradients(key_states, value_states):
        raise no_gradients(f"layer {state.layer_idx} already holds {state.seen} tokens")


def check_finite(layer_idx: int, keys: Tensor, values: Tensor, where: str) -> None:
    """Refuse NaN, infinity, and numbers so large that the codec would overflow.

    Raises:
        NonFiniteError: If there are any; ``where`` says among which tokens.
    """
    for name, states in (("keys", keys), ("values", values)):
        # The largest squared norm: one number tells about NaN, infinity and overflow in the codec.
        if states.numel() and not bool(torch.isfinite(states.float().square().sum(-1).amax())):
            msg = (
                f"NaN, infinity or an overflow in the {name} of layer {layer_idx} ({where}). The cache was "
                "not changed. Look for overflow in the model: float16 weights often need bfloat16."
            )
            raise NonFiniteError(msg)


def check_queries(state: LayerState, queries: Tensor) -> None:
    """Refuse queries that do not fit the keys.

    Raises:
        ShapeError: If they do not.
    """
    batch, heads, _, head_dim = state.exact[0].shape
    fits = queries.ndim == AXES and (queries.shape[0], queries.shape[3]) == (batch, head_dim)
    if not fits or queries.shape[1] % heads or not queries.shape[2]:
        msg = (
            f"queries of layer {state.layer_idx} must be [{batch}, a multiple of {heads}, tokens, {head_dim}], got "
            f"shape {tuple(queries.shape)}"
        )
        raise ShapeError(msg)


def check_transforms(state: LayerState, shared: Shared, key_states: Tensor) -> None:
    """Refuse transforms of another cache that do not fit this layer.

    Raises:
        OptionError: If such were given.
    """
    given = shared.given_to(state.layer_idx)
    if given is None:
        return
    batch, heads = key_states.shape[:2]
    rows, fitted_heads = given.keys.reference.shape[:2]
    wrong = ""
    if given.asked != state.asked:
        wrong = f"were fitted by {given.asked[0]} and {given.asked[1]}"
    elif fitted_heads != heads or rows not in {1, batch}:
        wrong = f"are for {rows} rows and {fitted_heads} KV heads, this prompt has {batch} and {heads}"
    elif given.unrotated != (shared.make_phase(state.layer_idx, 0) is not None):
        wrong = f"are for keys {'without' if given.unrotated else 'with'} their rotary phase, unlike this cache's"
    if wrong:
        msg = (
            f"the transforms given for layer {state.layer_idx} {wrong}. Use those of a cache of the same model, "
            "preset and config."
        )
        raise OptionError(msg)
