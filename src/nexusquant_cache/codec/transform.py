"""The linear map between vectors and the unit-variance channels that the block code sees."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from nexusquant_cache.codec.hadamard import (
    apply_hadamard,
    apply_hadamard_rows,
    hadamard_factors,
    hadamard_matrix,
    random_signs,
)
from nexusquant_cache.codec.layout import BLOCK, CodeLayout
from nexusquant_cache.codec.operands import SidePlan, side_plan

_INT8_MAX = 127
_LEAST_DEVIATION = 1 / _INT8_MAX  # of a channel, relative to the largest: rounding of the axes spills over that much
_TINY = torch.finfo(torch.float32).tiny


class Rotation(ABC):
    """An orthogonal map of the channels, shared by all tokens of a layer.

    It may hold tensors with leading axes ``[batch, kv_heads, ...]``, one basis per head, for instance a basis
    computed from the prompt; these follow the batch through `map_batch` and count in ``nbytes``.
    """

    @property
    def first_stride(self) -> int:
        """Order of the Hadamard factor that acts on neighbouring channels first; 1 if there is none.

        A decoder may apply the stages below this stride itself and say so to `unrotate`.
        """
        return 1

    @property
    def block_variances(self) -> Float[Tensor, "b h blocks"] | None:
        """What squared error in a coded channel of each block weighs in the vector; None if all weigh alike."""
        return None

    @abstractmethod
    def rotate(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Return the channels that are coded, in float32.

        The result may lie channel-major in memory, which is what the encoder wants.
        """

    @abstractmethod
    def unrotate(self, y: Float[Tensor, "b h n d"], first_stride: int = 1) -> Float[Tensor, "b h n d"]:
        """Invert `rotate` for a row-major tensor in which the stages below ``first_stride`` are done."""

    def adjoint(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Return ``z`` with ``<z, y> = <x, unrotate(y)>`` for all ``y``; for an orthogonal map, `rotate`."""
        return self.rotate(x)

    def axes(self, device: torch.device) -> tuple[Int8[Tensor, "b_or_1 h_or_1 d d"], Float[Tensor, "*heads d"]] | None:
        """Return the same map for kernels: what each coded channel adds to a vector, as whole numbers and their unit.

        None, which is the default, if it cannot be written so; plain torch computes then.
        """
        del device
        return None

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> "Rotation":
        """Return this rotation with ``function`` applied to every tensor that has a batch axis."""
        del function
        return self


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
    return signed.to(device, torch.int8)[None, None], torch.full((head_dim,), head_dim**-0.5, device=device)


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
        x = _double(vectors) / peak
        variances, axes = torch.linalg.eigh(x.mT @ x / max(x.shape[2], 1))
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

    def rotate(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Return each vector's product with every axis over its squared length; rounded from float64, see `fit`."""
        basis = _double(self.basis)
        # Lengths come in twice: once with the vector, which may be huge, so that no square is formed of it.
        unit = basis / basis.norm(dim=-1, keepdim=True).clamp_min(_TINY)
        lengths = basis.norm(dim=-1, keepdim=True).clamp_min(_TINY) * self.step
        channels: Tensor = (_double(x) @ unit.mT) / lengths.mT
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


@dataclass(frozen=True)
class VectorTransform:
    """What the keys or the values of one layer share: fitted once, never changed.

    Attributes:
        rotation: The rotation of the channels.
        mean: Subtracted from every vector before rotation, ``[batch, kv_heads, 1, head_dim]`` float16, or None.
        reference: The scale that scale code 128 stands for, float32.
        plans: Which of the codec's layouts each head has, on the CPU; None if all have the first.
    """

    rotation: Rotation
    mean: Float[Tensor, "b h 1 d"] | None
    reference: Float[Tensor, "b h 1"]
    plans: UInt8[Tensor, "b h"] | None = None
    _side_plans: dict[tuple[CodeLayout, ...], SidePlan | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def side_plan(self, layouts: tuple[CodeLayout, ...]) -> SidePlan | None:
        """Return what kernels need to know of this transform, made once; None if its rotation cannot be told them.

        Args:
            layouts: The codec's layouts.
        """
        if layouts not in self._side_plans:
            axes = self.rotation.axes(self.reference.device)
            plan = None if axes is None else side_plan(self.reference, *axes, self.mean, layouts, self.plans)
            self._side_plans[layouts] = plan
        return self._side_plans[layouts]

    @cached_property
    def plan_of_heads(self) -> tuple[int, ...]:
        """The layout of each head, counted through the batch; empty if all have the first."""
        return () if self.plans is None else tuple(self.plans.flatten().tolist())

    @cached_property
    def heads_by_plan(self) -> dict[int, list[int]]:
        """The heads of all rows, counted through the batch, that have each layout; empty if all have the first."""
        groups: dict[int, list[int]] = {}
        for head, plan in enumerate(self.plan_of_heads):
            groups.setdefault(plan, []).append(head)
        return groups

    def forward(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Return centred, rotated vectors in float32; scales are not applied."""
        x = x.float()
        return self.rotation.rotate(x if self.mean is None else x - self.mean)

    def inverse(
        self, y: Float[Tensor, "b h n d"], scales: Float[Tensor, "b h n"], first_stride: int = 1
    ) -> Float[Tensor, "b h n d"]:
        """Return the vectors of rotated, unit-variance channels ``y`` and their scales, in float32."""
        x = self.rotation.unrotate(y, first_stride).mul_(scales[..., None])
        return x if self.mean is None else x.add_(self.mean)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> "VectorTransform":
        """Return this transform with ``function`` applied to every tensor that has a batch axis."""
        return replace(
            self,
            rotation=self.rotation.map_batch(function),
            mean=None if self.mean is None else function(self.mean),
            reference=function(self.reference),
            plans=None if self.plans is None else function(self.plans).to("cpu"),
        )

    @staticmethod
    def cat(parts: "list[VectorTransform]") -> "VectorTransform":
        """Return one transform for the rows of all parts, which must differ in nothing but their tensors."""
        joined = (torch.cat(tensors) for tensors in zip(*map(_batch_tensors, parts), strict=True))
        return parts[0].map_batch(lambda _: next(joined))


def _batch_tensors(transform: VectorTransform) -> list[Tensor]:
    """Return every tensor with a batch axis, in the order in which `VectorTransform.map_batch` visits them."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    transform.map_batch(note)
    return found
