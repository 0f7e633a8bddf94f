"""Left padding: how many pads each row of a batch begins with, stated by a mask or recognised from the keys.

A cache is never shown the attention mask.  But pads share one token and one position (`generate` puts
them all at position 0), so at the first attention layer all pads of a row have the same key, while equal
real tokens at consecutive positions differ by a rotary step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from nexusquant_cache.errors import OptionError, ShapeError, UnsupportedError

# Two roundings of one vector differ by less; a rotary step moves the fastest pair of channels by a radian.
_RELATIVE = 0.02
_ABSOLUTE = 1e-5  # of the largest channel
_LOOK = 256  # tokens looked at before the rest of a long prompt


def leading_pads(attention_mask: Shaped[Tensor, "rows n"]) -> Int[Tensor, "rows"]:
    """Return the number of zeros that each row of a mask begins with, on the CPU.

    Raises:
        OptionError: If the mask is not two-dimensional, or has a zero behind a one.
    """
    mask: object = attention_mask  # whatever the annotation says
    if not isinstance(mask, Tensor) or mask.ndim != 2:  # noqa: PLR2004 - batch, tokens
        shape = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        msg = f"attention_mask must be a tensor [batch, tokens] of ones and zeros, got {shape}"
        raise OptionError(msg)
    if not is_left_padding(mask):
        msg = (
            "attention_mask must be zeros, then ones, in every row: padding on the left. "
            "Set tokenizer.padding_side = 'left'; padding elsewhere cannot be told from text by a cache."
        )
        raise OptionError(msg)
    return mask.detach().to("cpu").eq(0).sum(1)


def is_left_padding(mask: Shaped[Tensor, "rows n"]) -> bool:
    """Tell whether every row of a mask is zeros, then ones."""
    real = mask != 0
    return bool((real[:, 1:] >= real[:, :-1]).all())


@dataclass
class Beginning:
    """How each row begins, as far as seen.

    Attributes:
        first: The first vector of each row, ``[batch, channels]``.
        after: The first one that differs from it; meaningless for open rows.
        run: How many leading vectors equal the first.
        open: Rows of which all vectors so far equal the first.
    """

    first: Float[Tensor, "b c"]
    after: Float[Tensor, "b c"]
    run: Int[Tensor, "b"]
    open: Bool[Tensor, "b"]

    @staticmethod
    def of(vectors: Float[Tensor, "b n c"]) -> "Beginning":
        """Start with the first vectors of each row."""
        first = vectors[:, 0].clone()  # not a view, which would keep all the others
        batch = len(vectors)
        start = Beginning(
            first,
            first,
            torch.zeros(batch, dtype=torch.int64, device="cpu"),
            torch.ones(batch, dtype=torch.bool, device="cpu"),
        )
        return start.grown(vectors)

    def grown(self, vectors: Float[Tensor, "b n c"]) -> "Beginning":
        """Return this with further vectors of each row."""
        equal = _close(vectors, self.first[:, None]).long().cumprod(1).sum(1)
        ends = equal < vectors.shape[1]
        at = equal.clamp_max(vectors.shape[1] - 1)
        found = vectors[torch.arange(len(vectors), device=at.device), at]
        is_open = self.open.to(ends.device)
        after = torch.where((is_open & ends)[:, None], found, self.after)
        run = self.run + torch.where(self.open, equal.cpu(), 0)
        return Beginning(self.first, after, run, self.open & ~ends.cpu())

    def cropped(self, seen: int) -> "Beginning":
        """Return this as it was when so many tokens had been seen."""
        return Beginning(self.first, self.after, self.run.clamp_max(seen), self.open | (self.run >= seen))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Beginning":
        """Return this with ``function`` applied to every tensor; all have the batch as first axis."""
        return Beginning(function(self.first), function(self.after), function(self.run), function(self.open))

    def pads(self, position_shows: bool) -> Int[Tensor, "b"] | None:
        """Return the number of pads of each row, or None if it cannot be told.

        Args:
            position_shows: Whether equal tokens at different positions have different keys.  If not, equal leading keys
                may be text.
        """
        same = _close(self.first[:, None], self.first[None]).cpu()
        padded = self._surely_padded(position_shows, same)
        if padded is None or not bool(padded.any()):
            return None if padded is None else torch.zeros_like(self.run)
        is_pad = same[int(padded.long().argmax())]
        single = is_pad & ~padded
        if not bool(is_pad[padded].all()) or not self._behind_is_first(single, ~is_pad):
            return None
        return torch.where(padded, self.run, torch.where(single, 1, 0))

    def _surely_padded(self, position_shows: bool, same: Bool[Tensor, "b b"]) -> Bool[Tensor, "b"] | None:
        """Return which rows certainly have pads; None if nothing can be concluded about the other rows.

        Args:
            position_shows: As in `pads`.
            same: Which rows begin with the same vector.
        """
        padded = self.run > 1
        if not position_shows:
            # Equal keys may be equal tokens: in a batch, either could be meant.  A single row is taken for text.
            is_ambiguous = bool(padded.any()) and len(padded) > 1
            return None if is_ambiguous else torch.zeros_like(padded)
        if bool(padded.any()) or bool(same.all()):
            return padded
        # If a row's second key equals another row's first, both stand at position 0: the row begins with a pad.
        padded = (_close(self.after[:, None], self.first[None]).cpu() & ~same).any(1)
        return padded if bool(padded.any()) else None

    def _behind_is_first(self, single: Bool[Tensor, "b"], unpadded: Bool[Tensor, "b"]) -> bool:
        """Tell whether these rows begin with one pad each, and not with a text whose first token is the pad's.

        They do if their second vector is one that an unpadded row begins with: then it stands at position 0.

        Args:
            single: The rows.
            unpadded: Rows without pads.
        """
        known = self.first[unpadded.to(self.first.device)]
        behind = self.after[single.to(self.after.device)]
        return bool(_close(behind[:, None], known[None]).any(1).all())


@dataclass
class BatchPadding:
    """What is known about the pads of the batch that a cache serves.

    Attributes:
        stated: Pads of each row of the mask that the user gave, or None.
        pads: Pads of each row of the batch, on the CPU; None if there are none (or none are known).
        certain: False if rows may have pads that could not be told apart: then nothing may be evicted.
        settled_at: Seen tokens from which on ``pads`` and ``certain`` hold; None while every token so far
            may be a pad.
        beginning: How the rows begin; dropped when that is settled.
    """

    stated: Int[Tensor, "rows"] | None = None
    pads: Int[Tensor, "b"] | None = None
    certain: bool = True
    settled_at: int | None = None
    beginning: Beginning | None = None

    @property
    def most(self) -> int:
        """Pads of the row that has most."""
        return 0 if self.pads is None else int(self.pads.max())

    def is_settled(self, seen: int) -> bool:
        """Tell whether, with so many tokens seen, the padding was known and every row had a real token.

        Layers of one forward are updated one by one.  Each asks with its own count, so all get the same answer.
        """
        return self.settled_at is not None and seen >= self.settled_at and seen > self.most

    def may_evict(self, seen: int) -> bool:
        """Tell whether tokens may be evicted: only where text and padding cannot be mistaken for each other."""
        return self.certain and self.is_settled(seen)

    def take_stated(self, pads: Int[Tensor, "rows"], batch: int | None) -> None:
        """Take the pads of each row as given; with a known batch size, for each of its rows."""
        self.stated, self.certain, self.beginning = pads, True, None
        if batch is not None:
            self.pads, self.stated = _per_row(pads, batch), pads.repeat_interleave(batch // len(pads))
            self.settled_at = 0

    def give_up(self) -> None:
        """Take all tokens for text for good: they are about to be coded, and it is not known which are pads."""
        if self.settled_at is None:
            self.pads, self.certain, self.settled_at, self.beginning = None, False, 0, None

    def observe(
        self,
        keys: Float[Tensor, "b h n d"],
        values: Float[Tensor, "b h n dv"],
        seen: int,
        position_shows: bool,
    ) -> None:
        """Look at new tokens of the first attention layer, before any layer has stored them.

        Args:
            keys: New keys.
            values: New values; they differ where keys do, and in latent attention it is they that are rotary.
            seen: Tokens that the layer has seen before.
            position_shows: Whether equal tokens at different positions differ at this layer.
        """
        if seen == 0 and self.stated is not None:
            self.take_stated(self.stated, len(keys))
        if self.settled_at is not None:
            return
        tokens = min(keys.shape[2], _LOOK) if self.beginning is None else keys.shape[2]
        vectors = _vectors(keys[:, :, :tokens], values[:, :, :tokens])
        beginning = Beginning.of(vectors) if self.beginning is None else self.beginning.grown(vectors)
        if tokens < keys.shape[2] and bool(beginning.open.any()):
            beginning = beginning.grown(_vectors(keys[:, :, tokens:], values[:, :, tokens:]))
        self.beginning = beginning
        if not bool(beginning.open.any()):
            pads = beginning.pads(position_shows)
            self.certain = pads is not None
            self.pads = pads if pads is not None and bool(pads.any()) else None
            self.settled_at = seen + keys.shape[2]
            self.beginning = None

    def observe_turn(self, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n dv"], evicted: int) -> None:
        """Look for padding in a later turn: after an eviction, transformers' mask would hide other tokens instead.

        Raises:
            UnsupportedError: If a row of the turn has pads, at least two, and tokens have been evicted.
        """
        if not _has_equal_neighbours(keys, values):
            return
        if evicted:
            msg = (
                f"this turn looks padded (equal keys side by side), and {evicted} tokens have been evicted: "
                "transformers' mask would hide the wrong ones. Give turns of equal length, or one cache per "
                "conversation, or a preset that evicts nothing (quant)."
            )
            raise UnsupportedError(msg)
        self.certain = False

    def crop(self, seen: int) -> None:
        """Follow the cache back to this many seen tokens; what was known stays known, unless nothing is left."""
        if seen == 0:
            self.pads, self.certain, self.settled_at, self.beginning = None, True, None, None
        elif self.settled_at is not None:
            self.settled_at = min(self.settled_at, seen)
        elif self.beginning is not None:
            self.beginning = self.beginning.cropped(seen)

    def map(self, function: Callable[[Tensor], Tensor], seen: int) -> None:
        """Apply ``function`` to every tensor of the batch, if there is one; all have the batch as first axis."""
        if not seen:
            return
        self.pads = None if self.pads is None else function(self.pads)
        self.stated = None if self.stated is None else function(self.stated)
        self.beginning = None if self.beginning is None else self.beginning.map(function)


def _per_row(pads: Int[Tensor, "rows"], batch: int) -> Int[Tensor, "b"] | None:
    """Return the pads of each row of a batch, in which each row of the mask may stand several times in a row."""
    if batch % len(pads):
        msg = (
            f"attention_mask has {len(pads)} rows, and the batch has {batch}. It must be the mask of this batch "
            "(each row may stand for several, as with num_return_sequences)."
        )
        raise ShapeError(msg)
    return pads.repeat_interleave(batch // len(pads)) if bool(pads.any()) else None


def _vectors(keys: Tensor, values: Tensor) -> Float[Tensor, "b n c"]:
    """Return one vector per token, to compare tokens by: the keys and values of all heads."""
    both = [x.detach().float().transpose(1, 2).flatten(2) for x in (keys, values)]
    return torch.cat(both, -1)


def _has_equal_neighbours(keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n dv"]) -> bool:
    """Tell whether any row has two tokens side by side with equal keys and values."""
    few = torch.cat([x[:, 0, :, :8].detach().float() for x in (keys, values)], -1)  # enough to rule out nearly all
    rows, tokens = _close(few[:, 1:], few[:, :-1]).nonzero(as_tuple=True)
    if not len(rows):
        return False
    first, second = (_vectors(keys[rows, :, at, None], values[rows, :, at, None]) for at in (tokens, tokens + 1))
    return bool(_close(first, second).any())


def _close(a: Float[Tensor, "*#shape c"], b: Float[Tensor, "*#shape c"]) -> Bool[Tensor, "*shape"]:
    """Tell which vectors are equal up to rounding."""
    size = torch.maximum(a.abs(), b.abs())
    limit = _RELATIVE * size + _ABSOLUTE * size.amax(-1, keepdim=True)
    return ((a - b).abs() <= limit).all(-1)
