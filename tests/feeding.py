"""What a model does with a cache, without a model: update it, and attend to what the update returns."""

from typing import Any

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

GROUP = 2
"""Query heads for each KV head, as in the tiny models."""


def feed(
    cache: Any, keys: Tensor, values: Tensor, *layer_idx: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Give a cache, or a layer of it, new tokens, attend to what it returns, and return that.

    Only so does the cache see the attention, without which it evicts nothing.

    Args:
        cache: The cache; with a layer, there is no index.
        keys: New keys, which are the queries too.
        values: New values.
        layer_idx: Which layer of the cache.
        mask: As for scaled_dot_product_attention; all may be seen by default.
    """
    states: tuple[Tensor, Tensor] = cache.update(keys, values, *layer_idx)
    _attend(keys, states, mask)
    return states


def attended(cache: Any, keys: Tensor, values: Tensor, *layer_idx: int, mask: Tensor | None = None) -> Tensor:
    """Do the same, and return what attention gives."""
    return _attend(keys, cache.update(keys, values, *layer_idx), mask)


def _attend(keys: Tensor, states: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    queries = keys.repeat_interleave(GROUP, 1)
    return F.scaled_dot_product_attention(queries, *states, attn_mask=mask, enable_gqa=True)
