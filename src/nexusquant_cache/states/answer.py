"""Attention to what a layer holds, under the model's own mask: the one way in for states and for `attention`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Float, Shaped
from torch import Tensor

from nexusquant_cache.codec import impl
from nexusquant_cache.codec.held import HeldTokens
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.torch import attend as plain_attend
from nexusquant_cache.errors import UnsupportedError, no_gradients
from nexusquant_cache.uncompiled import uncompiled

MOST_QUERIES = 16
"""More queries at once than this are worth decoding for."""
_LOGITS = 1 << 25  # computed at once, over all heads: 128 MiB in float32


def check_dropout(dropout: float) -> None:
    """Refuse dropout.

    Raises:
        UnsupportedError: If there is any.
    """
    if dropout:
        msg = f"a compressed cache is read without dropout, got dropout={dropout}: call model.eval()"
        raise UnsupportedError(msg)


def check_gradients(*given: Tensor | None) -> None:
    """Refuse queries, masks and weights to which gradients are to flow: codes are read without.

    Raises:
        UnsupportedError: If one of these is such.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        what = "the attention to coded tokens is asked for some, for queries, a mask or weights"
        raise no_gradients(what)


@uncompiled
def attend(
    queries: Float[Tensor, "#b q m d"],
    held: HeldTokens,
    mask: Shaped[Tensor, "#b #q #m seen"] | None,
    softmax: Softmax,
) -> Float[Tensor, "b q m dv"]:
    """Return the attention output in the dtype of the queries.

    Few queries are answered from the codes.  For many, the tokens are decoded once.

    Args:
        queries: Queries of the newest tokens.
        held: What they attend to; some of it is packed.
        mask: True for what may be seen, or numbers to add to the logits, of all tokens seen; None if all may be seen.
        softmax: What varies between models.
    """
    queries = queries.expand(len(held.tail[0]), -1, -1, -1)  # one row may attend to a batch
    if not queries.shape[2]:
        return queries.new_zeros(*queries.shape[:3], held.tail[1].shape[3])
    if queries.shape[2] <= MOST_QUERIES:
        return impl.attend(queries, held, mask, softmax)[0].to(queries.dtype)
    if softmax.softcap is None and softmax.sink_logits is None:
        keys, values = (x.to(queries.dtype) for x in (held.decoded_keys(), held.decoded_values()))

        def attend_some(some: Tensor, visible: Tensor | None) -> Tensor:
            kept = held.mask(visible)
            kept = None if kept is None else _by_query_head(kept, some.shape[1])
            return F.scaled_dot_product_attention(
                some, keys, values, kept, scale=softmax.scaling, enable_gqa=some.shape[1] != keys.shape[1]
            )
    else:

        def attend_some(some: Tensor, visible: Tensor | None) -> Tensor:
            return impl.attend(some, held, visible, softmax)[0].to(queries.dtype)

    return _in_parts(attend_some, queries, mask, held.tokens)


def _in_parts(
    attend_some: Callable[[Tensor, Tensor | None], Tensor], queries: Tensor, mask: Tensor | None, tokens: int
) -> Tensor:
    """Attend with so few queries at once that logits, or masks, do not fill the memory."""
    step = max(_LOGITS // (queries.shape[0] * queries.shape[1] * max(tokens, 1)), MOST_QUERIES)
    parts = queries.split(step, 2)
    visible = [mask] * len(parts) if mask is None or mask.shape[2] == 1 else mask.split(step, 2)
    return torch.cat([attend_some(*part) for part in zip(parts, visible, strict=True)], 2)


def _by_query_head(x: Shaped[Tensor, "#b heads group m n"], query_heads: int) -> Shaped[Tensor, "#b q m n"]:
    """Return a mask by KV head and query head of its group by query head; one for all heads stays one."""
    if x.shape[1] == x.shape[2] == 1:
        return x[:, 0]
    return x.expand(-1, -1, query_heads // x.shape[1], -1, -1).flatten(1, 2)


@uncompiled
def attend_with_weights(
    queries: Float[Tensor, "b q m d"],
    held: HeldTokens,
    mask: Shaped[Tensor, "#b #q #m seen"] | None,
    softmax: Softmax,
) -> tuple[Float[Tensor, "b q m dv"], Float[Tensor, "b q m seen"]]:
    """Return the attention output and its weights, 0 for evicted tokens, in the dtype of the queries; see `attend`."""
    out, weights = impl.attend(queries, held, mask, softmax, weights=True)
    assert weights is not None
    return out.to(queries.dtype), held.spread(weights, 0.0).to(queries.dtype)


@uncompiled
def logits(queries: Float[Tensor, "b q m d"], held: HeldTokens) -> Float[Tensor, "b q m seen"]:
    """Return unscaled logits in the dtype of the queries, minus infinity for evicted tokens."""
    if queries.shape[2] <= MOST_QUERIES:
        found = plain_attend.logits_of(queries, held, 1.0).to(queries.dtype)
    else:
        grouped = queries.unflatten(1, (held.tail[0].shape[1], -1))
        found = grouped @ held.decoded_keys().to(queries.dtype)[:, :, None].mT
    if held.visible is not None:
        found.masked_fill_(~held.visible, -torch.inf)
    return held.spread(found, -torch.inf)


@uncompiled
def weighted_values(weights: Float[Tensor, "b q m seen"], held: HeldTokens) -> Float[Tensor, "b q m dv"]:
    """Return the weighted sums of the values in the dtype of the weights."""
    kept = held.stored(weights)
    if held.visible is not None:
        kept = kept.masked_fill(~held.visible, 0.0)
    if weights.shape[2] <= MOST_QUERIES:
        return plain_attend.values_of(kept, held).to(weights.dtype)
    return (kept @ held.decoded_values().to(weights.dtype)[:, :, None]).flatten(1, 2)
