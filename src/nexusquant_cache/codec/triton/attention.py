"""Attention on the codes by kernels: what `codes.attend` computes, with nothing decoded outside registers."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from nexusquant_cache.codec import impl as support
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.held import CodedSide, HeldTokens
from nexusquant_cache.codec.operands import ExactTokens, PackedOperand, Places, RopeOperand, Softmax
from nexusquant_cache.codec.torch.attend import stored
from nexusquant_cache.codec.triton import coding as fused

_MOST_ERROR = 0.03  # relative to plain torch: products have float16 operands, outputs may have bfloat16


def can_attend(held: HeldTokens) -> bool:
    """Tell whether kernels shall attend to these tokens.

    Raises:
        UnsupportedError: If they were asked for (``impl="triton"``) and cannot.
    """
    return all(
        side is not None and isinstance(side.codec, E8Codec) and side.codec.uses_kernels(side.transform)
        for side in (held.keys, held.values)
    )


def attend(
    queries: Float[Tensor, "b q m d"],
    held: HeldTokens,
    mask: Bool[Tensor, "#b #q m n"] | None,
    softmax: Softmax,
) -> Float[Tensor, "b q m dv"] | None:
    """Return the attention output in the dtype of the queries; None if kernels cannot.

    That is with a mask that differs between heads or hides packed tokens from some of the queries only, and on a card
    whose shared memory is too small.

    Args:
        queries: Queries of the newest tokens.
        held: What they attend to; only if `can_attend`.
        mask: True for what may be seen, in the order of the tokens; None if all may be seen.
        softmax: What varies between models.

    Raises:
        UnsupportedError: If the card is too small and kernels were asked for (``impl="triton"``).
    """
    assert held.keys is not None
    assert held.values is not None
    assert held.sinks is not None
    assert isinstance(held.keys.codec, E8Codec)
    from triton.runtime.errors import OutOfResources  # noqa: PLC0415 - optional

    from nexusquant_cache.codec.triton import attend as kernel  # noqa: PLC0415 - imports triton

    hidden = exact_mask = None
    if mask is not None:
        if mask.shape[1] != 1:
            return None
        first, count = held.sinks[0].shape[2], held.packed_tokens
        visible = stored(held, mask.expand(len(queries), -1, -1, -1))[:, 0]
        seen = visible[..., first : first + count]
        if seen.shape[1] > 1 and not torch.equal(seen, seen[:, :1].expand_as(seen)):
            return None
        hidden = ~seen[:, 0]
        exact_mask = torch.cat([visible[..., :first], visible[..., first + count :]], -1)
    packed_keys, packed_values = _operand(held.keys), _operand(held.values)
    rope, places = _rope(held)
    try:
        partial = kernel.attend_packed(
            queries, packed_keys, packed_values, softmax, rope=rope, places=places, hidden=hidden
        )
    except OutOfResources as error:  # heads of 256 channels on cards with little shared memory
        support.refuse(held.keys.codec.impl, f"the card is too small for a kernel: {error}")
        return None
    keys, values = (torch.cat(pair, 2) for pair in zip(held.sinks, held.tail, strict=True))
    return kernel.combine(queries, partial, packed_values.plan, ExactTokens(keys, values, exact_mask), softmax)


def is_right(
    held: HeldTokens, found: Float[Tensor, "b q m dv"], expected: Callable[[], Float[Tensor, "b q m dv"]]
) -> bool:
    """Tell whether kernels attend as plain torch does; see `support.is_right`.

    Args:
        held: What was attended to.
        found: What `attend` has returned.
        expected: Computes the same in plain torch.
    """
    assert held.keys is not None
    assert held.values is not None
    assert isinstance(held.keys.codec, E8Codec)
    sides = [(x.plan.head_dim, x.plan.rates, x.even) for x in (_operand(held.keys), _operand(held.values))]
    rows = found.shape[1] // held.tail[0].shape[1] * found.shape[2]
    phase = held.phase is not None and (held.phase.rotary_dim, held.phase.interleaved, _is_contiguous(held))
    key = ("attend", found.device, found.dtype, *sides, rows, phase)
    return support.is_right(held.keys.codec.impl, key, lambda: support.distance(found, expected()), _MOST_ERROR)


def _operand(side: CodedSide) -> PackedOperand:
    assert isinstance(side.codec, E8Codec)
    return fused.operand(side.codec.layouts, side.packed, side.transform)


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
    return held.positions is not None and held.positions.bitmap is None and held.pads is None


def _positions(held: HeldTokens) -> Int32[Tensor, "b h n"]:
    from nexusquant_cache.codec.triton import positions as kernel  # noqa: PLC0415 - imports triton

    assert held.positions is not None
    map_, device = held.positions, held.tail[0].device
    heads = held.tail[0].shape[:2]
    pads = None if held.pads is None else held.pads.to(device, torch.int32)
    return kernel.kept_positions(
        heads, map_.bitmap, start=map_.start, covered=map_.covered, tokens=map_.tokens, pads=pads
    )
