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
        sink_logits: A further logit of each query head (``s_aux`` in transformers), whose token has no value.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Float[Tensor, " query_heads"] | None = None
