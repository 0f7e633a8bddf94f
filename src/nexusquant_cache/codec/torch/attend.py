"""Attention on the codes in plain torch: what every other implementation is compared with.

Packed vectors are never turned back into what they were.  With a vector written as ``scale * U y + mean``, for coded
channels ``y`` and the rotation ``U`` of its head,

- the sum of the values is ``U (sum of weight * scale * y) + mean * (sum of weights)``: one vector is rotated per query;
- a logit is ``scale * <U^T q, y> + <q, mean>`` for keys that were coded as attention sees them;
- keys that were coded without their rotary phase are rotated and turned a few hundred tokens at a time.

Where a codec has no coded channels (`VectorCodec.has_channels`), it decodes a few hundred tokens at a time.

All in float32, which is more precise than attention on decoded vectors in a 16-bit dtype.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.held import CodedSide, HeldTokens
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.tables import covered_stages

_CHUNK = 1 << 19  # channels decoded at once, over all heads: 2 MiB in float32, which stay in a core's cache


def attend(
    queries: Float[Tensor, "b q m d"],
    held: HeldTokens,
    mask: Shaped[Tensor, "#b #q m n"] | None,
    softmax: Softmax,
) -> tuple[Float[Tensor, "b q m dv"], Float[Tensor, "b q m n"]]:
    """Return the attention output and weights, in float32, tokens in the order of ``held``.

    Args:
        queries: Queries of the newest tokens.
        held: What they attend to.
        mask: True for what may be seen, or numbers to add to the logits; None if all may be seen.
        softmax: What varies between models.
    """
    batch, _, count, _ = queries.shape
    heads = held.tail[0].shape[1]
    with torch.autocast(queries.device.type, enabled=False):
        q = (queries.float() * softmax.scaling).unflatten(1, (heads, -1)).flatten(2, 3)
        logits = in_order(held, _logits(q, held)).view(batch, -1, count, held.tokens)
        weights = _softmax(logits, mask, softmax)
        out = _values(stored(held, weights.view(batch, heads, -1, held.tokens)), held)
    return out.view(batch, -1, count, out.shape[-1]), weights


def _softmax(logits: Tensor, mask: Tensor | None, options: Softmax) -> Tensor:
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if options.sink_logits is not None:
        extra = options.sink_logits.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
    # A query that may see nothing (a pad's) sees nothing.
    return logits.softmax(-1) if mask is None else logits.softmax(-1).nan_to_num(0.0)


def in_order(held: HeldTokens, x: Shaped[Tensor, "b h m n"]) -> Shaped[Tensor, "b h m n"]:
    """Put what is stored sinks first into the order of the tokens."""
    return _swap(held, x, sinks_first=True)


def stored(held: HeldTokens, x: Shaped[Tensor, "b h m n"]) -> Shaped[Tensor, "b h m n"]:
    """Put what is in the order of the tokens as it is stored: sinks first."""
    return _swap(held, x, sinks_first=False)


def _swap(held: HeldTokens, x: Tensor, *, sinks_first: bool) -> Tensor:
    """Exchange the sinks of each row with the packed tokens before them."""
    if held.before_sinks is None or held.sinks is None:
        return x
    sinks, rows = held.sinks[0].shape[2], []
    for row, before in zip(x, held.before_sinks, strict=True):
        first, second = (sinks, before) if sinks_first else (before, sinks)
        parts = row[..., first : first + second], row[..., :first], row[..., first + second :]
        rows.append(torch.cat(parts, -1))
    return torch.stack(rows)


def _logits(q: Float[Tensor, "b h m d"], held: HeldTokens) -> Float[Tensor, "b h m n"]:
    """Return scaled logits: of the sinks, of the packed tokens, of the tail."""
    assert held.keys is not None
    assert held.sinks is not None
    out = q.new_empty(*q.shape[:3], held.tokens)
    first, packed = held.sinks[0].shape[2], held.packed_tokens
    out[..., :first] = q @ held.sinks[0].float().mT
    out[..., first + packed :] = q @ held.tail[0].float().mT
    body, transform = out[..., first : first + packed], held.keys.transform
    if held.phase is None and held.keys.codec.has_channels:
        rotated = transform.rotation.adjoint(q)
        for chunk in _chunks(held.keys, q.shape[-1]):
            y, scales = _read(held.keys, chunk)
            torch.mul(rotated @ y.mT, scales[:, :, None], out=body[..., chunk])
        if transform.mean is not None:
            body += q @ transform.mean.float().mT
        return out
    angles = None if held.phase is None else held.angles()
    for chunk in _chunks(held.keys, q.shape[-1]):
        keys = _decode(held.keys, chunk)
        if held.phase is not None and angles is not None:
            keys = held.phase.rotate(keys, angles[..., chunk])
        body[..., chunk] = q @ keys.mT
    return out


def _values(weights: Float[Tensor, "b h m n"], held: HeldTokens) -> Float[Tensor, "b h m dv"]:
    """Return the weighted sums of all values; weights are stored sinks first."""
    assert held.values is not None
    assert held.sinks is not None
    first, packed = held.sinks[1].shape[2], held.packed_tokens
    out = weights[..., :first] @ held.sinks[1].float() + weights[..., first + packed :] @ held.tail[1].float()
    body, transform = weights[..., first : first + packed], held.values.transform
    if not held.values.codec.has_channels:
        for chunk in _chunks(held.values, out.shape[-1]):
            out += body[..., chunk] @ _decode(held.values, chunk)
        return out
    summed = torch.zeros_like(out)
    for chunk in _chunks(held.values, out.shape[-1]):
        y, scales = _read(held.values, chunk)
        summed += (body[..., chunk] * scales[:, :, None]) @ y
    out += transform.rotation.unrotate(summed)
    if transform.mean is not None:
        out += body.sum(-1, keepdim=True) * transform.mean
    return out


def _chunks(side: CodedSide, head_dim: int) -> list[slice]:
    """Return ranges of tokens that are decoded together."""
    batch, heads, tokens = side.packed.scales.shape
    step = max(_CHUNK // (batch * heads * head_dim), 1)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _read(side: CodedSide, chunk: slice, first_stride: int = 1) -> tuple[Tensor, Tensor]:
    """Return coded channels and scales of some tokens."""
    return side.codec.coded_channels(_part(side, chunk), side.transform, first_stride)


def _decode(side: CodedSide, chunk: slice) -> Tensor:
    """Return the vectors of some tokens: in plain torch, unless the codec decodes in its own way."""
    if not side.codec.has_channels:
        return side.codec.decode(_part(side, chunk), side.transform)
    done = covered_stages(side.transform.rotation.first_stride)
    return side.transform.inverse(*_read(side, chunk, done), done)


def _part(side: CodedSide, chunk: slice) -> PackedVectors:
    return side.packed.map(lambda x: x[:, :, chunk])
