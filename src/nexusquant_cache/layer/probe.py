"""How much encoding a layer's first tokens changes attention; measured once, while their exact copies are there."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_QUERIES = 16


def stand_in_queries(newest: Float[Tensor, "b h m d"], keys: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h w d"]:
    """Return what stands in for queries that nobody has shown: the newest keys, centred.

    Args:
        newest: Keys of the newest tokens, of which the last 16 are used.
        keys: Those that are going to be encoded, whose mean is taken off.
    """
    return newest[:, :, -_QUERIES:].float() - keys.float().mean(2, keepdim=True)


def attention_error(
    queries: Float[Tensor, "b q w d"],
    exact: tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]],
    coded: tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]],
    hidden: Bool[Tensor, "b #h n"] | None = None,
) -> float:
    """Return how much encoding changes what queries read from the encoded tokens, in the head that suffers most.

    The tokens that stay exact are left out.  They would add the same to both outputs, and so hide the change.

    Args:
        queries: With their rotary phase, of which the last 16 are used; a multiple of the KV heads.
        exact: Keys and values as they came.
        coded: Those of the same tokens, encoded and decoded.
        hidden: Tokens that no query sees.  A head that sees none suffers nothing.

    Returns:
        The root mean square of the change, divided by that of the exact output: 0 if nothing changes, 1 if the change
        is as large as the output.
    """
    right, wrong = (_outputs(queries[:, :, -_QUERIES:], *pair, hidden) for pair in (exact, coded))
    distance, length = (x.square().mean((-1, -2)) for x in (right - wrong, right))
    tiny = torch.finfo(torch.float32).tiny
    # An overflow in the logits of huge keys is no number, and as bad as can be.
    return float((distance / length.clamp_min(tiny)).sqrt().nan_to_num(torch.inf).amax())


def _outputs(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Bool[Tensor, "b #h n"] | None
) -> Float[Tensor, "b h rows dv"]:
    """Return what each query reads; the query heads that share a KV head stand one behind the other."""
    rows = queries.float().reshape(*keys.shape[:2], -1, keys.shape[-1])
    logits, values = rows @ keys.float().mT * keys.shape[-1] ** -0.5, values.float()
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, :, None], torch.finfo(logits.dtype).min)
        values = values.masked_fill(hidden[..., None], 0)
    outputs: Tensor = logits.softmax(-1) @ values
    return outputs
