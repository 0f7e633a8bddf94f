"""One compression of a layer: score, keep, fit, encode."""

from dataclasses import dataclass, replace

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
from nexusquant_cache.layer.selection import Scope, Selection, shared_counts
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import Codecs, LayerState
from nexusquant_cache.layer.tokens import LayerTransforms, PackedSide, PackedTokens, own


def evicts_now(state: LayerState, shared: Shared) -> bool:
    """Tell whether a compression of the layer as it is now may drop tokens: a prompt waits whose attention was seen."""
    is_long = candidates(state, shared) >= shared.settings.min_tokens
    return state.turn.is_pending and is_long and shared.evicts and state.may_evict


def make_room(state: LayerState, shared: Shared, selection: Selection | None = None) -> None:
    """Encode what the tail need not hold, if enough of it waits: of a prompt the best tokens, else all.

    Autocast is switched off meanwhile: precision is chosen step by step.

    Args:
        state: The layer.
        shared: What the layers share.
        selection: Which tokens of a prompt to keep; by default what the layer would choose alone.
    """
    settings, count = shared.settings, candidates(state, shared)
    compression = Compression(state, shared)
    with torch.autocast(state.home.type, enabled=False):
        if state.turn.is_pending and count >= settings.min_tokens:
            scope = (selection and selection.scope) or Scope.of(state, shared)
            if scope.can_shrink and state.may_evict:
                selection = selection or select_alone(scope)
            elif scope.can_shrink:
                shared.warn_kept_whole(state.layer_idx)
            compression.encode_oldest(scope, selection)
        elif not state.turn.is_pending and count >= (
            settings.min_tokens if state.body is None else settings.flush_length
        ):
            compression.encode_oldest(Scope.of(state, shared), None)
    stop_waiting(state)


def select_alone(scope: Scope) -> Selection:
    """Return what a layer keeps that is compressed for itself."""
    found = scope.scores()
    (counts,) = shared_counts([found]) if found.is_comparable else (found.equal(),)
    return Selection.of(found.scores, counts)


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
        left_out: Which of them are padding, or not of the row; None if none are.
        tokens: How many of them heads keep, on average; those of the longest row.
        is_short: Whether all are kept, and would be if attention was seen.
    """

    keys: Float[Tensor, "b h n d"]
    values: Float[Tensor, "b h n dv"]
    columns: Int[Tensor, "*heads n"]
    sinks: Int[Tensor, "b s"] | None
    phase: RotaryPhase | None
    start: int
    left_out: Bool[Tensor, "b h n"] | None
    tokens: int
    is_short: bool

    @property
    def origins(self) -> Int[Tensor, " b"] | None:
        """Position from which each row counts."""
        return None if self.sinks is None else own(self.sinks[:, 0])


@dataclass(frozen=True)
class Compression:
    """A compression of a layer."""

    state: LayerState
    shared: Shared

    def encode_oldest(self, scope: Scope, selection: Selection | None) -> None:
        """Move the tokens of a scope out of the tail, encoding them, or those selected.

        Nothing changes before everything is computed: an error leaves the layer as it was.
        """
        state, stop, phase = self.state, scope.stop, scope.phase
        is_first = state.body is None
        offset = state.seen - state.tail_tokens
        taken = None if selection is None else selection.taken
        if taken is None and scope.places is not None:
            taken = ~scope.is_sink[:, None, :stop].expand(-1, state.exact[0].shape[1], -1)
        start = scope.sinks if taken is None else 0
        keys, values = (_pick(x[:, :, start:stop], taken) for x in state.exact)
        check_finite(state.layer_idx, keys, values, "generated tokens")

        columns: Int[Tensor, "*heads n"] = torch.arange(start, stop, device=keys.device)
        if taken is not None:
            columns = columns.expand(*taken.shape)[taken].view(*keys.shape[:3])
        left_out = self._left_out(columns, None if selection is None else selection.unlike)
        first = None
        if is_first:
            tokens = keys.shape[2] if selection is None else selection.most_tokens
            is_short = not scope.can_shrink
            first = _First(keys, values, columns, scope.places, phase, start, left_out, tokens, is_short)
        if phase is not None:
            origins = state.origins if first is None else first.origins
            angles = angles_of(columns + offset, origins, *keys.shape[:2])
            keys = phase.rotate(keys.float(), angles, inverse=True)
        if first is not None:
            self._start_body(replace(first, keys=keys))
        else:
            self._append(keys, values)
        self._place(keys.shape[2], taken, taken if selection is None else selection.kept)
        state.cut_tail(stop, state.tail_tokens)
        if state.pads is not None and not bool(state.pads.any()):
            state.pads = None

    def _place(self, tokens: int, taken: Bool[Tensor, "b h n"] | None, kept: Bool[Tensor, "b h n"] | None) -> None:
        """Say where the newest packed tokens are, and let go of those that are not kept."""
        body = self.state.body
        assert body is not None
        positions = body.positions
        if taken is None or kept is None:
            positions.append_all(tokens)
            return
        before, fresh = positions.visible(), kept[taken].view(*kept.shape[:2], tokens)
        is_ragged = before is not None or not bool(fresh.all())
        if before is None:
            before = fresh.new_ones(*fresh.shape[:2], positions.tokens)
        positions.append(kept)
        if is_ragged:
            body.choose(torch.cat([before, fresh], 2))

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
        return codecs[0].for_tokens(first.tokens), codecs[1].for_tokens(first.tokens)

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
        self, columns: Int[Tensor, "*heads n"], unlike: Bool[Tensor, "b h m"] | None
    ) -> Bool[Tensor, "b h n"] | None:
        """Return which tokens of the tail say nothing of their row, padding and `Selection.unlike`; None if none do."""
        pads = self.state.pads
        if pads is None and unlike is None:
            return None
        lead = self.state.exact[0].shape[:2]
        index = columns.expand(*lead, columns.shape[-1])
        marks = [
            x.expand(*lead, -1).gather(2, index)
            for x in (None if pads is None else pads[:, None], unlike)
            if x is not None
        ]
        found = torch.stack(marks).any(0)
        return found if bool(found.any()) else None

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
        """Fit to one row, without what is left out; in all its heads that is equally many."""
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


def _with_more_bits(codecs: Codecs, bits: float = 1.0) -> Codecs | None:
    """Return both codecs with more bits, or the one that has such; None if neither has."""
    more = codecs[0].with_more_bits(bits), codecs[1].with_more_bits(bits)
    return None if more == (None, None) else (more[0] or codecs[0], more[1] or codecs[1])


def _pick(x: Tensor, taken: Bool[Tensor, "b h n"] | None) -> Tensor:
    """Return the tokens that are taken, of each head the same number."""
    if taken is None:
        return x
    return x[taken].view(*taken.shape[:2], -1, x.shape[-1])
