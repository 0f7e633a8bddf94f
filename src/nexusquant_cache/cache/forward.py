"""What surrounds the update of a layer: what has to come before it, and how an error is undone."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig

from nexusquant_cache.cache.report import content, storage_bytes
from nexusquant_cache.errors import CacheStateError, ShapeError, UnsupportedError
from nexusquant_cache.layer.parts import CompressedPart, Part, compressed
from nexusquant_cache.layer.shared import Shared

_AXES = 4  # batch, kv_heads, tokens, head_dim
_STATES = "keys and values"


class Forward:
    """Updates the layers of a cache, one by one, so that an error leaves the cache as it was before the forward.

    An error of the model, or an interrupt between two updates, is not seen here.  The layers then have seen different
    numbers of tokens, which the next forward finds.

    Attributes:
        is_broken: Whether an error could not be undone.
        peak_bytes: The most that was held at once.
    """

    def __init__(self, shared: Shared, config: PretrainedConfig | None, *, spares_sliding: bool) -> None:
        """Start with an empty cache.

        Args:
            shared: What its layers share.
            config: The model's, for text.
            spares_sliding: Whether sliding-window layers of an offloading cache stay on the device.
        """
        self.shared, self.config, self.spares_sliding = shared, config, spares_sliding
        self.is_broken = False
        self.peak_bytes = 0
        self._held: dict[int, int] = {}  # bytes that each layer held when that was last noted
        # What this forward has given already, as layer and kind, and which layer last; which layer forwards end with;
        # tokens seen before.
        self._given: set[tuple[int, str]] = set()
        self._last = -1
        self._end: int | None = None
        self._before = 0

    def check(self) -> None:
        """Refuse to go on after an error that could not be undone.

        Raises:
            CacheStateError: If there was one: part of the layers had already been compressed, or layers of
                transformers' own classes had taken the tokens.
        """
        if self.is_broken:
            msg = "an earlier forward failed half-way and could not be undone: call cache.reset() or use a new cache"
            raise CacheStateError(msg)

    def trouble(self, parts: list[Part]) -> str:
        """Say why the cache cannot go on as it is; nothing if it can."""
        if self.is_broken:
            return "broken: an earlier forward could not be undone, call cache.reset()"
        is_whole = self.unfinished(parts) is None and not self.not_reached(parts)
        return "" if is_whole else "in a forward, or one was not finished"

    def enter(self, parts: list[Part], index: int, kind: str = _STATES) -> None:
        """Take note that a layer is about to be given something; what is given a second time begins a forward.

        Args:
            parts: All layers.
            index: The layer.
            kind: What it is given: keys and values, or a state of linear attention.

        Raises:
            CacheStateError: If the forward before was not finished.
        """
        # Layers come in the order of their indices; in a step some give no states of linear attention.
        if not self._given or index < self._last or (index, kind) in self._given:
            self._begin(parts)
        self._given.add((index, kind))
        self._last = index

    def _begin(self, parts: list[Part]) -> None:
        unfinished = self.unfinished(parts)
        if unfinished is not None:
            least, most = unfinished
            msg = (
                f"some layers have seen {most} tokens and others {least}: the forward before was not finished. Take "
                f"its tokens back with cache.crop({least - most}), or call cache.reset()."
            )
            if self.config is None:
                msg += " If nothing has failed, some layers are of another kind: give the cache config=model.config."
            raise CacheStateError(msg)
        seen = [part.seen for part in parts if part.is_in_step]
        if any(kind != _STATES for _, kind in self._given):
            # States of linear attention tell of no tokens, but a forward ends where those before it have ended.
            last = max(index for index, _ in self._given)
            if self._end is None:
                self._end = max(part.index for part in parts if part.is_in_step or part.is_linear)
            if last < self._end:
                self.is_broken = True
                self.check()
        self._given, self._before = set(), max(seen, default=0)

    def unfinished(self, parts: list[Part]) -> tuple[int, int] | None:
        """Return how many tokens layers have seen, the fewest and the most; None if all have seen equally many.

        Layers that have seen none do not count: they share keys of others, or belong to another stage of a pipeline.
        """
        seen = {part.seen for part in parts if part.is_in_step} - {0}
        return (min(seen), max(seen)) if len(seen) > 1 else None

    def not_reached(self, parts: list[Part]) -> list[int]:
        """Return the layers that no forward has reached, behind others that have seen tokens, if a config names all."""
        if self.config is None:
            return []
        seen = [(part.index, part.seen) for part in parts if part.is_in_step]
        last = max((index for index, count in seen if count), default=-1)
        return [index for index, count in seen if not count and index > last >= 0]

    def check_reached(self, parts: list[Part]) -> None:
        """Refuse what is to be kept of a first forward that has not reached all layers.

        Raises:
            CacheStateError: If there are such layers.
        """
        missing = self.not_reached(parts)
        if missing:
            msg = (
                f"layers {missing[0]} to {missing[-1]} have seen no tokens: the first forward was not finished. Call "
                "cache.reset() and read the prompt again."
            )
            raise CacheStateError(msg)

    def update(
        self,
        parts: list[Part],
        index: int,
        states: tuple[Tensor, Tensor],
        store: Callable[[], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Do what an update of a layer asks for, and the update itself.

        Args:
            parts: All layers.
            index: The one to update.
            states: What it is given.
            store: The update.
        """
        self.check()
        self.enter(parts, index)
        part, key_states = parts[index], states[0]
        try:
            self._check_seen(part)
            if isinstance(part, CompressedPart):
                self._check_mask(part, key_states)
                part.layer.check(*states)  # before anything changes in other layers
                self._make_way(parts, part, key_states.shape[2])
            part.fetch()
            self._bring_next(parts, index)
            held = store()
            part.trim(key_states.shape[-2])
            self._send_away(part)
            if self.shared.when == "during_prefill" and key_states.shape[-2] > 1:
                self.note_peak(parts, index)
        except BaseException:  # an interrupt too: KeyboardInterrupt, cancellation
            try:
                self._send_away(part)
            finally:
                self.take_back(parts)
            raise
        return held

    def _check_seen(self, part: Part) -> None:
        """Refuse to go on if a forward before has not reached this layer.

        Raises:
            CacheStateError: If it has not.
            UnsupportedError: If this is the attention to an encoder's text, in a layer for the decoder's.
        """
        if part.is_in_step and part.seen != self._before:
            if getattr(self.config, "is_encoder_decoder", False) and not part.seen:
                msg = (
                    "the attention to the encoder's text writes into the same cache as that to the decoder's: use "
                    "EncoderDecoderCache(NexusQuantCache(config=model.config), DynamicCache()) of transformers"
                )
                raise UnsupportedError(msg)
            msg = (
                f"layer {part.index} has seen {part.seen} tokens and layers before it {self._before}: an earlier "
                "forward was not finished. Call cache.reset() or use a new cache."
            )
            raise CacheStateError(msg)

    def take_back(self, parts: list[Part]) -> None:
        """Take the tokens of this forward out of the layers that already have them."""
        self.is_broken = True  # until all is done: another interrupt may come
        is_done = not any(kind != _STATES for _, kind in self._given)
        for part in parts:
            if isinstance(part, CompressedPart):
                part.take_back(self._before)
            elif part.is_in_step:
                is_done &= part.seen <= self._before
        self._given.clear()
        self.is_broken = not is_done

    def take_back_unfinished(self, parts: list[Part], end: int) -> None:
        """Take an unfinished forward back, for a crop to so many tokens.

        Raises:
            CacheStateError: If the crop would end inside that forward, or it cannot be taken back.
        """
        unfinished = self.unfinished(parts)
        if unfinished is None:
            return
        if end > unfinished[0]:
            msg = (
                f"some layers have seen {unfinished[1]} tokens and others {unfinished[0]}: the forward before was not "
                f"finished. Remove all of it, cache.crop({unfinished[0] - unfinished[1]}), or call cache.reset()."
            )
            raise CacheStateError(msg)
        self._before = unfinished[0]
        self.take_back(parts)
        self.check()

    def _bring_next(self, parts: list[Part], index: int) -> None:
        """Start to bring the layer that is updated after this one to the device."""
        if self.shared.offloading:
            following = next(compressed([*parts[index + 1 :], *parts[:index]]), None)  # after the last one the first
            if following is not None:
                following.fetch_beside()

    def _send_away(self, part: Part) -> None:
        """Keep a layer in host memory again."""
        if self.shared.offloading and not (self.spares_sliding and getattr(part.layer, "is_sliding", False)):
            part.release()

    def _make_way(self, parts: list[Part], part: CompressedPart, tokens: int) -> None:
        """Do what has to be done in other layers before this one takes so many new tokens."""
        if self.shared.when == "during_prefill" and tokens > 1:
            # Layers before have had the tokens of this forward; the last one may still wait from the forward before.
            for other in compressed(parts):
                if other is not part:
                    other.encode_early(self._before)
        if part.is_pending and part.is_due(tokens):
            self.note_peak(parts)

    def note_peak(self, parts: list[Part], index: int | None = None) -> None:
        """Take note of what is held now.

        Args:
            parts: All layers.
            index: The layer of this forward that was updated last.  The others are as they were noted before, but for
                the nearest of ours before it, which may have been encoded.
        """
        changed = parts
        if index is not None and len(self._given) > 1 and len(self._held) == len(parts):
            nearest = max((part.index for part in compressed(parts[:index])), default=index)
            changed = parts[nearest : index + 1]
        self._held |= {part.index: storage_bytes([content(part)]) for part in changed}
        self.peak_bytes = max(self.peak_bytes, sum(self._held.values()) + storage_bytes(self.shared_content(parts)))

    def shared_content(self, parts: list[Part]) -> list[object]:
        """Return what holds the tensors that layers share."""
        phases = [part.state.phase for part in parts if part.state is not None]
        return [*self.shared.phases, *phases]

    def _check_mask(self, part: CompressedPart, key_states: Tensor) -> None:
        """Refuse a prompt that the mask given to the constructor does not fit.

        Raises:
            ShapeError: If it does not.
        """
        given = self.shared.mask_shape
        if given is None or key_states.ndim != _AXES:
            return
        batch, tokens, seen = key_states.shape[0], key_states.shape[2], part.seen
        if not seen and not _repeats(key_states, given[0]):
            is_right = False
        elif seen == given[1] or (part.state.turn.record_past and seen + tokens >= given[1]):  # candidates come with it
            is_right, self.shared.mask_shape = True, None  # the prompt is read
        else:  # it may come in chunks, the last of which may be of one token
            ends = tokens > 1 or seen + 1 == given[1] or part.state.turn.longest <= 1
            is_right = seen + tokens <= given[1] and ends
        if not is_right:
            msg = (
                f"attention_mask has the shape {list(given)}, and the prompt is [{batch}, {seen or tokens}]. Leave it "
                "out: the cache sees the model's own mask."
            )
            raise ShapeError(msg)


def _repeats(key_states: Tensor, rows: int) -> bool:
    """Tell whether a batch is so many rows, each of which may be repeated, as for beams and several answers."""
    batch = key_states.shape[0]
    if batch == rows:
        return True
    if not rows or batch % rows:
        return False
    grouped = key_states.unflatten(0, (rows, -1))
    return bool(torch.isclose(grouped, grouped[:, :1], rtol=1e-2, atol=1e-2).all())
