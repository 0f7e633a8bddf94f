"""Packed tokens as kernels read them, with poison around them, and what they decode to."""

from dataclasses import dataclass
from typing import Any

import torch
from integration.tiny import SMALL, prompt, tiny_llama
from torch import Tensor

from nexusquant_cache import LeveragePolicy, NexusQuantCache
from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.operands import PackedOperand, Places, RopeOperand
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.releases import CACHE

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


def logits_of(impl: Any, preset: str, rotary: bool, dtype: torch.dtype, pads: int = 0, **options: Any) -> Tensor:
    """Return logits of generated tokens, always the same ones, computed by an implementation."""
    model = tiny_llama(num_hidden_layers=1).to(dtype)
    ids = prompt(60, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :pads] = ids[1, :pads] = 0
    settings = SMALL | {"policy": LeveragePolicy(), "impl": impl} | options
    config = model.config if rotary else None
    cache = NexusQuantCache(preset, config=config, **settings)
    out = []
    with torch.no_grad():
        for chunk in (ids, *prompt(8, batch=2, seed=3).split([1, 6, 1], 1)):
            if chunk is not ids:
                mask = torch.cat([mask, torch.ones_like(chunk)], 1)
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -chunk.shape[1] :]
            given = {"attention_mask": mask, "position_ids": positions} if pads else {}
            out.append(model(chunk, **{CACHE: cache}, **given).logits[:, -1].float())
    return torch.stack(out)
