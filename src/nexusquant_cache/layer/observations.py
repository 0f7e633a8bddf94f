"""What attention shows of a prompt until the prompt is compressed, and how attention finds the layer.

transformers shows a cache keys and values only.  An attention function sees queries and the keys that `update`
returned, but not the cache.  So each layer notes which key tensor it has just returned (`note_keys`), and attention
asks for the layer of a key tensor (`take_layer_of`).

There is one note per thread, since attention follows the update of its layer in the same thread, before any other
layer is updated.  It holds weak references, so it keeps nothing alive and goes into no copy or pickle of a cache.  It
is taken once, so a layer that shares the keys of an earlier one does not replace its queries.
"""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.layer.tokens import own

QUERY_WINDOW = 64
"""The most queries that a policy can be shown."""


class _Note(threading.local):
    """What the last update in this thread has returned."""

    keys: "weakref.ref[Tensor] | None" = None
    layer: "weakref.ref[Any] | None" = None  # a NexusQuantLayer, whose module imports this one


_NOTE = _Note()


def note_keys(layer: Any, keys: Tensor) -> None:  # noqa: ANN401 - as above
    """Remember, until the next note in this thread, that a layer has returned these keys."""
    _NOTE.keys, _NOTE.layer = weakref.ref(keys), weakref.ref(layer)


def take_layer_of(keys: Tensor) -> Any:  # noqa: ANN401 - as above
    """Return the layer that has just returned this very tensor, once; None if there is none."""
    if _NOTE.keys is None or _NOTE.keys() is not keys:
        return None
    layer = None if _NOTE.layer is None else _NOTE.layer()
    _NOTE.keys = _NOTE.layer = None
    return layer


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
        """Take the queries of the newest of ``seen`` tokens; those known before stay if these join on."""
        self.before = self.before or (self.queries, self.end)
        if self.queries is not None and self.end == seen - queries.shape[2]:
            queries = torch.cat([self.queries.to(queries.device), queries], 2)
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
