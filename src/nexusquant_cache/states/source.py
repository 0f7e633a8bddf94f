"""Where states come from: one update of one layer."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nexusquant_cache.codec.held import HeldTokens, Side

See: TypeAlias = Callable[[int, Tensor, float | None, Tensor | None], None]
"""Sees how many tokens are new, queries, their scale, and which of the new tokens are padding."""


class Source:
    """What the keys and the values of one update have in common.

    Attributes:
        held: What the layer holds after the update.
        fresh: Tokens that the update has brought.
        shapes: Shapes of keys and values, ``[batch, kv_heads, tokens seen, channels]``.
    """

    def __init__(self, held: HeldTokens, fresh: int, see: See) -> None:
        """Come from an update that has brought so many tokens; ``see`` is shown the attention to them, once."""
        self.held, self.fresh = held, fresh
        (batch, heads, _, key_dim), value_dim = held.tail[0].shape, held.tail[1].shape[3]
        self.shapes: dict[Side, tuple[int, ...]] = {
            "keys": (batch, heads, held.seen, key_dim),
            "values": (batch, heads, held.seen, value_dim),
        }
        self._see: See | None = see
        self._noted: tuple[Tensor, float | None, Tensor | None] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether there are codes to answer from."""
        return self.held.keys is not None

    def show(
        self, queries: Float[Tensor, "b q m d"], scaling: float | None, pads: Bool[Tensor, "#b fresh"] | None
    ) -> None:
        """Let the layer see the attention to what it has returned.

        Only the first one counts: a layer of the model that shares the keys of an earlier one has queries of its own.

        Args:
            queries: Queries of the new tokens, or of the last of them, with their rotary phase.
            scaling: What attention multiplies logits with; by default ``head_dim ** -0.5``.
            pads: Which of the new tokens no query attends to; None if all are attended to.
        """
        if self._see is not None:
            see, self._see = self._see, None
            see(self.fresh, queries, scaling, pads)

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
    if mask is None or fresh == 1 or mask.ndim != 4:  # noqa: PLR2004 - batch, heads, queries, tokens
        return None
    newest = mask[..., -fresh:]
    # What hides a token by a number is the smallest number, or infinity, with a bias on top of it.
    visible = newest if mask.dtype == torch.bool else newest > torch.finfo(mask.dtype).min / 2
    return ~visible.flatten(1, 2).any(1)
