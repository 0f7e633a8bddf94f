"""Packed tokens as kernels read them, with poison around them, and what they decode to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.operands import PackedOperand, Places, RopeOperand
from nexusquant_cache.codec.rope import RotaryPhase

ROOM = 3  # tokens behind the stored ones


def correlated(*shape: int) -> Tensor:
    """Return vectors with a mean, whose channels are correlated and fall by other octaves in each head."""
    batch, heads, _, head_dim = shape
    slopes = torch.linspace(0, 7, batch * heads).view(batch, heads, 1, 1) * torch.linspace(0, 1, head_dim)
    mixing = torch.linalg.qr(torch.randn(batch, heads, head_dim, head_dim)).Q
    return (torch.randn(shape) * torch.exp2(-slopes)) @ mixing + torch.randn(batch, heads, 1, head_dim)


def codec_of(head_dim: int, bits: float, transform: str = "principal", *, center: bool = True) -> E8Codec:
    return E8Codec(CodeLayout.flat(head_dim, bits), center=center, transform=transform, candidates=(1.0,))


@dataclass
class Side:
    """Packed vectors and what they decode to, by the torch codec, in float64."""

    operand: PackedOperand
    decoded: Tensor


def side_of(codec: E8Codec, vectors: Tensor, tokens: int | None = None) -> Side:
    """Encode the first tokens, or all, by a transform of all."""
    transform = codec.fit(vectors)
    packed = codec.encode(vectors[:, :, :tokens], transform)
    plan = transform.side_plan(codec.layouts)
    assert plan is not None
    operand = PackedOperand(plan, poisoned(packed.words), poisoned(packed.scales))
    return Side(operand, codec.decode(PackedVectors(packed.words, packed.scales), transform).double())


def packed_side(codec: E8Codec, batch: int, heads: int, tokens: int) -> Side:
    """Return random tokens, fewer than the transform was fitted to, so that heads get plans of their own."""
    return side_of(codec, correlated(batch, heads, tokens + 300, codec.layout.head_dim), tokens)


def poisoned(stored: Tensor) -> Tensor:
    """Return a view of a larger buffer that is full of the worst bytes elsewhere."""
    batch, heads, tokens, *rest = stored.shape
    buffer = torch.full((batch, heads, tokens + ROOM, *rest), 0xFF, dtype=torch.uint8)
    buffer[:, :, :tokens] = stored
    return buffer[:, :, :tokens]


@dataclass
class Phase:
    """A rotary phase, where the tokens stand, and both as kernels read them."""

    rotary: RotaryPhase
    positions: Tensor
    rope: RopeOperand
    places: Places


def phase_of(
    shape: tuple[int, int, int], rotary_dim: int, *, interleaved: bool = False, start: int | None = None
) -> Phase:
    """Return a phase at the positions from ``start`` on, or at other ones for each head."""
    pairs = rotary_dim // 2
    rotary = RotaryPhase(0.5 ** torch.linspace(0, 10, pairs), interleaved)
    if start is None:
        chosen = [torch.randperm(40 * shape[2])[: shape[2]].sort().values for _ in range(shape[0] * shape[1])]
        positions = torch.stack(chosen).view(shape)
        places = Places(positions=positions.int())
    else:
        positions = torch.arange(start, start + shape[2])
        places = Places(start=start)
    low, high = rotary.tables(positions.device, int(positions.max()) + 1)
    return Phase(rotary, positions, RopeOperand(low, high, interleaved), places)
