"""One full-attention layer of the cache: exact sinks, packed body, exact tail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.held import CodedSide, HeldTokens, Side, angles_of
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.errors import (
    CacheStateError,
    DtypeError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnsupportedError,
)
from nexusquant_cache.files.schema import LayerMeta
from nexusquant_cache.files.state import Lists, Source, Tensors, layer_state, restore_layer
from nexusquant_cache.layer.host import arrive, beside, side_stream, to_device, to_host
from nexusquant_cache.layer.observations import QUERY_WINDOW, Observations, note_keys
from nexusquant_cache.layer.padding import BatchPadding
from nexusquant_cache.layer.probe import attention_error, stand_in_queries
from nexusquant_cache.layer.tokens import LayerTransforms, PackedSide, PackedTokens
from nexusquant_cache.policy import EvictionPolicy, ScoreInputs
from nexusquant_cache.presets import CacheConfig
from nexusquant_cache.states import HeldStates

When = Literal["post_prefill", "during_prefill"]
_Codecs: TypeAlias = tuple[VectorCodec, VectorCodec]
_AXES = 4  # batch, kv_heads, tokens, head_dim


@runtime_checkable
class LayerOwner(Protocol):
    """What a layer asks of its cache."""

    cache_config: CacheConfig
    padding: BatchPadding
    when: When
    offloading: bool

    def make_policy(self, layer_idx: int) -> EvictionPolicy:
        """Return the policy of this layer."""
        ...

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of this layer's keys or values."""
        ...

    def make_phase(self, layer_idx: int, seen_tokens: int) -> RotaryPhase | None:
        """Return the rotary phase to take off this layer's keys, or None."""
        ...

    def given_transforms(self, layer_idx: int) -> LayerTransforms | None:
        """Return the transforms that this layer shall use in place of fitting its own, if there are any."""
        ...

    def warn_code_error(self, layer_idx: int, error: float) -> None:
        """Say that coding changes what attention reads beyond what is allowed."""
        ...

    def warn_kept_whole(self) -> None:
        """Say that tokens are kept for want of knowledge about the padding."""
        ...


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


class NexusQuantLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer.

    Tokens arrive in the exact ``tail``.  At the first one-token update after a longer one, everything but
    the sinks and the newest ``residual_length`` tokens is scored, partly evicted, encoded, and freed.
    Later, whenever the tail has grown by ``flush_length``, its oldest tokens are encoded and appended.
    A token is encoded once; stored codes are never decoded and encoded again.

    While past recording is active, as in assisted decoding, updates encode nothing; the `crop` that follows
    each of them does, when it has taken back what was rejected.  So a rollback leaves no trace.

    The number of kept tokens depends on lengths alone, so it is equal in all layers, heads and rows, which
    transformers' single attention mask requires.  Kept tokens are always in the order of their positions.

    Attributes:
        seen: Tokens seen.
        sinks: First tokens of each row, exact, once anything is packed.
        body: Packed tokens.
        tail: Newest tokens, exact.
        phase: The rotary phase that was taken off the packed keys.
        observed: What attention has shown of the prompt that waits for its compression.
        sink_place: Of each row of a padded batch, the position of its first sink, and how many kept tokens (pads)
            come before it.  On the CPU.
        code_error: What coding the first tokens did to attention, see `probe.attention_error`; None before.
        codes_are_read: Whether attention of ours has seen this layer's keys, and so can read codes; see
            `nexusquant_cache.attention`.
        record_past: Whether a `crop` is expected after each update; transformers sets it to False as well.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, owner: LayerOwner, layer_idx: int) -> None:
        """Start empty; ``owner`` provides policy, codecs, padding and rotary phase when they are first needed."""
        # Not calling super().__init__: it assigns `keys` and `values`, which are computed here.
        self._owner = owner
        self.layer_idx = layer_idx
        self.reset()

    def reset(self) -> None:
        """Forget everything, including what was fitted."""
        self.is_initialized = False
        self.seen = 0
        self.sinks: tuple[Tensor, Tensor] | None = None
        self.body: PackedTokens | None = None
        self.tail: tuple[Tensor, Tensor] | None = None
        self.phase: RotaryPhase | None = None
        self.record_past = False
        self._expects_prompt = False
        self._updated_since_crop = False
        # Seen tokens before the first multi-token update that was not compressed yet.
        self._pending_from: int | None = None
        self._undo: tuple[int | None, bool, bool] = (None, False, False)
        self.sink_place: Int[Tensor, "b 2"] | None = None
        self.observed = Observations()
        self.code_error: float | None = None
        self.codes_are_read = False
        self._is_parked = False  # sent away by `offload`, all of it or, after an error, some
        self._coming: torch.cuda.Stream | None = None  # where copies to the device are made beside the computation

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fix shapes, dtypes and device, and make the codecs; the tensors may be empty."""
        self._check_kind(key_states, value_states)
        self._make_codecs(key_states, value_states)
        self.policy = self._owner.make_policy(self.layer_idx)
        self.device = key_states.device
        self.tail = (_own(key_states[:, :, :0]), _own(value_states[:, :, :0]))
        self.is_initialized = True

    def _make_codecs(self, key_states: Tensor, value_states: Tensor) -> None:
        """Ask for codecs; the first compression may choose others in their place."""
        key_codec = self._owner.make_codec("keys", key_states.shape[-1], self.layer_idx)
        value_codec = self._owner.make_codec("values", value_states.shape[-1], self.layer_idx)
        self.key_codec, self.value_codec = self._asked = key_codec, value_codec
        self._check_transforms(key_states)

    # Lengths

    def _exact(self) -> tuple[Tensor, Tensor]:
        self._arrive()
        assert self.tail is not None
        return self.tail

    @property
    def tail_tokens(self) -> int:
        """Tokens in the exact tail."""
        return 0 if self.tail is None else self.tail[0].shape[2]

    @property
    def kept(self) -> int:
        """Tokens stored, exact or packed."""
        sinks = 0 if self.sinks is None else self.sinks[0].shape[2]
        body = 0 if self.body is None else self.body.positions.tokens
        return sinks + body + self.tail_tokens

    @property
    def pending(self) -> bool:
        """Whether a prompt, or a later turn, waits for its compression."""
        return self._pending_from is not None

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1, under the name that older transformers use."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (kept + new tokens, evicted tokens), as they will be when the update of this step is done.

        The mask is built before any layer is updated, so an eviction that the update will trigger is
        already counted.

        Raises:
            CacheStateError: If the forward brings no token, which is how `generate` treats a prompt at most half as
                long as what the cache has seen.
        """
        if query_length == 0 and self.seen:
            msg = (
                f"this forward brings no new token, and the cache has seen {self.seen}: the prompt is not its "
                "continuation. Call cache.reset() or use a new cache for another prompt."
            )
            raise CacheStateError(msg)
        kept = self.kept - self._planned_eviction(query_length)
        return kept + query_length, self.seen - kept

    # Updates

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store new tokens and return all kept keys and values, decoded, for this forward's attention.

        Raises:
            ShapeError: If the shapes do not fit each other or earlier updates.
            DtypeError: If a tensor is not floating, or its dtype changed.
            NonFiniteError: If a token holds NaN or infinity.  Prompts are checked on arrival, generated tokens
                when they are encoded (a check at each step would wait for the accelerator).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_update(key_states, value_states)
        self.prefetch()
        query_length = key_states.shape[2]
        if query_length > 1:
            self._check_finite(key_states, value_states, "the prompt")
        if self.is_due(query_length):
            self._make_room()
        self.observed.start_update()
        # An update that no crop has followed ends the recording.
        self._undo = (self._pending_from, self.record_past, self._updated_since_crop)
        self.record_past = self._is_recording
        self._updated_since_crop = self.record_past
        if query_length > 1 and self._pending_from is None:
            self._pending_from = self.seen
        tail_keys, tail_values = self._exact()
        first = self.seen == 0
        self.tail = (_append(tail_keys, key_states), _append(tail_values, value_states))
        self.seen += query_length
        visible = (key_states, value_states) if first else self._visible()
        note_keys(self, visible[0])
        return visible

    @property
    def wants_queries(self) -> bool:
        """Whether tokens wait for a compression in which the policy will look at their queries."""
        return self.pending and self._owner.cache_config.keep_ratio < 1 and self.policy.wants_queries

    def observe_queries(self, queries: Float[Tensor, "b q w d"]) -> None:
        """Keep the queries of the newest tokens until the compression, if it will use them.

        Args:
            queries: The queries of the last update's tokens, or of the last of them, with their rotary phase, scaled so
                that ``queries @ keys.mT / head_dim**0.5`` are the logits of the model.

        Raises:
            ShapeError: If they do not fit the keys.
        """
        if not self.wants_queries:
            return
        batch, heads, _, head_dim = self._exact()[0].shape
        fits = queries.ndim == _AXES and (queries.shape[0], queries.shape[3]) == (batch, head_dim)
        if not fits or queries.shape[1] % heads or not queries.shape[2]:
            msg = (
                f"queries of layer {self.layer_idx} must be [{batch}, a multiple of {heads}, tokens, {head_dim}], got "
                f"shape {tuple(queries.shape)}"
            )
            raise ShapeError(msg)
        self.observed.append(queries, self.seen)

    def observe_reconstruction(self, attention: Float[Tensor, "b h n"]) -> None:
        """Keep, until the compression, the greatest attention that was paid to each token seen, in a second reading.

        Tokens that come later count as fully attended.
        """
        assert self.pending
        assert self.body is None
        self._arrive()
        self.observed.reconstruction = _own(attention)

    def compress(self) -> None:
        """Compress now what the next generation step would compress."""
        if self.pending:
            self._make_room()

    def compress_early(self) -> None:
        """Compress during the prefill, if that is wanted and enough tokens are there; otherwise leave them waiting."""
        is_candidate = self.record_past and not self._expects_prompt  # and may still be taken back
        if self._is_due_early() and not is_candidate:
            self._make_room()

    def is_due(self, query_length: int) -> bool:
        """Tell whether an update of so many tokens begins by making room in the tail."""
        if self.seen == 0 or self._is_recording:
            return False
        return query_length == 1 or self._is_due_early()

    def _is_due_early(self) -> bool:
        """Tell whether to compress before the prefill is over: if enough tokens wait, and all pads will go."""
        if self._owner.when == "post_prefill" or not self.pending or not self._owner.padding.is_settled(self.seen):
            return False
        candidates = self._candidates()
        if candidates < self._owner.cache_config.min_tokens:
            return False
        evicts = self._owner.cache_config.keep_ratio < 1 and self._owner.padding.may_evict(self.seen)
        return self.body is not None or not evicts or candidates - self._kept_of(candidates) >= self._owner.padding.most

    @property
    def _is_recording(self) -> bool:
        return self.record_past and not self._updated_since_crop

    def activate_past_recording(self) -> None:
        """Expect a `crop` after each update from now on, and encode only then.

        The first multi-token update is taken for a prompt, later ones for candidates.  An update that is not followed
        by a crop ends the recording.
        """
        self.record_past = self._expects_prompt = True
        self._updated_since_crop = False

    def held(self) -> HeldTokens:
        """Return all kept tokens as they are now, oldest first, on the device of the layer."""
        self.prefetch()
        if self.body is None:
            return HeldTokens(self._exact())
        before = None if self.sink_place is None else tuple(self.sink_place[:, 1].tolist())
        return HeldTokens(
            tail=self._exact(),
            sinks=self.sinks,
            keys=CodedSide(self.key_codec, self.body.keys.packed(), self.body.keys.transform),
            values=CodedSide(self.value_codec, self.body.values.packed(), self.body.values.transform),
            positions=replace(self.body.positions),
            phase=self.phase,
            pads=self._owner.padding.pads,
            before_sinks=before if before is not None and any(before) else None,
        )

    def dense(self) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]]:
        """Return all kept keys and values in the dtypes they came in, oldest first."""
        with self._at_home():
            held = self.held()
            return held.dense_keys(), held.dense_values()

    def _visible(self) -> tuple[Tensor, Tensor]:
        """Return what attention shall see: decoded, unless it has shown that it can read codes."""
        if self.body is None or not self.codes_are_read:
            return self.dense()
        held = self.held()
        return HeldStates(held, "keys"), HeldStates(held, "values")

    def _angles(self, positions: Int[Tensor, "*given n"], batch: int, heads: int) -> Int[Tensor, "*out n"]:
        """Return positions as the rotary embedding has seen them; see `held.angles_of`."""
        return angles_of(positions, self._owner.padding.pads, batch, heads)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All kept keys, decoded anew at each access; None before the first update."""
        return self.dense()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All kept values, decoded anew at each access; None before the first update."""
        return self.dense()[1] if self.is_initialized else None

    # Compression

    def _candidates(self) -> int:
        """Tokens between the sinks and the residual."""
        settings = self._owner.cache_config
        sinks = 0 if self.sinks is not None else settings.sink_tokens
        return self.tail_tokens - settings.residual_length - sinks

    def _kept_of(self, candidates: int) -> int:
        """Return how many candidates a compression keeps."""
        padding = self._owner.padding
        # transformers' mask takes as many of a row's first slots for pads as there are pads not evicted yet.  Later
        # evictions would have to take packed pads, one by one in each row; such a batch is rather kept whole.
        keeps_pads = self.body is not None and self.seen - self.kept < padding.most
        if keeps_pads or not padding.may_evict(self.seen):
            return candidates
        return ceil(self._owner.cache_config.keep_ratio * candidates)

    def _planned_eviction(self, query_length: int) -> int:
        """Tokens that the next update, of so many tokens, will evict."""
        candidates = self._candidates()
        if not self.pending or not self.is_due(query_length) or candidates < self._owner.cache_config.min_tokens:
            return 0
        return candidates - self._kept_of(candidates)

    def _make_room(self) -> None:
        """Encode what the tail need not hold, in the precision that the code asks for, also under autocast."""
        # Codes are appended to where they are.
        with self._at_home(codes=False), torch.autocast(self.device.type, enabled=False):
            self._encode_waiting()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        self._pending_from = None
        self.observed = Observations()

    def _encode_waiting(self) -> None:
        """Encode a prompt with eviction, or generated tokens without, if enough of them wait."""
        settings = self._owner.cache_config
        candidates = self._candidates()
        if self.pending and candidates >= settings.min_tokens:
            if not self._owner.padding.may_evict(self.seen) and ceil(settings.keep_ratio * candidates) < candidates:
                self._owner.warn_kept_whole()
            self._encode_oldest(candidates, self._kept_of(candidates))
        elif not self.pending and candidates >= (settings.min_tokens if self.body is None else settings.flush_length):
            self._encode_oldest(candidates, candidates)

    def _encode_oldest(self, candidates: int, count: int) -> None:
        """Move ``candidates`` tokens out of the tail, encoding the ``count`` best of them.

        Nothing changes before everything is computed: an error leaves the layer as it was.
        """
        if self.body is None:
            self._owner.padding.give_up()
        tail_keys, tail_values = self._exact()
        offset = self.seen - self.tail_tokens
        sinks = self._owner.cache_config.sink_tokens if self.body is None else 0
        rows = self._rows_by_pads()
        # The sinks of padded rows lie in different places, so the first time their rest has to be picked.
        evicts_none = count == candidates and (rows is None or self.body is not None)
        phase = self.phase if self.body is not None else self._owner.make_phase(self.layer_idx, self.seen)
        keep = None if evicts_none else self._select(sinks, candidates, count, rows, phase)
        start = sinks if keep is None else 0
        stop = sinks + candidates
        keys, values = (_pick(x[:, :, start:stop], keep) for x in (tail_keys, tail_values))
        self._check_finite(keys, values, "generated tokens")

        if phase is not None:
            positions: Int[Tensor, "*heads n"] = torch.arange(offset + start, offset + stop, device=keys.device)
            if keep is not None:
                positions = positions.expand(*keep.shape)[keep].view(*keep.shape[:2], count)
            keys = phase.rotate(keys.float(), self._angles(positions, *keys.shape[:2]), inverse=True)

        if self.body is None:
            self._start_body(_First(keys, values, keep, start, candidates, count, phase, rows))
        else:
            self.body.keys.append(self.key_codec.encode(keys, self.body.keys.transform))
            self.body.values.append(self.value_codec.encode(values, self.body.values.transform))
        assert self.body is not None
        if keep is None:
            self.body.positions.append_all(count)
        else:
            self.body.positions.append(keep)
        self.tail = (_own(tail_keys[:, :, stop:]), _own(tail_values[:, :, stop:]))

    def _start_body(self, first: "_First") -> None:
        """Fit the transforms and encode the first tokens, with more bits if attention would suffer too much."""
        sinks, place = self._take_sinks(self._owner.cache_config.sink_tokens, first.candidates, first.count)
        given = self._owner.given_transforms(self.layer_idx)
        codecs = given.codecs if given else self._codecs_for(first.count)
        while True:
            keys, values = self._encode_first(first, codecs)
            error = self._code_error(first, (codecs[0].decode(*keys), codecs[1].decode(*values)))
            more = None if error <= self._owner.cache_config.most_code_error else _with_more_bits(codecs)
            if more is None:
                break
            codecs = more
        if error > self._owner.cache_config.most_code_error:
            self._owner.warn_code_error(self.layer_idx, error)
        self.key_codec, self.value_codec = codecs
        self.code_error = error
        self.sinks, self.sink_place, self.phase = sinks, place, first.phase
        # Sinks inside the covered range are simply not among the kept ones of the map.
        self.body = PackedTokens(PackedSide.of(*keys), PackedSide.of(*values), PositionMap(first.start))

    def _codecs_for(self, tokens: int) -> tuple[VectorCodec, VectorCodec]:
        return self.key_codec.for_tokens(tokens), self.value_codec.for_tokens(tokens)

    def _encode_first(
        self, first: "_First", codecs: tuple[VectorCodec, VectorCodec]
    ) -> tuple[tuple[PackedVectors, VectorTransform], tuple[PackedVectors, VectorTransform]]:
        """Return the codes of the first tokens, each with its transform."""
        transforms = self._given_transforms(codecs)
        if transforms is None:
            transforms = self._fit(first, codecs)
        keys, values = codecs[0].encode(first.keys, transforms[0]), codecs[1].encode(first.values, transforms[1])
        return (keys, transforms[0]), (values, transforms[1])

    def _code_error(self, first: "_First", decoded: tuple[Tensor, Tensor]) -> float:
        """Return what coding does to attention on the coded tokens; see `probe.attention_error`."""
        keys, pads = [first.keys, decoded[0]], self._owner.padding.pads
        stop = first.start + first.keys.shape[2]
        positions: Int[Tensor, "*heads n"] = torch.arange(first.start, stop, device=self.device)
        if first.keep is not None:
            positions = first.keep.nonzero()[:, -1].view(*first.keys.shape[:3])
        if first.phase is not None:
            angles = self._angles(positions, *first.keys.shape[:2])
            keys = [first.phase.rotate(x.float(), angles) for x in keys]
        hidden = None if pads is None else positions.expand(*first.keys.shape[:3]) < pads.to(self.device)[:, None, None]
        queries = self.observed.last_queries(QUERY_WINDOW, self.seen)
        if queries is None:
            queries = stand_in_queries(self._exact()[0], keys[0])
        return attention_error(queries, (keys[0], first.values), (keys[1], decoded[1]), hidden)

    def _given_transforms(
        self, codecs: tuple[VectorCodec, VectorCodec]
    ) -> tuple[VectorTransform, VectorTransform] | None:
        """Return the transforms of another prompt for this batch, if the owner has any that these codecs can use."""
        given = self._owner.given_transforms(self.layer_idx)
        if given is None or given.codecs != codecs:
            return None
        batch = self._exact()[0].shape[0]

        def fitted(x: Tensor) -> Tensor:
            return x.to(self.device).expand(batch, *x.shape[1:])

        return given.keys.map_batch(fitted), given.values.map_batch(fitted)

    def _check_transforms(self, key_states: Tensor) -> None:
        """Raise OptionError if transforms were given that do not fit this layer."""
        given = self._owner.given_transforms(self.layer_idx)
        if given is None:
            return
        batch, heads = key_states.shape[:2]
        rows, fitted_heads = given.keys.reference.shape[:2]
        wrong = ""
        if given.asked != self._asked:
            wrong = f"were fitted by {given.asked[0]} and {given.asked[1]}"
        elif fitted_heads != heads or rows not in {1, batch}:
            wrong = f"are for {rows} rows and {fitted_heads} KV heads, this prompt has {batch} and {heads}"
        elif given.unrotated != (self._owner.make_phase(self.layer_idx, 0) is not None):
            wrong = f"are for keys {'without' if given.unrotated else 'with'} their rotary phase, unlike this cache's"
        if wrong:
            msg = (
                f"the transforms given for layer {self.layer_idx} {wrong}. Use those of a cache of the same model, "
                "preset and config."
            )
            raise OptionError(msg)

    @property
    def transforms(self) -> LayerTransforms | None:
        """What was fitted to the prompt; None before the first compression."""
        if self.body is None:
            return None
        self._arrive()
        return LayerTransforms(
            keys=self.body.keys.transform,
            values=self.body.values.transform,
            codecs=(self.key_codec, self.value_codec),
            asked=self._asked,
            unrotated=self.phase is not None,
        )

    def _rows_by_pads(self) -> dict[int, list[int]] | None:
        """Return the rows that have so many pads; None without padding."""
        pads = self._owner.padding.pads
        if pads is None:
            return None
        groups: dict[int, list[int]] = {}
        for row, count in enumerate(pads.tolist()):
            groups.setdefault(count, []).append(row)
        return groups

    def _in_tail(self, pads: int) -> int:
        """Return how many of a row's leading pads the tail holds."""
        before = self.seen - self.tail_tokens
        return min(max(pads - before, 0), self.tail_tokens)

    def _select(
        self,
        sinks: int,
        candidates: int,
        count: int,
        rows: dict[int, list[int]] | None,
        phase: RotaryPhase | None,
    ) -> Bool[Tensor, "b h n"]:
        """Choose which of the first ``sinks + candidates`` tokens of the tail to encode.

        Pads go first, oldest first.  Only then does the policy choose, and it is shown a row without its pads, as if
        the row had been alone; rows with equally many pads are shown to it together.
        """
        keys = self._exact()[0]
        keep = torch.ones(*keys.shape[:2], sinks + candidates, dtype=torch.bool, device=keys.device)
        for row_pads, members in (rows or {0: list(range(len(keys)))}).items():
            pads = min(self._in_tail(row_pads), candidates)
            gone = min(pads, candidates - count)
            chosen = torch.ones_like(keep[members])
            if candidates - count > pads:
                inputs = self._score_inputs(members, row_pads, sinks, candidates - pads, phase)
                selected = self.policy.select(inputs, count)
                chosen[..., pads:] = selected[..., : sinks + candidates - pads]
            chosen[..., :gone] = False
            chosen[..., pads : pads + sinks] = False
            keep[members] = chosen
        return keep

    def _score_inputs(
        self, members: list[int], row_pads: int, sinks: int, candidates: int, phase: RotaryPhase | None
    ) -> ScoreInputs:
        """Return what a policy sees of these rows: their real tokens in the tail."""
        keys, values = (x if len(members) == len(x) else x[members] for x in self._exact())
        pads = self._in_tail(row_pads)
        queries = self.observed.last_queries(min(QUERY_WINDOW, self.tail_tokens - pads), self.seen)
        attention = self.observed.attention_to(self.tail_tokens)
        order = torch.arange(self.tail_tokens - pads, device=keys.device)
        first = self.seen - len(order) - row_pads
        return ScoreInputs(
            keys=keys[:, :, pads:],
            values=values[:, :, pads:],
            positions=order + first,
            protected=(order < sinks) | (order >= sinks + candidates),
            layer_idx=self.layer_idx,
            queries=None if queries is None else queries[members],
            reconstruction=None if attention is None else attention[members][:, :, pads:],
            phase=phase,
        )

    def _fit(self, first: "_First", codecs: tuple[VectorCodec, VectorCodec]) -> tuple[VectorTransform, VectorTransform]:
        """Fit both codecs to the tokens that are going to be encoded, pads left out."""
        keys, values, rows = first.keys, first.values, first.rows
        if rows is None:
            return codecs[0].fit(keys), codecs[1].fit(values)
        parts: tuple[list[VectorTransform], list[VectorTransform]] = ([], [])
        evicted, candidates = first.candidates - first.count, first.candidates
        for row_pads, members in rows.items():
            in_tail = self._in_tail(row_pads)
            pads = max(min(in_tail, candidates) - evicted, 0)
            sample = keys[members][:, :, pads:], values[members][:, :, pads:]
            if pads == keys.shape[2] and in_tail < self.tail_tokens:
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
        start = max(pads, self.tail_tokens - self._owner.cache_config.residual_length)
        keys, values = (x[members][:, :, start:] for x in self._exact())
        if phase is not None:
            angles = torch.arange(start - pads, self.tail_tokens - pads, device=keys.device)
            keys = phase.rotate(keys.float(), angles, inverse=True)
        return keys, values

    def _take_sinks(
        self, sinks: int, candidates: int, count: int
    ) -> tuple[tuple[Tensor, Tensor], Int[Tensor, "b 2"] | None]:
        """Return the first real tokens of each row and, in a padded batch, where they are."""
        keys, values = self._exact()
        pads = self._owner.padding.pads
        if pads is None:
            return (_own(keys[:, :, :sinks]), _own(values[:, :, :sinks])), None
        starts = pads.clamp_max(candidates)
        place = torch.stack([starts, (starts - (candidates - count)).clamp_min(0)], 1)
        index = (starts[:, None] + torch.arange(sinks, device="cpu")).to(keys.device)[:, None, :, None]
        taken = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values)]
        return (taken[0], taken[1]), place

    # Cache operations

    def crop(self, tokens_to_remove: int, packed_tokens: int | None = None) -> None:
        """Remove the ``abs(tokens_to_remove)`` newest tokens; while recording, encode what the tail need not hold.

        Codes are dropped, never decoded and encoded again.

        Args:
            tokens_to_remove: 0 or a negative number.
            packed_tokens: Packed tokens that every head shall have left if the removal reaches them: the number that
                all heads of all layers still have (see `kept_before`).  The oldest surplus ones are dropped.

        Raises:
            ShapeError: If the number is positive (an absolute length, which transformers gave up).
            UnsupportedError: If the batch is padded and the removal reaches the sinks of a row.
        """
        if tokens_to_remove > 0:
            msg = f"crop takes 0 or a negative number of tokens to remove, got {tokens_to_remove}"
            raise ShapeError(msg)
        if not self.is_initialized:
            return
        self._arrive()
        if tokens_to_remove:
            self._remove(min(-tokens_to_remove, self.seen), packed_tokens)
        self._updated_since_crop = False
        if self.record_past:
            if not self._expects_prompt:
                self._stop_waiting()  # these were candidates
            self._expects_prompt = False
            if self.seen:
                self._make_room()

    @property
    def _is_padded(self) -> bool:
        """Whether the sinks of any row do not stand at its beginning."""
        return self.sink_place is not None and bool(self.sink_place[:, 0].any())

    def check_crop(self, count: int) -> None:
        """Raise UnsupportedError if the newest ``count`` tokens cannot be removed."""
        end = self.seen - count
        if not self._is_padded or self.sinks is None or self.sink_place is None or end <= 0:
            return
        last = int(self.sink_place[:, 0].max()) + self.sinks[0].shape[2]
        if end < last:
            msg = (
                f"cannot remove the newest {count} of {self.seen} tokens: in a padded batch only tokens behind "
                f"position {last}, where the last row's first tokens end, can go. Start again after cache.reset()."
            )
            raise UnsupportedError(msg)

    def kept_before(self, count: int) -> Int[Tensor, "b h"] | None:
        """Return how many packed tokens each head has without the newest ``count``; None if no code is to go."""
        if self.body is None or count <= self.tail_tokens:
            return None
        self._arrive()
        return self.body.kept_before(self.seen - count)

    def _remove(self, count: int, packed_tokens: int | None) -> None:
        self.check_crop(count)
        end = self.seen - count
        keys, values = self._exact()
        if self._pending_from is not None and end <= self._pending_from:
            self._stop_waiting()
        self.observed.crop(end)
        if count <= self.tail_tokens or self.body is None:
            stop = self.tail_tokens - count
            self.tail = (_own(keys[:, :, :stop]), _own(values[:, :, :stop]))
        else:
            self._remove_packed(end, packed_tokens)
        self.seen = end

    def _remove_packed(self, end: int, packed_tokens: int | None) -> None:
        assert self.body is not None
        assert self.sinks is not None
        keys, values = self._exact()
        sinks = self.sinks[0].shape[2]
        if end <= (0 if self._is_padded else sinks):
            # Nothing packed is left: as if nothing had ever been.
            self.tail = (_own(self.sinks[0][:, :, :end]), _own(self.sinks[1][:, :, :end]))
            self.sinks = self.body = self.phase = self.sink_place = self.code_error = None
            self._make_codecs(keys, values)
            return
        before = self.body.kept_before(end)
        least = int(before.min()) if packed_tokens is None else packed_tokens
        if self.sink_place is not None:
            # Rows that keep pads keep the same tokens in all heads.
            lost = (before[:, 0].cpu() - least).clamp_min(0)
            place = self.sink_place
            self.sink_place = torch.stack([place[:, 0], (place[:, 1] - lost).clamp_min(0)], 1)
        self.body.crop(end, least)
        self.tail = (_own(keys[:, :, :0]), _own(values[:, :, :0]))

    def take_back(self, count: int) -> None:
        """Undo the last update of ``count`` tokens, all still in the tail; without tokens, forget shapes as well.

        A compression that the update caused stays: it would have come with the next one.
        """
        if count > 0:
            self._remove(count, None)
            self._pending_from, self.record_past, self._updated_since_crop = self._undo
        if self.seen == 0:
            self.reset()

    def _map_exact(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to every tensor in full precision; all of them have the batch as first axis."""
        if self.sinks is not None:
            self.sinks = (function(self.sinks[0]), function(self.sinks[1]))
        if self.tail is not None:
            self.tail = (function(self.tail[0]), function(self.tail[1]))
        self.observed.map(function)

    def _map_codes(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to codes and scales; all of them have the batch as first axis."""
        if self.body is not None:
            self.body.map_codes(function)

    def _map_rest(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to transforms and positions; all of them have the batch as first axis."""
        if self.body is not None:
            self.body.map_rest(function)

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function``, which acts on rows of the batch, to all that is stored per row."""
        self._arrive()
        self._map_exact(function)
        self._map_codes(function)
        self._map_rest(function)
        if self.sink_place is not None:
            self.sink_place = function(self.sink_place)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows of the batch in another order, as beam search does."""
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._map_rows(lambda x: x[indices.to(x.device), ...])

    # Host memory

    @property
    def is_away(self) -> bool:
        """Whether anything that attention needs is elsewhere than on the device of the layer."""
        if not self.is_initialized or self.tail is None:
            return False
        if self._is_parked or self.tail[0].device != self.device:
            return True
        return self.body is not None and any(buffer.is_away(self.device) for buffer in self.body.buffers)

    def offload(self) -> None:
        """Move everything stored to host memory, in packed form.

        The next update, or whatever else needs it on the device, brings it back.
        """
        self._arrive()
        self._is_parked = self.is_initialized
        for apply in (self._map_exact, self._map_codes, self._map_rest):
            apply(to_host)

    def prefetch(self) -> None:
        """Move what attention needs back to the device of the layer; an offloading cache only copies the codes there.

        On a CUDA device the copies may still be under way, in the order of the current stream.
        """
        self._fetch()

    def prefetch_beside(self) -> None:
        """Start to `prefetch` beside the computation; whatever uses the layer next waits."""
        if self._coming is None and self.is_away:
            self._coming = side_stream(self.device)
            with beside(self._coming, self.device):
                self._move_here()

    def unpark(self) -> None:
        """Undo `offload`, but for what an offloading cache keeps in host memory: codes, and a waiting prompt."""
        stays = self._owner.offloading
        self._fetch(codes=not stays, prompt=not stays)

    def _fetch(self, *, codes: bool = True, prompt: bool = True) -> None:
        self._arrive()
        if self.is_away:
            self._move_here(codes=codes, prompt=prompt)

    def _move_here(self, *, codes: bool = True, prompt: bool = True) -> None:
        """Move or copy to the device what is not there.  After an error it can be called again."""
        assert self.tail is not None
        stays = self.tail if self.pending and not prompt else ()

        def moved(x: Tensor) -> Tensor:
            return x if any(x is tail for tail in stays) else to_device(x, self.device)

        if self._is_parked or self.tail[0].device != self.device:
            self._map_exact(moved)
            self._map_rest(moved)
        if codes and not self._owner.offloading:
            self._map_codes(moved)
        elif codes and self.body is not None:
            for buffer in self.body.buffers:
                buffer.fetch(self.device)
        self._is_parked = False

    def release(self) -> None:
        """Keep in host memory alone what is large: the codes, and a prompt that waits for its compression.

        Sinks, the newest tokens and transforms stay on the device: they change, or are needed, at every step.
        """
        self._arrive()
        if self.body is not None:
            for buffer in self.body.buffers:
                buffer.release()
        if self.pending and self.tail is not None:
            self.tail = (to_host(self.tail[0]), to_host(self.tail[1]))

    @contextmanager
    def _at_home(self, *, codes: bool = True) -> Iterator[None]:
        """Have everything on the device meanwhile, or all but codes that are kept in host memory."""
        was_away = self.is_away
        self._fetch(codes=codes or not self._owner.offloading)
        try:
            yield
        finally:
            if was_away and self._owner.offloading:
                self.release()

    def _arrive(self) -> None:
        """Wait for what is coming, in the order of the device's current stream."""
        if self._coming is None:
            return
        came: list[Tensor] = []

        def note(x: Tensor) -> Tensor:
            came.append(x)
            return x

        self._map_exact(note)
        if self.body is not None:
            came += [buffer.fetched for buffer in self.body.buffers if buffer.fetched is not None]
        arrive(self._coming, self.device, came)
        self._coming = None

    def __getstate__(self) -> dict[str, object]:
        """Return what a copy or a pickle gets."""
        self._arrive()
        return self.__dict__.copy()

    # At rest

    def state(self, lists: Lists) -> tuple[LayerMeta, Tensors]:
        """Return all that the layer holds and counts, as metadata and tensors that share memory with it.

        Args:
            lists: What layers share; codecs and phases of this layer are added.

        Raises:
            UnsupportedError: If a codec or a rotation is of a class that a file cannot name.
            NonFiniteError: If an exact token holds NaN or infinity.
        """
        self._arrive()
        return layer_state(self, lists)

    def restore(self, meta: LayerMeta, source: Source) -> None:
        """Take what `state` of another layer returned, in place of everything that this one holds."""
        self.reset()
        restore_layer(self, meta, source)

    # Checks

    def _check_kind(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            if not states.is_floating_point():
                msg = f"{name} must be a floating tensor, got {states.dtype} in layer {self.layer_idx}"
                raise DtypeError(msg)
            if states.ndim != _AXES:
                msg = f"{name} must be [batch, kv_heads, tokens, head_dim], got shape {tuple(states.shape)}"
                raise ShapeError(msg)
        if key_states.shape[:3] != value_states.shape[:3]:
            msg = (
                "key_states and value_states must agree in batch, kv_heads and tokens, got "
                f"{tuple(key_states.shape)} and {tuple(value_states.shape)} in layer {self.layer_idx}"
            )
            raise ShapeError(msg)

    def _check_update(self, key_states: Tensor, value_states: Tensor) -> None:
        self._check_kind(key_states, value_states)
        held = self._exact()
        for name, states, stored in (("key_states", key_states, held[0]), ("value_states", value_states, held[1])):
            given = (*states.shape[:2], states.shape[3])
            expected = (*stored.shape[:2], stored.shape[3])
            if given != expected:
                msg = (
                    f"{name} of layer {self.layer_idx} changed (batch, kv_heads, head_dim) from {expected} to {given}. "
                    "A cache belongs to one model and one batch: call cache.reset() or use a new cache."
                )
                raise ShapeError(msg)
            if states.dtype != stored.dtype:
                msg = (
                    f"{name} of layer {self.layer_idx} changed dtype from {stored.dtype} to {states.dtype}. "
                    "Call cache.reset() or use a new cache."
                )
                raise DtypeError(msg)

    def _check_finite(self, keys: Tensor, values: Tensor, where: str) -> None:
        for name, states in (("keys", keys), ("values", values)):
            # The largest squared norm: one number tells about NaN, infinity and overflow in the codec.
            if states.numel() and not bool(torch.isfinite(states.float().square().sum(-1).amax())):
                msg = (
                    f"NaN, infinity or an overflow in the {name} of layer {self.layer_idx} ({where}). The cache was "
                    "not changed. Look for overflow in the model: float16 weights often need bfloat16."
                )
                raise NonFiniteError(msg)


def _with_more_bits(codecs: _Codecs) -> _Codecs | None:
    """Return both codecs with more bits, or the one that has such; None if neither has."""
    more = codecs[0].with_more_bits(), codecs[1].with_more_bits()
    return None if more == (None, None) else (more[0] or codecs[0], more[1] or codecs[1])


def _own(x: Tensor) -> Tensor:
    """Return a copy that shares memory with nothing, so that the original can be freed."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def _append(stored: Tensor, new: Tensor) -> Tensor:
    return _own(new) if stored.shape[2] == 0 else torch.cat([stored, new.detach()], 2)


def _pick(x: Tensor, keep: Bool[Tensor, "b h n"] | None) -> Tensor:
    """Return the kept tokens of each head; every head keeps the same number."""
    if keep is None:
        return x
    return x[keep].view(*keep.shape[:2], -1, x.shape[-1])
