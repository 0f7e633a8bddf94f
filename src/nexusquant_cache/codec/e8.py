"""The E8 codec: rotation, one scale per vector, parity-coset block codes."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.scale import decode_scales, encode_scales
from nexusquant_cache.codec.transform import HadamardRotation, Rotation, VectorTransform
from nexusquant_cache.errors import OptionError, ShapeError, suggest
from nexusquant_cache.layout import BLOCK, CodeLayout
from nexusquant_cache.reference.blocks import codes_of, nearest
from nexusquant_cache.reference.packing import pack
from nexusquant_cache.reference.tables import covered_stages, decode_rows

GainRule = Literal["least_squares", "norm", "unbiased"]

_CHUNK = 4096  # vectors encoded together: their temporaries stay in the cache of a core
_FLOAT16_MAX = 65504.0
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class E8Codec(VectorCodec):
    """Codes vectors block by block after centring and rotating them.

    A vector ``y`` with root mean square ``r`` is coded at the scale ``r * c`` for each candidate ``c``; the
    candidate with the least error at its best gain wins.  The gain that is stored for the decoded
    ``q`` is

    - ``least_squares``: ``<y, q> / <q, q>``, the least error, which shrinks inner products;
    - ``norm``: ``|y| / |q|``, which keeps the vector's norm;
    - ``unbiased``: ``<y, y> / <y, q>``, which keeps the inner product with the vector's own direction.

    Args:
        layout: Bits of every block.
        gain: The gain rule.
        candidates: Scales to try, relative to the root mean square.
        center: Whether `fit` removes the mean over tokens.
        seed: Of the random signs.

    Raises:
        OptionError: If the gain rule is unknown or a candidate is not positive.
    """

    layout: CodeLayout
    gain: GainRule = "norm"
    candidates: tuple[float, ...] = (0.92, 1.1)
    center: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.gain not in get_args(GainRule):
            msg = f"unknown gain rule {self.gain!r}. {suggest(str(self.gain), get_args(GainRule))}"
            raise OptionError(msg)
        if not self.candidates or not all(0 < candidate < float("inf") for candidate in self.candidates):
            msg = f"scale candidates must be positive numbers, at least one, got {self.candidates!r}"
            raise OptionError(msg)

    @property
    def bytes_per_vector(self) -> int:
        """Packed codes and one byte of scale."""
        return self.layout.bytes_per_vector + 1

    def make_rotation(self, vectors: Float[Tensor, "b h n d"]) -> Rotation:
        """Return the rotation for these (centred) vectors; override it for a basis of your own."""
        del vectors
        return HadamardRotation(self.layout.head_dim, self.seed)

    def fit(self, vectors: Float[Tensor, "b h n d"]) -> VectorTransform:
        """Freeze the mean (if centring), the rotation and the reference scale of each head."""
        self._check(vectors)
        mean = None
        if self.center:
            # Any rounding of the mean is harmless: what is subtracted is what is added back.
            mean = vectors.mean(2, keepdim=True, dtype=torch.float32)
            mean = mean.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()
        centred = vectors.float() if mean is None else vectors.float() - mean
        # The median of the tokens' scales, so that no outlier moves the grid; 1 for a head of zeros.
        peak = centred.abs().amax(-1, keepdim=True).clamp_min(_TINY)
        norms = (centred / peak).square().mean(-1).sqrt() * peak[..., 0]
        reference = norms.median(-1, keepdim=True).values
        return VectorTransform(self.make_rotation(centred), mean, torch.where(reference > 0, reference, 1.0))

    def encode(self, vectors: Float[Tensor, "b h n d"], transform: VectorTransform) -> PackedVectors:
        """Return the codes of finite vectors; see the class for the search."""
        self._check(vectors)
        shape = vectors.shape[:3]
        channels = transform.forward(vectors).reshape(-1, self.layout.head_dim).T
        parts = [self._encode_chunk(part.contiguous()) for part in channels.split(_CHUNK, dim=1)]
        if not parts:
            parts = [self._encode_chunk(channels)]
        words = torch.cat([pack(codes, self.layout) for codes, _ in parts])
        words = words.view(*shape, self.layout.bytes_per_vector)
        gains = torch.cat([gain for _, gain in parts]).view(shape)
        return PackedVectors(words, encode_scales(gains, transform.reference))

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Float[Tensor, "b h n d"]:
        """Return the vectors of the codes as a new float32 tensor."""
        shape = packed.scales.shape
        done = covered_stages(self.layout, transform.rotation.first_stride)
        rows = decode_rows(packed.words.reshape(shape.numel(), self.layout.bytes_per_vector), self.layout, done)
        scales = decode_scales(packed.scales, transform.reference)
        return transform.inverse(rows.view(*shape, self.layout.head_dim), scales, done)

    def _check(self, vectors: Tensor) -> None:
        if vectors.ndim != 4 or vectors.shape[-1] != self.layout.head_dim:  # noqa: PLR2004 - b h n d
            msg = f"expected [batch, kv_heads, tokens, {self.layout.head_dim}], got shape {tuple(vectors.shape)}"
            raise ShapeError(msg)

    def _encode_chunk(self, y: Float[Tensor, "d rows"]) -> tuple[Int[Tensor, "rows blocks"], Float[Tensor, "rows"]]:
        """Return codes and gains of channel-major vectors."""
        # Divided by its largest channel first: no square of a finite vector overflows.
        peak = y.abs().amax(0).clamp_min(_TINY)
        y = y / peak
        power = _row_sum(y.square())
        rms = (power / self.layout.head_dim).sqrt()
        inverse = torch.where(rms > 0, 1 / rms, 0.0)
        best = self._try(y, inverse / self.candidates[0])
        for candidate in self.candidates[1:]:
            other = self._try(y, inverse / candidate)
            better = other[0] > best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(other, best, strict=True))
        _, inner, norm, choices = best
        return self._codes(choices), self._gain(power, inner, norm) * peak

    def _try(self, y: Float[Tensor, "d rows"], scale: Float[Tensor, "rows"]) -> tuple[Tensor, ...]:
        """Return fit, inner product, squared norm and choices of the nearest codewords at this scale.

        The error at the best gain is ``<y,y> - <y,q>^2 / <q,q>``: the best fit has the largest quotient.
        """
        blocks = (y * scale).view(self.layout.blocks, BLOCK, -1)
        q, choices = torch.zeros_like(blocks), torch.zeros_like(blocks, dtype=torch.uint8)
        for bits, index in self._rates():
            q[index], choices[index] = nearest(blocks[index], bits)
        q = q.view(y.shape)
        inner, norm = _row_sum(y * q), _row_sum(q.square())
        fit = inner.square() / norm.clamp_min(_TINY)
        return fit, inner, norm, choices

    def _codes(self, choices: UInt8[Tensor, "blocks 8 rows"]) -> Int[Tensor, "rows blocks"]:
        codes = torch.zeros(self.layout.blocks, choices.shape[-1], dtype=torch.int64, device=choices.device)
        for bits, index in self._rates():
            codes[index] = codes_of(choices[index], bits)
        return codes.T

    def _rates(self) -> list[tuple[int, slice | list[int]]]:
        """Return each rate of the plan with the blocks that have it."""
        plan = self.layout.block_bits
        if self.layout.is_uniform:
            return [(plan[0], slice(None))]
        return [(bits, [i for i, b in enumerate(plan) if b == bits]) for bits in sorted(set(plan) - {0})]

    def _gain(self, power: Tensor, inner: Tensor, norm: Tensor) -> Tensor:
        norm, inner = norm.clamp_min(_TINY), inner.clamp_min(_TINY)
        if self.gain == "least_squares":
            gain = inner / norm
        elif self.gain == "norm":
            gain = (power / norm).sqrt()
        else:
            gain = power / inner
        return torch.where(power > 0, gain, 0.0)


def _row_sum(x: Float[Tensor, "d rows"]) -> Float[Tensor, "rows"]:
    """Sum over channels, by halves: the order does not depend on how many rows there are."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        rest = x[2 * half :]
        x = x[:half] + x[half : 2 * half]
        if rest.shape[0]:
            x = torch.cat([x, rest])
    return x[0]
