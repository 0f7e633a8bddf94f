"""One full-attention layer of the cache, as transformers knows layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from nexusquant_cache.errors import CacheStateError, UnsupportedError
from nexusquant_cache.layer.checks import (
    check_finite,
    check_gradients,
    check_kind,
    check_queries,
    check_transforms,
    check_update,
    needs_gradients,
    without_gradient,
)
from nexusquant_cache.layer.compress import choose_alone, encode_oldest, stop_waiting
from nexusquant_cache.layer.crop import before_update, check_sign, remove
from nexusquant_cache.layer.decoded import Decoded
from nexusquant_cache.layer.observations import scaled
from nexusquant_cache.layer.reading import dense, held, newest, states
from nexusquant_cache.layer.residency import Residency
from nexusquant_cache.layer.schedule import are_enough, is_due, is_due_early, wants_far, wants_queries
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import LayerState
from nexusquant_cache.layer.tokens import own
from nexusquant_cache.states.source import Source


class NexusQuantLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer.

    Tokens arrive in the exact tail.  When the next layer is given a prompt, or at the first generation step (one token,
    or as `Turn` has it), everything but the sinks and the newest ``residual_length`` tokens is encoded, and the exact
    copies are freed.  At the first step the prompt is scored, and the codes of what is evicted are dropped.
    Later, whenever the tail has grown by ``flush_length``, its oldest tokens are encoded and appended.
    A token is encoded once; stored codes are never decoded and encoded again.

    While past recording is active, as in assisted decoding, updates encode nothing; the `crop` that follows
    each of them does, when it has taken back what was rejected.  So a rollback leaves no trace.

    Attributes:
        state: What it holds and counts.
        shared: What all layers of the cache share.
        residency: Where its tensors are.
        undo: What an error in this forward brings back, if the tokens that it has brought are encoded already.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, shared: Shared, layer_idx: int) -> None:
        """Start empty; ``shared`` provides policy, codecs and rotary phase when they are first needed."""
        # Not calling super().__init__: it assigns `keys` and `values`, which are computed here.
        self.shared, self.layer_idx = shared, layer_idx
        self.reset()

    def reset(self) -> None:
        """Forget everything, including what was fitted."""
        self.is_initialized = False
        self.undo: dict[str, Any] | None = None
        self.state = LayerState(self.layer_idx)
        self.residency = Residency(self.state, self.shared)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fix shapes, dtypes and device, and ask for the codecs; the tensors may be empty."""
        state, shared = self.state, self.shared
        check_kind(self.layer_idx, key_states, value_states)
        state.codecs = state.asked = (
            shared.make_codec("keys", key_states.shape[-1], self.layer_idx),
            shared.make_codec("values", value_states.shape[-1], self.layer_idx),
        )
        check_transforms(state, shared, key_states)
        state.policy = shared.make_policy(self.layer_idx)
        state.device = key_states.device
        state.tail = (own(key_states[:, :, :0]), own(value_states[:, :, :0]))
        self.is_initialized = True

    @property
    def record_past(self) -> bool:
        """Whether a `crop` is expected after each update; transformers sets it to False as well."""
        return self.state.turn.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.state.turn.record_past = value

    def activate_past_recording(self) -> None:
        """Expect a `crop` after each update from now on, and encode only then.

        The first multi-token update is taken for a prompt, later ones for candidates.  An update that is not followed
        by a crop ends the recording.
        """
        self.state.turn.start_recording()

    # Lengths

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.state.seen

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1, under the name that older transformers use."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (seen + new tokens, 0): the mask has a column for every token, kept or not.

        Raises:
            CacheStateError: If the forward brings no token, which is how `generate` treats a prompt at most half as
                long as what the cache has seen.
        """
        seen = self.state.seen
        if query_length == 0 and seen:
            msg = (
                f"this forward brings no new token, and the cache has seen {seen}: the prompt is not its "
                "continuation. To go on, give generate all tokens so far and the new ones behind them. Call "
                "cache.reset() or use a new cache for another prompt. For several questions about one text, ask each "
                "of a copy.deepcopy(cache), or crop the cache back to the text."
            )
            raise CacheStateError(msg)
        return seen + query_length, 0

    # Updates

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store new tokens and return states, with a place for every token seen, for this forward's attention.

        Args:
            key_states: New keys; `check` has been called with these very tensors.
            value_states: New values.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        state = self.state
        self.residency.arrive()
        self.residency.fetch()
        query_length = key_states.shape[2]
        if is_due(state, query_length):
            if state.turn.is_pending:
                self.shared.compress_waiting(query_length)  # this layer among them
            else:
                self.encode()
        elif is_due_early(state, self.shared):
            self.encode()
        saved, self.undo = state.snapshot_of_update(), None
        try:
            state.observed.start_update()
            state.turn.note_update(state.seen, query_length, is_first=state.body is None)
            state.shown_before = state.shown
            given = (key_states, value_states) if state.seen == 0 else None
            if given is not None:
                state.is_detached = needs_gradients(*given)
            was_shown = state.is_shown
            state.append(key_states, value_states)
            return states(self.source(query_length), given=given, was_shown=was_shown)
        except BaseException:  # an interrupt too
            state.restore(saved)
            raise

    def check(self, key_states: Tensor, value_states: Tensor) -> None:
        """Refuse what cannot be stored.

        Raises:
            ShapeError: If the shapes do not fit each other or earlier updates.
            DtypeError: If a tensor is not floating, or its dtype changed.
            NonFiniteError: If a token holds NaN or infinity.  Prompts are checked on arrival, generated tokens
                when they are encoded (a check at each step would wait for the accelerator).
            UnsupportedError: If gradients are to flow to tokens that the layer holds already.
        """
        state = self.state
        if not self.is_initialized:
            check_kind(self.layer_idx, key_states, value_states)
        else:
            check_update(state, key_states, value_states)
        check_gradients(state, key_states, value_states)
        if not state.turn.is_step(key_states.shape[2]):
            check_finite(self.layer_idx, key_states, value_states, "the prompt")

    def source(self, fresh: int) -> Source:
        """Return what the states of an update that has brought so many tokens have in common."""
        here = self.state, self.state.seen
        return Source(held(self.state), fresh, partial(self._see, *here), partial(self._note_read, *here, fresh))

    def _see(  # noqa: PLR0913, PLR0917 - the first two are known at the update
        self,
        state: LayerState,
        seen: int,
        fresh: int,
        queries: Tensor,
        scaling: float | None,
        pads: Tensor | None,
        log_sums: Tensor | None,
    ) -> None:
        """See the attention to an update's tokens, and which of them are padding, if it does not come too late."""
        if not self._is_at(state, seen) or len(queries) != len(state.exact[0]):
            return
        self.residency.arrive()
        if pads is not None and bool(pads.any()):
            state.note_pads(pads)
        self.observe(queries, scaling)
        if wants_far(state, self.shared):
            count = state.seen - (state.turn.pending_from or 0)
            with self.residency.at_home():
                keys = newest(state, 0, count).to(queries.device)
            real = keys.new_ones(keys.shape[0], count, dtype=torch.bool)
            if state.pads is not None:
                real = ~state.pads[:, state.pads.shape[1] - count :]
            exact = queries.detach()
            if exact.device.type == "cpu":  # the sums are of products that nobody has rounded
                exact = exact.float()
            state.observed.append_far(scaled(exact, scaling), keys, real, self.shared.settings, log_sums)
        state.note_shown(fresh)  # when all is there

    def _note_read(self, state: LayerState, seen: int, fresh: int) -> None:
        """Take note that something else than attention looks at an update's tokens, which count as not seen then."""
        if self._is_at(state, seen):
            state.forget_shown_from(seen - fresh)

    def _is_at(self, state: LayerState, seen: int) -> bool:
        return state is self.state and state.seen == seen

    def observe(self, queries: Float[Tensor, "b q w d"], scaling: float | None = None) -> None:
        """See the queries of the tokens that came last, and keep them until the compression if the policy wants them.

        Args:
            queries: Those of the last update's tokens, or of the last of them, with their rotary phase.
            scaling: What attention multiplies logits with; by default ``head_dim ** -0.5``.

        Raises:
            ShapeError: If they do not fit the keys.
        """
        if wants_queries(self.state, self.shared):
            self.residency.arrive()
            check_queries(self.state, queries)
            policy = self.state.policy
            assert policy is not None
            self.state.observed.append(scaled(queries.detach(), scaling), self.state.seen, policy.most_queries)

    def compress(self) -> None:
        """Encode now what the tail need not hold, and of a prompt drop what the layer for itself does not keep."""
        with self._all_or_nothing():
            self.encode()
            if self.state.turn.is_pending:
                with self.residency.at_home():
                    choose_alone(self.state, self.shared)
                stop_waiting(self.state)

    def encode(self) -> None:
        """Encode now what the tail need not hold, if that is enough; nothing is dropped."""
        if are_enough(self.state, self.shared):
            with self.residency.at_home(codes=False), self._all_or_nothing():  # codes are appended to where they are
                encode_oldest(self.state, self.shared)

    def encode_early(self, fresh: int) -> None:
        """Do the same in the middle of a forward, which has brought so many tokens and may fail yet."""
        self.undo = before_update(self.state, fresh) if 0 < fresh < self.state.seen else None
        self.encode()

    @property
    def held_to_undo(self) -> list[object]:
        """What holds the tensors that an error in this forward would bring back, and that the layer has no more."""
        return [] if self.undo is None else [self.undo[name] for name in ("tail", "pads", "observed")]

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Let an error, or an interrupt, leave the layer as it is now."""
        state, saved = self.state, self.state.snapshot()
        try:
            yield
        except BaseException:
            state.restore(saved)
            raise

    @property
    def keys(self) -> Tensor | None:
        """All kept keys, decoded anew at each access; None before the first update."""
        return self._shown(0)

    @keys.setter
    def keys(self, _: object) -> NoReturn:
        raise self._fixed("keys")

    @property
    def values(self) -> Tensor | None:
        """All kept values, decoded anew at each access; None before the first update."""
        return self._shown(1)

    @values.setter
    def values(self, _: object) -> NoReturn:
        raise self._fixed("values")

    def _fixed(self, name: str) -> UnsupportedError:
        return UnsupportedError(
            f"the {name} of a compressed layer are codes, which cannot be replaced: use crop, batch_select_indices or "
            "a new cache, or override make_codec or make_policy to change what the cache holds"
        )

    def _shown(self, place: int) -> Tensor | None:
        if not self.is_initialized:
            return None
        found = dense(self.state, self.residency)[place]
        if self.state.is_detached and torch.is_grad_enabled():
            found = without_gradient(found)
        return found if self.state.body is None else Decoded.of(found, is_whole=self.state.is_whole)

    # Cache operations

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the ``abs(tokens_to_remove)`` newest tokens; while recording, encode what the tail need not hold.

        Args:
            tokens_to_remove: 0 or a negative number.

        Raises:
            ShapeError: If the number is positive (an absolute length, which transformers gave up).
            UnsupportedError: If the batch is padded and the removal reaches the sinks of a row.
        """
        check_sign(tokens_to_remove)
        if not self.is_initialized:
            return
        self.take_off(-tokens_to_remove)
        self.settle()

    def take_off(self, count: int) -> None:
        """Begin a crop: remove the newest ``count`` tokens."""
        self.residency.arrive()
        self.undo = None
        if count:
            with self._all_or_nothing():
                remove(self.state, min(count, self.state.seen))

    def settle(self) -> None:
        """End a crop: encode what the tail need not hold if past is recorded; of a prompt as `compress` does."""
        turn = self.state.turn
        with self._all_or_nothing():
            turn.updated_since_crop = False
            if not turn.record_past:
                return
            if not turn.expects_prompt:
                stop_waiting(self.state)  # these were candidates
            turn.expects_prompt = False
            if self.state.seen:
                self.compress()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows of the batch in another order, as beam search does."""
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._map_rows(lambda x: x[indices.to(x.device), ...])

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        self.residency.arrive()
        self.undo = None
        with self._all_or_nothing():
            self.state.map_rows(function)

    def offload(self) -> None:
        """Move everything stored to host memory; the next update, or whatever else needs it, brings it back."""
        self.undo = None
        self.residency.offload()

    def prefetch(self) -> None:
        """Move what attention needs back to the device of the layer; see `Residency.fetch`."""
        self.residency.fetch()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle gets."""
        self.residency.arrive()
        return self.__dict__.copy()
