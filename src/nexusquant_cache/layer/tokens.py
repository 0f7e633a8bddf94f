"""Storage of compressed tokens: append-only buffers, original positions, and the two together."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors, RaggedVectors, VectorCodec, filled, is_there
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.layer.host import empty_beside, pinned_for, to_device, to_host

_LEAST_ROOM = 32  # tokens
_ROOM_SHARE = 256  # room to grow, as a part of what is stored


@dataclass
class TokenBuffer:
    """A tensor ``[batch, kv_heads, tokens, ...]`` that grows along the tokens without copying every time.

    When it is full it is replaced by one with 1/256 more room (at least 32 tokens): the room that is held
    and not used stays below half a percent, and a stored byte is copied once per 1/256 of growth, far
    less often than attention reads it.

    It may be kept in host memory and lent to the device in which it is needed: `fetch` copies it there, `release` lets
    go of the copy.  New tokens go to both places, so what is stored makes the way back only once.

    Attributes:
        data: Stored tokens, with room for more.
        tokens: How many there are.
        fetched: A copy of ``data`` where it is needed.
    """

    data: Tensor
    tokens: int
    fetched: Tensor | None = None

    @classmethod
    def of(cls, data: Tensor) -> "TokenBuffer":
        """Return a full buffer holding this tensor."""
        return cls(_exact(data), data.shape[2])

    def stored(self) -> Tensor:
        """Return the tokens where they are stored; shares memory."""
        return self.data.narrow(2, 0, self.tokens)

    def view(self) -> Tensor:
        """Return the tokens where they are needed, if they have been fetched; shares memory."""
        return (self.data if self.fetched is None else self.fetched).narrow(2, 0, self.tokens)

    def append(self, new: Tensor) -> None:
        """Store further tokens behind the others."""
        if self.fetched is not None:
            self.fetched = self._appended(self.fetched, new)
        self.data = self._appended(self.data, new.to(self.data.device))
        self.tokens += new.shape[2]

    def _appended(self, data: Tensor, new: Tensor) -> Tensor:
        """Return the tensor with further tokens, in a larger one if there is no room in it."""
        total = self.tokens + new.shape[2]
        # What was made in inference mode may not be written to later.
        fixed = data.is_inference() and not torch.is_inference_mode_enabled()
        if total > data.shape[2] or fixed:
            room = total + max(_LEAST_ROOM, total // _ROOM_SHARE) if total > data.shape[2] else data.shape[2]
            grown = empty_beside(data, (*data.shape[:2], room, *data.shape[3:]))
            grown[:, :, : self.tokens] = data[:, :, : self.tokens]
            data = grown
        data[:, :, self.tokens : total] = new
        return data

    def crop(self, tokens: int) -> None:
        """Keep this many tokens, the first ones."""
        self.data, self.tokens, self.fetched = _exact(self.stored()[:, :, :tokens]), tokens, None

    def rectangle(self) -> Tensor:
        """Return the tokens where they are stored; shares memory."""
        return self.stored()

    def shallow(self) -> "TokenBuffer":
        """Return another holder of the same tokens, which stays as it is when tokens come to this one, or go."""
        return replace(self)

    def map_rows(self, function: Callable[[Tensor], Tensor], counts: Int[Tensor, "b h"] | None = None) -> None:
        """Replace the stored tokens by the result of a function of the rows of a batch, dropping unused room."""
        del counts
        self.move(function)

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Store the tokens where ``function`` moves tensors, dropping unused room."""
        self.data, self.fetched = _exact(function(self.stored())), None

    @property
    def on_the_way(self) -> tuple[Tensor, ...]:
        """The tensors that a copy may still be made of, or to."""
        return (self.data,) if self.fetched is None else (self.data, self.fetched)

    def is_away(self, device: torch.device) -> bool:
        """Tell whether the tokens would have to be fetched to be used on a device."""
        return (self.data if self.fetched is None else self.fetched).device != device

    def fetch(self, device: torch.device) -> None:
        """Have a copy on a device, until `release`."""
        if self.is_away(device):
            self.data = pinned_for(self.data, device)  # crops, copies and files leave it pageable
            self.fetched = to_device(self.data, device)

    def release(self) -> None:
        """Store the tokens in host memory, and only there."""
        self.data, self.fetched = to_host(self.data), None


@dataclass
class RaggedBuffer:
    """Tokens of which each row and head has its own number, and a `TokenBuffer` of as many in all behind them.

    What a prompt leaves lies one head behind the other, without room: that it never needs.  `rectangle` is the view
    that other code has of it, see `RaggedVectors`.

    Attributes:
        front: What the prompt has left.
        counts: How many of these each row and head has, on the CPU: the tensor that `PositionMap` has.
        rest: What came later.
        fetched: A copy of ``front`` where it is needed.
    """

    front: Shaped[Tensor, "total *rest"]
    counts: Int[Tensor, "b h"]
    rest: TokenBuffer
    fetched: Tensor | None = None

    @classmethod
    def of(cls, rows: Shaped[Tensor, "total *rest"], counts: Int[Tensor, "b h"], behind: int = 0) -> "RaggedBuffer":
        """Return a full buffer of rows as `stored` returns them.

        Args:
            rows: One head behind the other.
            counts: How many of these each has, on the CPU, without those behind.
            behind: How many of the last rows of each head are not counted.
        """
        lead = tuple(counts.shape)
        if not behind:
            return cls(_exact(rows), counts, TokenBuffer(rows.new_empty(*lead, 0, *rows.shape[1:]), 0))
        # Found on the CPU: a device need not be waited for.
        is_later = torch.cat([torch.arange(count + behind) >= count for count in counts.flatten().tolist()])
        front, later = (rows[which.nonzero()[:, 0].to(rows.device)] for which in (~is_later, is_later))
        return cls(front, counts, TokenBuffer.of(later.view(*lead, behind, *rows.shape[1:])))

    @property
    def tokens(self) -> int:
        """Number of places in each head."""
        return int(self.counts.max()) + self.rest.tokens

    def stored(self) -> Shaped[Tensor, "total *rest"]:
        """Return all tokens, one head behind the other."""
        if not self.rest.tokens:
            return self.front
        return self.rectangle()[self._is_there()]

    def rectangle(self) -> Shaped[Tensor, "b h n *rest"]:
        """Return the tokens where they are stored, with something in empty places."""
        return torch.cat([filled(self.front, self.counts), self.rest.stored()], 2)

    def _is_there(self) -> Bool[Tensor, "b h n"]:
        return F.pad(is_there(self.counts, self.front.device), (0, self.rest.tokens), value=True)

    def view(self) -> Shaped[Tensor, "total *rest"]:
        """Return what the prompt has left, where it is needed; shares memory."""
        return self.front if self.fetched is None else self.fetched

    def append(self, new: Tensor) -> None:
        """Store further tokens behind the others, as many in each head."""
        self.rest.append(new)

    def crop(self, tokens: int) -> None:
        """Keep the first places, as many, which must be all that the prompt has left, and perhaps more."""
        self.rest.crop(tokens - int(self.counts.max()))

    def shallow(self) -> "RaggedBuffer":
        """Return another holder of the same tokens, which stays as it is when tokens come to this one, or go."""
        return replace(self, rest=self.rest.shallow())

    def map_rows(self, function: Callable[[Tensor], Tensor], counts: Int[Tensor, "b h"] | None) -> None:
        """Replace the stored tokens by the result of a function of the rows of a batch, dropping unused room.

        Args:
            function: Keeps the other axes.
            counts: The result for `counts`.
        """
        assert counts is not None
        rows = function(filled(self.front, self.counts))
        self.rest.move(function)
        rows = rows[:, :, : int(counts.max())][is_there(counts, rows.device)]
        self.front, self.fetched, self.counts = rows, None, counts

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Store the tokens where ``function`` moves tensors, dropping unused room."""
        self.rest.move(function)
        self.front, self.fetched = function(self.front), None

    @property
    def on_the_way(self) -> tuple[Tensor, ...]:
        """The tensors that a copy may still be made of, or to."""
        return (self.front, *(() if self.fetched is None else (self.fetched,)), *self.rest.on_the_way)

    def is_away(self, device: torch.device) -> bool:
        """Tell whether the tokens would have to be fetched to be used on a device."""
        return self.view().device != device or self.rest.is_away(device)

    def fetch(self, device: torch.device) -> None:
        """Have a copy on a device, until `release`."""
        self.rest.fetch(device)
        if self.view().device != device:
            self.front = pinned_for(self.front, device)
            self.fetched = to_device(self.front, device)

    def release(self) -> None:
        """Store the tokens in host memory, and only there."""
        self.rest.release()
        self.front, self.fetched = to_host(self.front), None


Buffer: TypeAlias = TokenBuffer | RaggedBuffer


def chosen(buffer: Buffer, stay: Bool[Tensor, "b h n"], counts: Int[Tensor, "b h"] | None) -> Buffer:
    """Return a new buffer of some of the tokens, lent to where the others are.

    Args:
        buffer: The tokens.
        stay: Which of its places; of empty ones none.
        counts: How many that are in each head, on the CPU; None if equally many.
    """
    whole = buffer.rectangle()
    rows = whole[stay.to(whole.device)]
    found: Buffer
    if counts is None:
        found = TokenBuffer.of(rows.view(*stay.shape[:2], -1, *rows.shape[1:]))
    else:
        found = RaggedBuffer.of(rows, counts)
    found.fetch(buffer.view().device)  # where the others were lent to
    return found


def own(x: Tensor) -> Tensor:
    """Return a copy that shares memory with nothing, so that the original can be freed."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def _exact(data: Tensor) -> Tensor:
    """Return the tensor, copied if it is a view of something larger, which it would keep alive."""
    exact = data.is_contiguous() and data.untyped_storage().nbytes() == data.nbytes
    return data if exact else data.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class LayerTransforms:
    """What a layer has fitted to a prompt, for a cache of another prompt to use in place of fitting its own.

    Attributes:
        keys: Transform of the keys.
        values: Transform of the values.
        codecs: The codecs that fitted them, by which alone they can be used.
        asked: The codecs that the cache asked for, which leave some choices to the prompt.
        unrotated: Whether the keys were without their rotary phase.
    """

    keys: VectorTransform
    values: VectorTransform
    codecs: tuple[VectorCodec, VectorCodec]
    asked: tuple[VectorCodec, VectorCodec]
    unrotated: bool


@dataclass
class PackedSide:
    """The compressed keys or the compressed values of one layer."""

    transform: VectorTransform
    words: Buffer
    scales: Buffer

    @classmethod
    def of(cls, packed: PackedVectors, transform: VectorTransform) -> "PackedSide":
        """Start with these tokens."""
        return cls(transform, TokenBuffer.of(packed.words), TokenBuffer.of(packed.scales))

    def append(self, packed: PackedVectors) -> None:
        """Add tokens encoded with this side's transform."""
        self.words.append(packed.words)
        self.scales.append(packed.scales)

    def choose(self, stay: Bool[Tensor, "b h n"], counts: Int[Tensor, "b h"] | None) -> None:
        """Keep some of the tokens; see `chosen`."""
        self.words, self.scales = chosen(self.words, stay, counts), chosen(self.scales, stay, counts)

    def packed(self) -> PackedVectors | RaggedVectors:
        """Return all packed tokens; shares memory."""
        words, scales = self.words, self.scales
        if isinstance(words, RaggedBuffer) and isinstance(scales, RaggedBuffer):
            rest = PackedVectors(words.rest.view(), scales.rest.view())
            return RaggedVectors(words.view(), scales.view(), words.counts, rest)
        return PackedVectors(words.view(), scales.view())


@dataclass
class PackedTokens:
    """The compressed tokens of one layer, all at the same rate."""

    keys: PackedSide
    values: PackedSide
    positions: PositionMap

    def shallow(self) -> "PackedTokens":
        """Return another holder of the same tokens, which stays as it is when tokens come to this one, or go."""
        keys, values = (
            replace(side, words=side.words.shallow(), scales=side.scales.shallow()) for side in (self.keys, self.values)
        )
        return PackedTokens(keys, values, replace(self.positions))

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put codes and positions through a function of the rows of a batch."""
        positions = self.positions
        positions.map_rows(function)
        for side in (self.keys, self.values):
            side.words.map_rows(function, positions.counts)
            side.scales.map_rows(function, positions.counts)
        if positions.counts is not None and int(positions.counts.min()) == positions.kept:  # of the rows that are left
            stay = positions.visible()
            assert stay is not None
            positions.counts = None
            self.choose(stay)

    def choose(self, stay: Bool[Tensor, "b h n"]) -> None:
        """Keep some of the tokens; the positions say so already, and of none behind those that they cover."""
        self.keys.choose(stay, self.positions.counts)
        self.values.choose(stay, self.positions.counts)
