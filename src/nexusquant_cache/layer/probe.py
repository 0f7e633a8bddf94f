"""A look at what coding does to attention, taken once for each layer, while the exact tokens are still there."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_QUERIES = 16


def stand_in_queries(newest: Float[Tensor, "b h m d"], keys: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h w d"]:
    """Return the newest keys without the mean of the others, which takes the place of queries where none are known."""
    return newest[:, :, -_QUERIES:].float() - keys.float().mean(2, keepdim=True)


def attention_error(
    queries: Float[Tensor, "b q w d"],
    exact: tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]],
    coded: tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]],
    hidden: Bool[Tensor, "b h n"] | None = None,
) -> float:
    """Return how far coding moves the output of attention on the coded tokens, relative to its length.

    Exact tokens are left out: they hide in what they add what becomes of the others.

    Args:
        queries: With their rotary phase, of which the last 16 are used; a multiple of the KV heads.
        exact: Keys and values as they came.
        coded: The same tokens as they will be from now on.
        hidden: Those that attention does not look at; a head in which all are suffers nothing.

    Returns:
        The root of the mean squared distance of outputs over that of their squared lengths, in the head that suffers
        most: 0 is exact, 1 is as bad as an output of zeros.
    """
    right, wrong = (_outputs(queries[:, :, -_QUERIES:], *pair, hidden) for pair in (exact, coded))
    distance, length = (x.square().mean((-1, -2)) for x in (right - wrong, right))
    tiny = torch.finfo(torch.float32).tiny
    # An overflow in the logits of huge keys is no number, and as bad as can be.
    return float((distance / length.clamp_min(tiny)).sqrt().nan_to_num(torch.inf).amax())


def _outputs(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Bool[Tensor, "b h n"] | None
) -> Float[Tensor, "b h rows dv"]:
    """Return what every query, of whatever head of a group, reads."""
    rows = queries.float().reshape(*keys.shape[:2], -1, keys.shape[-1])
    logits, values = rows @ keys.float().mT * keys.shape[-1] ** -0.5, values.float()
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, :, None], torch.finfo(logits.dtype).min)
        values = values.masked_fill(hidden[..., None], 0)
    outputs: Tensor = logits.softmax(-1) @ values
    return outputs
