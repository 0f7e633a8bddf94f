"""Which tokens of a prompt are kept: a policy scores all of them, as the codes hold them, and the best stay."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nexusquant_cache.layer.reading import newest
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import LayerState, Pair
from nexusquant_cache.policy import ScoreInputs

_CERTAIN = 5
"""One in so many tokens of an equal share every head keeps, whatever its scores."""


@dataclass(frozen=True)
class Scope:
    """The tokens of a prompt that waits, all of them held: coded ones, from which a policy chooses, and exact ones.

    Attributes:
        state: The layer.
        shared: What its layers share.
    """

    state: LayerState
    shared: Shared

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.state.waiting_tokens

    @property
    def stop(self) -> int:
        """How many come before the tail."""
        return self.tokens - self.state.tail_tokens

    @property
    def first(self) -> int:
        """Position of the first."""
        return self.state.seen - self.tokens

    @property
    def pads(self) -> Bool[Tensor, "b tokens"]:
        """Which of them are padding."""
        state = self.state
        if state.pads is not None:
            return state.pads
        return torch.zeros(len(state.exact[0]), self.tokens, dtype=torch.bool, device=state.home)

    @property
    def is_sink(self) -> Bool[Tensor, "b tokens"]:
        """Which of them are sinks."""
        state = self.state
        found = torch.zeros(len(state.exact[0]), state.seen, dtype=torch.bool, device=state.home)
        if state.sink_positions is None:
            found[:, : state.sink_tokens] = True
        else:
            found.scatter_(1, state.sink_positions, value=True)
        return found[:, self.first :]

    @cached_property
    def free(self) -> Bool[Tensor, "b stop"]:
        """Which of them are coded and no padding: among these a policy chooses."""
        return ~(self.is_sink | self.pads)[:, : self.stop]

    @cached_property
    def budgets(self) -> list[int]:
        """How many tokens the heads of each row keep, on average, as if the row were compressed alone."""
        origins = [0] * len(self.free) if self.state.origins is None else self.state.origins.tolist()
        counts = self.free.sum(1).tolist()
        return [
            self.shared.settings.budget(count, max(self.first - origin, 0))
            for count, origin in zip(counts, origins, strict=True)
        ]

    @cached_property
    def can_shrink(self) -> bool:
        """Whether a row would keep fewer tokens than it has."""
        return self.shared.evicts and sum(self.budgets) < int(self.free.sum())

    def scores(self) -> "Scores":
        """Return what the policy thinks of each token.

        It is shown a row without its pads, as if the row had been alone; rows with the same pads together.
        """
        state, is_sink, pads, free, stop = self.state, self.is_sink, self.pads, self.free, self.stop
        policy, budgets = state.policy, self.budgets
        states = newest(state, 0, self.tokens), newest(state, 1, self.tokens)
        assert policy is not None
        scores = torch.zeros(free.shape, dtype=torch.float64, device=free.device)
        scores = scores.masked_fill_(~free, -torch.inf)[:, None].repeat(1, state.exact[0].shape[1], 1)
        for members in self._alike():
            row = members[0]
            if budgets[row] == int(free[row].sum()):
                continue  # all stay
            real = (~pads[row] | is_sink[row]).nonzero()[:, 0]
            protected = is_sink[row, real] | (real >= stop)
            found = policy.checked_scores(self._inputs(states, members, real, protected)).double()
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

    def _inputs(
        self, states: Pair, members: list[int], real: Int[Tensor, " real"], protected: Bool[Tensor, " real"]
    ) -> ScoreInputs:
        """Return what a policy sees of these rows: the tokens that are no padding."""
        state, tokens = self.state, self.tokens
        is_all = len(members) == len(states[0]) and len(real) == tokens
        keys, values = states if is_all else (x[members][:, :, real] for x in states)
        queries = state.observed.last_queries(tokens, state.seen)
        if queries is not None:
            before = tokens - queries.shape[2]
            queries = queries[members][:, :, real[real >= before] - before]
        attention = state.observed.attention_to(tokens)
        far = state.observed.far
        start = self.first - (0 if state.origins is None else int(state.origins[members[0]]))
        return ScoreInputs(
            keys=keys,
            values=values,
            positions=torch.arange(len(real), device=keys.device) + max(start, 0),
            protected=protected,
            layer_idx=state.layer_idx,
            queries=queries if queries is not None and queries.shape[2] else None,
            reconstruction=None if attention is None else attention[members][:, :, real],
            far_attention=None if far is None else far[members][:, :, real],
            phase=state.phase,
        )

    def keep(self, kept: Bool[Tensor, "b h stop"]) -> None:
        """Let go of all coded tokens of the prompt but these."""
        body = self.state.body
        assert body is not None
        positions = body.positions
        before = positions.visible()
        coded = ~self.is_sink[:, None, : self.stop].expand_as(kept)
        fresh = kept[coded].view(*kept.shape[:2], -1)
        earlier = positions.tokens - fresh.shape[2]
        if before is None:
            before = fresh.new_ones(*fresh.shape[:2], earlier)
        positions.restrict(kept[:, :, max(positions.start - self.first, 0) :])
        body.choose(torch.cat([before[:, :, :earlier], fresh], 2))


@dataclass(frozen=True)
class Scores:
    """What a policy thinks of the tokens of one layer.

    Attributes:
        scores: Of every token of a `Scope` before the tail; minus infinity for those that it does not choose from.
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

    def best(self, counts: Int[Tensor, "b h"]) -> Bool[Tensor, "b h n"]:
        """Return the best tokens of each head, as many as these."""
        return _ranks(self.scores) < counts[..., None]

    def chosen_alone(self) -> Bool[Tensor, "b h n"]:
        """Return what the layer keeps if it chooses for itself."""
        return self.best(shared_counts([self])[0] if self.is_comparable else self.equal())


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
        layer.scores.masked_fill(layer.best(counts), -torch.inf).to(device)
        for layer, counts in zip(layers, certain, strict=True)
    ]
    together = torch.cat([scores.flatten(1) for scores in open_], 1)
    taken = (_ranks(together) < rest[:, None]) & ~together.isneginf()
    parts = taken.split([scores[0].numel() for scores in open_], 1)
    return [
        counts + part.view_as(scores).sum(-1).to(counts.device)
        for counts, part, scores in zip(certain, parts, open_, strict=True)
    ]


def _ranks(scores: Float[Tensor, "*heads n"]) -> Int[Tensor, "*heads n"]:
    """Return the place of each score, 0 for the greatest; of equal ones the first comes first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
