"""Which tokens are kept: a policy scores, the base class does everything else.

A policy is one class with one method, `EvictionPolicy.score`.  Protection (sinks and recent tokens), equal
kept counts, top-k and checks are the same for all of them and live in `EvictionPolicy.select`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nexusquant_cache.errors import NonFiniteError, OptionError, ShapeError


@dataclass(frozen=True)
class ScoreInputs:
    """What a policy may look at: one layer's exact tokens at the moment they are compressed.

    Attributes:
        keys: Keys as attention sees them (with their rotary phase), ``[batch, kv_heads, tokens, head_dim]``.
        values: Values of the same tokens.
        positions: Original positions, ascending.
        protected: Tokens that are kept whatever their score: sinks and recent tokens.
        layer_idx: Index of the layer in the model.
    """

    keys: Float[Tensor, "b h n d"]
    values: Float[Tensor, "b h n dv"]
    positions: Int[Tensor, "n"]
    protected: Bool[Tensor, "n"]
    layer_idx: int

    @property
    def sink_tokens(self) -> int:
        """Number of protected tokens at the beginning."""
        return int(self.protected.long().cumprod(0).sum()) if not bool(self.protected.all()) else 0


class EvictionPolicy(ABC):
    """Scores tokens; the highest scores are kept.

    Subclasses implement `score` and nothing else.  They are called once per layer and compression, hold no
    state of a cache, and may be shared between caches.
    """

    @abstractmethod
    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the importance of every token, per head, in any floating dtype.

        Only the order within a head matters.  Scores of protected tokens are ignored.  They must be finite.
        """

    def select(self, inputs: ScoreInputs, count: int) -> Bool[Tensor, "b h n"]:
        """Return which tokens to keep: all protected ones and the ``count`` best others of each head.

        Ties go to the earlier token, so that the choice does not depend on the device.

        Raises:
            ShapeError: If `score` returned another shape than ``[batch, kv_heads, tokens]``.
            NonFiniteError: If a score of an unprotected token is NaN or infinite.
        """
        batch, heads, tokens, _ = inputs.keys.shape
        keep = inputs.protected.expand(batch, heads, tokens).clone()
        free = (~inputs.protected).nonzero()[:, 0]
        if count >= len(free):
            return keep.fill_(value=True)
        scores = self.score(inputs)
        name = type(self).__name__
        if scores.shape != (batch, heads, tokens):
            msg = (
                f"{name}.score must return [batch, kv_heads, tokens] = {(batch, heads, tokens)}, "
                f"got shape {tuple(scores.shape)}"
            )
            raise ShapeError(msg)
        scores = scores.index_select(-1, free)
        if not bool(torch.isfinite(scores).all()):
            msg = f"{name}.score returned NaN or infinity in layer {inputs.layer_idx}; scores must be finite"
            raise NonFiniteError(msg)
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
        return keep.scatter_(-1, free[best], value=True)


@dataclass(frozen=True)
class KeyKeyPolicy(EvictionPolicy):
    """Attention of the last keys on all keys, standing in for queries that a cache never sees.

    Keys are centred (without the sinks), so that the large common component of keys does not decide.
    The **maximum** over the observation window and max-pooling over some twenty tokens keep whole facts:
    a number is several tokens long, and half of it is worth nothing.

    Args:
        observation_window: How many of the newest keys act as queries.
        pool: Width of the max-pooling, in tokens; odd.

    References:
        The observation window and pooling are those of Li et al. (2024), "SnapKV", arXiv:2404.14469, section
        4; keys instead of queries, the maximum instead of the mean and the width are ours.
    """

    observation_window: int = 32
    pool: int = 21

    def __post_init__(self) -> None:
        """Check the window and the width."""
        if self.observation_window < 1:
            msg = f"observation_window must be at least 1 token, got {self.observation_window}"
            raise OptionError(msg)
        if self.pool < 1 or self.pool % 2 == 0:
            msg = f"pool must be an odd number of tokens, at least 1, got {self.pool}"
            raise OptionError(msg)

    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the greatest attention weight that any key of the window gives to a token near this one."""
        return self._pool(self._attention(inputs).amax(2))

    def _attention(self, inputs: ScoreInputs) -> Float[Tensor, "b h w n"]:
        keys = inputs.keys.float()
        keys = keys - keys[:, :, inputs.sink_tokens :].mean(2, keepdim=True)
        queries = keys[:, :, -self.observation_window :]
        logits: Tensor = queries @ keys.mT * keys.shape[-1] ** -0.5
        return logits.softmax(-1)

    def _pool(self, scores: Float[Tensor, "b h n"]) -> Float[Tensor, "b h n"]:
        return F.max_pool1d(scores, self.pool, stride=1, padding=self.pool // 2)


@dataclass(frozen=True)
class MeanKeyKeyPolicy(KeyKeyPolicy):
    """The mean attention of the last keys, narrowly pooled: the usual recipe, kept for comparison.

    A fact that only a few of the last keys attend to drowns in the mean, and narrow pooling keeps parts of it.

    References:
        Li et al. (2024), "SnapKV", arXiv:2404.14469, section 4, with keys for queries.
    """

    pool: int = 7

    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the mean attention weight over the window, max-pooled."""
        return self._pool(self._attention(inputs).mean(2))


@dataclass(frozen=True)
class KeyNormPolicy(EvictionPolicy):
    """Keeps keys of small norm, which attract attention.

    References:
        Devoto et al. (2024), "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        arXiv:2406.11430.
    """

    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the negative norm of each key."""
        norms: Tensor = inputs.keys.float().norm(dim=-1)
        return -norms
