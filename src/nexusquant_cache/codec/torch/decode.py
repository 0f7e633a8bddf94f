"""Decoding in plain torch: what every other implementation is compared with."""

from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.scale import decode_scales
from nexusquant_cache.codec.tables import covered_stages, decode_heads
from nexusquant_cache.codec.transform import VectorTransform


def decode(
    packed: PackedVectors, transform: VectorTransform, layouts: tuple[CodeLayout, ...]
) -> Float[Tensor, "b h n d"]:
    """Return the vectors as a new float32 tensor.

    Args:
        packed: The encoded vectors.
        transform: The transform they were encoded with.
        layouts: Layouts of one size; `VectorTransform.plans` says which of them each head has.
    """
    done = covered_stages(transform.rotation.first_stride)
    return transform.inverse(*coded_channels(packed, transform, layouts, done), done)


def coded_channels(
    packed: PackedVectors, transform: VectorTransform, layouts: tuple[CodeLayout, ...], first_stride: int = 1
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n"]]:
    """Return codewords for channels of unit variance, and scales; see `VectorCodec.coded_channels`.

    Args:
        packed: The encoded vectors.
        transform: The transform they were encoded with.
        layouts: As of `decode`.
        first_stride: Hadamard stages below this stride shall be done; at most 4.
    """
    shape = packed.scales.shape
    plans = transform.plan_of_heads or (0,) * (shape[0] * shape[1])
    y = decode_heads(packed.words.flatten(0, 1), layouts, plans, first_stride)
    return y.view(*shape, layouts[0].head_dim), decode_scales(packed.scales, transform.reference)
