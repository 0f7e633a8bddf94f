"""Policies that look at keys alone."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.errors import OptionError
from nexusquant_cache.policy.base import EvictionPolicy, PooledPolicy, ScoreInputs

_TINY = 1e-12  # in place of zero, where all keys are equal


@dataclass(frozen=True)
class KeyKeyPolicy(PooledPolicy):
    """Keeps what the last keys attend to: keys stand in for queries.

    Keys are centred first (sinks not counted), since what all keys have in common is large and tells nothing.  The
    **maximum** over the observation window and max-pooling over some twenty tokens keep whole facts: a number is
    several tokens long, and half of it is worth nothing.

    Args:
        observation_window: How many of the newest keys act as queries.
        pool: Width of the max-pooling, in tokens; odd.

    References:
        The observation window and pooling are those of Li et al. (2024), "SnapKV", arXiv:2404.14469, section
        4; keys instead of queries, the maximum instead of the mean and the width are ours.
    """

    observation_window: int = 32

    def __post_init__(self) -> None:
        """Check the window and the width."""
        super().__post_init__()
        check_window(self.observation_window)

    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the greatest attention weight that any key of the window gives to a token."""
        return key_attention(inputs, self.observation_window).amax(2)


@dataclass(frozen=True)
class MeanKeyKeyPolicy(KeyKeyPolicy):
    """Keeps what the last keys attend to on average, narrowly pooled: the usual recipe, for comparison.

    A fact that only a few of the last keys attend to drowns in the mean, and narrow pooling keeps parts of it.

    References:
        Li et al. (2024), "SnapKV", arXiv:2404.14469, section 4, with keys for queries.
    """

    pool: int = field(default=7, kw_only=True)

    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the mean attention weight over the window."""
        return key_attention(inputs, self.observation_window).mean(2)


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


@dataclass(frozen=True)
class KeyDiffPolicy(PooledPolicy):
    """Keeps keys whose direction is unlike that of the others, whatever will be asked.

    References:
        Park et al. (2025), "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
        Resource-Constrained Environments", arXiv:2504.15364; the anchor is the mean of the normalised keys.  The
        pooling is ours.
    """

    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the negative cosine similarity of each key to the mean direction of all keys."""
        directions = F.normalize(inputs.keys.float(), dim=-1)
        return -F.cosine_similarity(directions, directions.mean(2, keepdim=True), dim=-1)


@dataclass(frozen=True)
class LeveragePolicy(PooledPolicy):
    """Keeps keys that no combination of the other keys comes near, whatever will be asked.

    The score of a key ``k`` is its ridge leverage ``k^T (C + lambda I)^-1 k``.  Keys are without their rotary phase and
    centred (sinks not counted).  ``C`` is their covariance, ``lambda`` is ``ridge`` times their mean variance.

    Args:
        ridge: How large a variance must be to count, relative to the mean; positive.  With less, directions in which
            keys hardly differ would decide.
        pool: Width of the max-pooling, in tokens; odd.

    References:
        Chari & Van Durme (2025), "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage
        Scores", arXiv:2507.08143.  They sketch; at the width of a head the exact scores cost no more.  Centring,
        ridge and pooling are ours.
    """

    ridge: float = 1e-2

    def __post_init__(self) -> None:
        """Check the ridge and the width."""
        super().__post_init__()
        if not self.ridge > 0:
            msg = f"ridge must be positive, got {self.ridge}"
            raise OptionError(msg)

    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the ridge leverage of each key."""
        keys = centred(inputs.unrotated_keys, inputs)
        keys = keys / keys.abs().amax((2, 3), keepdim=True).clamp_min(_TINY)  # the scale does not matter
        covariance = covariance_of(keys[:, :, inputs.sink_tokens :])
        variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        identity = torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device)
        solved = torch.linalg.solve(covariance + self.ridge * variance.clamp_min(_TINY) * identity, keys.mT)
        leverages: Tensor = (keys * solved.mT).sum(-1)
        return leverages


def key_attention(inputs: ScoreInputs, window: int) -> Float[Tensor, "b h w n"]:
    """Return the attention that the last keys would pay if they were queries; all keys are centred."""
    keys = centred(inputs.keys.float(), inputs)
    logits: Tensor = keys[:, :, -window:] @ keys.mT * keys.shape[-1] ** -0.5
    return logits.softmax(-1)


def centred(keys: Float[Tensor, "b h n d"], inputs: ScoreInputs) -> Float[Tensor, "b h n d"]:
    """Return keys without the mean of each head, sinks not counted."""
    return keys - keys[:, :, inputs.sink_tokens :].mean(2, keepdim=True)


def covariance_of(centred: Float[Tensor, "*heads n d"]) -> Float[Tensor, "*heads d d"]:
    """Return the covariance of vectors whose mean is zero."""
    return centred.mT @ centred / centred.shape[-2]


def check_window(window: int) -> None:
    """Raise OptionError if this is no number of tokens to look from."""
    if window < 1:
        msg = f"observation_window must be at least 1 token, got {window}"
        raise OptionError(msg)
