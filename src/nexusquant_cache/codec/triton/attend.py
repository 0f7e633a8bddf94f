"""Attention by Triton kernels: what `codec.torch.attend` computes, with nothing decoded outside registers."""

from collections.abc import Hashable

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nexusquant_cache.codec.held import CodedSide, HeldTokens
from nexusquant_cache.codec.operands import ExactTokens, PackedOperand, Places, RopeOperand
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.triton import kernels_attend, kernels_positions
from nexusquant_cache.codec.triton.support import operand
from nexusquant_cache.errors import UnsupportedError


def attend(
    queries: Float[Tensor, "b q m d"],
    held: HeldTokens,
    mask: Bool[Tensor, "#b #q #m seen"] | Float[Tensor, "#b #q #m seen"] | None,
    softmax: Softmax,
) -> tuple[Float[Tensor, "b q m dv"], None] | None:
    """Return the attention output in the dtype of the queries, and no weights.

    Args:
        queries: Queries of the newest tokens.
        held: What they attend to.
        mask: True for what may be seen, of all tokens seen; None if all may be seen.
        softmax: What varies between models.

    Returns:
        None if the mask is one for plain torch: it adds numbers, differs between query heads, or hides packed tokens
        from some of the queries only.

    Raises:
        UnsupportedError: If the shared memory of the card is too small.
    """
    assert held.keys is not None
    assert held.values is not None
    assert held.sinks is not None
    hidden = exact_mask = None
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
        return None
    visible = held.mask(mask)
    if visible is not None:
        first, count = held.sink_tokens, held.packed_tokens
        visible = visible[:, :, 0].expand(-1, -1, queries.shape[2], -1)  # by KV head
        seen = visible[..., first : first + count]
        if queries.shape[2] > 1 and not torch.equal(seen, seen[:, :, :1].expand_as(seen)):
            return None
        hidden = ~seen[:, :, 0]
        exact_mask = torch.cat([visible[:, 0, :, :first], visible[:, 0, :, first + count :]], -1)  # same for all heads
    packed_keys, packed_values = _operand(held.keys), _operand(held.values)
    rope, places = _rope(held)
    try:
        partial = kernels_attend.attend_packed(
            queries, packed_keys, packed_values, softmax, rope=rope, places=places, hidden=hidden
        )
    except OutOfResources as error:  # heads of 256 channels on cards with little shared memory
        msg = f"the card is too small for a kernel: {error}"
        raise UnsupportedError(msg) from error
    keys, values = (torch.cat(pair, 2) for pair in zip(held.sinks, held.tail, strict=True))
    exact = ExactTokens(keys, values, exact_mask)
    return kernels_attend.combine(queries, partial, packed_values.plan, exact, softmax), None


def specialisation(queries: Float[Tensor, "b q m d"], held: HeldTokens) -> Hashable:
    """Return what kernels that attend are compiled for, besides the device and the dtype."""
    assert held.keys is not None
    assert held.values is not None
    sides = [(x.plan.head_dim, x.plan.rates, x.even) for x in (_operand(held.keys), _operand(held.values))]
    rows = queries.shape[1] // held.tail[0].shape[1] * queries.shape[2]
    phase = held.phase is not None and (held.phase.rotary_dim, held.phase.interleaved, _is_contiguous(held))
    return (*sides, rows, phase)


def _operand(side: CodedSide) -> PackedOperand:
    return operand(side.packed.rectangle(), side.transform, side.codec.layouts)


def _rope(held: HeldTokens) -> tuple[RopeOperand | None, Places | None]:
    """Return the phase that the keys were coded without, and where they stand."""
    if held.phase is None:
        return None, None
    assert held.positions is not None
    low, high = held.phase.tables(held.tail[0].device, held.positions.end)
    return RopeOperand(low, high, held.phase.interleaved), _places(held)


def _places(held: HeldTokens) -> Places:
    assert held.positions is not None
    if _is_contiguous(held):
        return Places(start=held.positions.start)
    return Places(positions=_positions(held))


def _is_contiguous(held: HeldTokens) -> bool:
    return held.positions is not None and held.positions.bitmap is None and held.origins is None


def _positions(held: HeldTokens) -> Int32[Tensor, "b h n"]:
    assert held.positions is not None
    map_, device = held.positions, held.tail[0].device
    if map_.counts is not None:
        return held.angles().to(torch.int32)
    heads = held.tail[0].shape[:2]
    origins = None if held.origins is None else held.origins.to(device, torch.int32).contiguous()
    return kernels_positions.kept_positions(
        heads, map_.bitmap, start=map_.start, covered=map_.covered, tokens=map_.tokens, origins=origins
    )
