"""A look at what coding does to attention, taken once for each layer, while the exact tokens are still there."""

import torch
from jaxtyping import Float
from torch import Tensor

_QUERIES = 16


def stand_in_queries(keys: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h w d"]:
    """Return the last keys without their mean, which takes the place of queries where none are known."""
    return keys[:, :, -_QUERIES:].float() - keys.float().mean(2, keepdim=True)


def attention_error(
    queries: Float[Tensor, "b q w d"],
    exact: tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]],
    coded: tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]],
) -> float:
    """Return how far coded keys and values move the output of attention, relative to its length.

    Args:
        queries: With their rotary phase, of which the last 16 are used; a multiple of the KV heads.
        exact: Keys and values as they came.
        coded: The same tokens as they will be from now on.

    Returns:
        The root of the mean squared distance of outputs over that of their squared lengths, in the head that suffers
        most: 0 is exact, 1 is as bad as an output of zeros.
    """
    right, wrong = (_outputs(queries[:, :, -_QUERIES:], *pair) for pair in (exact, coded))
    distance, length = (x.square().mean((-1, -2)) for x in (right - wrong, right))
    tiny = torch.finfo(torch.float32).tiny
    # An overflow in the logits of huge keys is no number, and as bad as can be.
    return float((distance / length.clamp_min(tiny)).sqrt().nan_to_num(torch.inf).amax())


def _outputs(queries: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, "b h rows dv"]:
    """Return what every query, of whatever head of a group, reads."""
    rows = queries.float().reshape(*keys.shape[:2], -1, keys.shape[-1])
    weights = (rows @ keys.float().mT * keys.shape[-1] ** -0.5).softmax(-1)
    return weights @ values.float()
