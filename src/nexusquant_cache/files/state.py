"""A living cache as metadata and tensors, and back: what `NexusQuantCache.save` writes and ``load`` reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.registry import CodecMeta, describe_codec, make_codec
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.errors import NonFiniteError
from nexusquant_cache.files.contents import DTYPES
from nexusquant_cache.files.schema import CacheMeta, PhaseMeta
from nexusquant_cache.layer.state import Declared
from nexusquant_cache.policy import EvictionPolicy
from nexusquant_cache.presets import CacheConfig

Tensors = dict[str, Tensor]


@dataclass
class Lists:
    """What several layers share and a file holds once."""

    codecs: list[CodecMeta] = field(default_factory=list)
    phases: list[RotaryPhase] = field(default_factory=list)
    policies: list[str] = field(default_factory=list)

    def codec(self, codec: VectorCodec) -> int:
        """Return the place of a codec."""
        meta = describe_codec(codec)
        if meta not in self.codecs:
            self.codecs.append(meta)
        return self.codecs.index(meta)

    def pair(self, codecs: tuple[VectorCodec, VectorCodec]) -> tuple[int, int]:
        """Return the places of the codecs of keys and of values."""
        return self.codec(codecs[0]), self.codec(codecs[1])

    def policy(self, policy: EvictionPolicy) -> int:
        """Return the place of a policy's name."""
        name = policy_name(policy)
        if name not in self.policies:
            self.policies.append(name)
        return self.policies.index(name)

    def phase(self, phase: RotaryPhase) -> int:
        """Return the place of a rotary phase."""
        for index, known in enumerate(self.phases):
            if known.matches(phase):
                return index
        self.phases.append(phase)
        return len(self.phases) - 1


@dataclass(frozen=True)
class Source:
    """What a file holds, as layers take it.

    Attributes:
        codecs: The codecs that it describes.
        phases: Its rotary phases.
        tensors: Its tensors on the CPU, by name.
        device: Where the layers shall be.
        dtype: What exact keys and values are cast to; None leaves them as they are.
    """

    codecs: tuple[VectorCodec, ...]
    phases: tuple[RotaryPhase, ...]
    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls, meta: CacheMeta, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None
    ) -> "Source":
        """Return what a file holds."""
        codecs = tuple(make_codec(codec) for codec in meta.codecs)
        phases = tuple(RotaryPhase(tensors[f"phases.{i}"], phase.interleaved) for i, phase in enumerate(meta.phases))
        return cls(codecs, phases, tensors, device, dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the device."""
        return self.tensors[name].to(self.device)

    def cast(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that an exact tensor of this one gets."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def exact(self, name: str) -> Tensor:
        """Return an exact tensor, cast if that is wanted."""
        return self.tensor(name).to(self.cast(self.tensors[name].dtype))

    def take(self, declared: Declared, name: str) -> Tensor:
        """Return a tensor of a layer as the layer holds it."""
        if declared.stays:
            return self.tensors[name]
        is_fixed = declared.kind != "exact" or declared.dtype in DTYPES
        return self.tensor(name) if is_fixed else self.exact(name)

    def codec_pair(self, places: tuple[int, int]) -> tuple[VectorCodec, VectorCodec]:
        """Return the codecs of keys and of values."""
        return self.codecs[places[0]], self.codecs[places[1]]


def check_finite(tensors: Tensors) -> None:
    """Raise NonFiniteError if one of these holds NaN or infinity."""
    for what, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # Two numbers, which NaN would be, in place of a tensor as large as this one.
        if not all(isfinite(float(x)) for x in tensor.aminmax()):
            msg = f"{what} holds NaN or infinity: a cache that has met with such numbers is of no use, and is not saved"
            raise NonFiniteError(msg)


def phases_state(lists: Lists) -> tuple[tuple[PhaseMeta, ...], Tensors]:
    """Return the rotary phases that layers have named."""
    metas = tuple(PhaseMeta(phase.inv_freq.shape[0], phase.interleaved) for phase in lists.phases)
    return metas, {f"phases.{index}": phase.inv_freq for index, phase in enumerate(lists.phases)}


def describe_settings(settings: CacheConfig) -> dict[str, Any]:
    """Return settings as JSON can hold them; which implementation computes is the reader's choice."""
    return {f.name: _plain(getattr(settings, f.name)) for f in fields(settings) if f.name != "impl"}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def policy_name(policy: EvictionPolicy) -> str:
    """Return what tells policies apart: their options, or the class where there are none that can be seen."""
    shows_options = type(policy).__repr__ is not object.__repr__
    return repr(policy) if shows_options else f"{type(policy).__module__}.{type(policy).__qualname__}"
