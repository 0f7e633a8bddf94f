"""The linear map between vectors and the unit-variance channels that blocks are made of."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.operands import SidePlan, side_plan


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
        """How much the squared error of a coded channel counts in the vector, by block; None if all count alike."""
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
        """Return the map as kernels take it: what each coded channel adds to a vector, in whole numbers and their unit.

        The default is None: the map cannot be written so, and plain torch computes.
        """
        del device
        return None

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> "Rotation":
        """Return this rotation with ``function`` applied to every tensor that has a batch axis."""
        del function
        return self


@dataclass(frozen=True)
class VectorTransform:
    """What the keys or the values of one layer share: fitted once, never changed.

    Attributes:
        rotation: The rotation of the channels.
        mean: Subtracted from every vector before rotation, ``[batch, kv_heads, 1, head_dim]`` float16, or None.
        reference: The scale that scale byte 128 stands for, float32.
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
        """Return this transform as kernels take it, made once; None if its rotation has no `Rotation.axes`.

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


_MOVED = {"HadamardRotation", "PrincipalRotation"}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module holds
    """Return rotations, which were here at first, and are imported from here by codecs that were written then."""
    if name in _MOVED:
        return getattr(importlib.import_module("nexusquant_cache.codec.rotation"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
