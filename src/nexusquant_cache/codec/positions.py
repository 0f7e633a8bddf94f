"""The original positions of kept tokens, at a bit per token."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nexusquant_cache.codec.base import filled, is_there


@dataclass
class PositionMap:
    """Which of the tokens seen since ``start`` are kept, at one bit per token and head where any are evicted.

    Heads that keep fewer of the covered tokens than others are filled up, so that all have places for as many; these
    places nobody shall look at (`visible`).

    Attributes:
        start: Position of the first token covered.
        covered: Tokens seen that ``bitmap`` covers.
        bitmap: Bit ``i % 8`` of byte ``i // 8`` says whether token ``start + i`` is kept; None while all are.
        kept: Tokens kept among the covered ones, in each head; the most of any head where they differ.
        dense: Tokens after the covered ones, all kept.
        counts: How many of the covered ones each head keeps, on the CPU; None if all keep equally many.
    """

    start: int
    covered: int = 0
    kept: int = 0
    dense: int = 0
    bitmap: Tensor | None = field(default=None)
    counts: Int[Tensor, "b h"] | None = field(default=None)

    @property
    def tokens(self) -> int:
        """Number of places for tokens in each head."""
        return self.kept + self.dense

    @property
    def mean_tokens(self) -> float:
        """Number of kept tokens, on average over rows and heads."""
        return self.dense + float(self.kept if self.counts is None else self.counts.double().mean())

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.start + self.covered + self.dense

    def append_all(self, tokens: int) -> None:
        """Add tokens that are all kept."""
        self.dense += tokens

    def append(self, keep: Bool[Tensor, "b h n"]) -> None:
        """Add tokens of which these are kept."""
        earlier = keep.new_ones(*keep.shape[:2], self.dense)
        known = self._bits(keep)
        self.dense = 0
        self.cover(torch.cat([known, earlier, keep], -1))

    def restrict(self, keep: Bool[Tensor, "b h n"]) -> None:
        """Keep, of the last so many positions, only these of those that are kept."""
        count = keep.shape[2]
        bits = torch.cat([self._bits(keep), keep.new_ones(*keep.shape[:2], self.dense)], -1)
        bits[..., bits.shape[-1] - count :] &= keep
        self.dense = 0
        self.cover(bits)

    def crop(self, end: int) -> Bool[Tensor, "b h tokens"] | int:
        """Forget positions from ``end`` on, which is not before the start.

        Returns:
            Which of the places stay; as one number if the first ones do.
        """
        behind = end - self.start - self.covered
        if behind >= 0:
            self.dense = behind
            return self.tokens
        assert self.bitmap is not None, "positions that are all kept are only ever cut behind their start"
        stay = self.positions(self.bitmap.device) < end
        visible = self.visible()
        if visible is not None:
            stay &= visible
        self.dense = 0
        self.cover(self._bits(self.bitmap)[..., : max(end - self.start, 0)])
        return stay

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function of the rows of a batch, which keeps the other axes as they are."""
        if self.bitmap is not None:
            self.bitmap = function(self.bitmap)
        if self.counts is not None:
            self.counts = function(self.counts)
            self.kept = int(self.counts.max())

    def cover(self, bits: Bool[Tensor, "b h covered"]) -> None:
        """Cover these tokens and no others."""
        self.covered = bits.shape[-1]
        counts = bits.sum(-1).cpu()
        self.kept = int(counts.max())
        self.counts = None if int(counts.min()) == self.kept else counts
        self.bitmap = _packed(bits)

    def _bits(self, like: Tensor) -> Bool[Tensor, "b h covered"]:
        if self.bitmap is None:
            return like.new_ones(*like.shape[:2], self.covered, dtype=torch.bool)
        return self.bits_of(self.bitmap)

    def bits_of(self, bitmap: Tensor) -> Bool[Tensor, "b h covered"]:
        """Return what a bitmap says of each covered token."""
        shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
        bits = (bitmap[..., None] >> shifts & 1).flatten(-2)
        return bits[..., : self.covered].bool()

    def visible(self) -> Bool[Tensor, "b h tokens"] | None:
        """Return which places hold tokens; None if all do."""
        if self.bitmap is None or self.counts is None:
            return None
        return torch.nn.functional.pad(is_there(self.counts, self.bitmap.device), (0, self.dense), value=True)

    def positions(self, device: torch.device) -> Int[Tensor, "*heads tokens"]:
        """Return the kept positions, ascending: ``[tokens]`` if all are kept, else ``[b, h, tokens]``.

        Places that hold no token are given the position of another one.
        """
        end = self.start + self.covered
        if self.bitmap is None:
            return torch.arange(self.start, end + self.dense, device=device)
        bits = self._bits(self.bitmap)
        kept = bits.nonzero()[:, -1] + self.start
        kept = filled(kept, self.counts) if self.counts is not None else kept.view(*bits.shape[:2], self.kept)
        dense = torch.arange(end, end + self.dense, device=device).expand(*bits.shape[:2], -1)
        return torch.cat([kept, dense], -1)


def _packed(bits: Bool[Tensor, "b h covered"]) -> Tensor:
    """Return eight bits to a byte, the first one lowest."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).view(*bits.shape[:2], -1, 8)
    weights = (1 << torch.arange(8, device=bits.device)).to(torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8)
