"""The package's own rotations: a fixed Hadamard matrix, and the principal axes of the vectors of each head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from nexusquant_cache.codec.hadamard import (
    apply_hadamard,
    apply_hadamard_rows,
    hadamard_factors,
    hadamard_matrix,
    random_signs,
)
from nexusquant_cache.codec.layout import BLOCK
from nexusquant_cache.codec.transform import Rotation

_INT8_MAX = 127
_LEAST_DEVIATION = 1 / _INT8_MAX  # of a channel, relative to the largest: rounding of the axes spills over that much
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class HadamardRotation(Rotation):
    """Random signs, then a Hadamard matrix: ``y = H (signs * x) / sqrt(d)``.

    It holds no tensor: signs and matrix follow from the head dimension and the seed.

    References:
        Ashkboos et al. (2024), "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv:2404.00456,
        section 3, for rotations of the KV cache; signs as in Tseng et al. (2024), "QuIP#",
        arXiv:2402.04396, section 3.
    """

    head_dim: int
    seed: int = 0

    @property
    def first_stride(self) -> int:
        """Order of the power-of-two factor."""
        return hadamard_factors(self.head_dim)[1]

    def _signs(self, device: torch.device) -> Tensor:
        scale: float = self.head_dim**-0.5
        return random_signs(self.head_dim, self.seed, device) * scale

    def rotate(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Return the rotated channels, channel-major in memory."""
        channels = x.reshape(-1, self.head_dim).T.to(torch.float32, memory_format=torch.contiguous_format)
        channels = channels.contiguous() * self._signs(x.device)[:, None]
        return apply_hadamard(channels).T.view(x.shape)

    def unrotate(self, y: Float[Tensor, "b h n d"], first_stride: int = 1) -> Float[Tensor, "b h n d"]:
        """Return ``signs * (H.T y) / sqrt(d)``, row-major."""
        given = y.reshape(-1, self.head_dim)
        rows = apply_hadamard_rows(given, first_stride=first_stride, transpose=True)
        # In place where the stages made a new tensor: every pass over a layer counts in each generation step.
        in_place = None if rows.data_ptr() == given.data_ptr() else rows
        return torch.mul(rows, self._signs(y.device), out=in_place).view(y.shape)

    def axes(self, device: torch.device) -> tuple[Int8[Tensor, "b_or_1 h_or_1 d d"], Float[Tensor, "*heads d"]] | None:
        """Return the signed Hadamard matrix, the same tensor for all layers."""
        return _hadamard_axes(self.head_dim, self.seed, device)


@lru_cache(maxsize=16)
def _hadamard_axes(
    head_dim: int, seed: int, device: torch.device
) -> tuple[Int8[Tensor, "1 1 d d"], Float[Tensor, " d"]]:
    signed = hadamard_matrix(head_dim) * random_signs(head_dim, seed, torch.device("cpu"))
    lengths = torch.full((head_dim,), head_dim**-0.5, device=device, dtype=torch.float32)
    return signed.to(device, torch.int8)[None, None], lengths


@dataclass(frozen=True)
class PrincipalRotation(Rotation):
    """The principal axes of the vectors of each head, by falling variance, every channel scaled to unit variance.

    The eight axes of a block are mixed by a Hadamard matrix of order 8, so that its channels are alike, as the block
    code assumes.  Encoder and decoder know the axes from the same 8-bit numbers.

    Args:
        basis: Axis of each coded channel, in units of ``step``.
        step: Of each axis; includes the deviation of the block's channels, so that a decoded vector is the sum
            of the axes times the coded channels.

    References:
        Karhunen-Loeve transform coding: Huang & Schultheiss (1963), "Block quantization of correlated Gaussian random
        variables", IEEE Trans. Commun. Syst. 11(3), 289-296; for KV caches, with calibration data, KVTC
        (2025), "KV Cache Transform Coding".
    """

    basis: Int8[Tensor, "b h d d"]
    step: Float[Tensor, "b h d 1"]

    @classmethod
    def fit(cls, vectors: Float[Tensor, "b h n d"]) -> tuple["PrincipalRotation", Float[Tensor, "b h blocks"]]:
        """Return the rotation for these centred vectors, and the variance of each block's channels, falling.

        Variances are relative to the head's largest channel, whose square may be no float32 number.  A head of zeros
        counts as white.

        Computed in float64 where the device has it, which makes the result the same in every batch.
        """
        peak = vectors.abs().amax((-1, -2), keepdim=True)
        peak = torch.where(peak > 0, peak, 1.0)
        x = _double(vectors)
        if x.dtype == torch.float64:  # squares of float32 numbers neither overflow there nor vanish
            covariance = x.mT @ x / peak.double().square()
        else:
            x = x / peak
            covariance = x.mT @ x
        variances, axes = torch.linalg.eigh(covariance / max(x.shape[2], 1))
        variances, axes = variances.flip(-1).clamp_min(0), axes.flip(-1)
        # The sign of an axis is free: fixed, it cannot depend on the library that found it.
        largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
        axes = torch.where(largest < 0, -axes, axes)
        by_block = variances.unflatten(-1, (-1, BLOCK)).mean(-1)
        deviations = by_block.sqrt().clamp_min(by_block[..., :1].sqrt() * _LEAST_DEVIATION)
        deviations = torch.where(deviations > 0, deviations, 1.0)
        mixed = torch.einsum("bhdki,ij->bhkjd", axes.unflatten(-1, (-1, BLOCK)), _mixing(axes)).flatten(2, 3)
        scaled = mixed * deviations.repeat_interleave(BLOCK, -1)[..., None]
        step = (scaled.abs().amax(-1, keepdim=True) / _INT8_MAX).clamp_min(_TINY)
        basis = (scaled / step).round().to(torch.int8)
        step = (step * peak).float().clamp(_TINY, torch.finfo(torch.float32).max)
        return cls(basis, step), deviations.square().float()

    def _axes(self) -> Float[Tensor, "b h d d"]:
        """Return what each coded channel adds to a decoded vector."""
        return self.basis.float() * self.step

    @property
    def block_variances(self) -> Float[Tensor, "b h blocks"]:
        """The squared length of a block's axes, relative to the longest block's."""
        lengths = self.basis.float().square().sum(-1).sqrt() * self.step[..., 0]
        relative = lengths / lengths.amax(-1, keepdim=True).clamp_min(_TINY)
        by_block: Tensor = relative.square().unflatten(-1, (-1, BLOCK)).mean(-1)
        return by_block

    def units(self) -> tuple[Float[Tensor, "b h d d"], Float[Tensor, "b h d 1"]]:
        """Return the axes with length 1, and their lengths; in float64, see `fit`."""
        basis = _double(self.basis)
        norms = basis.norm(dim=-1, keepdim=True).clamp_min(_TINY)
        return basis / norms, norms * self.step

    def rotate(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Return each vector's product with every axis over its squared length; rounded from float64, see `fit`."""
        # Lengths come in twice: once with the vector, which may be huge, so that no square is formed of it.
        units, lengths = self.units()
        channels: Tensor = (_double(x) @ units.mT) / lengths.mT
        return channels.float()

    def unrotate(self, y: Float[Tensor, "b h n d"], first_stride: int = 1) -> Float[Tensor, "b h n d"]:
        """Return the sum of the axes, each times its channel."""
        del first_stride  # no Hadamard stage was asked for
        return y @ self._axes()

    def adjoint(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Return the product with every axis, which is not `rotate`: axes have their lengths."""
        return x @ self._axes().mT

    def axes(self, device: torch.device) -> tuple[Int8[Tensor, "b_or_1 h_or_1 d d"], Float[Tensor, "*heads d"]] | None:
        """Return the stored axes."""
        del device
        return self.basis, self.step[..., 0]

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> "PrincipalRotation":
        """Apply ``function`` to the axes."""
        return PrincipalRotation(function(self.basis), function(self.step))


def _double(x: Tensor) -> Tensor:
    """Return the numbers in float64, or in float32 on a device without it."""
    return x.float() if x.device.type == "mps" else x.double()


def _mixing(like: Tensor) -> Float[Tensor, "8 8"]:
    matrix: Tensor = hadamard_matrix(BLOCK).to(like) * BLOCK**-0.5
    return matrix
