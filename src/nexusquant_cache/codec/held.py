"""What a layer holds at one moment, for attention: decoded, or read as it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.codec.transform import VectorTransform

Side = Literal["keys", "values"]


@dataclass(frozen=True)
class CodedSide:
    """The packed keys or values of a layer with all that decodes them."""

    codec: VectorCodec
    packed: PackedVectors
    transform: VectorTransform

    def decode(self) -> Float[Tensor, "b h n d"]:
        """Return the vectors in float32."""
        return self.codec.decode(self.packed, self.transform)


@dataclass(frozen=True)
class HeldTokens:
    """All tokens of a layer at one moment; shares memory with it, and stays as it is when the layer goes on.

    The order in which attention sees them is that of their positions: sinks, packed tokens, tail; in a padded batch
    some packed pads of a row come before its sinks.

    Attributes:
        tail: Exact keys and values of the newest tokens.
        sinks: Exact keys and values of the first ones; None while nothing is packed, then all else is None too.
        keys: Packed keys.
        values: Packed values.
        positions: Original positions of the packed tokens.
        phase: What was taken off the packed keys.
        pads: How many pads each row began with, on the CPU.
        before_sinks: How many packed tokens of each row come before its sinks; None if none do.
    """

    tail: tuple[Tensor, Tensor]
    sinks: tuple[Tensor, Tensor] | None = None
    keys: CodedSide | None = None
    values: CodedSide | None = None
    positions: PositionMap | None = None
    phase: RotaryPhase | None = None
    pads: Int[Tensor, "b"] | None = None
    before_sinks: tuple[int, ...] | None = None

    @property
    def packed_tokens(self) -> int:
        """Number of packed tokens of each head."""
        return 0 if self.positions is None else self.positions.tokens

    @property
    def tokens(self) -> int:
        """Number of all tokens of each head."""
        return self.packed_tokens + self.tail[0].shape[2] + (0 if self.sinks is None else self.sinks[0].shape[2])

    def dense_keys(self) -> Float[Tensor, "b h n d"]:
        """Return all keys in the dtype they came in, in order."""
        return self._assemble(0, self._decode_keys)

    def dense_values(self) -> Float[Tensor, "b h n dv"]:
        """Return all values in the dtype they came in, in order."""
        return self._assemble(1, self._decode_values)

    def _decode_keys(self, out: Float[Tensor, "b h n d"]) -> None:
        assert self.keys is not None
        decoded = self.keys.decode()
        if self.phase is None:
            out.copy_(decoded)
        else:
            self.phase.rotate(decoded, self.angles(), out=out)

    def _decode_values(self, out: Float[Tensor, "b h n dv"]) -> None:
        assert self.values is not None
        out.copy_(self.values.decode())

    def angles(self) -> Int[Tensor, "*heads n"]:
        """Return the positions of the packed tokens that the rotary embedding has seen; see `angles_of`."""
        assert self.positions is not None
        batch, heads = self.tail[0].shape[:2]
        return angles_of(self.positions.positions(self.tail[0].device), self.pads, batch, heads)

    def _assemble(self, side: int, decode: Callable[[Tensor], None]) -> Float[Tensor, "b h n d"]:
        """Return sinks, body and tail in one tensor; ``decode`` writes the body."""
        tail = self.tail[side]
        if self.sinks is None:
            return tail
        sinks, body = self.sinks[side], self.packed_tokens
        first = sinks.shape[2]
        out = tail.new_empty(*tail.shape[:2], self.tokens, tail.shape[3])
        out[:, :, first + body :] = tail
        if self.before_sinks is None:
            out[:, :, :first] = sinks
            decode(out[:, :, first : first + body])
            return out
        decoded = tail.new_empty(*tail.shape[:2], body, tail.shape[3])
        decode(decoded)
        for row, before in enumerate(self.before_sinks):
            out[row, :, :before] = decoded[row, :, :before]
            out[row, :, before : before + first] = sinks[row]
            out[row, :, before + first : first + body] = decoded[row, :, before:]
        return out


def angles_of(
    positions: Int[Tensor, "*given n"], pads: Int[Tensor, "b"] | None, batch: int, heads: int
) -> Int[Tensor, "*out n"]:
    """Return positions as the rotary embedding has seen them: pads do not count."""
    if pads is None:
        return positions
    rows = pads.to(positions.device)[:, None, None]
    return (positions.expand(batch, heads, -1) - rows).clamp_min(0)
