"""Storage of compressed tokens: append-only buffers, original positions, and the two together."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors, VectorCodec
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

    def crop(self, tokens: int, dropped: Int[Tensor, "b h"] | None = None) -> None:
        """Keep this many tokens: the first ones, or those behind the ``dropped`` first ones of each head."""
        view = self.stored()
        if dropped is not None:
            index = dropped.to(view.device)[..., None] + torch.arange(tokens, device=view.device)
            index = index.view(*index.shape, *(1,) * (view.ndim - 3)).expand(*index.shape, *view.shape[3:])
            view = view.gather(2, index)
        self.data, self.tokens, self.fetched = _exact(view[:, :, :tokens]), tokens, None

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the stored tokens by the result of ``function``, dropping unused room."""
        self.data, self.fetched = _exact(function(self.stored())), None

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
    words: TokenBuffer
    scales: TokenBuffer

    @classmethod
    def of(cls, packed: PackedVectors, transform: VectorTransform) -> "PackedSide":
        """Start with these tokens."""
        return cls(transform, TokenBuffer.of(packed.words), TokenBuffer.of(packed.scales))

    def append(self, packed: PackedVectors) -> None:
        """Add tokens encoded with this side's transform."""
        self.words.append(packed.words)
        self.scales.append(packed.scales)

    def packed(self) -> PackedVectors:
        """Return all packed tokens; shares memory."""
        return PackedVectors(self.words.view(), self.scales.view())


@dataclass
class PackedTokens:
    """The compressed tokens of one layer, all at the same rate."""

    keys: PackedSide
    values: PackedSide
    positions: PositionMap

    def shallow(self) -> "PackedTokens":
        """Return another holder of the same tokens, which stays as it is when tokens come to this one, or go."""
        keys, values = (
            replace(side, words=replace(side.words), scales=replace(side.scales)) for side in (self.keys, self.values)
        )
        return PackedTokens(keys, values, replace(self.positions))

    def kept_before(self, end: int) -> Int[Tensor, "b h"]:
        """Return how many tokens before position ``end`` each head has."""
        scales, kept = self.keys.scales.data, self.positions.kept_before(end)
        return torch.as_tensor(kept, device=scales.device).expand(scales.shape[:2])
