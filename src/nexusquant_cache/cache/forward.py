"""What surrounds the update of a layer: what has to come before it, and how an error is undone."""

from collections.abc import Callable

from torch import Tensor
from transformers import PretrainedConfig

from nexusquant_cache.cache.report import content, storage_bytes
from nexusquant_cache.errors import CacheStateError, ShapeError
from nexusquant_cache.layer.parts import CompressedPart, Part, compressed
from nexusquant_cache.layer.shared import Shared

_AXES = 4  # batch, kv_heads, tokens, head_dim


class Forward:
    """Updates the layers of a cache, one by one, so that an error leaves the cache as it was before the forward.

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

    def check(self) -> None:
        """Refuse to go on after an error that could not be undone.

        Raises:
            CacheStateError: If an earlier forward failed when part of the layers had already been compressed.
        """
        if self.is_broken:
            msg = "an earlier forward failed half-way through a compression: call cache.reset() or use a new cache"
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
        part, key_states = parts[index], states[0]
        before = part.seen
        try:
            if isinstance(part, CompressedPart):
                self._check_mask(part, key_states)
                self._make_way(parts, part, key_states)
            part.fetch()
            held = self._store(parts, index, store)
        except BaseException:  # an interrupt too: KeyboardInterrupt, cancellation
            if part.state is not None:
                self._roll_back(parts, before)
            raise
        if self.shared.when == "during_prefill" and key_states.shape[-2] > 1:
            self.note_peak(parts)
        return held

    def _store(
        self, parts: list[Part], index: int, store: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Update a layer with the next one on its way to the device, and send it away again."""
        if not self.shared.offloading:
            return store()
        try:
            following = next(compressed([*parts[index + 1 :], *parts[:index]]), None)  # after the last one the first
            if following is not None:
                following.fetch_beside()
            return store()
        finally:
            if not (self.spares_sliding and getattr(parts[index].layer, "is_sliding", False)):
                parts[index].release()

    def _make_way(self, parts: list[Part], part: CompressedPart, key_states: Tensor) -> None:
        """Do what has to be done in other layers before this one takes new tokens."""
        tokens = key_states.shape[-2] if key_states.ndim > 1 else 0
        ours = list(compressed(parts))
        if self.shared.when == "during_prefill" and tokens > 1:
            # Layers before have had the tokens of this forward; the last one may still wait from the forward before.
            for other in ours:
                if other is not part:
                    other.compress_early()
        if part.is_pending and part is ours[0] and part.is_due(tokens):
            self.note_peak(parts)

    def _roll_back(self, parts: list[Part], seen: int) -> None:
        """Take the tokens of an unfinished forward out of the layers that already have them."""
        for part in compressed(parts):
            self.is_broken |= not part.take_back(seen)

    def note_peak(self, parts: list[Part]) -> None:
        """Take note of what is held now."""
        held = storage_bytes([content(part) for part in parts], *self.shared_content(parts))
        self.peak_bytes = max(self.peak_bytes, held)

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
        is_read = bool(seen) and tokens == 1  # a prompt may come in chunks
        if batch != given[0] or (seen != given[1] if is_read else seen + tokens > given[1]):
            msg = (
                f"attention_mask has the shape {list(given)}, and the prompt is [{batch}, {seen or tokens}]. Leave it "
                "out: the cache sees the model's own mask."
            )
            raise ShapeError(msg)
        if is_read:
            self.shared.mask_shape = None
