"""Policies made of other policies."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.errors import OptionError
from nexusquant_cache.policy.base import (
    Aggregate,
    EvictionPolicy,
    PooledPolicy,
    ScoreInputs,
    aggregated,
    check_aggregate,
)


class PolicyOfPolicies(EvictionPolicy):
    """Scores by the scores of others, and needs what they need."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[EvictionPolicy]:
        """The others."""

    @property
    def wants_queries(self) -> bool:
        """Whether any of them does."""
        return any(part.wants_queries for part in self.parts)

    @property
    def most_queries(self) -> int:
        """The most that any of them looks at."""
        return max(part.most_queries for part in self.parts)

    @property
    def requires_queries(self) -> bool:
        """Whether any of them does."""
        return any(part.requires_queries for part in self.parts)

    @property
    def wants_reconstruction(self) -> bool:
        """Whether any of them does."""
        return any(part.wants_reconstruction for part in self.parts)

    @property
    def requires_reconstruction(self) -> bool:
        """Whether any of them does."""
        return any(part.requires_reconstruction for part in self.parts)

    @property
    def wants_far_attention(self) -> bool:
        """Whether any of them does."""
        return any(part.wants_far_attention for part in self.parts)

    def check_inputs(self, inputs: ScoreInputs) -> None:
        """Leave that to the parts, which are named in their messages."""


@dataclass(frozen=True)
class ValueAware(PolicyOfPolicies, PooledPolicy):
    """Multiplies the scores of another policy by the size of the values: attention adds weight times value.

    Negative scores, like those of `KeyNormPolicy`, are first shifted so that the least one is zero.

    Args:
        policy: The other policy; with ``pool=1`` it leaves the pooling to this one.
        pool: Width of the max-pooling of the product, in tokens; odd.  1 leaves it to the other policy.

    References:
        Guo, Kamigaito & Watanabe (2024), "Attention Score is not All You Need for Token Importance Indicator in KV
        Cache Reduction: Value Also Matters", arXiv:2406.12335, equation 4, with their norm, the sum of magnitudes.
    """

    policy: EvictionPolicy
    pool: int = field(default=1, kw_only=True)

    @property
    def parts(self) -> Sequence[EvictionPolicy]:
        """The other policy."""
        return (self.policy,)

    @property
    def scores_are_comparable(self) -> bool:
        """Whether the other policy's are."""
        return self.policy.scores_are_comparable

    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return score times norm."""
        scores = self.policy.checked_scores(inputs).float()
        least = scores.masked_fill(inputs.protected, torch.inf).amin(-1, keepdim=True)
        norms: Tensor = inputs.values.float().abs().sum(-1)
        return (scores - least.clamp_max(0)) * norms


@dataclass(frozen=True)
class SharedOverHeads(PolicyOfPolicies):
    """Lets all heads of a layer keep the same tokens: what one of them needs, the others keep for it.

    Scores of different heads are compared by their ranks.

    Args:
        policy: Whose scores are shared.
        aggregate: ``"max"`` keeps what any head ranks high, ``"mean"`` what they agree on.
    """

    policy: EvictionPolicy
    aggregate: Aggregate = "max"

    def __post_init__(self) -> None:
        """Check the option."""
        check_aggregate(self.aggregate)

    @property
    def parts(self) -> Sequence[EvictionPolicy]:
        """The other policy."""
        return (self.policy,)

    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the ranks, the same for all heads."""
        ranks = _ranks(self.policy, inputs, _less)
        return aggregated(ranks, self.aggregate, 1, keepdim=True).expand_as(ranks)


@dataclass(frozen=True)
class EqualBudgets(PolicyOfPolicies):
    """Lets all heads of all layers keep equally many tokens, whatever the scores of another policy are.

    Args:
        policy: Whose scores choose the tokens of a head.
    """

    policy: EvictionPolicy

    @property
    def parts(self) -> Sequence[EvictionPolicy]:
        """The other policy."""
        return (self.policy,)

    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the scores of the other policy."""
        return self.policy.checked_scores(inputs)


@dataclass(frozen=True)
class Combined(PolicyOfPolicies):
    """Uses several policies at once, whose scores are compared by their ranks in each head.

    Args:
        policies: The policies.
        aggregate: ``"max"`` keeps what any of them ranks high, ``"mean"`` what they agree on.
        shares: How many of the places each policy fills, relative to each other; positive, equal by default.  A token
            that several choose takes one place.  For ``"mean"`` they are weights.
    """

    policies: Sequence[EvictionPolicy]
    aggregate: Aggregate = "max"
    shares: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_aggregate(self.aggregate)
        if not self.policies:
            msg = "Combined needs at least one policy"
            raise OptionError(msg)
        _check_numbers("shares", self.shares, self.policies)

    @property
    def parts(self) -> Sequence[EvictionPolicy]:
        """The policies."""
        return self.policies

    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the aggregated ranks."""
        count = _place if self.aggregate == "max" else _less
        ranks = torch.stack([_ranks(part, inputs, count) for part in self.parts])
        if self.shares is None:
            return aggregated(ranks, self.aggregate, 0)
        shares = ranks.new_tensor(self.shares).view(-1, 1, 1, 1)
        if self.aggregate == "mean":
            return (ranks * shares).sum(0) / shares.sum()
        # Above any threshold, a policy with share 3 has three tokens where one with share 1 has one.
        return (1 - (1 - ranks) / (shares / shares.max())).amax(0)


@dataclass(frozen=True)
class Averaged(PolicyOfPolicies):
    """Uses the mean of the scores of several policies, which must be of one kind, such as parts of attention.

    Args:
        policies: The policies.
        weights: How much each counts, relative to each other; positive, equal by default.
    """

    policies: Sequence[EvictionPolicy]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.policies:
            msg = "Averaged needs at least one policy"
            raise OptionError(msg)
        _check_numbers("weights", self.weights, self.policies)

    @property
    def parts(self) -> Sequence[EvictionPolicy]:
        """The policies."""
        return self.policies

    @property
    def scores_are_comparable(self) -> bool:
        """Whether those of all of them are."""
        return all(part.scores_are_comparable for part in self.parts)

    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the mean."""
        weights = self.weights or [1.0] * len(self.parts)
        scores = [weight * part.checked_scores(inputs) for weight, part in zip(weights, self.parts, strict=True)]
        return torch.stack(scores).sum(0) / sum(weights)


@dataclass(frozen=True)
class IfReadAgain(PolicyOfPolicies):
    """Scores by one policy where the prompt has been read a second time, and by another one where it has not.

    Args:
        policy: Where it has, see `NexusQuantCache.read_again`.
        otherwise: Where it has not.
    """

    policy: EvictionPolicy
    otherwise: EvictionPolicy

    @property
    def parts(self) -> Sequence[EvictionPolicy]:
        """Both."""
        return self.policy, self.otherwise

    @property
    def wants_reconstruction(self) -> bool:
        """True: it tells which policy scores."""
        return True

    @property
    def requires_reconstruction(self) -> bool:
        """Whether the policy does that scores without one."""
        return self.otherwise.requires_reconstruction

    @property
    def scores_are_comparable(self) -> bool:
        """Whether those of both are."""
        return all(part.scores_are_comparable for part in self.parts)

    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the scores of one of them."""
        policy = self.otherwise if inputs.reconstruction is None else self.policy
        return policy.checked_scores(inputs)


def _check_numbers(name: str, numbers: Sequence[float] | None, policies: Sequence[EvictionPolicy]) -> None:
    """Raise OptionError if these are not one positive number for each policy."""
    is_right = numbers is None or (len(numbers) == len(policies) and all(0 < x < float("inf") for x in numbers))
    if not is_right:
        msg = f"{name} must be one positive number for each of {len(policies)} policies, got {numbers!r}"
        raise OptionError(msg)


def _ranks(policy: EvictionPolicy, inputs: ScoreInputs, count: Callable[[Tensor], Tensor]) -> Float[Tensor, "b h n"]:
    """Return the part of its head's unprotected tokens that come after a token; 0 for protected ones.

    Args:
        policy: Whose scores decide.
        inputs: What it is shown.
        count: Returns how many scores come after each: `_less`, or `_place`.
    """
    scores = policy.checked_scores(inputs).float()
    free = inputs.free
    ranks = torch.zeros_like(scores)
    ranks[..., free] = count(scores.index_select(-1, free)).float() / max(len(free), 1)
    return ranks


def _less(scores: Tensor) -> Tensor:
    """Return how many scores are less than each, of equal ones the same."""
    scores = scores.contiguous()
    return torch.searchsorted(scores.sort(-1).values, scores)


def _place(scores: Tensor) -> Tensor:
    """Return the place of each score from below; of equal ones, of which pooling makes many, the last comes highest.

    So a policy fills its share whatever its scores are.
    """
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1)
