"""One compression of a layer: score, keep, fit, encode."""

from dataclasses import dataclass, replace
from math import ceil

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.held import angles_of
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.layer.checks import check_finite
from nexusquant_cache.layer.observations import QUERY_WINDOW, Observations
from nexusquant_cache.layer.probe import attention_error, stand_in_queries
from nexusquant_cache.layer.schedule import candidates
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import Codecs, LayerState
from nexusquant_cache.layer.tokens import LayerTransforms, PackedSide, PackedTokens, own
from nexusquant_cache.policy import ScoreInputs


def make_room(state: LayerState, shared: Shared) -> None:
    """Encode what the tail need not hold, if enough of it waits: of a prompt the best tokens, else all.

    Autocast is switched off meanwhile: precision is chosen step by step.
    """
    settings, count = shared.settings, candidates(state, shared)
    compression = Compression(state, shared)
    with torch.autocast(state.home.type, enabled=False):
        if state.turn.is_pending and count >= settings.min_tokens:
            if not state.may_evict and ceil(settings.keep_ratio * count) < count:
                shared.warn_kept_whole(state.layer_idx)
            compression.encode_oldest(count, evicts=shared.evicts and state.may_evict)
        elif not state.turn.is_pending and count >= (
            settings.min_tokens if state.body is None else settings.flush_length
        ):
            compression.encode_oldest(count, evicts=False)
    stop_waiting(state)


def stop_waiting(state: LayerState) -> None:
    """Let go of what was kept for a compression."""
    state.turn.pending_from = None
    state.observed = Observations()


@dataclass(frozen=True)
class _First:
    """The tokens of a layer's first compression.

    Attributes:
        keys: Those to encode, without their rotary phase if it is known.
        values: Likewise.
        columns: Where they are in the tail, which begins with position 0.
        sinks: Where the sinks of each row are in the tail; None if they come first in all rows.
        phase: What was taken off the keys.
        start: Where the map of positions begins.
        left_out: Which of them are padding, or hidden; None if none are.
    """

    keys: Float[Tensor, "b h n d"]
    values: Float[Tensor, "b h n dv"]
    columns: Int[Tensor, "*heads n"]
    sinks: Int[Tensor, "b s"] | None
    phase: RotaryPhase | None
    start: int
    left_out: Bool[Tensor, "b h n"] | None

    @property
    def origins(self) -> Int[Tensor, " b"] | None:
        """Position from which each row counts."""
        return None if self.sinks is None else own(self.sinks[:, 0])


@dataclass(frozen=True)
class Compression:
    """A compression of a layer.

    Each row keeps as many tokens as it would alone.  All rows and heads store equally many, so that rows that keep
    fewer store others beside, which stay hidden: their pads, if they have any.
    """

    state: LayerState
    shared: Shared

    def encode_oldest(self, count: int, *, evicts: bool) -> None:
        """Move ``count`` tokens out of the tail, encoding them, or the best of them.

        Nothing changes before everything is computed: an error leaves the layer as it was.
        """
        state = self.state
        is_first = state.body is None
        offset = state.seen - state.tail_tokens
        sinks = self.shared.settings.sink_tokens if is_first else 0
        stop = sinks + count
        is_padded = state.pads is not None and bool(state.pads[:, :stop].any())
        places = self._sink_places(sinks, stop) if sinks and is_padded else None
        phase = self.shared.make_phase(state.layer_idx, state.seen) if is_first else state.phase
        is_sink = self._is_sink(sinks, places)
        keep = hidden = None
        if evicts:
            keep, hidden = self._select(is_sink, stop, phase)
        elif places is not None:
            keep = ~is_sink[:, None, :stop].expand(-1, state.exact[0].shape[1], -1)
        start = sinks if keep is None else 0
        keys, values = (_pick(x[:, :, start:stop], keep) for x in state.exact)
        check_finite(state.layer_idx, keys, values, "generated tokens")

        columns: Int[Tensor, "*heads n"] = torch.arange(start, stop, device=keys.device)
        if keep is not None:
            columns = columns.expand(*keep.shape)[keep].view(*keys.shape[:3])
        left_out = self._left_out(columns, hidden)
        first = _First(keys, values, columns, places, phase, start, left_out) if is_first else None
        if phase is not None:
            origins = state.origins if first is None else first.origins
            angles = angles_of(columns + offset, origins, *keys.shape[:2])
            keys = phase.rotate(keys.float(), angles, inverse=True)
        if first is not None:
            self._start_body(replace(first, keys=keys))
        else:
            self._append(keys, values)
        assert state.body is not None
        if keep is None:
            state.body.positions.append_all(keys.shape[2])
        else:
            state.body.positions.append(keep, hidden)
        state.cut_tail(stop, state.tail_tokens)
        if state.pads is not None and not bool(state.pads.any()):
            state.pads = None

    def _append(self, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n dv"]) -> None:
        body, codecs = self.state.body, self.state.codecs
        assert body is not None
        assert codecs is not None
        packed_keys = codecs[0].encode(keys, body.keys.transform)
        packed_values = codecs[1].encode(values, body.values.transform)
        body.keys.append(packed_keys)  # when both are there
        body.values.append(packed_values)

    def _start_body(self, first: _First) -> None:
        """Fit the transforms and encode the first tokens, with more bits if attention would suffer too much."""
        state, most = self.state, self.shared.settings.most_code_error
        sinks = self._take_sinks(first.sinks)
        given = self.shared.given_to(state.layer_idx)
        codecs = given.codecs if given else self._codecs_for(first.keys.shape[2])
        while True:
            keys, values = self._encode_first(first, codecs)
            error = self._code_error(first, (codecs[0].decode(*keys), codecs[1].decode(*values)))
            more = None if error <= most else _with_more_bits(codecs)
            if more is None:
                break
            codecs = more
        if error > most:
            self.shared.warn_code_error(state.layer_idx, error)
        state.codecs, state.code_error = codecs, error
        state.sinks, state.sink_positions, state.origins = sinks, first.sinks, first.origins
        state.phase = first.phase
        # Sinks inside the covered range are simply not among the kept ones of the map.
        state.body = PackedTokens(PackedSide.of(*keys), PackedSide.of(*values), PositionMap(first.start))

    def _codecs_for(self, tokens: int) -> Codecs:
        assert self.state.codecs is not None
        return self.state.codecs[0].for_tokens(tokens), self.state.codecs[1].for_tokens(tokens)

    def _encode_first(
        self, first: _First, codecs: Codecs
    ) -> tuple[tuple[PackedVectors, VectorTransform], tuple[PackedVectors, VectorTransform]]:
        """Return the first tokens encoded, keys and values each with their transform."""
        transforms = self._given_transforms(codecs)
        if transforms is None:
            transforms = self._fit(first, codecs)
        keys, values = codecs[0].encode(first.keys, transforms[0]), codecs[1].encode(first.values, transforms[1])
        return (keys, transforms[0]), (values, transforms[1])

    def _given_transforms(self, codecs: Codecs) -> tuple[VectorTransform, VectorTransform] | None:
        """Return the transforms that were given, for this batch; None if there are none, or these codecs differ."""
        given = self.shared.given_to(self.state.layer_idx)
        if given is None or given.codecs != codecs:
            return None
        batch, device = self.state.exact[0].shape[0], self.state.home

        def fitted(x: Tensor) -> Tensor:
            return x.to(device).expand(batch, *x.shape[1:])

        return given.keys.map_batch(fitted), given.values.map_batch(fitted)

    def _code_error(self, first: _First, decoded: tuple[Tensor, Tensor]) -> float:
        """Return how much encoding changes attention; see `probe.attention_error`."""
        keys = [first.keys, decoded[0]]
        if first.phase is not None:
            angles = angles_of(first.columns, first.origins, *first.keys.shape[:2])
            keys = [first.phase.rotate(x.float(), angles) for x in keys]
        queries = self.state.observed.last_queries(QUERY_WINDOW, self.state.seen)
        if queries is None:
            queries = stand_in_queries(self.state.exact[0], keys[0])
        return attention_error(queries, (keys[0], first.values), (keys[1], decoded[1]), first.left_out)

    def _left_out(
        self, columns: Int[Tensor, "*heads n"], hidden: Bool[Tensor, "b h m"] | None
    ) -> Bool[Tensor, "b h n"] | None:
        """Return which tokens of the tail are padding or hidden; None if none are."""
        pads = self.state.pads
        if pads is None and hidden is None:
            return None
        lead = self.state.exact[0].shape[:2]
        index = columns.expand(*lead, columns.shape[-1])
        marks = [
            x.expand(*lead, -1).gather(2, index)
            for x in (None if pads is None else pads[:, None], hidden)
            if x is not None
        ]
        found = torch.stack(marks).any(0)
        return found if bool(found.any()) else None

    # Which tokens stay

    def _sink_places(self, sinks: int, stop: int) -> Int[Tensor, "b s"]:
        """Return where each row has its first real tokens; where it has too few, the last of its pads."""
        assert self.state.pads is not None
        pads = self.state.pads[:, :stop]
        order = torch.arange(stop, device=pads.device)
        rank = torch.where(pads, 2 * stop - order, order)
        return rank.argsort(1)[:, :sinks].sort(1).values

    def _is_sink(self, sinks: int, places: Int[Tensor, "b s"] | None) -> Bool[Tensor, "b tail"]:
        """Return which tokens of the tail are sinks."""
        rows, device = len(self.state.exact[0]), self.state.home
        found = torch.zeros(rows, self.state.tail_tokens, dtype=torch.bool, device=device)
        if places is not None:
            return found.scatter_(1, places, value=True)
        found[:, :sinks] = True
        return found

    def _select(
        self, is_sink: Bool[Tensor, "b tail"], stop: int, phase: RotaryPhase | None
    ) -> tuple[Bool[Tensor, "b h n"], Bool[Tensor, "b h n"] | None]:
        """Choose which of the first ``stop`` tokens of the tail to encode, and which of these to hide.

        The policy is shown a row without its pads, as if the row had been alone; rows with the same pads together.
        """
        state = self.state
        keys, policy = state.exact[0], state.policy
        assert policy is not None
        pads = torch.zeros_like(is_sink) if state.pads is None else state.pads
        free = ~is_sink[:, :stop] & ~pads[:, :stop]
        counts = [self._kept_of(candidates) for candidates in free.sum(1).tolist()]
        keep = free[:, None].expand(-1, keys.shape[1], -1).clone()
        for members in self._alike():
            row = members[0]
            real = (~pads[row] | is_sink[row]).nonzero()[:, 0]
            inside = int((real < stop).sum())
            protected = is_sink[row, real] | (real >= stop)
            if counts[row] < int(free[row].sum()):
                selected = policy.select(self._score_inputs(members, real, protected, phase), counts[row])
                keep[members] &= _scattered(selected[..., :inside], real[:inside], stop)
        most = max(*counts, 1)  # a body without a token could not be fitted to
        if min(counts) == most:
            return keep, None
        # Rows that keep fewer store pads beside, then others, the oldest first.
        rank = torch.where(pads[:, None, :stop], 0, 1).expand_as(keep) + 2 * keep + 4 * is_sink[:, None, :stop]
        order = rank.argsort(dim=-1, stable=True)
        short = most - torch.tensor(counts, device=keys.device)
        fills = torch.arange(stop, device=keys.device) < short[:, None, None]
        hidden = torch.zeros_like(keep).scatter_(-1, order, fills.expand_as(keep))
        return keep | hidden, hidden

    def _kept_of(self, candidates: int) -> int:
        """Return how many of so many tokens a row keeps that is compressed alone."""
        settings = self.shared.settings
        return candidates if candidates < settings.min_tokens else ceil(settings.keep_ratio * candidates)

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

    def _score_inputs(
        self,
        members: list[int],
        real: Int[Tensor, " real"],
        protected: Bool[Tensor, " real"],
        phase: RotaryPhase | None,
    ) -> ScoreInputs:
        """Return what a policy sees of these rows: the tokens of the tail that are no padding."""
        state = self.state
        is_all = len(members) == len(state.exact[0]) and len(real) == state.tail_tokens
        keys, values = state.exact if is_all else (x[members][:, :, real] for x in state.exact)
        queries = state.observed.last_queries(min(QUERY_WINDOW, state.tail_tokens), state.seen)
        if queries is not None:
            before = state.tail_tokens - queries.shape[2]
            queries = queries[members][:, :, real[real >= before] - before]
        attention = state.observed.attention_to(state.tail_tokens)
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
            phase=phase,
        )

    # What the first compression fixes

    def _fit(self, first: _First, codecs: Codecs) -> tuple[VectorTransform, VectorTransform]:
        """Fit both codecs to the tokens that are going to be encoded, pads left out."""
        left_out = first.left_out
        if left_out is None:
            return codecs[0].fit(first.keys), codecs[1].fit(first.values)
        fitted = [self._fit_row(row, first, left_out[row], codecs) for row in range(len(left_out))]
        return VectorTransform.cat([keys for keys, _ in fitted]), VectorTransform.cat([values for _, values in fitted])

    def _fit_row(
        self, row: int, first: _First, left_out: Bool[Tensor, "h n"], codecs: Codecs
    ) -> tuple[VectorTransform, VectorTransform]:
        """Fit to one row that stores pads, or tokens that are hidden; in all its heads these are equally many."""
        heads = len(left_out)
        keys, values = (x[row][~left_out].view(1, heads, -1, x.shape[-1]) for x in (first.keys, first.values))
        if not keys.shape[2]:
            keys, values = self._real_in_tail(row, first)
        return codecs[0].fit(keys), codecs[1].fit(values)

    def _real_in_tail(self, row: int, first: _First) -> tuple[Tensor, Tensor]:
        """Return what real tokens a short row has behind those to encode; of a row of pads alone anything will do."""
        assert self.state.pads is not None
        real = (~self.state.pads[row]).nonzero()[:, 0]
        if not len(real):
            return first.keys[row : row + 1], first.values[row : row + 1]
        keys, values = (x[row : row + 1, :, real] for x in self.state.exact)
        if first.phase is not None:
            origins = None if first.origins is None else first.origins[row : row + 1]
            keys = first.phase.rotate(keys.float(), angles_of(real, origins, *keys.shape[:2]), inverse=True)
        return keys, values

    def _take_sinks(self, places: Int[Tensor, "b s"] | None) -> tuple[Tensor, Tensor]:
        """Return the first real tokens of each row."""
        keys, values = self.state.exact
        if places is None:
            sinks = self.shared.settings.sink_tokens
            return own(keys[:, :, :sinks]), own(values[:, :, :sinks])
        index = places[:, None, :, None]
        keys, values = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values))
        return keys, values


def fitted_transforms(state: LayerState) -> LayerTransforms | None:
    """Return what was fitted to the prompt; None before the first compression."""
    if state.body is None or state.codecs is None or state.asked is None:
        return None
    return LayerTransforms(
        keys=state.body.keys.transform,
        values=state.body.values.transform,
        codecs=state.codecs,
        asked=state.asked,
        unrotated=state.phase is not None,
    )


def _with_more_bits(codecs: Codecs) -> Codecs | None:
    """Return both codecs with more bits, or the one that has such; None if neither has."""
    more = codecs[0].with_more_bits(), codecs[1].with_more_bits()
    return None if more == (None, None) else (more[0] or codecs[0], more[1] or codecs[1])


def _scattered(x: Bool[Tensor, "b h real"], places: Int[Tensor, " real"], tokens: int) -> Bool[Tensor, "b h n"]:
    """Return what is given for some of so many tokens for all of them, False for the others."""
    return x.new_zeros(*x.shape[:2], tokens).index_copy_(2, places, x)


def _pick(x: Tensor, keep: Bool[Tensor, "b h n"] | None) -> Tensor:
    """Return the kept tokens of each head; every head keeps the same number."""
    if keep is None:
        return x
    return x[keep].view(*keep.shape[:2], -1, x.shape[-1])
