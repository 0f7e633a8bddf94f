"""One full-attention layer of the cache: exact sinks, packed body, exact tail."""

from collections.abc import Callable
from math import ceil
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from nexusquant_cache.cache.tokens import PackedSide, PackedTokens, PositionMap
from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.errors import CacheStateError, DtypeError, NonFiniteError, ShapeError, UnsupportedError
from nexusquant_cache.policy import EvictionPolicy, ScoreInputs
from nexusquant_cache.presets import CacheConfig
from nexusquant_cache.reference.rope import RotaryPhase

Side = Literal["keys", "values"]
_AXES = 4  # batch, kv_heads, tokens, head_dim


@runtime_checkable
class LayerOwner(Protocol):
    """What a layer asks of its cache."""

    cache_config: CacheConfig
    may_evict: bool

    def make_policy(self, layer_idx: int) -> EvictionPolicy:
        """Return the policy of this layer."""
        ...

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of this layer's keys or values."""
        ...

    def make_phase(self, layer_idx: int, seen_tokens: int) -> RotaryPhase | None:
        """Return the rotary phase to take off this layer's keys, or None."""
        ...


class NexusQuantLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer.

    Tokens arrive in the exact ``tail``.  At the first one-token update after a longer one, everything but
    the sinks and the newest ``residual_length`` tokens is scored, partly evicted, encoded, and freed.
    Later, whenever the tail has grown by ``flush_length``, its oldest tokens are encoded and appended.
    A token is encoded once; stored codes are never decoded and encoded again.

    The number of kept tokens depends on lengths alone, so it is equal in all layers, heads and rows, which
    transformers' single attention mask requires.
    """

    is_sliding = False
    is_compileable = False
    # A rollback that reaches the packed tokens is refused, so no promise for the whole cache.
    is_croppable = False

    def __init__(self, owner: LayerOwner, layer_idx: int) -> None:
        """Start empty; ``owner`` provides policy, codecs and rotary phase when they are first needed."""
        # Not calling super().__init__: it assigns `keys` and `values`, which are computed here.
        self._owner = owner
        self.layer_idx = layer_idx
        self.reset()

    def reset(self) -> None:
        """Forget everything, including what was fitted."""
        self.is_initialized = False
        self.seen = 0
        self.pending = False
        self._was_pending = False
        self.sinks: tuple[Tensor, Tensor] | None = None
        self.body: PackedTokens | None = None
        self.tail: tuple[Tensor, Tensor] | None = None
        self.phase: RotaryPhase | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fix shapes, dtypes and device, and make the codecs; the tensors may be empty."""
        self._check_kind(key_states, value_states)
        key_codec = self._owner.make_codec("keys", key_states.shape[-1], self.layer_idx)
        value_codec = self._owner.make_codec("values", value_states.shape[-1], self.layer_idx)
        self.key_codec, self.value_codec = key_codec, value_codec
        self.policy = self._owner.make_policy(self.layer_idx)
        self.device = key_states.device
        self.tail = (_own(key_states[:, :, :0]), _own(value_states[:, :, :0]))
        self.is_initialized = True

    # Lengths

    def _exact(self) -> tuple[Tensor, Tensor]:
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
        evicted = self._planned_eviction() if query_length == 1 else 0
        kept = self.kept - evicted
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
        query_length = key_states.shape[2]
        if query_length == 1 and self.seen:
            self._make_room()
        self._was_pending = self.pending
        if query_length > 1:
            self._check_finite(key_states, value_states, "the prompt")
            self.pending = True
        tail_keys, tail_values = self._exact()
        first = self.seen == 0
        self.tail = (_append(tail_keys, key_states), _append(tail_values, value_states))
        self.seen += query_length
        return (key_states, value_states) if first else self.dense()

    def compress(self) -> None:
        """Compress now what the next generation step would compress."""
        if self.pending and self.is_initialized:
            self._make_room()

    def dense(self) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]]:
        """Return all kept keys and values in the dtypes they came in, oldest first."""
        tail_keys, tail_values = self._exact()
        if self.body is None:
            return tail_keys, tail_values
        assert self.sinks is not None
        keys, body_keys = _frame(self.sinks[0], self.body.positions.tokens, tail_keys)
        values, body_values = _frame(self.sinks[1], self.body.positions.tokens, tail_values)
        decoded = self.key_codec.decode(self.body.keys.packed(), self.body.keys.transform)
        if self.phase is None:
            body_keys.copy_(decoded)
        else:
            self.phase.rotate(decoded, self.body.positions.positions(decoded.device), out=body_keys)
        body_values.copy_(self.value_codec.decode(self.body.values.packed(), self.body.values.transform))
        return keys, values

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
        if not self._owner.may_evict:
            return candidates
        return ceil(self._owner.cache_config.keep_ratio * candidates)

    def _planned_eviction(self) -> int:
        """Tokens that the next one-token update will evict."""
        candidates = self._candidates()
        if not self.pending or candidates < self._owner.cache_config.min_tokens:
            return 0
        return candidates - self._kept_of(candidates)

    def _make_room(self) -> None:
        """Encode what the tail need not hold: a prompt with eviction, generated tokens without."""
        settings = self._owner.cache_config
        candidates = self._candidates()
        if self.pending and candidates >= settings.min_tokens:
            self._encode_oldest(candidates, self._kept_of(candidates))
        elif not self.pending and candidates >= (settings.min_tokens if self.body is None else settings.flush_length):
            self._encode_oldest(candidates, candidates)
        self.pending = False

    def _encode_oldest(self, candidates: int, count: int) -> None:
        """Move ``candidates`` tokens out of the tail, encoding the ``count`` best of them.

        Nothing changes before everything is computed: an error leaves the layer as it was.
        """
        tail_keys, tail_values = self._exact()
        sinks = self._owner.cache_config.sink_tokens if self.sinks is None else 0
        keep = None if count == candidates else self._select(sinks, candidates, count)
        inside = slice(sinks, sinks + candidates)
        keys = _pick(tail_keys[:, :, inside], keep)
        values = _pick(tail_values[:, :, inside], keep)
        self._check_finite(keys, values, "generated tokens")

        start = self.seen - self.tail_tokens + sinks
        phase = self.phase if self.body is not None else self._owner.make_phase(self.layer_idx, self.seen)
        if phase is not None:
            positions: Int[Tensor, "*heads n"] = torch.arange(start, start + candidates, device=keys.device)
            if keep is not None:
                positions = positions.expand(*keep.shape)[keep].view(*keep.shape[:2], count)
            keys = phase.rotate(keys.float(), positions, inverse=True)

        if self.body is None:
            key_transform, value_transform = self.key_codec.fit(keys), self.value_codec.fit(values)
        else:
            key_transform, value_transform = self.body.keys.transform, self.body.values.transform
        packed = self.key_codec.encode(keys, key_transform), self.value_codec.encode(values, value_transform)

        self._store(packed, (key_transform, value_transform), start, keep)
        if self.sinks is None:
            self.sinks = (_own(tail_keys[:, :, :sinks]), _own(tail_values[:, :, :sinks]))
            self.phase = phase
        self.tail = (_own(tail_keys[:, :, inside.stop :]), _own(tail_values[:, :, inside.stop :]))

    def _select(self, sinks: int, candidates: int, count: int) -> Bool[Tensor, "b h n"]:
        """Ask the policy which of the candidates to keep."""
        keys, values = self._exact()
        order = torch.arange(self.tail_tokens, device=keys.device)
        inputs = ScoreInputs(
            keys=keys,
            values=values,
            positions=order + (self.seen - self.tail_tokens),
            protected=(order < sinks) | (order >= sinks + candidates),
            layer_idx=self.layer_idx,
        )
        return self.policy.select(inputs, count)[..., sinks : sinks + candidates]

    def _store(
        self,
        packed: tuple[PackedVectors, PackedVectors],
        transforms: tuple[VectorTransform, VectorTransform],
        start: int,
        keep: Bool[Tensor, "b h n"] | None,
    ) -> None:
        if self.body is None:
            sides = [PackedSide.of(p, t) for p, t in zip(packed, transforms, strict=True)]
            self.body = PackedTokens(sides[0], sides[1], PositionMap(start))
        else:
            self.body.keys.append(packed[0])
            self.body.values.append(packed[1])
        if keep is None:
            self.body.positions.append_all(packed[0].tokens)
        else:
            self.body.positions.append(keep)

    # Cache operations

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the ``abs(tokens_to_remove)`` newest tokens.

        Raises:
            ShapeError: If the number is positive (an absolute length, which transformers gave up).
            UnsupportedError: If the removal reaches tokens that are already packed.
        """
        if tokens_to_remove > 0:
            msg = f"crop takes 0 or a negative number of tokens to remove, got {tokens_to_remove}"
            raise ShapeError(msg)
        count = -tokens_to_remove
        if count == 0 or not self.is_initialized:
            return
        if count > self.tail_tokens and self.body is not None:
            msg = (
                f"cannot remove the newest {count} tokens: only the newest {self.tail_tokens} are held in full "
                "precision. Raise residual_length, or start again from the prompt after cache.reset()."
            )
            raise UnsupportedError(msg)
        count = min(count, self.tail_tokens)
        stop = self.tail_tokens - count
        keys, values = self._exact()
        self.tail = (_own(keys[:, :, :stop]), _own(values[:, :, :stop]))
        self.seen -= count

    def take_back(self, count: int) -> None:
        """Undo the last update of ``count`` tokens, all still in the tail; without tokens, forget shapes as well.

        A compression that the update caused stays: it would have come with the next one.
        """
        if count > 0:
            self.crop(-count)
            self.pending = self._was_pending
        if self.seen == 0:
            self.reset()

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to every stored tensor; all of them have the batch as first axis."""
        if self.sinks is not None:
            self.sinks = (function(self.sinks[0]), function(self.sinks[1]))
        if self.tail is not None:
            self.tail = (function(self.tail[0]), function(self.tail[1]))
        if self.body is not None:
            self.body.map(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows of the batch in another order, as beam search does."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._map(lambda x: x[indices.to(x.device), ...])

    def offload(self) -> None:
        """Move everything stored to the CPU, in packed form."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything stored back to the device of the layer."""
        self._map(lambda x: x.to(self.device, non_blocking=True))

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


def _own(x: Tensor) -> Tensor:
    """Return a copy that shares memory with nothing, so that the original can be freed."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def _append(stored: Tensor, new: Tensor) -> Tensor:
    return _own(new) if stored.shape[2] == 0 else torch.cat([stored, new.detach()], 2)


def _frame(sinks: Tensor, body: int, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor with sinks and tail in place and, as a view, the part between them to be filled."""
    first, last = sinks.shape[2], tail.shape[2]
    out = tail.new_empty(*tail.shape[:2], first + body + last, tail.shape[3])
    out[:, :, :first] = sinks
    out[:, :, first + body :] = tail
    return out, out[:, :, first : first + body]


def _pick(x: Tensor, keep: Bool[Tensor, "b h n"] | None) -> Tensor:
    """Return the kept tokens of each head; every head keeps the same number."""
    if keep is None:
        return x
    return x[keep].view(*keep.shape[:2], -1, x.shape[-1])
