"""Codecs to compare with: scalar quantizers, float16, axes without a bit plan, sharpened keys; each with its cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.rotation import HadamardRotation
from nexusquant_cache.codec.scale import decode_scales, encode_scales
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.errors import OptionError, ShapeError
from nexusquant_cache.evaluation import Candidate
from nexusquant_cache.evaluation.caches import update
from nexusquant_cache.evaluation.fit import random_tokens
from nexusquant_cache.evaluation.presets import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, UInt8
    from torch import Tensor
    from transformers import PretrainedConfig

    from nexusquant_cache import CacheConfig, EvictionPolicy
    from nexusquant_cache.codec.held import Side
    from nexusquant_cache.codec.layout import CodeLayout

UNCHECKED = 1e9
"""The `CacheConfig.most_code_error` of a cache that never spends more bits than it was given."""

_MAX_BITS = 4
_ROUNDS = 3000  # of Lloyd's algorithm; 16 levels have settled to 1e-9 by then
_TINY = torch.finfo(torch.float32).tiny


@lru_cache
def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """Return the levels of the scalar quantizer of ``2 ** bits`` levels that suits a unit Gaussian best, ascending.

    References:
        Lloyd (1982), "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28(2), 129-137, method I.
    """
    count = 1 << bits
    levels = [4.0 * (index + 0.5) / count - 2.0 for index in range(count)]
    for _ in range(_ROUNDS):
        cuts = [-math.inf, *_middles(levels), math.inf]
        levels = [_gaussian_mean(low, high) for low, high in pairwise(cuts)]
    return tuple(levels)


def _middles(levels: Sequence[float]) -> list[float]:
    return [(low + high) / 2 for low, high in pairwise(levels)]


def _gaussian_mean(low: float, high: float) -> float:
    """Return the mean of a unit Gaussian between two bounds."""
    density = (math.exp(-bound * bound / 2) / math.sqrt(2 * math.pi) for bound in (low, high))
    below = (math.erf(bound / math.sqrt(2)) / 2 for bound in (low, high))
    return (next(density) - next(density)) / -(next(below) - next(below))


def pack_bits(codes: UInt8[Tensor, "*rows d"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Lay codes of ``bits`` bits side by side, lowest bit first; ``bits * d`` must be a multiple of 8."""
    flags = codes[..., None] >> _counting(bits, codes) & 1
    octets = flags.flatten(-2).unflatten(-1, (-1, 8))
    return (octets << _counting(8, codes)).sum(-1, dtype=torch.uint8)


def unpack_bits(words: UInt8[Tensor, "*rows bytes"], bits: int) -> UInt8[Tensor, "*rows d"]:
    """Read the codes back: the inverse of `pack_bits`."""
    flags = words[..., None] >> _counting(8, words) & 1
    fields = flags.flatten(-2).unflatten(-1, (-1, bits))
    return (fields << _counting(bits, words)).sum(-1, dtype=torch.uint8)


def _counting(count: int, like: Tensor) -> UInt8[Tensor, "count"]:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


@dataclass(frozen=True)
class LloydMaxCodec(VectorCodec):
    """Scalar codes: Hadamard rotation, Lloyd-Max levels of a Gaussian, one scale per vector.

    Args:
        head_dim: Channels per vector.
        bits: Bits per channel, 1 to 4.
        center: Whether `fit` removes the mean over tokens.

    Raises:
        OptionError: If there is no code of so many bits.
        ShapeError: If a vector's codes do not fill whole bytes.

    References:
        Zandieh et al. (2025), "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
        arXiv:2504.19874, section 3.1.  There the rotation is a random one, the levels are those of the exact
        distribution of a rotated channel, and the norm that is stored is that of the vector, at 16 bits or more; ours
        has the 8 bits of `nexusquant_cache.codec.scale`.
    """

    head_dim: int
    bits: int
    center: bool = False

    def __post_init__(self) -> None:
        """Check the rate."""
        given: object = self.bits
        if type(given) is not int or not 1 <= given <= _MAX_BITS:
            msg = f"scalar codes have 1 to {_MAX_BITS} whole bits per channel, got {self.bits!r}"
            raise OptionError(msg)
        if self.head_dim * self.bits % 8:
            msg = f"{self.bits} bits for each of {self.head_dim} channels do not fill whole bytes"
            raise ShapeError(msg)

    @property
    def bytes_per_vector(self) -> int:
        """Packed codes and one byte of scale."""
        return self.head_dim * self.bits // 8 + 1

    def fit(self, vectors: Float[Tensor, "b h n d"]) -> VectorTransform:
        """Freeze the mean (if centring) and the reference scale of each head."""
        mean = vectors.float().mean(2, keepdim=True).half() if self.center else None
        centred = vectors.float() if mean is None else vectors.float() - mean
        reference = centred.square().mean((2, 3)).sqrt().clamp_min(_TINY)[..., None]
        return VectorTransform(HadamardRotation(self.head_dim), mean, reference)

    def encode(self, vectors: Float[Tensor, "b h n d"], transform: VectorTransform) -> PackedVectors:
        """Return the nearest level of every channel at the vector's own root mean square."""
        y = transform.forward(vectors)
        rms = y.square().mean(-1, keepdim=True).sqrt()
        y = y / rms.clamp_min(_TINY)
        cuts = torch.tensor(_middles(lloyd_max_levels(self.bits)), device=y.device)
        codes = torch.bucketize(y.contiguous(), cuts)
        power, norm = y.square().sum(-1), self._levels(y)[codes].square().sum(-1)
        scales = torch.where(power > 0, (power / norm).sqrt(), 0.0) * rms[..., 0]  # keeps the vector's norm
        return PackedVectors(pack_bits(codes.to(torch.uint8), self.bits), encode_scales(scales, transform.reference))

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Float[Tensor, "b h n d"]:
        """Return the levels, scaled and rotated back."""
        codes = unpack_bits(packed.words, self.bits)
        y = self._levels(codes).index_select(0, codes.flatten().int()).view(codes.shape)
        return transform.inverse(y, decode_scales(packed.scales, transform.reference))

    def _levels(self, like: Tensor) -> Float[Tensor, "levels"]:
        return torch.tensor(lloyd_max_levels(self.bits), device=like.device)


@dataclass(frozen=True)
class ExactCodec(VectorCodec):
    """Keeps vectors as they are, in float16: for recipes that evict and nothing else.

    The last byte of a vector stands where other codecs have their scale, so a vector takes two bytes per channel.
    """

    head_dim: int

    @property
    def bytes_per_vector(self) -> int:
        """Two bytes per channel."""
        return 2 * self.head_dim

    def fit(self, vectors: Float[Tensor, "b h n d"]) -> VectorTransform:
        """Return a transform that is not used."""
        return VectorTransform(HadamardRotation(self.head_dim), None, vectors.new_ones(*vectors.shape[:2], 1).float())

    def encode(self, vectors: Float[Tensor, "b h n d"], transform: VectorTransform) -> PackedVectors:
        """Return the bytes of the rounded vectors."""
        del transform
        octets = vectors.half().contiguous().view(torch.uint8)
        return PackedVectors(octets[..., :-1], octets[..., -1])

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Float[Tensor, "b h n d"]:
        """Return the vectors."""
        del transform
        return torch.cat([packed.words, packed.scales[..., None]], -1).view(torch.float16).float()


@dataclass(frozen=True)
class FlatPlanCodec(E8Codec):
    """Lattice codes that give short principal axes as many bits as long ones."""

    @property
    def layouts(self) -> tuple[CodeLayout, ...]:
        """The flat one."""
        return (self.layout,)


@dataclass(frozen=True)
class SharpenedCodec(E8Codec):
    """Lattice codes whose decoded vectors stand further from their mean than was stored, which sharpens attention.

    Args:
        sharpness: The factor of the deviation from the mean (from 0, without centring).
    """

    sharpness: float = 1.0

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Float[Tensor, "b h n d"]:
        """Return the vectors, their deviation times the factor."""
        decoded = super().decode(packed, transform)
        if transform.mean is None:
            return decoded.mul_(self.sharpness)
        return torch.lerp(transform.mean.float(), decoded, self.sharpness)


class ScalarCache(NexusQuantCache):
    """Our cache with scalar quantizers in place of the lattice; bits are whole numbers."""

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of the keys or the values of a layer."""
        del layer_idx
        settings = self.cache_config
        if side == "keys":
            return LloydMaxCodec(head_dim, settings.key_bits, settings.center_keys)
        return LloydMaxCodec(head_dim, settings.value_bits)


class ExactCache(NexusQuantCache):
    """Our cache with float16 in place of codes."""

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of the keys or the values of a layer."""
        del side, layer_idx
        return ExactCodec(head_dim)


class FlatPlanCache(NexusQuantCache):
    """Our cache with the same bits for all axes."""

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of the keys or the values of a layer."""
        codec = super().make_codec(side, head_dim, layer_idx)
        return FlatPlanCodec(**vars(codec))


class KeyAxesCache(NexusQuantCache):
    """Our cache with principal axes for keys, however few tokens there are: what it has of long texts."""

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of the keys or the values of a layer."""
        codec = super().make_codec(side, head_dim, layer_idx)
        return replace(codec, transform="principal") if side == "keys" else codec  # type: ignore[type-var]  # E8Codec


class CentredValuesCache(NexusQuantCache):
    """Our cache with the mean of the values removed, too."""

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of the keys or the values of a layer."""
        return replace(super().make_codec(side, head_dim, layer_idx), center=True)  # type: ignore[type-var]  # E8Codec


class SharpenedCache(NexusQuantCache):
    """Our cache with decoded keys 2 % further from their mean."""

    sharpness = 1.02

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of the keys or the values of a layer."""
        codec = super().make_codec(side, head_dim, layer_idx)
        return SharpenedCodec(**vars(codec), sharpness=self.sharpness) if side == "keys" else codec


class MoreSharpenedCache(SharpenedCache):
    """The same with 5 %."""

    sharpness = 1.05


def candidate_of(
    name: str,
    kind: type[NexusQuantCache],
    settings: CacheConfig,
    config: PretrainedConfig,
    policy: EvictionPolicy | None = None,
) -> Candidate:
    """Return a cache of this kind as a candidate."""

    def make() -> NexusQuantCache:
        return kind(settings, config=config, policy=policy)

    return Candidate(name, make, settings={**describe(settings, make().make_policy(0)), "kind": kind.__name__})


def ratio_for(
    kind: type[NexusQuantCache], settings: CacheConfig, target: float, config: PretrainedConfig, tokens: int
) -> float:
    """Return the part of the tokens to keep so that the bytes held reach the target; bytes grow linearly with it."""
    low, high = 0.2, 0.8
    at_low, at_high = (held_bytes(kind, replace(settings, keep_ratio=ratio), config, tokens) for ratio in (low, high))
    ratio = low + (target - at_low) / (at_high - at_low) * (high - low)
    return round(min(max(ratio, 0.01), 1.0), 3)


def held_bytes(kind: type[NexusQuantCache], settings: CacheConfig, config: PretrainedConfig, tokens: int) -> float:
    """Return the bytes that a cache of the whole model would hold, from one layer of random keys and values."""
    cache = kind(settings, config=config)
    heads, random = config.num_key_value_heads, torch.Generator().manual_seed(0)
    update(cache, *random_tokens(heads, tokens, head_dim_of(config), random), 0)
    cache.compress()
    report = cache.memory_report()
    return float(report.shared_bytes + report.layers[0].held_bytes * config.num_hidden_layers)


def head_dim_of(config: PretrainedConfig) -> int:
    """Return the channels of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def dense_bytes(config: PretrainedConfig, tokens: int) -> int:
    """Return the bytes of a plain 16-bit cache."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(config) * tokens
