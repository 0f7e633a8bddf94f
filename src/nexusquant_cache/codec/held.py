"""What a layer holds at one moment, for attention: decoded, or read as it is."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors, RaggedVectors, VectorCodec
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.codec.transform import VectorTransform

Side = Literal["keys", "values"]


@dataclass(frozen=True)
class CodedSide:
    """The packed keys or values of a layer with all that decodes them."""

    codec: VectorCodec
    packed: PackedVectors | RaggedVectors
    transform: VectorTransform

    def decode(self) -> Float[Tensor, "b h n d"]:
        """Return the vectors in float32."""
        return self.codec.decode(self.packed.rectangle(), self.transform)


@dataclass(frozen=True)
class HeldTokens:
    """All tokens of a layer at one moment; shares memory with it, and stays as it is when the layer goes on.

    Tokens are *stored* in the order sinks, packed tokens, tail.  That is the order of their positions, except in rows
    that do not begin with their first token: there, sinks stand behind padding.  Heads that keep fewer packed tokens
    than others have empty places behind them, as `PositionMap` has.

    Attributes:
        tail: Exact keys and values of the newest tokens.
        seen: How many tokens the layer has seen, kept or not: the columns of the model's mask.
        sinks: Exact keys and values of the first ones; None while nothing is packed, then all else is None too.
        keys: Packed keys.
        values: Packed values.
        positions: Original positions of the packed tokens.
        phase: What was taken off the packed keys.
        sink_positions: Original positions of the sinks, ascending; None if they are the first tokens of every row.
        origins: Position from which the rotary positions of each row count; None if all count from 0.
    """

    tail: tuple[Tensor, Tensor]
    seen: int
    sinks: tuple[Tensor, Tensor] | None = None
    keys: CodedSide | None = None
    values: CodedSide | None = None
    positions: PositionMap | None = None
    phase: RotaryPhase | None = None
    sink_positions: Int[Tensor, "b s"] | None = None
    origins: Int[Tensor, " b"] | None = None

    @property
    def packed_tokens(self) -> int:
        """Number of places for packed tokens in each head."""
        return 0 if self.positions is None else self.positions.tokens

    @property
    def sink_tokens(self) -> int:
        """Number of sinks."""
        return 0 if self.sinks is None else self.sinks[0].shape[2]

    @property
    def tokens(self) -> int:
        """Number of places for tokens in each head."""
        return self.packed_tokens + self.tail[0].shape[2] + self.sink_tokens

    @property
    def is_whole(self) -> bool:
        """Whether every token that was seen is kept."""
        return self.tokens == self.seen and (self.positions is None or self.positions.counts is None)

    @property
    def is_plain(self) -> bool:
        """Whether every token that was seen is kept, and stored in the order of the positions."""
        return self.is_whole and self.sink_positions is None

    @cached_property
    def columns(self) -> Int[Tensor, "*heads n"]:
        """The original positions of all tokens as they are stored, ``[n]`` or ``[b, h, n]``; of empty places any."""
        device, tail = self.tail[0].device, self.tail[0].shape[2]
        newest = torch.arange(self.seen - tail, self.seen, device=device)
        if self.positions is None:
            return newest
        packed = self.positions.positions(device)
        if self.sink_positions is None and packed.ndim == 1:
            return torch.cat([torch.arange(self.sink_tokens, device=device), packed, newest])
        lead = self.tail[0].shape[:2]
        if self.sink_positions is None:
            sinks: Tensor = torch.arange(self.sink_tokens, device=device)
        else:
            sinks = self.sink_positions[:, None]
        return torch.cat([x.expand(*lead, x.shape[-1]) for x in (sinks, packed, newest)], -1)

    @cached_property
    def visible(self) -> Bool[Tensor, "b h 1 1 n"] | None:
        """Which places hold tokens; None if all of them do."""
        packed = None if self.positions is None else self.positions.visible()
        if packed is None:
            return None
        found = torch.nn.functional.pad(packed, (self.sink_tokens, self.tail[0].shape[2]), value=True)
        return found[:, :, None, None].to(self.tail[0].device)

    def mask(self, mask: Shaped[Tensor, "#b #q m seen"] | None) -> Shaped[Tensor, "#b heads group m n"] | None:
        """Return the model's mask for the tokens as they are stored; None if all may be seen.

        Args:
            mask: True for what may be seen, or numbers to add to the logits, of all tokens seen.
        """
        if mask is None:
            return self.visible
        found = self.stored(mask)
        if self.visible is None:
            return found
        return found & self.visible if found.dtype == torch.bool else found.masked_fill(~self.visible, -torch.inf)

    def stored(self, x: Shaped[Tensor, "#b #q m seen"]) -> Shaped[Tensor, "#b heads group m n"]:
        """Return what is given for every token seen, for those that are kept, as they are stored.

        Args:
            x: For all query heads, or for one that stands for all.

        Returns:
            By KV head and query head of its group; an axis of length 1 stands for all.  In empty places, what belongs
            to another token.
        """
        heads = self.tail[0].shape[1]
        grouped = x.unflatten(1, (heads, -1)) if x.shape[1] > 1 else x[:, :, None]
        if self.is_plain:
            return grouped
        if self.columns.ndim == 1:
            return grouped.index_select(-1, self.columns)
        index = self.columns[:, :, None, None]
        batch, heads, tokens = self.columns.shape
        return grouped.expand(batch, heads, -1, -1, -1).gather(
            -1, index.expand(-1, -1, grouped.shape[2], grouped.shape[3], tokens)
        )

    def spread(self, x: Shaped[Tensor, "b heads group m n"], absent: float) -> Shaped[Tensor, "b q m seen"]:
        """Return what is given for the kept tokens, as they are stored, for every token seen, by query head.

        Args:
            x: By KV head and query head of its group.
            absent: What evicted tokens get.
        """
        if not self.is_plain:
            out = x.new_full((*x.shape[:-1], self.seen + 1), absent)  # the last one for what stands in empty places
            columns = self.columns
            if columns.ndim == 1:
                out.index_copy_(-1, columns, x)
            else:
                index = columns[:, :, None, None]
                index = index if self.visible is None else index.masked_fill(~self.visible, self.seen)
                out.scatter_(-1, index.expand(x.shape), x)
            x = out[..., : self.seen]
        return x.flatten(1, 2)

    def decoded_keys(self, *, by_tables: bool = False) -> Float[Tensor, "b h n d"]:
        """Return all keys as they are stored, in the dtype they came in.

        Args:
            by_tables: Hold the turns of the rotary phase for the next time, where that is the next step.
        """
        out = self._exact(0)
        if self.keys is not None:
            decoded, packed = self.keys.decode(), self._packed(out)
            if self.phase is None:
                packed.copy_(decoded)
            else:
                self.phase.rotate(decoded, self.angles(), out=packed, by_tables=by_tables)
        return out

    def decoded_values(self) -> Float[Tensor, "b h n dv"]:
        """Return all values as they are stored, in the dtype they came in."""
        out = self._exact(1)
        if self.values is not None:
            self._packed(out).copy_(self.values.decode())
        return out

    def dense_keys(self, *, by_tables: bool = False) -> Float[Tensor, "b h n d"]:
        """Return all keys in the dtype they came in, in the order of the positions; zeros in empty places."""
        return self._in_order(self.decoded_keys(by_tables=by_tables))

    def dense_values(self) -> Float[Tensor, "b h n dv"]:
        """Return all values in the dtype they came in, in the order of the positions; zeros in empty places."""
        return self._in_order(self.decoded_values())

    def angles(self) -> Int[Tensor, "*heads n"]:
        """Return the positions of the packed tokens that the rotary embedding has seen; see `angles_of`."""
        assert self.positions is not None
        batch, heads = self.tail[0].shape[:2]
        return angles_of(self.positions.positions(self.tail[0].device), self.origins, batch, heads)

    def _exact(self, side: int) -> Float[Tensor, "b h n d"]:
        """Return one tensor for all tokens of a side, in which the packed ones are not filled in."""
        tail = self.tail[side]
        if self.sinks is None:
            return tail
        out = tail.new_empty(*tail.shape[:2], self.tokens, tail.shape[3])
        out[:, :, : self.sink_tokens] = self.sinks[side]
        out[:, :, self.sink_tokens + self.packed_tokens :] = tail
        return out

    def _packed(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h packed d"]:
        return x[:, :, self.sink_tokens : self.sink_tokens + self.packed_tokens]

    def _in_order(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        if self.visible is not None:
            x = x.masked_fill(~self.visible[:, :, 0, 0, :, None], 0)
        if self.sink_positions is None:
            return x
        return x.gather(2, self.columns.argsort(-1)[..., None].expand_as(x))


def angles_of(
    positions: Int[Tensor, "*given n"], origins: Int[Tensor, " b"] | None, batch: int, heads: int
) -> Int[Tensor, "*out n"]:
    """Return positions as the rotary embedding has seen them, if it counts from the first token of each row."""
    if origins is None:
        return positions
    rows = origins.to(positions.device)[:, None, None]
    return (positions.expand(batch, heads, -1) - rows).clamp_min(0)
