"""Packed tokens as a cache holds them, of any size and at once: every word is a codeword, so they can be drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import torch
from _codes import KeyAxesCache

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.held import CodedSide, HeldTokens, Side
from nexusquant_cache.codec.operands import PackedOperand, Places, RopeOperand
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.codec.triton.support import operand

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, UInt8
    from torch import Tensor

    from nexusquant_cache.codec.transform import VectorTransform

Keys = Literal["post-RoPE", "pre-RoPE", "pre-RoPE, evicted"]
KEYS: tuple[Keys, ...] = get_args(Keys)

SINKS, TAIL = 4, 64
_FITTED = 1024  # vectors that transforms are fitted to
_KEEP = 0.411  # of the tokens seen, where some are evicted
_ROPE_BASE = 500_000.0
_ALIGNED = 16  # tokens, so that strides are alike for the compiler whatever the number of tokens
_OCTAVES = 7  # by which the variance falls along the axes, at most


@dataclass(frozen=True)
class Shape:
    """What a layer holds.

    Attributes:
        batch: Rows.
        tokens: Tokens that attention reads, sinks and tail included.
        kv_heads: Heads of keys and values.
        query_heads: Heads of queries.
        head_dim: Channels of each.
    """

    batch: int
    tokens: int
    kv_heads: int = 8
    query_heads: int = 32
    head_dim: int = 128

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.batch} x {self.tokens:,}, {self.query_heads}/{self.kv_heads} heads of {self.head_dim}"

    @property
    def fp16_bytes(self) -> int:
        """Bytes of keys and values in 16 bit."""
        return 4 * self.batch * self.kv_heads * self.tokens * self.head_dim


def correlated(heads: int, tokens: int, head_dim: int, seed: int = 0) -> Float[Tensor, "1 h n d"]:
    """Return vectors with a mean, whose variances fall along other axes and by other octaves in each head."""
    random = torch.Generator().manual_seed(seed)
    slopes = torch.linspace(0, _OCTAVES, heads)[:, None, None] * torch.linspace(0, 1, head_dim)
    axes = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=random)).Q
    vectors = torch.randn(heads, tokens, head_dim, generator=random) * torch.exp2(-slopes / 2)
    return (vectors @ axes + torch.randn(heads, 1, head_dim, generator=random))[None]


@lru_cache(maxsize=64)
def fitted(preset: str, side: Side, heads: int, head_dim: int) -> tuple[E8Codec, VectorTransform]:
    """Return codec and transform of one side of a layer, on the CPU, as a cache with a long prompt chooses them."""
    codec = KeyAxesCache(preset, impl="triton").make_codec(side, head_dim, 0)
    assert isinstance(codec, E8Codec)
    seed = 0 if side == "keys" else 1
    return codec, codec.fit(correlated(heads, _FITTED, head_dim, seed))


def on_device(transform: VectorTransform, batch: int, device: torch.device) -> VectorTransform:
    """Return a transform of one row for all rows of a batch, with memory of its own."""
    return transform.map_batch(lambda x: x.to(device).expand(batch, *x.shape[1:]).clone())


@lru_cache(maxsize=8)
def rotary(head_dim: int) -> RotaryPhase:
    """Return the phase of Llama 3."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return RotaryPhase((_ROPE_BASE**-exponent).float())


def random_side(preset: str, side: Side, shape: Shape, packed: int, device: torch.device) -> CodedSide:
    """Draw the codes of one side, in a buffer with room."""
    codec, transform = fitted(preset, side, shape.kv_heads, shape.head_dim)
    room = -(-packed // _ALIGNED) * _ALIGNED
    rows = (shape.batch, shape.kv_heads, room)
    words = torch.randint(0, 256, (*rows, codec.layout.bytes_per_vector), dtype=torch.uint8, device=device)
    scales = torch.randint(112, 145, rows, dtype=torch.uint8, device=device)
    stored = PackedVectors(words[:, :, :packed], scales[:, :, :packed])
    return CodedSide(codec, stored, on_device(transform, shape.batch, device))


def random_held(shape: Shape, keys: Keys, preset: str, dtype: torch.dtype, device: torch.device) -> HeldTokens:
    """Draw what a layer of a cache with this preset holds."""
    packed = shape.tokens - SINKS - TAIL
    where = PositionMap(SINKS, dense=packed)
    if keys == "pre-RoPE, evicted":
        covered = math.ceil(packed / _KEEP)
        bitmap = _random_bitmap(covered, packed).to(device).expand(shape.batch, shape.kv_heads, -1).contiguous()
        where = PositionMap(SINKS, covered, packed, 0, bitmap)

    def exact(count: int) -> tuple[Tensor, Tensor]:
        size = (2, shape.batch, shape.kv_heads, count, shape.head_dim)
        first, second = torch.randn(size, dtype=dtype, device=device)
        return first, second

    return HeldTokens(
        tail=exact(TAIL),
        seen=where.end + TAIL,
        sinks=exact(SINKS),
        keys=random_side(preset, "keys", shape, packed, device),
        values=random_side(preset, "values", shape, packed, device),
        positions=where,
        phase=None if keys == "post-RoPE" else rotary(shape.head_dim),
    )


def _random_bitmap(covered: int, kept: int) -> UInt8[Tensor, " bytes"]:
    bits = torch.zeros(-(-covered // 8) * 8, dtype=torch.uint8)
    bits[torch.randperm(covered, generator=torch.Generator().manual_seed(0))[:kept]] = 1
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def operand_of(side: CodedSide) -> PackedOperand:
    """Return one side as kernels read it."""
    assert isinstance(side.codec, E8Codec)
    return operand(side.packed, side.transform, side.codec.layouts)


def rope_of(held: HeldTokens) -> tuple[RopeOperand | None, Places | None]:
    """Return the phase and the places as kernels read them."""
    if held.phase is None:
        return None, None
    from nexusquant_cache.codec.triton.kernels_positions import kept_positions  # noqa: PLC0415 - imports triton

    where, device = held.positions, held.tail[0].device
    assert where is not None
    low, high = held.phase.tables(device, where.end)
    if where.bitmap is None:
        return RopeOperand(low, high), Places(where.start)
    heads = (where.bitmap.shape[0], where.bitmap.shape[1])
    found = kept_positions(heads, where.bitmap, start=where.start, covered=where.covered, tokens=where.tokens)
    return RopeOperand(low, high), Places(positions=found)


def packed_bytes(held: HeldTokens) -> int:
    """Return the bytes of all codes and scales."""
    sides = [side.packed for side in (held.keys, held.values) if side is not None]
    return sum(side.words.numel() + side.scales.numel() for side in sides)


# The oracle, in float64 on the CPU and without a kernel


def on_cpu(side: CodedSide) -> CodedSide:
    """Return the same codes on the CPU, to be decoded by plain torch."""
    assert isinstance(side.codec, E8Codec)
    codec = replace(side.codec, impl="torch")
    return CodedSide(codec, side.packed.map(torch.Tensor.cpu), side.transform.map_batch(torch.Tensor.cpu))


def decoded(side: CodedSide) -> Float64[Tensor, "b h n d"]:
    """Return the vectors of codes by their definition."""
    side = on_cpu(side)
    y, scales = side.codec.coded_channels(side.packed, side.transform)
    axes = side.transform.rotation.axes(y.device)
    assert axes is not None
    whole, step = axes
    vectors = y.double() @ (whole.double() * step.double()[..., None]) * scales.double()[..., None]
    return vectors if side.transform.mean is None else vectors + side.transform.mean.double()


def turned(vectors: Float64[Tensor, "b h n d"], held: HeldTokens) -> Float64[Tensor, "b h n d"]:
    """Return packed keys with their phase."""
    if held.phase is None:
        return vectors
    where = held.positions
    assert where is not None
    there = replace(where, bitmap=None if where.bitmap is None else where.bitmap.cpu())
    return held.phase.rotate(vectors, there.positions(vectors.device))


def attended(query: Float[Tensor, "b q 1 d"], held: HeldTokens, scaling: float) -> Float64[Tensor, "b q 1 d"]:
    """Return the attention of a query to all that is held."""
    assert held.keys is not None
    assert held.values is not None
    assert held.sinks is not None
    sinks, tail = ([x.double().cpu() for x in pair] for pair in (held.sinks, held.tail))
    keys = torch.cat([sinks[0], turned(decoded(held.keys), held), tail[0]], 2)
    values = torch.cat([sinks[1], decoded(held.values), tail[1]], 2)
    grouped = query.double().cpu().unflatten(1, (keys.shape[1], -1)).squeeze(3)
    weights = torch.softmax(grouped @ keys.mT * scaling, -1)
    return (weights @ values).flatten(1, 2)[:, :, None]
