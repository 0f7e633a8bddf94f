"""Policies that look at queries, or at the attention they pay."""

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.errors import OptionError
from nexusquant_cache.policy.base import Aggregate, PooledPolicy, ScoreInputs, aggregated, check_aggregate
from nexusquant_cache.policy.keys import centred, check_window, covariance_of, key_attention


@dataclass(frozen=True)
class WindowAttentionPolicy(PooledPolicy):
    """Keeps what the last queries attend to: `KeyKeyPolicy` with real queries in place of keys.

    Requires queries.  Several query heads share a key: the one that attends to it most decides.  Soft-capping and sink
    logits of a model are left out.

    Args:
        observation_window: How many of the last queries are asked.
        aggregate: ``"max"`` or ``"mean"`` over the window.
        pool: Width of the max-pooling, in tokens; odd.

    References:
        Li et al. (2024), "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv:2404.14469, section 4;
        the maximum instead of the mean and the width are ours.
    """

    observation_window: int = 32
    aggregate: Aggregate = "max"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_window(self.observation_window)
        check_aggregate(self.aggregate)

    @property
    def most_queries(self) -> int:
        """The window, if it is wider than usual."""
        return max(self.observation_window, super().most_queries)

    @property
    def requires_queries(self) -> bool:
        """True."""
        return True

    @property
    def scores_are_comparable(self) -> bool:
        """True: they are parts of attention."""
        return True

    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the attention that each token gets from the window, by the head that attends to it most."""
        weights = _causal_attention(inputs, self.observation_window)
        return aggregated(weights, self.aggregate, 3).amax(2)


@dataclass(frozen=True)
class RecentAttentionPolicy(WindowAttentionPolicy):
    """Keeps what the last queries attend to on average; without queries, what the last keys do.

    That keeps what the model is busy with, and so its predictions.  For facts that it is not busy with, combine it with
    `LeveragePolicy`.

    References:
        As of `WindowAttentionPolicy`.
    """

    observation_window: int = 64
    aggregate: Aggregate = "mean"

    @property
    def wants_queries(self) -> bool:
        """True."""
        return True

    @property
    def requires_queries(self) -> bool:
        """False: keys stand in for them."""
        return False

    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the attention that a token gets from the window."""
        if inputs.queries is not None:
            return super().token_scores(inputs)
        weights = key_attention(inputs, self.observation_window)
        return aggregated(weights, self.aggregate, 2)


@dataclass(frozen=True)
class ExpectedAttentionPolicy(PooledPolicy):
    """Keeps what queries still to come are expected to attend to, if they are like the last ones.

    The last queries, without their rotary phase, give the mean and covariance of a Gaussian.  It is turned by the mean
    phase of the next positions, and the score of a key is the expectation of ``exp(q k / sqrt(d))``.

    Where the last queries are not known, keys stand in for them, centred as in `KeyKeyPolicy`, and a line in the log
    says so.  Where no rotary phase is known, nothing is turned.

    Args:
        future_tokens: How many of the next positions the mean phase is taken over.
        pool: Width of the max-pooling, in tokens; odd.

    References:
        Devoto, Jeblick & Jégou (2025), "Expected Attention: KV Cache Compression by Estimating Attention from Future
        Queries Distribution", arXiv:2510.00636, section 3.  There, hidden states give the statistics, and the norm of
        the value is a factor (`ValueAware`); the maximum over a group of query heads and the pooling are ours.
    """

    future_tokens: int = 512

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.future_tokens < 1:
            msg = f"future_tokens must be at least 1, got {self.future_tokens}"
            raise OptionError(msg)

    @property
    def wants_queries(self) -> bool:
        """True."""
        return True

    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the expected attention, by the query head for which it is greatest; sinks get none."""
        keys, mean, spread = _stand_in_statistics(inputs) if inputs.queries is None else _statistics(inputs)
        turn, root = _mean_turn(inputs, self.future_tokens), keys.shape[-1] ** 0.5
        logits = _products(mean @ turn, keys)[..., 0, :] / root
        logits += _products(spread @ turn, keys).div_(root).square_().sum(-2) / 2
        logits[..., : inputs.sink_tokens] = -torch.inf
        expected: Tensor = logits.softmax(-1).amax(2)
        return expected


@dataclass(frozen=True)
class FarAttentionPolicy(PooledPolicy):
    """Keeps what any later part of the prompt looks back at, at least 64 tokens later: facts that are taken up again.

    Nearly every token gets attention from those that follow it; what is looked back at from afar is rare, and likely to
    be looked at again.  So this serves questions that come later, without a second reading.

    Where it is not known, as in a prompt that was saved by an earlier release, the last queries decide.

    It costs the logits of the prompt once more; where more than a third of the tokens is kept (`keep_ratio`), those of
    every second query.

    Args:
        pool: Width of the max-pooling, in tokens; odd.
    """

    @property
    def wants_queries(self) -> bool:
        """True: far attention is computed from them as they come."""
        return True

    @property
    def wants_far_attention(self) -> bool:
        """True."""
        return True

    @property
    def scores_are_comparable(self) -> bool:
        """True: they are parts of attention."""
        return True

    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the greatest far attention; where it is not known, that of the last queries."""
        if inputs.far_attention is None:
            return RecentAttentionPolicy(observation_window=64, aggregate="max").token_scores(inputs)
        return inputs.far_attention


@dataclass(frozen=True)
class ReconstructionPolicy(PooledPolicy):
    """Keeps what the model attends to when it reads the prompt a second time, as if to repeat it.

    That depends on no question, so it serves any that comes later.

    Requires `nexusquant_cache.attention.reconstruct`, which costs about as much as a prefill.

    Args:
        pool: Width of the max-pooling, in tokens; odd.  1 by default: each token has been looked for by itself.

    References:
        Kim et al. (2025), "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv:2505.23416.
    """

    pool: int = field(default=1, kw_only=True)

    @property
    def requires_reconstruction(self) -> bool:
        """True."""
        return True

    @property
    def scores_are_comparable(self) -> bool:
        """True: they are parts of attention."""
        return True

    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the greatest attention of the second reading."""
        assert inputs.reconstruction is not None
        return inputs.reconstruction


def _products(
    queries: Float[Tensor, "b h group w d"], keys: Float[Tensor, "b h n d"]
) -> Float[Tensor, "b h group w n"]:
    """Return the product of each query with each key of its head, without a copy of the keys for each group."""
    products: Tensor = (queries.flatten(2, 3) @ keys.mT).unflatten(2, queries.shape[2:4])
    return products


def _causal_attention(inputs: ScoreInputs, window: int) -> Float[Tensor, "b h group w n"]:
    """Return the attention weights of the last queries; none sees what comes after it."""
    queries = inputs.grouped_queries[..., -window:, :] * inputs.keys.shape[-1] ** -0.5
    logits = _products(queries, inputs.keys.float())
    count, tokens = logits.shape[-2:]
    future = torch.ones(count, tokens, dtype=torch.bool, device=logits.device).triu(tokens - count + 1)
    return logits.masked_fill_(future, -torch.inf).softmax(-1)


Statistics: TypeAlias = tuple[
    Float[Tensor, "b h n d"], Float[Tensor, "b h group 1 d"], Float[Tensor, "b h group rank d"]
]
"""Keys, and of each query head the mean of its queries and a matrix ``S`` with ``S^T S`` their covariance."""


def _statistics(inputs: ScoreInputs) -> Statistics:
    """Return the statistics of the queries, without their rotary phase."""
    queries = inputs.grouped_queries
    if inputs.phase is not None:
        positions = inputs.positions[-queries.shape[3] :]
        queries = inputs.phase.rotate(queries.flatten(1, 2), positions, inverse=True).view_as(queries)
    mean = queries.mean(3, keepdim=True)
    return inputs.keys.float(), mean, (queries - mean) * queries.shape[3] ** -0.5


def _stand_in_statistics(inputs: ScoreInputs) -> Statistics:
    """Return the statistics of the keys, which stand in for queries."""
    stand_ins = centred(inputs.unrotated_keys, inputs)
    variances, axes = torch.linalg.eigh(covariance_of(stand_ins[:, :, inputs.sink_tokens :]))
    spread = variances.clamp_min(0).sqrt()[..., None] * axes.mT
    return centred(inputs.keys.float(), inputs), torch.zeros_like(spread[:, :, None, :1]), spread[:, :, None]


def _mean_turn(inputs: ScoreInputs, future_tokens: int) -> Float[Tensor, "d d"]:
    """Return the matrix that turns a row vector by the phases of the next positions, on average."""
    identity = torch.eye(inputs.keys.shape[-1], dtype=torch.float32, device=inputs.keys.device)
    if inputs.phase is None:
        return identity
    positions = inputs.positions[-1] + 1 + torch.arange(future_tokens, device=identity.device)
    turned = inputs.phase.rotate(identity[None, :, None].expand(-1, -1, future_tokens, -1), positions)
    return turned.mean(2)[0]
