"""What a codec is: vectors to packed words and back, one vector at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
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

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedVectors":
        """Return the result of applying ``function`` to every tensor."""
        return PackedVectors(function(self.words), function(self.scales))

    @staticmethod
    def cat(parts: "list[PackedVectors]") -> "PackedVectors":
        """Return the tokens of all parts in a row."""
        return PackedVectors(torch.cat([p.words for p in parts], 2), torch.cat([p.scales for p in parts], 2))


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

    def for_tokens(self, tokens: int) -> "VectorCodec":
        """Return the codec for a layer that begins with so many coded tokens; by default this one."""
        del tokens
        return self

    def with_more_bits(self) -> "VectorCodec | None":
        """Return this codec with more bits, for layers that suffer from it; None, the default, if it can have none."""
        return None
