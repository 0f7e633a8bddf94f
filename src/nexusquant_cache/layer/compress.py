"""One compression of a layer: fit, encode, choose what stays."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.held import angles_of
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.layer.checks import check_finite
from nexusquant_cache.layer.observations import Observations
from nexusquant_cache.layer.probe import attention_error, stand_in_queries
from nexusquant_cache.layer.schedule import candidates
from nexusquant_cache.layer.selection import Scope
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import Codecs, LayerState
from nexusquant_cache.layer.tokens import LayerTransforms, PackedSide, PackedTokens, own

_PROBED = 64  # queries that try what encoding does to attention


def encode_oldest(state: LayerState, shared: Shared) -> None:
    """Move all but the newest tokens of a layer out of the tail, encoded; of the first ones, the sinks as they are.

    Autocast is switched off meanwhile: precision is chosen step by step.  Nothing changes before everything is
    computed: an error leaves the layer as it was.
    """
    with torch.autocast(state.home.type, enabled=False):
        _Encoding(state, shared).encode_oldest()


def choice(state: LayerState, shared: Shared) -> Scope | None:
    """Return the tokens of a prompt of which some are to be dropped now; None if there are none.

    Where some would be, and cannot be, a warning says so.
    """
    if not state.turn.is_pending or state.body is None or not shared.evicts:
        return None
    scope = Scope(state, shared)
    if scope.stop <= 0 or not scope.can_shrink:
        return None
    if not state.may_evict:
        shared.warn_kept_whole(state.layer_idx)
        return None
    return scope


def choose_alone(state: LayerState, shared: Shared) -> None:
    """Drop the tokens of a prompt that a layer for itself does not keep."""
    scope = choice(state, shared)
    if scope is not None:
        with torch.autocast(state.home.type, enabled=False):
            scope.keep(scope.scores().chosen_alone())


def stop_waiting(state: LayerState) -> None:
    """Let go of what was kept for a choice."""
    state.turn.pending_from = None
    state.observed = Observations()
    state.trim_pads()


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
        left_out: Which of them are padding; None if none are.
        tokens: How many of them heads will keep, on average; those of the longest row.
        is_short: Whether all will be kept, and would be if attention was seen.
    """

    keys: Float[Tensor, "b h n d"]
    values: Float[Tensor, "b h n dv"]
    columns: Int[Tensor, "*rows n"]
    sinks: Int[Tensor, "b s"] | None
    phase: RotaryPhase | None
    start: int
    left_out: Bool[Tensor, "b n"] | None
    tokens: int
    is_short: bool

    @property
    def origins(self) -> Int[Tensor, " b"] | None:
        """Position from which each row counts."""
        return None if self.sinks is None else own(self.sinks[:, 0])


@dataclass(frozen=True)
class _Encoding:
    """An encoding of tokens of a layer."""

    state: LayerState
    shared: Shared

    def encode_oldest(self) -> None:
        """Move tokens out of the tail; see the function of this name."""
        state, shared = self.state, self.shared
        sinks = shared.settings.sink_tokens if state.body is None else 0
        offset, stop = state.seen - state.tail_tokens, sinks + candidates(state, shared)
        pads = None if state.body is not None or state.pads is None else state.pads[:, :stop]
        places = _sink_places(pads, sinks) if sinks and pads is not None and bool(pads.any()) else None
        columns: Int[Tensor, "*rows n"] = torch.arange(sinks, stop, device=state.home)
        taken = None
        if places is not None and pads is not None:
            taken = torch.ones_like(pads).scatter_(1, places, value=False)[:, None]
            columns = taken.nonzero()[:, -1].view(len(taken), 1, -1)
        keys, values = (_at(x, columns) for x in state.exact)
        check_finite(state.layer_idx, keys, values, "generated tokens")

        first, phase, origins = None, state.phase, state.origins
        if state.body is None:
            phase = shared.make_phase(state.layer_idx, state.seen)
            tokens, is_short = self._outlook(pads, columns)
            left_out = None if pads is None or not bool(pads.any()) else _at(pads[:, None], columns)[:, 0]
            start = 0 if places is not None else sinks
            first = _First(keys, values, columns, places, phase, start, left_out, tokens, is_short)
            origins = first.origins
        if phase is not None:
            angles = angles_of(columns + offset, origins, *keys.shape[:2])
            keys = phase.rotate(keys.float(), angles, inverse=True)
        if first is not None:
            self._start_body(replace(first, keys=keys))
        else:
            self._append(keys, values)
        assert state.body is not None
        if taken is None:
            state.body.positions.append_all(keys.shape[2])
        else:
            state.body.positions.append(taken.expand(-1, keys.shape[1], -1))
        state.cut_tail(stop, state.tail_tokens)
        state.trim_pads()

    def _outlook(self, pads: Bool[Tensor, "b stop"] | None, columns: Int[Tensor, "*rows n"]) -> tuple[int, bool]:
        """Return how many of the first tokens heads will keep, on average, of the longest row, and whether all."""
        state, shared = self.state, self.shared
        counts = [columns.shape[-1]] if pads is None else (~_at(pads[:, None], columns)).sum((1, 2)).tolist()
        budgets = [shared.settings.budget(count) for count in counts]
        if not shared.evicts or budgets == counts:
            return columns.shape[-1], True
        return max(budgets) if state.may_evict else columns.shape[-1], False

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
        codecs = given.codecs if given else self._codecs_for(first)
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

    def _codecs_for(self, first: _First) -> Codecs:
        codecs, more = self.state.codecs, self.shared.settings.short_text_bits
        assert codecs is not None
        if first.is_short and more:
            codecs = _with_more_bits(codecs, more) or codecs
        keys, values = first.keys, first.values
        if first.left_out is not None:
            counts = (~first.left_out).sum(1)
            longest = (counts == counts.max()).nonzero()[:, 0].tolist()
            rows = [self._real_of(row, first) for row in longest]
            most = max(keys.shape[2] for keys, _ in rows)  # they differ where all to encode is padding
            keys, values = map(torch.cat, zip(*(row for row in rows if row[0].shape[2] == most), strict=True))
        return codecs[0].for_tokens(keys, first.tokens), codecs[1].for_tokens(values, first.tokens)

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
        queries = self.state.observed.last_queries(_PROBED, self.state.seen)
        if queries is None:
            queries = stand_in_queries(self.state.exact[0], keys[0])
        hidden = None if first.left_out is None else first.left_out[:, None]
        return attention_error(queries, (keys[0], first.values), (keys[1], decoded[1]), hidden)

    # What the first compression fixes

    def _fit(self, first: _First, codecs: Codecs) -> tuple[VectorTransform, VectorTransform]:
        """Fit both codecs to the tokens that are going to be encoded, pads left out."""
        left_out = first.left_out
        if left_out is None:
            return codecs[0].fit(first.keys), codecs[1].fit(first.values)
        rows = range(len(left_out))
        fitted = [[codec.fit(x) for codec, x in zip(codecs, self._real_of(row, first), strict=True)] for row in rows]
        keys, values = (VectorTransform.cat(side) for side in map(list, zip(*fitted, strict=True)))
        return keys, values

    def _real_of(self, row: int, first: _First) -> tuple[Tensor, Tensor]:
        """Return one row without what is left out."""
        keys, values = first.keys[row : row + 1], first.values[row : row + 1]
        if first.left_out is not None:
            keys, values = keys[:, :, ~first.left_out[row]], values[:, :, ~first.left_out[row]]
        return (keys, values) if keys.shape[2] else self._real_in_tail(row, first)

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
        return _at(keys, places[:, None]), _at(values, places[:, None])


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


def _with_more_bits(codecs: Codecs, bits: float = 1.0) -> Codecs | None:
    """Return both codecs with more bits, or the one that has such; None if neither has."""
    more = codecs[0].with_more_bits(bits), codecs[1].with_more_bits(bits)
    return None if more == (None, None) else (more[0] or codecs[0], more[1] or codecs[1])


def _at(x: Shaped[Tensor, "b h m *rest"], columns: Int[Tensor, "*rows n"]) -> Shaped[Tensor, "b h n *rest"]:
    """Return the tokens at these columns, which are ascending: the same without a gap, or those of each row."""
    if columns.ndim == 1:
        return x[:, :, int(columns[0]) : int(columns[-1]) + 1] if len(columns) else x[:, :, :0]
    index = columns.expand(-1, x.shape[1], -1)
    return x.gather(2, index.view(*index.shape, *(1,) * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:]))


def _sink_places(pads: Bool[Tensor, "b n"], sinks: int) -> Int[Tensor, "b s"]:
    """Return where each row has its first real tokens; where it has too few, the last of its pads."""
    stop = pads.shape[1]
    order = torch.arange(stop, device=pads.device)
    rank = torch.where(pads, 2 * stop - order, order)
    return rank.argsort(1)[:, :sinks].sort(1).values
