"""What varies between the attention of models."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """How logits are made and summed.

    Attributes:
        scaling: Factor of the inner products.
        softcap: Logits ``x`` become ``softcap * tanh(x / softcap)``; None to leave them.
        sinks: A further logit of each query head, whose token has no value.
    """

    scaling: float
    softcap: float | None = None
    sinks: Float[Tensor, " query_heads"] | None = None
