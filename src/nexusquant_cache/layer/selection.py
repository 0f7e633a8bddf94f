"""Which of the tokens that wait a compression takes, and which of these it keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.layer.observations import QUERY_WINDOW
from nexusquant_cache.layer.schedule import candidates
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import LayerState
from nexusquant_cache.policy import ScoreInputs

_CERTAIN = 5
"""One in so many tokens of an equal share every head keeps, whatever its scores."""


@dataclass(frozen=True)
class Scope:
    """The tokens of the tail that a compression takes out of it, but for sinks.

    Attributes:
        state: The layer.
        shared: What its layers share.
        stop: They are among the first so many of the tail.
        sinks: How many sinks there are among these.
        places: Where the sinks of each row are; None if they come first in all rows.
    """

    state: LayerState
    shared: Shared
    stop: int
    sinks: int
    places: Int[Tensor, "b s"] | None

    @classmethod
    def of(cls, state: LayerState, shared: Shared) -> "Scope":
        """Return the scope of a compression of a layer as it is now."""
        is_first = state.body is None
        sinks = shared.settings.sink_tokens if is_first else 0
        stop = sinks + candidates(state, shared)
        is_padded = state.pads is not None and bool(state.pads[:, :stop].any())
        places = _sink_places(state, sinks, stop) if sinks and is_padded else None
        return cls(state, shared, stop, sinks, places)

    @cached_property
    def phase(self) -> RotaryPhase | None:
        """What is taken off keys."""
        state = self.state
        return self.shared.make_phase(state.layer_idx, state.seen) if state.body is None else state.phase

    @property
    def is_sink(self) -> Bool[Tensor, "b tail"]:
        """Which tokens of the tail are sinks."""
        state = self.state
        found = torch.zeros(len(state.exact[0]), state.tail_tokens, dtype=torch.bool, device=state.home)
        if self.places is not None:
            return found.scatter_(1, self.places, value=True)
        found[:, : self.sinks] = True
        return found

    @cached_property
    def free(self) -> Bool[Tensor, "b stop"]:
        """Which of them are real and no sinks: among these a policy chooses."""
        taken = ~self.is_sink[:, : self.stop]
        return taken if self.state.pads is None else taken & ~self.state.pads[:, : self.stop]

    @cached_property
    def budgets(self) -> list[int]:
        """How many tokens the heads of each row keep, on average, as if the row were compressed alone."""
        state, settings = self.state, self.shared.settings
        before = state.seen - state.tail_tokens
        origins = [0] * len(self.free) if state.origins is None else state.origins.tolist()
        counts = self.free.sum(1).tolist()
        return [settings.budget(count, before - origin) for count, origin in zip(counts, origins, strict=True)]

    @cached_property
    def can_shrink(self) -> bool:
        """Whether a row would keep fewer tokens than it has."""
        return self.shared.evicts and sum(self.budgets) < int(self.free.sum())

    def scores(self) -> "Scores":
        """Return what the policy thinks of each token.

        It is shown a row without its pads, as if the row had been alone; rows with the same pads together.
        """
        state, is_sink, stop, free = self.state, self.is_sink, self.stop, self.free
        policy, budgets = state.policy, self.budgets
        assert policy is not None
        pads = torch.zeros_like(is_sink) if state.pads is None else state.pads
        scores = torch.zeros(free.shape, dtype=torch.float64, device=free.device)
        scores = scores.masked_fill_(~free, -torch.inf)[:, None].repeat(1, state.exact[0].shape[1], 1)
        for members in self._alike():
            row = members[0]
            if budgets[row] == int(free[row].sum()):
                continue  # all stay
            real = (~pads[row] | is_sink[row]).nonzero()[:, 0]
            protected = is_sink[row, real] | (real >= stop)
            found = policy.checked_scores(self._inputs(members, real, protected)).double()
            index = torch.tensor(members, device=free.device)[:, None], real[~protected]
            scores.movedim(1, 2)[index] = found[..., ~protected].movedim(1, 2)
        return Scores(scores, tuple(budgets), is_comparable=policy.scores_are_comparable)

    def _alike(self) -> list[list[int]]:
        """Return the rows whose pads are the same, together."""
        state, rows = self.state, len(self.state.exact[0])
        marks = [x for x in (state.pads, state.sink_positions, state.origins) if x is not None]
        if not marks:
            return [list(range(rows))]
        found: dict[tuple[int, ...], list[int]] = {}
        for row in range(rows):
            key = tuple(number for mark in marks for number in mark[row].reshape(-1).tolist())
            found.setdefault(key, []).append(row)
        return list(found.values())

    def _inputs(self, members: list[int], real: Int[Tensor, " real"], protected: Bool[Tensor, " real"]) -> ScoreInputs:
        """Return what a policy sees of these rows: the tokens of the tail that are no padding."""
        state = self.state
        is_all = len(members) == len(state.exact[0]) and len(real) == state.tail_tokens
        keys, values = state.exact if is_all else (x[members][:, :, real] for x in state.exact)
        queries = state.observed.last_queries(min(QUERY_WINDOW, state.tail_tokens), state.seen)
        if queries is not None:
            before = state.tail_tokens - queries.shape[2]
            queries = queries[members][:, :, real[real >= before] - before]
        attention = state.observed.attention_to(state.tail_tokens)
        far = state.observed.far
        origins = state.origins
        start = state.seen - state.tail_tokens - (0 if origins is None else int(origins[members[0]]))
        return ScoreInputs(
            keys=keys,
            values=values,
            positions=torch.arange(len(real), device=keys.device) + max(start, 0),
            protected=protected,
            layer_idx=state.layer_idx,
            queries=queries if queries is not None and queries.shape[2] else None,
            reconstruction=None if attention is None else attention[members][:, :, real],
            far_attention=None if far is None else far[members][:, :, real],
            phase=self.phase,
        )


@dataclass(frozen=True)
class Scores:
    """What a policy thinks of the tokens of one layer.

    Attributes:
        scores: Of every token that a `Scope` may take; minus infinity for those that it leaves.
        budgets: How many tokens the heads of each row keep, on average over its heads and layers.
        is_comparable: Whether scores of different heads and layers can be compared.
    """

    scores: Float[Tensor, "b h n"]
    budgets: tuple[int, ...]
    is_comparable: bool

    def equal(self) -> Int[Tensor, "b h"]:
        """Return how many tokens each head keeps if all heads of a row keep equally many."""
        heads = self.scores.shape[1]
        return torch.tensor(self.budgets, device=self.scores.device)[:, None].repeat(1, heads)


def shared_counts(layers: Sequence[Scores]) -> list[Int[Tensor, "b h"]]:
    """Return how many tokens each row and head of each layer keeps, where one threshold decides over all of a row.

    Together they keep as many as with equal shares.  A fifth of its equal share each head keeps for certain.

    Args:
        layers: Layers of one batch whose scores can be compared.

    References:
        Feng et al. (2024), "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
        Inference", arXiv:2407.11550, for the heads of a layer.  One threshold over all layers is ours.
    """
    device = layers[0].scores.device
    equal = [layer.equal() for layer in layers]
    certain = [(counts + _CERTAIN - 1) // _CERTAIN for counts in equal]
    rest = torch.stack([(a - b).sum(1).to(device) for a, b in zip(equal, certain, strict=True)]).sum(0)
    # What each head keeps for certain no longer takes part; ties go to the first layer, head and token.
    open_ = [
        layer.scores.masked_fill(_ranks(layer.scores) < counts[..., None], -torch.inf).to(device)
        for layer, counts in zip(layers, certain, strict=True)
    ]
    together = torch.cat([scores.flatten(1) for scores in open_], 1)
    taken = (_ranks(together) < rest[:, None]) & ~together.isneginf()
    parts = taken.split([scores[0].numel() for scores in open_], 1)
    return [
        counts + part.view_as(scores).sum(-1).to(counts.device)
        for counts, part, scores in zip(certain, parts, open_, strict=True)
    ]


@dataclass(frozen=True)
class Selection:
    """What a compression of a layer encodes, and what it keeps of it.

    As many tokens of each row and head are encoded: of heads that keep fewer than others, their next best ones too.

    Attributes:
        taken: Which tokens are encoded.
        kept: Which of them are kept.
        unlike: Which of them say nothing of the tokens of their row: it keeps fewer than others in all of its heads.
        scope: What was chosen from, if that is known already.
    """

    taken: Bool[Tensor, "b h n"]
    kept: Bool[Tensor, "b h n"]
    unlike: Bool[Tensor, "b h n"]
    scope: Scope | None = None

    @property
    def most_tokens(self) -> int:
        """How many tokens heads keep, on average, in the row that keeps most."""
        return int(self.kept.sum(-1).double().mean(1).amax())

    @classmethod
    def of(cls, scores: Float[Tensor, "b h n"], counts: Int[Tensor, "b h"]) -> "Selection":
        """Return the best tokens of each head.

        Args:
            scores: Minus infinity for tokens that are not kept.
            counts: How many each head keeps.
        """
        ranks, of_row = _ranks(scores), counts.amax(1)[:, None, None]
        most = max(int(of_row.max()), 1)  # a body without a token could not be fitted to
        taken = ranks < most
        return cls(taken, ranks < counts[..., None], taken & (ranks >= of_row))


def _ranks(scores: Float[Tensor, "*heads n"]) -> Int[Tensor, "*heads n"]:
    """Return the place of each score, 0 for the greatest; of equal ones the first comes first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _sink_places(state: LayerState, sinks: int, stop: int) -> Int[Tensor, "b s"]:
    """Return where each row has its first real tokens; where it has too few, the last of its pads."""
    assert state.pads is not None
    pads = state.pads[:, :stop]
    order = torch.arange(stop, device=pads.device)
    rank = torch.where(pads, 2 * stop - order, order)
    return rank.argsort(1)[:, :sinks].sort(1).values
