"""A serde for LMCache that stores chunks of keys and values as our codes: it quantizes, and evicts nothing.

LMCache keeps the KV cache of vLLM and SGLang on the CPU, on disks and on other machines.  What an L2 adapter stores may
pass through a serde.  With this file on ``PYTHONPATH``, name both in the JSON of ``--l2-adapter``::

    {"type": "plugin", "module_path": "lmcache_serde", "class_name": "Files", "adapter_params": {"base_path": "/cache"},
     "serde": {"type": "nexusquant", "head_dim": 128}}

A plugin is how LMCache is told to import a module; with the module imported, any adapter can have the serde.  Other
options of it are ``key_bits`` and ``value_bits`` per channel (by default those of the preset `keep-all`), and
``max_workers``.  Tried with LMCache 0.5.6 on a CPU, with chunks of random numbers; no engine was involved.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, Serializer, register_serde_factory
from lmcache.v1.memory_management import MemoryObj

from nexusquant_cache import PRESETS
from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.rotation import HadamardRotation
from nexusquant_cache.codec.transform import VectorTransform

NAME = "nexusquant"


@dataclass(frozen=True)
class Sides:
    """How keys and values are coded.  A chunk is ``[2, layers, tokens, kv_heads * head_dim]``."""

    head_dim: int = 128
    key_bits: float = PRESETS["quant"].key_bits
    value_bits: float = PRESETS["quant"].value_bits

    def codecs(self) -> list[E8Codec]:
        """Return the codec of keys and that of values."""
        layouts = [CodeLayout.flat(self.head_dim, bits) for bits in (self.key_bits, self.value_bits)]
        return [E8Codec(layout, center=True) for layout in layouts]

    def parts(self, codec: E8Codec, chunk: torch.Size) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return what one side of a chunk is stored as: codes, scale bytes, means and reference scales."""
        sides, layers, tokens, channels = chunk
        if sides != 2 or channels % self.head_dim:  # noqa: PLR2004 - keys and values
            msg = f"expected [2, layers, tokens, kv_heads * {self.head_dim}], got {tuple(chunk)}: check head_dim"
            raise ValueError(msg)
        heads = (layers, channels // self.head_dim)
        codes = (*heads, tokens, codec.layout.bytes_per_vector)
        means = (*heads, 1, self.head_dim)
        return [(codes, torch.uint8), (codes[:-1], torch.uint8), (means, torch.float16), ((*heads, 1), torch.float32)]

    def size(self, chunk: torch.Size) -> int:
        """Return the bytes of a chunk, which do not depend on its content."""
        parts = [part for codec in self.codecs() for part in self.parts(codec, chunk)]
        return sum(prod(shape) * dtype.itemsize for shape, dtype in parts)


@dataclass(frozen=True)
class CodesSerializer(Serializer):
    """Encodes chunks."""

    sides: Sides

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Return the bytes of all tensors of an object."""
        return sum(map(self.sides.size, layout_desc.shapes))

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Write codes, and return how many bytes they have."""
        del key
        written: list[torch.Tensor] = []
        for index in range(len(src.get_shapes())):
            for states, codec in zip(src.get_tensor(index), self.sides.codecs(), strict=True):
                shape = self.sides.parts(codec, src.get_shapes()[index])[0][0]
                vectors = states.unflatten(-1, (shape[1], -1)).transpose(1, 2).float()  # [layers, heads, tokens, d]
                if not bool(vectors.isfinite().all()):
                    msg = "a chunk has NaN or infinity among its keys or values: it is not stored"
                    raise ValueError(msg)
                transform = codec.fit(vectors)
                packed = codec.encode(vectors, transform)
                written += [packed.words, packed.scales, transform.mean, transform.reference]
        blob = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in written])
        dst.tensor[: len(blob)] = blob
        return len(blob)


@dataclass(frozen=True)
class CodesDeserializer(Deserializer):
    """Decodes chunks."""

    sides: Sides

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Read codes, and write what they stand for in the destination's dtype."""
        del key
        blob = src.tensor.flatten()
        for index, chunk in enumerate(dst.get_shapes()):
            for states, codec in zip(dst.get_tensor(index), self.sides.codecs(), strict=True):
                found: list[torch.Tensor] = []
                for shape, dtype in self.sides.parts(codec, chunk):
                    size = prod(shape) * dtype.itemsize
                    found.append(blob[:size].clone().view(dtype).view(shape))
                    blob = blob[size:]
                words, scales, mean, reference = found
                transform = VectorTransform(HadamardRotation(self.sides.head_dim, codec.seed), mean, reference)
                vectors = codec.decode(PackedVectors(words, scales), transform)
                states.copy_(vectors.transpose(1, 2).flatten(2))


class Files(FSL2Adapter):
    """LMCache's own files in a folder, as a plugin."""

    config_class_name = FSL2AdapterConfig.__name__  # where LMCache looks

    def __init__(self, config: FSL2AdapterConfig, l1_memory_desc: L1MemoryDesc | None = None) -> None:
        """Take what plugins are given."""
        del l1_memory_desc
        super().__init__(config)


def create(options: dict[str, object]) -> AsyncSerdeProcessor:
    """Return the serde for the options of an adapter's JSON."""
    known = ["max_workers", *(field.name for field in fields(Sides))]
    for name in options:
        if name not in known:
            msg = f"{NAME} has no option {name!r}; there are {', '.join(known)}"
            raise ValueError(msg)
    workers = int(str(options.get("max_workers", 1)))
    sides = Sides(**{name: value for name, value in options.items() if name != "max_workers"})
    return AsyncSerdeProcessor(CodesSerializer(sides), CodesDeserializer(sides), max_workers=workers)


register_serde_factory(NAME, create)
