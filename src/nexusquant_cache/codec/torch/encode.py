"""Encoding in plain torch: what every other implementation is compared with."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.blocks import codes_of, nearest
from nexusquant_cache.codec.layout import BLOCK, CodeLayout
from nexusquant_cache.codec.packing import pack
from nexusquant_cache.codec.scale import encode_scales
from nexusquant_cache.codec.transform import VectorTransform

_CHUNK = 4096  # vectors encoded together: their temporaries stay in the cache of a core
_TINY = torch.finfo(torch.float32).tiny


def encode(
    vectors: Float[Tensor, "b h n d"],
    transform: VectorTransform,
    layouts: tuple[CodeLayout, ...],
    candidates: tuple[float, ...],
) -> PackedVectors:
    """Return finite vectors, encoded; the search for scales is that of `codec.e8.E8Codec`.

    Args:
        vectors: Keys or values.
        transform: What they share.
        layouts: Layouts of one size; `VectorTransform.plans` says which of them each head has.
        candidates: Scales to try, relative to the root mean square.
    """
    batch, heads, tokens, head_dim = vectors.shape
    y = transform.forward(vectors)
    if transform.heads_by_plan:
        return _encode_by_plan(y.flatten(0, 1), transform, layouts, candidates)
    words, scales = _encode_rows(y.reshape(-1, head_dim).T, layouts[0], None, candidates)
    words, scales = words.view(batch, heads, tokens, words.shape[1]), scales.view(batch, heads, tokens)
    return PackedVectors(words, encode_scales(scales, transform.reference))


def _encode_by_plan(
    y: Float[Tensor, "bh n d"],
    transform: VectorTransform,
    layouts: tuple[CodeLayout, ...],
    candidates: tuple[float, ...],
) -> PackedVectors:
    """Encode the heads of each layout together."""
    tokens, head_dim = y.shape[1:]
    weights = transform.rotation.block_variances
    words = torch.empty(len(y), tokens, layouts[0].bytes_per_vector, dtype=torch.uint8, device=y.device)
    scales = y.new_empty(len(y), tokens)
    for plan, members in transform.heads_by_plan.items():
        weight = None
        if weights is not None:
            weight = weights.flatten(0, 1)[members].repeat_interleave(tokens, 0).T
        rows = y[members].reshape(-1, head_dim).T
        part, scale = _encode_rows(rows, layouts[plan], weight, candidates)
        words[members], scales[members] = part.view(len(members), *words.shape[1:]), scale.view(len(members), tokens)
    shape = transform.reference.shape[:2]
    return PackedVectors(words.unflatten(0, shape), encode_scales(scales.unflatten(0, shape), transform.reference))


def _encode_rows(
    channels: Float[Tensor, "d rows"],
    layout: CodeLayout,
    weights: Float[Tensor, "blocks rows"] | None,
    candidates: tuple[float, ...],
) -> tuple[UInt8[Tensor, "rows bytes"], Float[Tensor, "rows"]]:
    """Return words and scales of channel-major vectors, a chunk at a time."""
    words, scales = [], []
    for start in range(0, max(channels.shape[1], 1), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        search = ScaleSearch(layout, None if weights is None else weights[:, chunk])
        codes, scale = search.encode(channels[:, chunk].contiguous(), candidates)
        words.append(pack(codes, layout))
        scales.append(scale)
    return torch.cat(words), torch.cat(scales)


@dataclass(frozen=True)
class ScaleSearch:
    """The search for the scale of each vector: one layout, channel-major vectors.

    ``weights`` says how much each block of each vector weighs in products; None if all weigh alike.
    """

    layout: CodeLayout
    weights: Float[Tensor, "blocks rows"] | None

    def encode(
        self, y: Float[Tensor, "d rows"], candidates: tuple[float, ...]
    ) -> tuple[Int[Tensor, "rows blocks"], Float[Tensor, "rows"]]:
        """Return codes, and the scales that keep the norms of the vectors."""
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
        _, norm, choices = best
        scales = torch.where(power > 0, (power / norm.clamp_min(_TINY)).sqrt(), 0.0)
        return self._codes(choices), scales * peak

    def _try(self, y: Float[Tensor, "d rows"], scale: Float[Tensor, "rows"]) -> tuple[Tensor, ...]:
        """Return fit, squared norm and choices of the nearest codewords, when vectors are multiplied by ``scale``.

        At the factor of ``q`` that suits it best, the error is ``<y,y> - <y,q>^2 / <q,q>``: the best fit has the
        largest quotient.
        """
        blocks = (y * scale).view(self.layout.blocks, BLOCK, -1)
        q, choices = torch.zeros_like(blocks), torch.zeros_like(blocks, dtype=torch.uint8)
        for bits, index in self._rates():
            q[index], choices[index] = nearest(blocks[index], bits)
        q = q.view(y.shape)
        inner, norm = self._weighted(self._by_block(y * q)), self._weighted(self._by_block(q.square()))
        fit = inner.square() / norm.clamp_min(_TINY)
        return fit, norm, choices

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


def _row_sum(x: Float[Tensor, "d *rows"]) -> Float[Tensor, "*rows"]:
    """Sum over channels, by halves: the order does not depend on how many rows there are."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        rest = x[2 * half :]
        x = x[:half] + x[half : 2 * half]
        if rest.shape[0]:
            x = torch.cat([x, rest])
    return x[0]
