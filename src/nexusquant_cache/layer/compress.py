"""One compression of a layer: score, keep, fit, encode."""

from dataclasses import dataclass
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
from nexusquant_cache.layer.schedule import candidates, kept_of
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
            if not shared.padding.may_evict(state.seen) and ceil(settings.keep_ratio * count) < count:
                shared.warn_kept_whole()
            compression.encode_oldest(count, kept_of(count, state, shared))
        elif not state.turn.is_pending and count >= (
            settings.min_tokens if state.body is None else settings.flush_length
        ):
            compression.encode_oldest(count, count)
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
        keep: Which tokens of the tail they are; None for all from ``start`` on.
        start: Where they begin in the tail.
        candidates: Tokens that leave the tail besides the sinks.
        count: How many of them are encoded.
        phase: What was taken off the keys.
        rows: The rows that have so many pads; None without padding.
    """

    keys: Float[Tensor, "b h n d"]
    values: Float[Tensor, "b h n dv"]
    keep: Bool[Tensor, "b h m"] | None
    start: int
    candidates: int
    count: int
    phase: RotaryPhase | None
    rows: dict[int, list[int]] | None


@dataclass(frozen=True)
class Compression:
    """A compression of a layer.

    The number of kept tokens depends on lengths alone, so it is equal in all layers, heads and rows, which
    transformers' single attention mask requires.  Kept tokens are always in the order of their positions.
    """

    state: LayerState
    shared: Shared

    def encode_oldest(self, count: int, kept: int) -> None:
        """Move ``count`` tokens out of the tail, encoding the ``kept`` best of them.

        Nothing changes before everything is computed: an error leaves the layer as it was.
        """
        state = self.state
        is_first = state.body is None
        if is_first:
            self.shared.padding.give_up()
        tail_keys, tail_values = state.exact
        offset = state.seen - state.tail_tokens
        sinks = self.shared.settings.sink_tokens if is_first else 0
        rows = self._rows_by_pads()
        # The sinks of padded rows lie in different places, so the first time their rest has to be picked.
        evicts_none = kept == count and (rows is None or not is_first)
        phase = self.shared.make_phase(state.layer_idx, state.seen) if is_first else state.phase
        keep = None if evicts_none else self._select(sinks, count, kept, rows, phase)
        start = sinks if keep is None else 0
        stop = sinks + count
        keys, values = (_pick(x[:, :, start:stop], keep) for x in (tail_keys, tail_values))
        check_finite(state.layer_idx, keys, values, "generated tokens")

        if phase is not None:
            positions: Int[Tensor, "*heads n"] = torch.arange(offset + start, offset + stop, device=keys.device)
            if keep is not None:
                positions = positions.expand(*keep.shape)[keep].view(*keep.shape[:2], kept)
            keys = phase.rotate(keys.float(), self._angles(positions, *keys.shape[:2]), inverse=True)

        if is_first:
            self._start_body(_First(keys, values, keep, start, count, kept, phase, rows))
        else:
            self._append(keys, values)
        assert state.body is not None
        if keep is None:
            state.body.positions.append_all(kept)
        else:
            state.body.positions.append(keep)
        state.cut_tail(stop, state.tail_tokens)

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
        sinks, place = self._take_sinks(self.shared.settings.sink_tokens, first.candidates, first.count)
        given = self.shared.given_to(state.layer_idx)
        codecs = given.codecs if given else self._codecs_for(first.count)
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
        state.sinks, state.sink_place, state.phase = sinks, place, first.phase
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
        keys, pads = [first.keys, decoded[0]], self.shared.padding.pads
        stop = first.start + first.keys.shape[2]
        positions: Int[Tensor, "*heads n"] = torch.arange(first.start, stop, device=self.state.home)
        if first.keep is not None:
            positions = first.keep.nonzero()[:, -1].view(*first.keys.shape[:3])
        if first.phase is not None:
            angles = self._angles(positions, *first.keys.shape[:2])
            keys = [first.phase.rotate(x.float(), angles) for x in keys]
        hidden = None
        if pads is not None:
            hidden = positions.expand(*first.keys.shape[:3]) < pads.to(self.state.home)[:, None, None]
        queries = self.state.observed.last_queries(QUERY_WINDOW, self.state.seen)
        if queries is None:
            queries = stand_in_queries(self.state.exact[0], keys[0])
        return attention_error(queries, (keys[0], first.values), (keys[1], decoded[1]), hidden)

    def _angles(self, positions: Int[Tensor, "*given n"], batch: int, heads: int) -> Int[Tensor, "*out n"]:
        """Return positions as the rotary embedding has seen them; see `held.angles_of`."""
        return angles_of(positions, self.shared.padding.pads, batch, heads)

    # Which tokens stay

    def _rows_by_pads(self) -> dict[int, list[int]] | None:
        """Return the rows that have so many pads; None without padding."""
        pads = self.shared.padding.pads
        if pads is None:
            return None
        groups: dict[int, list[int]] = {}
        for row, count in enumerate(pads.tolist()):
            groups.setdefault(count, []).append(row)
        return groups

    def _in_tail(self, pads: int) -> int:
        """Return how many of a row's leading pads the tail holds."""
        before = self.state.seen - self.state.tail_tokens
        return min(max(pads - before, 0), self.state.tail_tokens)

    def _select(
        self, sinks: int, count: int, kept: int, rows: dict[int, list[int]] | None, phase: RotaryPhase | None
    ) -> Bool[Tensor, "b h n"]:
        """Choose which of the first ``sinks + count`` tokens of the tail to encode.

        Pads go first, oldest first.  Only then does the policy choose, and it is shown a row without its pads, as if
        the row had been alone; rows with equally many pads are shown to it together.
        """
        keys, policy = self.state.exact[0], self.state.policy
        assert policy is not None
        keep = torch.ones(*keys.shape[:2], sinks + count, dtype=torch.bool, device=keys.device)
        for row_pads, members in (rows or {0: list(range(len(keys)))}).items():
            pads = min(self._in_tail(row_pads), count)
            gone = min(pads, count - kept)
            chosen = torch.ones_like(keep[members])
            if count - kept > pads:
                inputs = self._score_inputs(members, row_pads, sinks, count - pads, phase)
                selected = policy.select(inputs, kept)
                chosen[..., pads:] = selected[..., : sinks + count - pads]
            chosen[..., :gone] = False
            chosen[..., pads : pads + sinks] = False
            keep[members] = chosen
        return keep

    def _score_inputs(
        self, members: list[int], row_pads: int, sinks: int, count: int, phase: RotaryPhase | None
    ) -> ScoreInputs:
        """Return what a policy sees of these rows: their real tokens in the tail."""
        state = self.state
        keys, values = (x if len(members) == len(x) else x[members] for x in state.exact)
        pads = self._in_tail(row_pads)
        queries = state.observed.last_queries(min(QUERY_WINDOW, state.tail_tokens - pads), state.seen)
        attention = state.observed.attention_to(state.tail_tokens)
        order = torch.arange(state.tail_tokens - pads, device=keys.device)
        first = state.seen - len(order) - row_pads
        return ScoreInputs(
            keys=keys[:, :, pads:],
            values=values[:, :, pads:],
            positions=order + first,
            protected=(order < sinks) | (order >= sinks + count),
            layer_idx=state.layer_idx,
            queries=None if queries is None else queries[members],
            reconstruction=None if attention is None else attention[members][:, :, pads:],
            phase=phase,
        )

    # What the first compression fixes

    def _fit(self, first: _First, codecs: Codecs) -> tuple[VectorTransform, VectorTransform]:
        """Fit both codecs to the tokens that are going to be encoded, pads left out."""
        keys, values, rows = first.keys, first.values, first.rows
        if rows is None:
            return codecs[0].fit(keys), codecs[1].fit(values)
        parts: tuple[list[VectorTransform], list[VectorTransform]] = ([], [])
        evicted = first.candidates - first.count
        for row_pads, members in rows.items():
            in_tail = self._in_tail(row_pads)
            pads = max(min(in_tail, first.candidates) - evicted, 0)
            sample = keys[members][:, :, pads:], values[members][:, :, pads:]
            if pads == keys.shape[2] and in_tail < self.state.tail_tokens:
                sample = self._real_residual(members, in_tail, first.phase)
            elif pads == keys.shape[2]:
                sample = keys[members], values[members]  # a row of pads alone: anything will do
            parts[0].append(codecs[0].fit(sample[0]))
            parts[1].append(codecs[1].fit(sample[1]))
        order = [row for members in rows.values() for row in members]
        back = torch.tensor(order, device=keys.device).argsort()
        key_transform, value_transform = (
            VectorTransform.cat(part).map_batch(lambda x: x.index_select(0, back.to(x.device))) for part in parts
        )
        return key_transform, value_transform

    def _real_residual(self, members: list[int], pads: int, phase: RotaryPhase | None) -> tuple[Tensor, Tensor]:
        """Return the real tokens of a short row that the residual holds, keys without their phase."""
        tokens = self.state.tail_tokens
        start = max(pads, tokens - self.shared.settings.residual_length)
        keys, values = (x[members][:, :, start:] for x in self.state.exact)
        if phase is not None:
            angles = torch.arange(start - pads, tokens - pads, device=keys.device)
            keys = phase.rotate(keys.float(), angles, inverse=True)
        return keys, values

    def _take_sinks(self, sinks: int, count: int, kept: int) -> tuple[tuple[Tensor, Tensor], Int[Tensor, "b 2"] | None]:
        """Return the first real tokens of each row and, in a padded batch, where they are."""
        keys, values = self.state.exact
        pads = self.shared.padding.pads
        if pads is None:
            return (own(keys[:, :, :sinks]), own(values[:, :, :sinks])), None
        starts = pads.clamp_max(count)
        place = torch.stack([starts, (starts - (count - kept)).clamp_min(0)], 1)
        index = (starts[:, None] + torch.arange(sinks, device="cpu")).to(keys.device)[:, None, :, None]
        taken = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values)]
        return (taken[0], taken[1]), place


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


def _pick(x: Tensor, keep: Bool[Tensor, "b h n"] | None) -> Tensor:
    """Return the kept tokens of each head; every head keeps the same number."""
    if keep is None:
        return x
    return x[keep].view(*keep.shape[:2], -1, x.shape[-1])
