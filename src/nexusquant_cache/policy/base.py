"""What a policy is shown, and what it gets from its base class."""

import functools
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.errors import CacheStateError, NonFiniteError, OptionError, ShapeError, suggest

_LOGGER = logging.getLogger(__name__)

Aggregate: TypeAlias = Literal["max", "mean"]


@dataclass(frozen=True)
class ScoreInputs:
    """What a policy may look at: one layer's tokens of a prompt, when it is decided which of them are kept.

    Attributes:
        keys: Keys as attention sees them (with their rotary phase), as the codes hold them; sinks and recent tokens
            exact.  ``[batch, kv_heads, tokens, head_dim]``.
        values: Values of the same tokens.
        positions: Original positions, ascending.
        protected: Tokens that are kept whatever their score: sinks and recent tokens.
        layer_idx: Index of the layer in the model.
        queries: The queries of the last ``w`` tokens, at most `EvictionPolicy.most_queries`, as attention sees them,
            scaled so that ``queries @ keys.mT / head_dim**0.5`` are the model's logits.  Query head ``i`` belongs to KV
            head ``i // (query_heads // kv_heads)``.  None if the policy does not want them, or if those of the newest
            tokens are not known: the end of the prompt was cropped, or the row ends with as much padding.
        reconstruction: The greatest attention that any query paid to a token while the model read the prompt a second
            time; None without `nexusquant_cache.attention.reconstruct`.
        far_attention: The greatest attention that any query of these tokens, or any second one where more than a third
            is kept, paid to a token at least 64 before it; None if the policy does not want it, or the prompt was saved
            by a release that did not know it.
        phase: The rotary phase of the keys, if it is known.
    """

    keys: Float[Tensor, "b h n d"]
    values: Float[Tensor, "b h n dv"]
    positions: Int[Tensor, "n"]
    protected: Bool[Tensor, "n"]
    layer_idx: int
    queries: Float[Tensor, "b q w d"] | None = None
    reconstruction: Float[Tensor, "b h n"] | None = None
    far_attention: Float[Tensor, "b h n"] | None = None
    phase: RotaryPhase | None = None

    @cached_property
    def unrotated_keys(self) -> Float[Tensor, "b h n d"]:
        """The keys without their rotary phase, in float32; the keys as they are if no phase is known.

        It is known to a cache that was made with ``config=model.config`` and removes it (``remove_rope``).
        """
        keys = self.keys.float()
        return keys if self.phase is None else self.phase.rotate(keys, self.positions, inverse=True)

    @property
    def grouped_queries(self) -> Float[Tensor, "b h group w d"]:
        """The queries in float32, those that share a KV head together.

        Raises:
            CacheStateError: If there are none.
        """
        if self.queries is None:
            msg = f"layer {self.layer_idx} was shown no queries; test inputs.queries, or let the policy require them"
            raise CacheStateError(msg)
        grouped: Tensor = self.queries.float().unflatten(1, (self.keys.shape[1], -1))
        return grouped

    @property
    def free(self) -> Int[Tensor, "free"]:
        """Indices of the tokens that are not protected."""
        return (~self.protected).nonzero()[:, 0]

    @property
    def sink_tokens(self) -> int:
        """Number of protected tokens at the beginning."""
        return int(self.protected.long().cumprod(0).sum()) if not bool(self.protected.all()) else 0


class EvictionPolicy(ABC):
    """Scores tokens; the highest scores are kept.

    Subclasses implement `score`, and say whether they look at queries.  They are called once per layer and
    compression, hold no state of a cache, and may be shared between caches.
    """

    @property
    def wants_queries(self) -> bool:
        """Whether the policy looks at queries.  The cache then keeps the last ones that it is shown."""
        return self.requires_queries

    @property
    def most_queries(self) -> int:
        """The number of newest queries that are kept for the policy; 64 by default."""
        return 64

    @property
    def requires_queries(self) -> bool:
        """Whether the policy cannot score without them."""
        return False

    @property
    def wants_reconstruction(self) -> bool:
        """Whether the policy looks at `ScoreInputs.reconstruction`.  If not, `NexusQuantCache.read_again` is spared."""
        return self.requires_reconstruction

    @property
    def requires_reconstruction(self) -> bool:
        """Whether the policy cannot score without `ScoreInputs.reconstruction`."""
        return False

    @property
    def wants_far_attention(self) -> bool:
        """Whether the policy looks at `ScoreInputs.far_attention`, which costs the logits of the prompt once more."""
        return False

    @property
    def scores_are_comparable(self) -> bool:
        """Whether scores of different heads and layers can be compared, as parts of all attention can.

        All heads of all layers then share one budget, and what scores highest is kept, wherever it is.  If not, the
        default, every head keeps equally many tokens.
        """
        return False

    @abstractmethod
    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the importance of every token, per head, in any floating dtype.

        Only the order within a head matters, unless `scores_are_comparable`.  Scores of protected tokens are ignored.
        They must be finite.
        """

    def checked_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the result of `score`, checked.  Policies made of others call it on these.

        Raises:
            CacheStateError: If the policy requires queries or a reconstruction, and there are none.
            ShapeError: If `score` returned another shape than ``[batch, kv_heads, tokens]``.
            NonFiniteError: If a score of an unprotected token is NaN or infinite.
        """
        self.check_inputs(inputs)
        scores = self.score(inputs)
        name, expected = type(self).__name__, tuple(inputs.keys.shape[:3])
        if scores.shape != expected:
            msg = f"{name}.score must return [batch, kv_heads, tokens] = {expected}, got shape {tuple(scores.shape)}"
            raise ShapeError(msg)
        if not bool(torch.isfinite(scores.index_select(-1, inputs.free)).all()):
            msg = f"{name}.score returned NaN or infinity in layer {inputs.layer_idx}; scores must be finite"
            raise NonFiniteError(msg)
        return scores

    def check_inputs(self, inputs: ScoreInputs) -> None:
        """Check that the policy has what it requires; log it if keys stand in for queries that it wants.

        Raises:
            CacheStateError: If queries or a reconstruction are required, and there are none.
        """
        name = type(self).__name__
        if self.requires_queries and inputs.queries is None:
            msg = (
                f"{name} scores by queries, and those of the newest tokens of layer {inputs.layer_idx} are not known, "
                "as after a crop or much padding on the right: let the model read more tokens, or choose a policy that "
                "does without."
            )
            raise CacheStateError(msg)
        if self.requires_reconstruction and inputs.reconstruction is None:
            msg = (
                f"{name} scores by a second reading of the prompt. Call cache.read_again(model, input_ids) between the "
                "prompt and the first generation step."
            )
            raise CacheStateError(msg)
        if self.wants_queries and inputs.queries is None:
            _note_stand_ins(name)


@dataclass(frozen=True)
class PooledPolicy(EvictionPolicy):
    """Scores tokens one by one, then gives each token the greatest score near it.

    A fact is several tokens long, and half of it is worth nothing.

    Args:
        pool: Width of the max-pooling, in tokens; odd.  1 leaves the scores as they are.
    """

    pool: int = field(default=21, kw_only=True)

    def __post_init__(self) -> None:
        """Check the width."""
        if self.pool < 1 or self.pool % 2 == 0:
            msg = f"pool must be an odd number of tokens, at least 1, got {self.pool}"
            raise OptionError(msg)

    @abstractmethod
    def token_scores(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the importance of every token by itself."""

    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return for each token the greatest score within ``pool // 2`` tokens of it."""
        return F.max_pool1d(self.token_scores(inputs), self.pool, stride=1, padding=self.pool // 2)


def check_aggregate(aggregate: str) -> None:
    """Raise OptionError if this is neither ``"max"`` nor ``"mean"``."""
    if aggregate not in get_args(Aggregate):
        msg = f"unknown aggregate={aggregate!r}. {suggest(str(aggregate), get_args(Aggregate))}"
        raise OptionError(msg)


def aggregated(scores: Tensor, aggregate: Aggregate, axis: int, *, keepdim: bool = False) -> Tensor:
    """Return the greatest or the mean score along an axis."""
    return scores.amax(axis, keepdim=keepdim) if aggregate == "max" else scores.mean(axis, keepdim=keepdim)


@functools.cache
def _note_stand_ins(name: str) -> None:
    """Log, once for each class of policies, that keys stand in for queries."""
    _LOGGER.info(
        "%s is shown no queries and takes keys in their place: those of the newest tokens are not known, as after a "
        "crop or much padding on the right",
        name,
    )
