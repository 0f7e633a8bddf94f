"""What a codec is: vectors to packed words and back, one vector at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.errors import UnsupportedError


@dataclass(frozen=True)
class PackedVectors:
    """The keys or values of some tokens, encoded.

    Attributes:
        words: Packed codes, one row of bytes per vector.
        scales: One scale byte per vector (`codec.scale`).
    """

    words: UInt8[Tensor, "b h n bytes"]
    scales: UInt8[Tensor, "b h n"]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.words.shape[2]

    def part(self, tokens: slice) -> "PackedVectors":
        """Return some tokens; shares memory."""
        return self.map(lambda x: x[:, :, tokens])

    def rectangle(self) -> "PackedVectors":
        """Return all tokens: these."""
        return self

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedVectors":
        """Return the result of applying ``function`` to every tensor."""
        return PackedVectors(function(self.words), function(self.scales))

    @staticmethod
    def cat(parts: "list[PackedVectors]") -> "PackedVectors":
        """Return the tokens of all parts in a row."""
        return PackedVectors(torch.cat([p.words for p in parts], 2), torch.cat([p.scales for p in parts], 2))


@dataclass(frozen=True)
class RaggedVectors:
    """Packed vectors of which each row and head has its own number, and behind them as many in all.

    Seen as a rectangle, heads with fewer vectors are filled up with copies of others, which nobody shall look at.

    Attributes:
        words: Packed codes, one head behind the other.
        scales: One scale byte per vector.
        counts: How many vectors each row and head has of these, on the CPU.
        rest: The vectors behind, as many in each head.
    """

    words: UInt8[Tensor, "total bytes"]
    scales: UInt8[Tensor, " total"]
    counts: Int[Tensor, "b h"]
    rest: PackedVectors

    @cached_property
    def front(self) -> int:
        """The most vectors that a head has before the rest."""
        return int(self.counts.max())

    @property
    def tokens(self) -> int:
        """Number of vectors of a head of the rectangle."""
        return self.front + self.rest.tokens

    @cached_property
    def starts(self) -> Int[Tensor, "b h"]:
        """Where each head begins, on the CPU."""
        ends = self.counts.flatten().cumsum(0).view_as(self.counts)
        return ends - self.counts

    def part(self, tokens: slice) -> PackedVectors:
        """Return some tokens of the rectangle."""
        start, stop, _ = tokens.indices(self.tokens)
        front = slice(min(start, self.front), min(stop, self.front))
        behind = self.rest.part(slice(max(start - self.front, 0), max(stop - self.front, 0)))
        if front.start == front.stop:
            return behind
        index = places(self.counts, self.words.device, front)
        before = PackedVectors(self.words[index], self.scales[index])
        return PackedVectors.cat([before, behind]) if behind.tokens else before

    def rectangle(self) -> PackedVectors:
        """Return all of it."""
        return self.part(slice(None))


def places(counts: Int[Tensor, "b h"], device: torch.device, some: slice = slice(None)) -> Int[Tensor, "b h some"]:
    """Return where the vectors of each head lie, stored one head behind the other; behind the last one it is repeated.

    Args:
        counts: How many each head has, on the CPU.
        device: Where the result shall be.
        some: Which of the places of each head, as many as the head with most vectors has.
    """
    start, stop, _ = some.indices(int(counts.max()))
    counts = counts.to(device)[..., None]
    ends = counts.flatten().cumsum(0).view_as(counts)
    index = ends - counts + torch.arange(start, stop, device=device)
    return index.minimum(ends - 1).clamp_min(0)


def is_there(counts: Int[Tensor, "b h"], device: torch.device) -> Bool[Tensor, "b h most"]:
    """Return which vectors of such a rectangle a head has."""
    return torch.arange(int(counts.max()), device=device) < counts.to(device)[..., None]


def filled(rows: Shaped[Tensor, "total *rest"], counts: Int[Tensor, "b h"]) -> Shaped[Tensor, "b h most *rest"]:
    """Return the rectangle."""
    return rows[places(counts, rows.device)]


class VectorCodec(ABC):
    """Encodes vectors of one side (keys or values) of one layer.

    `fit` looks at the tokens of the first compression and freezes what all tokens share; `encode` and
    `decode` then treat every vector on its own, so that encoding a concatenation is the concatenation of
    encodings and no stored code is ever touched again.

    Attributes:
        impl: Which implementation computes, see `codec.impl.Impl`; a codec of your own computes as it likes.
    """

    impl: str = "torch"

    @property
    def layouts(self) -> tuple[CodeLayout, ...]:
        """The layouts that heads may have, if rows are laid out as in `codec.layout`; none if not.

        Only such rows are read by other implementations than plain torch.
        """
        return ()

    @abstractmethod
    def fit(self, vectors: Float[Tensor, "b h n d"]) -> VectorTransform:
        """Return what all tokens of this layer will share.

        Args:
            vectors: The tokens of the first compression, without the sinks.
        """

    @abstractmethod
    def encode(self, vectors: Float[Tensor, "b h n d"], transform: VectorTransform) -> PackedVectors:
        """Return finite vectors, encoded."""

    @abstractmethod
    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Float[Tensor, "b h n d"]:
        """Return the vectors as a new float32 tensor."""

    @property
    def has_channels(self) -> bool:
        """Whether `decode` is `VectorTransform.inverse` of `coded_channels`.

        If so, attention sums coded channels and rotates the sum.  If not, it decodes some tokens at a time.
        """
        return False

    def coded_channels(
        self, packed: PackedVectors, transform: VectorTransform, first_stride: int = 1
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n"]]:
        """Return what `VectorTransform.inverse` makes vectors of: coded channels and scales, in float32.

        Args:
            packed: The encoded vectors.
            transform: The transform they were encoded with.
            first_stride: Hadamard stages below this stride shall be done, see `Rotation.first_stride`.

        Raises:
            UnsupportedError: If the codec works in another way, see `has_channels`.
        """
        del packed, transform, first_stride
        msg = f"{type(self).__name__} has no coded channels"
        raise UnsupportedError(msg)

    @property
    @abstractmethod
    def bytes_per_vector(self) -> int:
        """Bytes held per vector (words and scale)."""

    def for_tokens(self, vectors: Float[Tensor, "b h n d"], kept: int) -> "VectorCodec":
        """Return the codec for a layer that begins with tokens like these; by default this one.

        Args:
            vectors: The keys or the values of the longest rows, without padding.
            kept: How many of its tokens heads will keep, on average.
        """
        del vectors, kept
        return self

    def with_more_bits(self, bits: float = 1.0) -> "VectorCodec | None":
        """Return this codec with so many more bits per channel; None, the default, if it can have none.

        For layers that suffer from it, and for texts that begin short (`CacheConfig.short_text_bits`).
        """
        del bits
        return None
