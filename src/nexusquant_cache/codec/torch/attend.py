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

from nexusquant_cache.codec.held import CodedSide, HeldTokens
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.tables import covered_stages

_CHUNK = 1 << 19  # channels decoded at once, over all heads: 2 MiB in float32, which stay in a core's cache


def attend(
    queries: Float[Tensor, "b q m d"],
    held: HeldTokens,
    mask: Shaped[Tensor, "#b #q #m seen"] | None,
    softmax: Softmax,
) -> tuple[Float[Tensor, "b q m dv"], Float[Tensor, "b heads group m n"]]:
    """Return the attention output in float32, and its weights by KV head and query head, tokens as they are stored.

    Args:
        queries: Queries of the newest tokens.
        held: What they attend to.
        mask: True for what may be seen, or numbers to add to the logits, of all tokens seen; None if all may be seen.
        softmax: What varies between models.
    """
    visible = held.mask(mask)
    with torch.autocast(queries.device.type, enabled=False):
        weights = _softmax(logits_of(queries, held, softmax.scaling), visible, softmax)
    return values_of(weights, held), weights


def logits_of(
    queries: Float[Tensor, "b q m d"], held: HeldTokens, scaling: float
) -> Float[Tensor, "b heads group m n"]:
    """Return scaled logits in float32, by KV head and query head of its group, tokens as they are stored."""
    heads, count = held.tail[0].shape[1], queries.shape[2]
    with torch.autocast(queries.device.type, enabled=False):
        q = (queries.float() * scaling).unflatten(1, (heads, -1)).flatten(2, 3)
        logits: Tensor = _logits(q, held).unflatten(2, (-1, count))
    return logits


def values_of(weights: Float[Tensor, "b heads group m n"], held: HeldTokens) -> Float[Tensor, "b q m dv"]:
    """Return the weighted sums of all values in float32, by query head; tokens as they are stored."""
    with torch.autocast(weights.device.type, enabled=False):
        out = _values(weights.float().flatten(2, 3), held)
    by_head: Tensor = out.unflatten(2, weights.shape[2:4]).flatten(1, 2)
    return by_head


def _softmax(
    logits: Float[Tensor, "b heads group m n"], mask: Tensor | None, options: Softmax
) -> Float[Tensor, "b heads group m n"]:
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if options.sink_logits is not None:
        sinks = options.sink_logits.float().view(1, *logits.shape[1:3], 1, 1)
        return torch.cat([logits, sinks.expand(*logits.shape[:4], 1)], -1).softmax(-1)[..., :-1]
    # A query that may see nothing (a pad's) sees nothing.
    return logits.softmax(-1) if mask is None else logits.softmax(-1).nan_to_num(0.0)


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
            keys = held.phase.rotate(keys, angles[..., chunk], by_tables=True)
        body[..., chunk] = q @ keys.mT
    return out


def _values(weights: Float[Tensor, "b h m n"], held: HeldTokens) -> Float[Tensor, "b h m dv"]:
    """Return the weighted sums of all values."""
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
    batch, heads = side.transform.reference.shape[:2]
    tokens = side.packed.tokens
    step = max(_CHUNK // (batch * heads * head_dim), 1)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _read(side: CodedSide, chunk: slice, first_stride: int = 1) -> tuple[Tensor, Tensor]:
    """Return coded channels and scales of some tokens."""
    return side.codec.coded_channels(side.packed.part(chunk), side.transform, first_stride)


def _decode(side: CodedSide, chunk: slice) -> Tensor:
    """Return the vectors of some tokens: in plain torch, unless the codec decodes in its own way."""
    if not side.codec.has_channels:
        return side.codec.decode(side.packed.part(chunk), side.transform)
    done = covered_stages(side.transform.rotation.first_stride)
    return side.transform.inverse(*_read(side, chunk, done), done)
