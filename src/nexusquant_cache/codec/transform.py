"""The linear map between vectors and the unit-variance channels that the block code sees."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.reference.hadamard import (
    apply_hadamard,
    apply_hadamard_rows,
    hadamard_factors,
    random_signs,
)


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

    @abstractmethod
    def rotate(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Return the channels that are coded, in float32.

        The result may lie channel-major in memory, which is what the encoder wants.
        """

    @abstractmethod
    def unrotate(self, y: Float[Tensor, "b h n d"], first_stride: int = 1) -> Float[Tensor, "b h n d"]:
        """Invert `rotate` for a row-major tensor in which the stages below ``first_stride`` are done."""

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


@dataclass(frozen=True)
class VectorTransform:
    """What the keys or the values of one layer share: fitted once, never changed.

    Attributes:
        rotation: The rotation of the channels.
        mean: Subtracted from every vector before rotation, ``[batch, kv_heads, 1, head_dim]`` float16, or None.
        reference: The scale that scale code 128 stands for, float32.
    """

    rotation: Rotation
    mean: Float[Tensor, "b h 1 d"] | None
    reference: Float[Tensor, "b h 1"]

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
