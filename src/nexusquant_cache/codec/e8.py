"""The E8 codec: rotation, one scale per vector, parity-coset block codes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.blocks import codes_of, nearest
from nexusquant_cache.codec.impl import Impl, are_wanted, distance, is_right, refuse
from nexusquant_cache.codec.layout import BLOCK, DISTORTION, MAX_BITS, CodeLayout, sloped_layouts
from nexusquant_cache.codec.packing import pack
from nexusquant_cache.codec.scale import decode_scales, encode_scales
from nexusquant_cache.codec.tables import covered_stages, decode_heads
from nexusquant_cache.codec.transform import HadamardRotation, PrincipalRotation, Rotation, VectorTransform
from nexusquant_cache.codec.triton import coding as fused
from nexusquant_cache.errors import OptionError, ShapeError, suggest

GainRule = Literal["least_squares", "norm", "unbiased"]
TransformRule = Literal["auto", "principal", "hadamard"]

_MOST_ERROR = 2e-3  # of a kernel relative to plain torch
_MOST_TIES = 0.05  # vectors of which rounding may have decided
_STEP_BYTES = 4  # of each axis, besides one byte for each of its channels
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

    Blocks without bits take part in none of this; products weigh each block as it weighs in the vector.

    Args:
        layout: Bits of every block for channels that are alike, as a Hadamard rotation makes them.
        gain: The gain rule.
        candidates: Scales to try, relative to the root mean square.
        center: Whether `fit` removes the mean over tokens.
        seed: Of the random signs.
        transform: ``"hadamard"`` rotates by a fixed matrix that costs no byte.  ``"principal"`` gives each head the
            principal axes of its own vectors and, of the layouts of equal size (`layout.sloped_layouts`), the one that
            suits their variances.  ``"auto"`` leaves the choice to `for_tokens`; `fit` takes it for ``"principal"``.
        axes_save: Bits per channel that principal axes are expected to save at equal error, for `for_tokens`.
        impl: ``"triton"`` encodes and decodes by kernels, ``"torch"`` never does, ``"auto"`` does where a GPU has them.

    Raises:
        OptionError: If the gain rule, the transform or ``impl`` is unknown or a candidate is not positive.
    """

    layout: CodeLayout
    gain: GainRule = "norm"
    candidates: tuple[float, ...] = (0.92, 1.1)
    center: bool = False
    seed: int = 0
    transform: TransformRule = "hadamard"
    axes_save: float = 0.5
    impl: Impl = field(default="auto", compare=False)  # the codes are the same

    def __post_init__(self) -> None:
        """Check the options."""
        for what, given, known in (
            ("gain rule", self.gain, get_args(GainRule)),
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
        """Packed codes and one byte of scale."""
        return self.layout.bytes_per_vector + 1

    def for_tokens(self, tokens: int) -> "E8Codec":
        """Choose between the transforms, if that is left open: whichever takes fewer bytes at equal error.

        Principal axes cost a matrix, a Hadamard rotation costs `axes_save` bits in every channel of every token.
        """
        if self.transform != "auto" or self._has_own_rotation:
            return self
        head_dim = self.layout.head_dim
        axes = head_dim * (head_dim + _STEP_BYTES)
        if tokens * head_dim / 8 * self.axes_save >= axes:
            return replace(self, transform="principal")
        bits = min(self.layout.bits_per_channel + self.axes_save, MAX_BITS)
        return replace(self, transform="hadamard", layout=CodeLayout.flat(head_dim, bits))

    @property
    def _has_own_rotation(self) -> bool:
        """Whether a subclass brings a rotation of its own, which then goes before any transform."""
        return type(self).make_rotation is not E8Codec.make_rotation

    def with_more_bits(self) -> "E8Codec | None":
        """Return the same codec at one more bit per channel, at most 4; None if it has 4."""
        bits = min(self.layout.bits_per_channel + 1, MAX_BITS)
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
        mean = None
        if self.center:
            # Any rounding of the mean is harmless: what is subtracted is what is added back.
            mean = vectors.mean(2, keepdim=True, dtype=torch.float32)
            mean = mean.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()
        centred = vectors.float() if mean is None else vectors.float() - mean
        if self.transform == "hadamard" or self._has_own_rotation:
            return VectorTransform(self.make_rotation(centred), mean, _reference(centred))
        rotation, variances = PrincipalRotation.fit(centred)
        errors = torch.stack([_expected_error(variances, layout) for layout in self.layouts])
        plans = errors.argmin(0).to("cpu", torch.uint8)
        return VectorTransform(rotation, mean, _reference(rotation.rotate(centred)), plans)

    def encode(self, vectors: Float[Tensor, "b h n d"], transform: VectorTransform) -> PackedVectors:
        """Return the codes of finite vectors; see the class for the search."""
        self._check(vectors)
        if self.uses_kernels(transform):
            packed = fused.encode(vectors, transform, self.layouts, self.candidates, self.gain)
            if self._is_right("encode", transform, vectors, lambda: self._compare_codes(vectors, packed, transform)):
                return packed
        return self._encode(vectors, transform)

    def _encode(self, vectors: Float[Tensor, "b h n d"], transform: VectorTransform) -> PackedVectors:
        batch, heads, tokens, head_dim = vectors.shape
        y = transform.forward(vectors)
        if transform.heads_by_plan:
            return self._encode_by_plan(y.flatten(0, 1), transform)
        words, gains = self._encode_rows(y.reshape(-1, head_dim).T, self.layout, None)
        words, gains = words.view(batch, heads, tokens, words.shape[1]), gains.view(batch, heads, tokens)
        return PackedVectors(words, encode_scales(gains, transform.reference))

    def _encode_by_plan(self, y: Float[Tensor, "bh n d"], transform: VectorTransform) -> PackedVectors:
        """Encode the heads of each layout together."""
        tokens, head_dim = y.shape[1:]
        weights = transform.rotation.block_variances
        words = torch.empty(len(y), tokens, self.layout.bytes_per_vector, dtype=torch.uint8, device=y.device)
        gains = y.new_empty(len(y), tokens)
        for plan, members in transform.heads_by_plan.items():
            weight = None
            if weights is not None:
                weight = weights.flatten(0, 1)[members].repeat_interleave(tokens, 0).T
            rows = y[members].reshape(-1, head_dim).T
            part, gain = self._encode_rows(rows, self.layouts[plan], weight)
            words[members], gains[members] = part.view(len(members), *words.shape[1:]), gain.view(len(members), tokens)
        shape = transform.reference.shape[:2]
        scales = encode_scales(gains.unflatten(0, shape), transform.reference)
        return PackedVectors(words.unflatten(0, shape), scales)

    def _encode_rows(
        self, channels: Float[Tensor, "d rows"], layout: CodeLayout, weights: Float[Tensor, "blocks rows"] | None
    ) -> tuple[UInt8[Tensor, "rows bytes"], Float[Tensor, "rows"]]:
        """Return words and gains of channel-major vectors, a chunk at a time."""
        words, gains = [], []
        for start in range(0, max(channels.shape[1], 1), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            search = _ScaleSearch(layout, None if weights is None else weights[:, chunk])
            codes, gain = search.encode(channels[:, chunk].contiguous(), self.candidates, self.gain)
            words.append(pack(codes, layout))
            gains.append(gain)
        return torch.cat(words), torch.cat(gains)

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Float[Tensor, "b h n d"]:
        """Return the vectors of the codes as a new float32 tensor."""
        if self.uses_kernels(transform):
            vectors = fused.decode(packed, transform, self.layouts)
            if self._is_right("decode", transform, vectors, lambda: distance(vectors, self._decode(packed, transform))):
                return vectors
        return self._decode(packed, transform)

    def _decode(self, packed: PackedVectors, transform: VectorTransform) -> Float[Tensor, "b h n d"]:
        done = covered_stages(transform.rotation.first_stride)
        return transform.inverse(*self.coded_channels(packed, transform, done), done)

    def uses_kernels(self, transform: VectorTransform) -> bool:
        """Tell whether vectors with this transform are for kernels.

        Raises:
            UnsupportedError: If `impl` insists on them and they cannot be used.
        """
        if not are_wanted(self.impl, transform.reference.device):
            return False
        reason = fused.why_not(self.layouts, transform)
        if reason is not None:
            refuse(self.impl, reason)
        return reason is None

    def _is_right(self, what: str, transform: VectorTransform, vectors: Tensor, error: Callable[[], float]) -> bool:
        """Tell whether kernels do the same as plain torch; see `support.is_right`."""
        if not vectors.numel():
            return True
        plan = transform.side_plan(self.layouts)
        assert plan is not None
        key = (what, vectors.device, vectors.dtype, self.layout.head_dim, plan.rates, plan.row_bytes % 2, self.gain)
        return is_right(self.impl, key, error, _MOST_ERROR)

    def _compare_codes(self, vectors: Tensor, packed: PackedVectors, transform: VectorTransform) -> float:
        """Return by how much the codes of a kernel are worse than those of plain torch, or further from them."""
        expected = self._encode(vectors, transform)
        found, plain = (self._decode(each, transform) for each in (packed, expected))
        worse = distance(found, vectors.float()) - distance(plain, vectors.float())
        # Where two codes are equally near, rounding decides: a few vectors may differ, and then as a whole.
        differ = (packed.words != expected.words).any(-1).float().mean()
        return max(worse, float(differ) - _MOST_TIES)

    @property
    def has_channels(self) -> bool:
        """Whether this class decodes, and not a subclass in its own way."""
        return type(self).decode is E8Codec.decode

    def coded_channels(
        self, packed: PackedVectors, transform: VectorTransform, first_stride: int = 1
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n"]]:
        """Return codewords for channels of unit variance, and scales; ``first_stride`` at most 4."""
        shape = packed.scales.shape
        scales = decode_scales(packed.scales, transform.reference)
        heads = shape[0] * shape[1]
        y = decode_heads(
            packed.words.flatten(0, 1), self.layouts, transform.plan_of_heads or (0,) * heads, first_stride
        )
        return y.view(*shape, self.layout.head_dim), scales

    def _check(self, vectors: Tensor) -> None:
        if vectors.ndim != 4 or vectors.shape[-1] != self.layout.head_dim:  # noqa: PLR2004 - b h n d
            msg = f"expected [batch, kv_heads, tokens, {self.layout.head_dim}], got shape {tuple(vectors.shape)}"
            raise ShapeError(msg)


@dataclass(frozen=True)
class _ScaleSearch:
    """The search for the scale of each vector: one layout, channel-major vectors.

    ``weights`` says how much each block of each vector weighs in products; None if all weigh alike.
    """

    layout: CodeLayout
    weights: Float[Tensor, "blocks rows"] | None

    def encode(
        self, y: Float[Tensor, "d rows"], candidates: tuple[float, ...], gain: GainRule
    ) -> tuple[Int[Tensor, "rows blocks"], Float[Tensor, "rows"]]:
        """Return codes and gains."""
        # Divided by its largest channel first: no square of a finite vector overflows.
        peak = y.abs().amax(0).clamp_min(_TINY)
        y = y / peak
        coded = sum(bits > 0 for bits in self.layout.block_bits)
        square = self._by_block(y.square())
        rms = (_row_sum(square) / max(coded * BLOCK, 1)).sqrt()
        power = self._weighted(square)
        inverse = torch.where(rms > 0, 1 / rms, 0.0)
        best = self._try(y, inverse / candidates[0])
        for candidate in candidates[1:]:
            other = self._try(y, inverse / candidate)
            better = other[0] > best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(other, best, strict=True))
        _, inner, norm, choices = best
        return self._codes(choices), _gain(gain, power, inner, norm) * peak

    def _try(self, y: Float[Tensor, "d rows"], scale: Float[Tensor, "rows"]) -> tuple[Tensor, ...]:
        """Return fit, inner product, squared norm and choices of the nearest codewords at this scale.

        The error at the best gain is ``<y,y> - <y,q>^2 / <q,q>``: the best fit has the largest quotient.
        """
        blocks = (y * scale).view(self.layout.blocks, BLOCK, -1)
        q, choices = torch.zeros_like(blocks), torch.zeros_like(blocks, dtype=torch.uint8)
        for bits, index in self._rates():
            q[index], choices[index] = nearest(blocks[index], bits)
        q = q.view(y.shape)
        inner, norm = self._weighted(self._by_block(y * q)), self._weighted(self._by_block(q.square()))
        fit = inner.square() / norm.clamp_min(_TINY)
        return fit, inner, norm, choices

    def _by_block(self, products: Float[Tensor, "d rows"]) -> Float[Tensor, "blocks rows"]:
        """Return the sum over the channels of each block; nothing for blocks without bits."""
        sums = _row_sum(products.view(self.layout.blocks, BLOCK, -1).transpose(0, 1))
        if 0 in self.layout.block_bits:
            coded = [[float(bits > 0)] for bits in self.layout.block_bits]
            sums = sums * torch.tensor(coded, dtype=torch.float32, device=sums.device)
        return sums

    def _weighted(self, by_block: Float[Tensor, "blocks rows"]) -> Float[Tensor, "rows"]:
        return _row_sum(by_block if self.weights is None else by_block * self.weights)

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


def _gain(rule: GainRule, power: Tensor, inner: Tensor, norm: Tensor) -> Tensor:
    norm, inner = norm.clamp_min(_TINY), inner.clamp_min(_TINY)
    if rule == "least_squares":
        gain = inner / norm
    elif rule == "norm":
        gain = (power / norm).sqrt()
    else:
        gain = power / inner
    return torch.where(power > 0, gain, 0.0)


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


def _row_sum(x: Float[Tensor, "d *rows"]) -> Float[Tensor, "*rows"]:
    """Sum over channels, by halves: the order does not depend on how many rows there are."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        rest = x[2 * half :]
        x = x[:half] + x[half : 2 * half]
        if rest.shape[0]:
            x = torch.cat([x, rest])
    return x[0]
