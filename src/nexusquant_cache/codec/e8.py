"""The E8 codec: rotation, one scale per vector, blocks of 8 channels as points of E8."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec import impl
from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.impl import Impl
from nexusquant_cache.codec.layout import BLOCK, DISTORTION, MAX_BITS, CodeLayout, sloped_layouts
from nexusquant_cache.codec.rotation import HadamardRotation, PrincipalRotation
from nexusquant_cache.codec.scale import CANDIDATES
from nexusquant_cache.codec.torch.decode import coded_channels
from nexusquant_cache.codec.transform import Rotation, VectorTransform
from nexusquant_cache.errors import OptionError, ShapeError, suggest

TransformRule = Literal["auto", "principal", "hadamard"]

_STEP_BYTES = 4  # of each axis, besides one byte for each of its channels
_FLOAT16_MAX = 65504.0
_SAMPLE = 512  # at most so many vectors, of which the median scale is taken, where it takes a rotation to know a scale
_LITTLE = 0.1  # bits per channel: where axes pay if they save no more, nobody has to look how many they save
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class E8Codec(VectorCodec):
    """Encodes vectors block by block after centring and rotating them.

    A vector ``y`` with root mean square ``r`` is divided by ``r * c`` for each candidate ``c``, and the nearest
    codeword ``q`` is found.  The candidate wins whose ``q`` points most nearly where ``y`` does.  The scale that is
    stored is ``|y| / |q|``, so that the decoded vector has the norm of ``y``.

    Blocks without bits take part in none of this; products weigh each block as it weighs in the vector.

    Args:
        layout: Bits of every block for channels that are alike, as a Hadamard rotation makes them.
        candidates: Scales to try, relative to the root mean square.
        center: Whether `fit` removes the mean over tokens.
        seed: Of the random signs.
        transform: ``"hadamard"`` rotates by a fixed matrix that costs no byte.  ``"principal"`` gives each head the
            principal axes of its own vectors and, of the layouts of equal size (`layout.sloped_layouts`), the one that
            suits their variances.  ``"auto"`` leaves the choice to `for_tokens`; `fit` takes it for ``"principal"``.
        impl: Which implementation computes, see `codec.impl`; up to rounding, all compute the same.

    Raises:
        OptionError: If the transform or ``impl`` is unknown or a candidate is not positive.
    """

    layout: CodeLayout
    candidates: tuple[float, ...] = CANDIDATES
    center: bool = False
    seed: int = 0
    transform: TransformRule = "hadamard"
    impl: Impl = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        """Check the options."""
        for what, given, known in (
            ("transform", self.transform, get_args(TransformRule)),
            ("impl", self.impl, get_args(Impl)),
        ):
            if given not in known:
                msg = f"unknown {what} {given!r}. {suggest(str(given), known)}"
                raise OptionError(msg)
        if not self.candidates or not all(0 < candidate < float("inf") for candidate in self.candidates):
            msg = f"scale candidates must be positive numbers, at least one, got {self.candidates!r}"
            raise OptionError(msg)

    @cached_property
    def layouts(self) -> tuple[CodeLayout, ...]:
        """The layouts that heads may have, all of one size; the first is that of a Hadamard rotation."""
        if self.transform == "hadamard" or self._has_own_rotation:
            return (self.layout,)
        sloped = sloped_layouts(self.layout.head_dim, self.layout.bytes_per_vector)
        return (self.layout, *(layout for layout in sloped if layout != self.layout))

    @property
    def bytes_per_vector(self) -> int:
        """Packed codes and the scale byte."""
        return self.layout.bytes_per_vector + 1

    def for_tokens(self, vectors: Float[Tensor, "b h n d"], kept: int) -> "E8Codec":
        """Choose between the transforms, if that is left open: whichever takes fewer bytes at equal error.

        Principal axes cost a matrix.  A Hadamard rotation costs, in every channel of every token, the bits that axes
        would save of vectors like these: the mean of what they save of every second vector, to which they are fitted,
        and of the others.  That is a guess where there are fewer than two vectors for each channel.  The row of which
        most is saved decides.

        Where axes pay already if they save a tenth of a bit, they are taken without a look.
        """
        self._check(vectors)
        if self.transform != "auto" or self._has_own_rotation:
            return self
        head_dim = self.layout.head_dim
        axes = head_dim * (head_dim + _STEP_BYTES)
        if kept * head_dim / 8 * _LITTLE >= axes:
            return replace(self, transform="principal")
        saved = self._saved_by_axes(vectors)
        if kept * head_dim / 8 * saved >= axes:
            return replace(self, transform="principal")
        bits = min(self.layout.bits_per_channel + saved, MAX_BITS)
        return replace(self, transform="hadamard", layout=CodeLayout.flat(head_dim, bits))

    def _saved_by_axes(self, vectors: Float[Tensor, "b h n d"]) -> float:
        """Return how many bits per channel principal axes save at equal error, on average over heads; at least 0."""
        if vectors.shape[2] < 2 * BLOCK:  # a handful shows nothing
            return 0.0
        mean = self._mean(vectors[:, :, ::2])
        fitted, others = (_centred(vectors[:, :, start::2], mean) for start in (0, 1))
        rotation, variances = PrincipalRotation.fit(fitted)
        # What is rotated is relative to the deviation of each block.
        relative = rotation.rotate(others).square().mean(2).unflatten(-1, (-1, BLOCK)).mean(-1)
        errors = torch.stack([_expected_error(variances, layout) for layout in self.layouts])
        plan = errors.argmin(0, keepdim=True)
        saved = []
        for by_block in (variances, relative * variances):
            errors = torch.stack([_expected_error(by_block, layout) for layout in self.layouts])
            flat = by_block.mean(-1) * sum(DISTORTION[bits] for bits in self.layout.block_bits)
            saved.append(0.5 * (flat / errors.gather(0, plan)[0]).log2())
        return max(float(torch.stack(saved).nan_to_num(0.0, 0.0, 0.0).mean((0, 2)).amax()), 0.0)

    @property
    def _has_own_rotation(self) -> bool:
        """Whether a subclass brings a rotation of its own, which then goes before any transform."""
        return type(self).make_rotation is not E8Codec.make_rotation

    def with_more_bits(self, bits: float = 1.0) -> "E8Codec | None":
        """Return the same codec at so many more bits per channel, at most 4; None if it has 4."""
        bits = min(self.layout.bits_per_channel + bits, MAX_BITS)
        if bits == self.layout.bits_per_channel:
            return None
        return replace(self, layout=CodeLayout.flat(self.layout.head_dim, bits))

    def make_rotation(self, vectors: Float[Tensor, "b h n d"]) -> Rotation:
        """Return the rotation for these (centred) vectors; override it for a basis of your own, which goes first."""
        del vectors
        return HadamardRotation(self.layout.head_dim, self.seed)

    def fit(self, vectors: Float[Tensor, "b h n d"]) -> VectorTransform:
        """Freeze the mean (if centring), the rotation, the layout and the reference scale of each head."""
        self._check(vectors)
        mean = self._mean(vectors)
        centred = _centred(vectors, mean)
        if self.transform == "hadamard" or self._has_own_rotation:
            return VectorTransform(self.make_rotation(centred), mean, _reference(centred))
        rotation, variances = PrincipalRotation.fit(centred)
        errors = torch.stack([_expected_error(variances, layout) for layout in self.layouts])
        plans = errors.argmin(0).to("cpu", torch.uint8)
        some = centred[:, :, :: -(-centred.shape[2] // _SAMPLE)]
        return VectorTransform(rotation, mean, _reference(rotation.rotate(some)), plans)

    def _mean(self, vectors: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h 1 d"] | None:
        """Return what is subtracted from every vector; None if nothing is."""
        if not self.center:
            return None
        # Any rounding of the mean is harmless: what is subtracted is what is added back.
        mean = vectors.mean(2, keepdim=True, dtype=torch.float32)
        return mean.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()

    def encode(self, vectors: Float[Tensor, "b h n d"], transform: VectorTransform) -> PackedVectors:
        """Return finite vectors, encoded; see the class for the search."""
        self._check(vectors)
        return impl.encode(self, vectors, transform, self.candidates)

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Float[Tensor, "b h n d"]:
        """Return the vectors as a new float32 tensor."""
        return impl.decode(self, packed, transform)

    @property
    def has_channels(self) -> bool:
        """Whether this class decodes, and not a subclass in its own way."""
        return type(self).decode is E8Codec.decode

    def coded_channels(
        self, packed: PackedVectors, transform: VectorTransform, first_stride: int = 1
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n"]]:
        """Return codewords for channels of unit variance, and scales; ``first_stride`` at most 4."""
        return coded_channels(packed, transform, self.layouts, first_stride)

    def _check(self, vectors: Tensor) -> None:
        if vectors.ndim != 4 or vectors.shape[-1] != self.layout.head_dim:  # noqa: PLR2004 - b h n d
            msg = f"expected [batch, kv_heads, tokens, {self.layout.head_dim}], got shape {tuple(vectors.shape)}"
            raise ShapeError(msg)


def _centred(vectors: Float[Tensor, "b h n d"], mean: Float[Tensor, "b h 1 d"] | None) -> Float[Tensor, "b h n d"]:
    return vectors.float() if mean is None else vectors.float() - mean


def _reference(y: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h 1"]:
    """Return the median of the vectors' scales, so that no outlier moves the grid; 1 for a head of zeros."""
    peak = y.abs().amax(-1, keepdim=True).clamp_min(_TINY)
    norms = (y / peak).square().mean(-1).sqrt() * peak[..., 0]
    reference = norms.median(-1, keepdim=True).values
    return torch.where(reference > 0, reference, 1.0)


def _expected_error(variances: Float[Tensor, "*heads blocks"], layout: CodeLayout) -> Float[Tensor, "*heads"]:
    """Return the squared error per block channel, summed, that Gaussian channels of these variances would have."""
    errors = [DISTORTION[bits] for bits in layout.block_bits]
    distortion = torch.tensor(errors, dtype=torch.float32, device=variances.device)
    return (variances * distortion).sum(-1)
