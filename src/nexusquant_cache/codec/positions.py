"""The original positions of kept tokens, at a bit per token."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass
class PositionMap:
    """Which of the tokens seen since ``start`` are kept, at one bit per token and head where any are evicted.

    Attributes:
        start: Position of the first token covered.
        covered: Tokens seen that ``bitmap`` covers.
        bitmap: Bit ``i % 8`` of byte ``i // 8`` says whether token ``start + i`` is kept; None while all are.
        kept: Tokens kept among the covered ones, equal in all heads.
        dense: Tokens after the covered ones, all kept.
        hidden: The same bits for kept tokens that nobody shall see: they fill the places of rows that keep fewer tokens
            than others.  None if there are none.
    """

    start: int
    covered: int = 0
    kept: int = 0
    dense: int = 0
    bitmap: Tensor | None = field(default=None)
    hidden: Tensor | None = field(default=None)

    @property
    def tokens(self) -> int:
        """Number of kept tokens."""
        return self.kept + self.dense

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.start + self.covered + self.dense

    def append_all(self, tokens: int) -> None:
        """Add tokens that are all kept."""
        self.dense += tokens

    def append(self, keep: Bool[Tensor, "b h n"], hidden: Bool[Tensor, "b h n"] | None = None) -> None:
        """Add tokens of which these are kept, the same number in every head, and these of them hidden."""
        earlier = keep.new_ones(*keep.shape[:2], self.dense)
        known = self._bits(keep)
        if hidden is not None or self.hidden is not None:
            before = torch.zeros_like(known) if self.hidden is None else self._unpacked(self.hidden)
            new = torch.zeros_like(keep) if hidden is None else hidden
            self.hidden = _packed(torch.cat([before, torch.zeros_like(earlier), new], -1))
        self.dense = 0
        self._set(torch.cat([known, earlier, keep], -1))

    def kept_before(self, end: int) -> Int[Tensor, "b h"] | int:
        """Return how many kept tokens stand before position ``end``, as one number where all heads agree."""
        behind = end - self.start - self.covered
        if behind >= 0:
            return self.kept + min(behind, self.dense)
        if self.bitmap is None:
            return 0
        return self._bits(self.bitmap)[..., : max(end - self.start, 0)].sum(-1)

    def crop(self, end: int, tokens: int) -> None:
        """Forget positions from ``end`` on, and in each head the first ones before it, so that ``tokens`` are left."""
        behind = end - self.start - self.covered
        if behind >= 0 and self.kept + behind == tokens:
            self.dense = behind
            return
        assert self.bitmap is not None, "positions that are all kept are only ever cut behind their start"
        bits = self._bits(self.bitmap)[..., : max(end - self.start, 0)]
        bits = torch.cat([bits, bits.new_ones(*bits.shape[:2], max(behind, 0))], -1)
        surplus = bits.sum(-1, keepdim=True) - tokens
        if self.hidden is not None:
            hidden = self._unpacked(self.hidden)[..., : bits.shape[-1]]
            self.hidden = _packed(torch.nn.functional.pad(hidden, (0, bits.shape[-1] - hidden.shape[-1])))
        self.dense = 0
        self._set(bits & (bits.cumsum(-1) > surplus))

    def _set(self, bits: Bool[Tensor, "b h covered"]) -> None:
        """Cover these tokens and no others."""
        self.covered = bits.shape[-1]
        self.kept = int(bits[0, 0].sum())
        self.bitmap = _packed(bits)

    def _bits(self, like: Tensor) -> Bool[Tensor, "b h covered"]:
        if self.bitmap is None:
            return like.new_ones(*like.shape[:2], self.covered, dtype=torch.bool)
        return self._unpacked(self.bitmap)

    def _unpacked(self, bitmap: Tensor) -> Bool[Tensor, "b h covered"]:
        shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
        bits = (bitmap[..., None] >> shifts & 1).flatten(-2)
        return bits[..., : self.covered].bool()

    def visible(self) -> Bool[Tensor, "b h tokens"] | None:
        """Return which kept tokens are not hidden; None if none are."""
        if self.bitmap is None or self.hidden is None:
            return None
        bits, hidden = self._unpacked(self.bitmap), self._unpacked(self.hidden)
        found = ~hidden[bits].view(*bits.shape[:2], self.kept)
        return torch.nn.functional.pad(found, (0, self.dense), value=True)

    def positions(self, device: torch.device) -> Int[Tensor, "*heads tokens"]:
        """Return the kept positions, ascending: ``[tokens]`` if all are kept, else ``[b, h, tokens]``."""
        end = self.start + self.covered
        if self.bitmap is None:
            return torch.arange(self.start, end + self.dense, device=device)
        bits = self._bits(self.bitmap)
        kept = bits.nonzero()[:, -1].view(*bits.shape[:2], self.kept) + self.start
        dense = torch.arange(end, end + self.dense, device=device).expand(*bits.shape[:2], -1)
        return torch.cat([kept, dense], -1)


def _packed(bits: Bool[Tensor, "b h covered"]) -> Tensor:
    """Return eight bits to a byte, the first one lowest."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).view(*bits.shape[:2], -1, 8)
    weights = (1 << torch.arange(8, device=bits.device)).to(torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8)
