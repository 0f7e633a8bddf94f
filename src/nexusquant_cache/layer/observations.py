"""What attention shows of a prompt until the prompt is compressed."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.layer.tokens import own

QUERY_WINDOW = 64
"""The most queries that a policy can be shown."""


@dataclass
class Observations:
    """What is known of a prompt that waits for its compression, besides its keys and values.

    Attributes:
        queries: Those of the newest tokens, at most `QUERY_WINDOW`, as attention sees them.
        end: Tokens seen when the newest of them came.
        before: The same two as they were before the last update, so that it can be taken back.
        reconstruction: The greatest attention paid to each token in a second reading, see
            `nexusquant_cache.attention.reconstruct`.
    """

    queries: Float[Tensor, "b q w d"] | None = None
    end: int = 0
    before: tuple[Float[Tensor, "b q w2 d"] | None, int] | None = None
    reconstruction: Float[Tensor, "b h n"] | None = None

    def start_update(self) -> None:
        """Forget how it was before the last update, which can no longer be taken back."""
        self.before = None

    def append(self, queries: Float[Tensor, "b q new d"], seen: int) -> None:
        """Take the queries of the newest of ``seen`` tokens; those of earlier tokens stay if these join on.

        Queries of tokens whose queries were taken already, since the last update, take their place.
        """
        self.before = self.before or (self.queries, self.end)
        earlier, end = self.before
        if earlier is not None and end == seen - queries.shape[2]:
            queries = torch.cat([earlier.to(queries.device), queries], 2)
        self.queries, self.end = own(queries[:, :, -QUERY_WINDOW:]), seen

    def crop(self, end: int) -> None:
        """Forget what is known of the tokens from position ``end`` on."""
        if self.reconstruction is not None:
            self.reconstruction = own(self.reconstruction[:, :, :end])
        if self.end <= end:
            return
        if self.before is not None and self.before[1] == end:
            self.queries = self.before[0]
        elif self.queries is not None:
            left = self.queries.shape[2] - (self.end - end)
            self.queries = own(self.queries[:, :, :left]) if left > 0 else None
        self.end, self.before = end, None

    def last_queries(self, count: int, seen: int) -> Float[Tensor, "b q w d"] | None:
        """Return up to ``count`` queries of the last of ``seen`` tokens, if they are known."""
        return None if self.queries is None or self.end != seen else self.queries[:, :, -count:]

    def attention_to(self, tokens: int) -> Float[Tensor, "b h n"] | None:
        """Return the attention paid to the first ``tokens`` tokens; those that came later count as fully attended."""
        if self.reconstruction is None:
            return None
        return F.pad(self.reconstruction, (0, tokens - self.reconstruction.shape[2]), value=1.0)


def scaled(queries: Float[Tensor, "b q w d"], scaling: float | None) -> Float[Tensor, "b q w d"]:
    """Return queries that give the model's logits at the usual scaling, ``head_dim ** -0.5``."""
    factor = 1.0 if scaling is None else scaling * queries.shape[-1] ** 0.5
    return queries if abs(factor - 1) < 1e-6 else queries * factor  # noqa: PLR2004 - a rounding
