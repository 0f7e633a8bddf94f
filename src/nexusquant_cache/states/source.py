"""Where states come from: one update of one layer."""

from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nexusquant_cache.codec.held import HeldTokens, Side

_HIDES = -5e3  # from here on, a number in a mask or in logits hides a token
See: TypeAlias = Callable[[int, Tensor, float | None, Tensor | None, Tensor | None], None]
"""Sees how many tokens are new, queries, their scale, which of the new tokens are padding, and sums."""


class Source:
    """What the keys and the values of one update have in common.

    Attributes:
        held: What the layer holds after the update.
        fresh: Tokens that the update has brought.
        shapes: Shapes of keys and values, ``[batch, kv_heads, tokens seen, channels]``.
    """

    def __init__(
        self, held: HeldTokens, fresh: int, see: See | None = None, note_read: Callable[[], None] | None = None
    ) -> None:
        """Come from an update.

        Args:
            held: What the layer holds.
            fresh: Tokens that the update has brought.
            see: Is shown the attention to them, once.
            note_read: Called, once, if something else looks at the states.
        """
        self.held, self.fresh = held, fresh
        (batch, heads, _, key_dim), value_dim = held.tail[0].shape, held.tail[1].shape[3]
        self.shapes: dict[Side, tuple[int, ...]] = {
            "keys": (batch, heads, held.seen, key_dim),
            "values": (batch, heads, held.seen, value_dim),
        }
        self._see, self._note_read = see, note_read
        self._noted: tuple[Tensor, float | None, Tensor | None] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether there are codes to answer from."""
        return self.held.keys is not None

    def show(
        self,
        queries: Float[Tensor, "b q m d"],
        scaling: float | None,
        pads: Bool[Tensor, "#b fresh"] | None,
        log_sums: Float[Tensor, "b q m"] | None = None,
    ) -> None:
        """Let the layer see the attention to what it has returned.

        Only the first one counts: a layer of the model that shares the keys of an earlier one has queries of its own.
        Where a model attends with a few queries at once, this is for the last of them (`are_last`).

        Args:
            queries: Queries of the new tokens, or of the last of them, with their rotary phase.
            scaling: What attention multiplies logits with; by default ``head_dim ** -0.5``.
            pads: Which of the new tokens no query attends to; None if all are attended to.
            log_sums: The logarithm of the sum that each query's softmax divides by; None if it is not known.
        """
        # More queries than tokens are no queries of these tokens.
        if self._see is not None and 0 < queries.shape[2] <= self.fresh:
            see, self._see = self._see, None
            see(self.fresh, queries, scaling, pads, log_sums)

    def note_read(self) -> None:
        """Tell the layer that something else than attention looks at its states: their tokens have to stay."""
        if self.fresh > 1 and self._note_read is not None:
            note, self._note_read, self._see = self._note_read, None, None
            note()

    @cached_property
    def evicted(self) -> Bool[Tensor, "b heads 1 seen"] | None:
        """Which tokens are gone; None if none are."""
        held = self.held
        if held.is_whole:
            return None
        batch, heads = held.tail[0].shape[:2]
        kept = torch.zeros(batch, heads, 1, 1, held.tokens, dtype=torch.uint8, device=held.tail[0].device)
        return held.spread(kept, 1.0).bool()

    def note(
        self, queries: Float[Tensor, "b q m d"], scaling: float | None, pads: Bool[Tensor, "#b fresh"] | None
    ) -> None:
        """Take note of what `show` will be given if the values are asked for too."""
        self._noted = (queries, scaling, pads)

    def show_noted(self) -> None:
        """Show what was noted, if anything was."""
        if self._noted is not None:
            self.show(*self._noted)


def pads_in(mask: Shaped[Tensor, "#b #q #m n"] | None, fresh: int) -> Bool[Tensor, "#b fresh"] | None:
    """Return which of the newest tokens a mask hides from all queries; None if there is no mask.

    A single new token is never taken for padding, so that nobody waits for a mask at each step.

    Args:
        mask: True for what may be seen, or numbers that are added to the logits.
        fresh: How many tokens are new.
    """
    if mask is None or fresh <= 1 or mask.ndim != 4 or not mask.shape[2]:  # noqa: PLR2004 - batch, heads, queries
        return None
    return hidden_in(is_visible(mask[..., -fresh:]))


def hidden_in(visible: Bool[Tensor, "#b #q #m fresh"]) -> Bool[Tensor, "#b fresh"]:
    """Return which of the new tokens are hidden from all queries of text.

    Queries of padding are free to see anything.  They are known by seeing the newest token, which in text only the last
    query does, and are not asked.  Where a mask lets text look ahead, the last query sees as much as they do.
    """
    is_asked = ~visible[..., -1:]
    is_asked[..., -1, :] = True
    return ~(visible & is_asked).flatten(1, 2).any(1)


def are_last(newest: Shaped[Tensor, "*b_q #m"] | None, queries: int, fresh: int) -> bool:
    """Tell whether queries are those of the last new tokens, and no block of earlier ones.

    Args:
        newest: What a mask, or the logits, say of the newest token, by query; None if there is no mask.
        queries: How many queries there are.
        fresh: How many tokens are new.
    """
    return queries == fresh or newest is None or bool(is_visible(newest[..., -1]).any())


def is_visible(x: Shaped[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Return which tokens may be seen, by a mask or by masked logits.

    What hides a token by a number is the smallest number of some dtype, not always that of the mask, or one like -1e4,
    with a logit or a bias on top of it.
    """
    return x if x.dtype == torch.bool else x > _HIDES
