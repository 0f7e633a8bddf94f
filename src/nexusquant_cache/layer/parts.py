"""One face for all layers of a cache: ours, and those of transformers' own classes."""

from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from nexusquant_cache.codec.held import HeldTokens
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.compress import fitted_transforms
from nexusquant_cache.layer.crop import bring_back, check_crop, take_back_update
from nexusquant_cache.layer.host import to_device, to_host
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.reading import dense, held
from nexusquant_cache.layer.schedule import is_due, is_due_early
from nexusquant_cache.layer.state import LayerState
from nexusquant_cache.layer.tokens import LayerTransforms, own


class Part:
    """A layer as its cache sees it: one of transformers' own classes, or `CompressedPart`.

    Attributes:
        layer: The layer.
        index: Its place in the cache.
    """

    layer: Any

    def __init__(self, layer: Any, index: int) -> None:  # noqa: ANN401 - any class of transformers
        self.layer, self.index = layer, index

    @property
    def state(self) -> LayerState | None:
        """What a compressed layer holds; None for others."""
        return None

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return int(getattr(self.layer, "get_seq_length", lambda: 0)())

    @property
    def rows(self) -> int:
        """Rows of the batch that it has seen; 1 before the first update."""
        keys = getattr(self.layer, "keys", None)
        return 1 if keys is None else len(keys)

    @property
    def is_in_step(self) -> bool:
        """Whether every forward gives the layer its tokens: after it, all such layers have seen equally many.

        Of transformers' own these are layers with a sliding window; others may be over an image, or hold states of no
        tokens.
        """
        return isinstance(self.layer, DynamicLayer) and bool(self.layer.is_sliding)

    @property
    def is_linear(self) -> bool:
        """Whether the layer holds states of linear attention, which tell of no tokens."""
        return isinstance(self.layer, LinearAttentionCacheLayerMixin)

    @property
    def may_leave(self) -> bool:
        """Whether the layer may be in host memory: every use of its states is an update, others would come too soon."""
        waits = self.is_linear or hasattr(self.layer, "update_indexer")
        return isinstance(self.layer, DynamicLayer) and not waits

    @property
    def transforms(self) -> LayerTransforms | None:
        """What was fitted to the prompt."""
        return None

    def arrive(self) -> None:
        """Wait for what is on its way, so that it can be read."""

    def check_crop(self, count: int) -> None:
        """Raise UnsupportedError if the newest ``count`` tokens cannot be removed.

        What was in a sliding window before them is there only as far as it was recorded.  transformers' class refuses
        where nothing was; where too little was, it would go on with a window that lacks tokens.
        """
        if not (self.is_in_step and self.layer.is_initialized and self.layer.record_past and count):
            return
        left = self.seen - count
        held, needed = max(self.layer.keys.shape[-2] - count, 0), min(left, self.layer.sliding_window - 1)
        if held < needed:
            msg = (
                f"cannot remove the newest {count} of {self.seen} tokens: layer {self.index} has a sliding window, and "
                f"of the {needed} tokens that would be in it, {needed - held} are gone. Call "
                "cache.activate_past_recording() before the tokens that may be taken back, or start again after "
                "cache.reset()"
            )
            raise UnsupportedError(msg)

    def trim(self, tokens: int) -> None:
        """Free what came before a sliding window: transformers' layer keeps a view of all ``tokens`` of the update."""
        layer = self.layer
        if self.state is None and self.is_in_step and tokens > layer.keys.shape[-2]:
            is_one = layer.values is layer.keys  # as in DeepSeek V4
            layer.keys = own(layer.keys)
            layer.values = layer.keys if is_one else own(layer.values)

    def observe(self, queries: Float[Tensor, "b q w d"]) -> None:
        """See the queries of the tokens that came last."""
        del queries

    def fetch(self) -> None:
        """Have on the device what the next update needs."""
        self._move(lambda x: to_device(x, self.layer.device))

    def fetch_beside(self) -> None:
        """Start to `fetch` beside the computation."""

    def release(self) -> None:
        """Keep in host memory what an offloading cache keeps there; all of it is there when this returns."""
        self._move(to_host)

    def offload(self) -> None:
        """Send everything to host memory."""
        self.release()

    def prefetch(self, *, whole: bool) -> None:
        """Undo `offload`; if not ``whole``, an offloading cache keeps in host memory what it always does."""
        del whole
        self.fetch()

    def _move(self, function: Callable[[Tensor], Tensor]) -> None:
        layer = self.layer
        if self.may_leave and layer.is_initialized and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = function(layer.keys), function(layer.values)


class CompressedPart(Part):
    """A layer of ours."""

    layer: NexusQuantLayer

    @property
    def state(self) -> LayerState:
        """What the layer holds."""
        return self.layer.state

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self.layer.state.seen

    @property
    def is_in_step(self) -> bool:
        """Yes."""
        return True

    @property
    def rows(self) -> int:
        """Rows of the batch that it has seen; 1 before the first update."""
        return 1 if self.layer.state.tail is None else len(self.layer.state.tail[0])

    @property
    def may_leave(self) -> bool:
        """Yes: it comes back by itself."""
        return True

    @property
    def transforms(self) -> LayerTransforms | None:
        """What was fitted to the prompt; None before the first compression."""
        self.layer.residency.arrive()
        return fitted_transforms(self.layer.state)

    def arrive(self) -> None:
        """Wait for copies that are made beside the computation."""
        self.layer.residency.arrive()

    def fetch(self) -> None:
        """Do nothing: the update of the layer fetches what it needs, after its checks."""

    def observe(self, queries: Float[Tensor, "b q w d"]) -> None:
        """Keep the queries until the compression, if the policy wants them."""
        self.layer.observe(queries)

    def fetch_beside(self) -> None:
        """Start to fetch the codes."""
        self.layer.residency.fetch_beside()

    def release(self) -> None:
        """Keep the codes, and a prompt that waits, in host memory."""
        self.layer.residency.release()

    def offload(self) -> None:
        """Send everything to host memory."""
        self.layer.residency.offload()

    def prefetch(self, *, whole: bool) -> None:
        """Bring back everything, or all but codes and a waiting prompt if the cache is offloading."""
        if whole:
            self.layer.residency.fetch()
        else:
            self.layer.residency.unpark()

    # What only layers of ours do

    def held(self) -> HeldTokens:
        """Return all kept tokens as they are now, for attention."""
        self.layer.residency.fetch()
        return held(self.layer.state)

    def dense(self) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]]:
        """Return all kept keys and values, decoded, in the dtypes they came in, oldest first."""
        return dense(self.layer.state, self.layer.residency)

    @property
    def is_pending(self) -> bool:
        """Whether a prompt, or a later turn, waits for its compression."""
        return self.layer.state.turn.is_pending

    @property
    def awaits_crop(self) -> bool:
        """Whether the next crop compresses a prompt, as in assisted decoding."""
        turn = self.layer.state.turn
        return turn.is_pending and turn.record_past and turn.expects_prompt

    def is_due(self, query_length: int) -> bool:
        """Tell whether an update of so many tokens begins with a compression."""
        return is_due(self.layer.state, query_length)

    def encode_early(self, before: int) -> None:
        """Encode in the middle of a prefill, if that is wanted and enough tokens are there; otherwise leave them.

        Args:
            before: Tokens that the layer had seen before this forward.
        """
        if is_due_early(self.layer.state, self.layer.shared):
            self.layer.encode_early(max(self.seen - before, 0))

    def check_crop(self, count: int) -> None:
        """Raise UnsupportedError if the newest ``count`` tokens cannot be removed."""
        check_crop(self.layer.state, count)

    def take_back(self, seen: int) -> None:
        """Undo the last update, back to so many tokens seen; without tokens, forget shapes as well.

        A compression that the update began with stays: the next update would have caused it too.
        """
        layer, state = self.layer, self.layer.state
        count = state.seen - seen
        if seen == 0:
            is_recording = state.turn.record_past
            layer.reset()
            if is_recording:
                layer.activate_past_recording()
        elif count > 0:
            layer.residency.arrive()
            if layer.undo is None:
                take_back_update(state, count)
            else:
                bring_back(state, layer.undo)
                layer.undo = None

    def observe_reconstruction(self, attention: Float[Tensor, "b h n"]) -> None:
        """Keep, while the prompt waits, the greatest attention that was paid to each token in a second reading.

        Tokens that come later count as fully attended.
        """
        assert self.layer.state.turn.pending_from == 0
        self.layer.residency.arrive()
        self.layer.state.observed.reconstruction = own(attention)


def part_of(layer: Any, index: int) -> Part:  # noqa: ANN401 - any layer of a cache
    """Return the face of a layer; the one place that asks of which kind it is."""
    return CompressedPart(layer, index) if isinstance(layer, NexusQuantLayer) else Part(layer, index)


def compressed(parts: list[Part]) -> Iterator[CompressedPart]:
    """Yield the parts that are layers of ours."""
    return (part for part in parts if isinstance(part, CompressedPart))
