"""The laws of principal axes: orthogonal, of unit variance, worth their bytes, and each row's own."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.blocks import decode_blocks
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import BLOCK, DISTORTION, CodeLayout, sloped_layouts
from nexusquant_cache.codec.packing import pack, unpack
from nexusquant_cache.codec.rotation import PrincipalRotation
from nexusquant_cache.codec.scale import decode_scales
from nexusquant_cache.codec.tables import decode_rows
from nexusquant_cache.codec.torch.encode import ScaleSearch
from nexusquant_cache.errors import OptionError, ShapeError

HEAD_DIMS = (8, 40, 64, 80, 96, 128, 256)
OCTAVES = (0.0, 3.0, 9.0)  # by which the variance of the heads falls over the channels


def vectors(
    tokens: int, head_dim: int = 64, octaves: tuple[float, ...] = OCTAVES, *, batch: int = 1, seed: int = 0
) -> Tensor:
    """Draw vectors of a few heads, each with its own axes and slope."""
    generator = torch.Generator().manual_seed(seed)
    deviations = 2.0 ** (-0.5 * torch.tensor(octaves)[:, None] * torch.linspace(0, 1, head_dim))
    axes = torch.linalg.qr(torch.randn(batch, len(octaves), head_dim, head_dim, generator=generator)).Q
    return (torch.randn(batch, len(octaves), tokens, head_dim, generator=generator) * deviations[:, None]) @ axes.mT


def codec_of(head_dim: int = 64, bits: float = 2, **options: object) -> E8Codec:
    return E8Codec(CodeLayout.flat(head_dim, bits), **({"transform": "principal"} | options))


def round_trip(codec: E8Codec, x: Tensor) -> Tensor:
    transform = codec.fit(x)
    return codec.decode(codec.encode(x, transform), transform)


def relative_error(x: Tensor, decoded: Tensor) -> float:
    return float((x.double() - decoded.double()).square().sum() / x.double().square().sum())


def decibels(ratio: float) -> float:
    return 10 * math.log10(ratio)


def assert_same(a: PackedVectors, b: PackedVectors) -> None:
    assert torch.equal(a.words, b.words)
    assert torch.equal(a.scales, b.scales)


class TestRotation:
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_axes_are_orthogonal(self, head_dim) -> None:
        """To the precision of int8: entries are off by half a step, some 0.3 percent of the axis together."""
        rotation, _ = PrincipalRotation.fit(vectors(1000, head_dim))
        units = rotation.basis.double() / rotation.basis.double().norm(dim=-1, keepdim=True)
        off = units @ units.mT - torch.eye(head_dim)
        assert off.abs().max() < 0.012

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_unrotate_inverts_rotate(self, head_dim) -> None:
        """To 40 dB, a hundredth of the error of 4 bits."""
        x = vectors(1000, head_dim)
        rotation, _ = PrincipalRotation.fit(x)
        assert relative_error(x, rotation.unrotate(rotation.rotate(x))) < 3e-4

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_channels_have_unit_variance(self, head_dim) -> None:
        """On the vectors they were fitted to; what the rounding of other axes spills over is most in the last block."""
        x = vectors(1000, head_dim, (0.0, 3.0))
        rotation, variances = PrincipalRotation.fit(x)
        squares = rotation.rotate(x).square().mean(2)
        assert (squares - 1).abs().max() < 0.05
        assert (variances.diff(dim=-1) <= 0).all()

    def test_variances_are_those_of_the_blocks(self) -> None:
        """Relative to each other, since a head's largest channel is their unit."""
        x = torch.randn(1, 1, 5000, 16) * torch.tensor([4.0] * 8 + [1.0] * 8)
        rotation, variances = PrincipalRotation.fit(x)
        assert float(variances[0, 0, 0] / variances[0, 0, 1]) == pytest.approx(16, rel=0.05)
        torch.testing.assert_close(rotation.block_variances, variances / variances[..., :1], rtol=0.02, atol=0)

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_axes_and_adjoint_are_the_rotation(self, head_dim) -> None:
        """What is decoded is the sum of the axes, each times its channel; the adjoint is the product with each axis."""
        x = vectors(50, head_dim)
        rotation, _ = PrincipalRotation.fit(x)
        axes, step = rotation.axes(x.device)
        matrix = axes.double() * step[..., None].double()
        torch.testing.assert_close(rotation.unrotate(x).double(), x.double() @ matrix, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rotation.adjoint(x).double(), x.double() @ matrix.mT, rtol=1e-4, atol=1e-4)

    def test_holds_one_byte_per_number(self) -> None:
        rotation, _ = PrincipalRotation.fit(vectors(100))
        assert rotation.basis.dtype == torch.int8
        assert (rotation.basis.nbytes, rotation.step.nbytes) == (3 * 64 * 64, 3 * 64 * 4)


class TestOneVectorAtATime:
    @given(st.lists(st.sampled_from([1, 7, 63, 65]), min_size=1, max_size=4), st.sampled_from([0.5, 1.75, 2.625, 4]))
    def test_encoding_a_concatenation(self, lengths, bits) -> None:
        """encode(cat(x)) = cat(encode(x)), bit for bit, and decode(cat(c)) = cat(decode(c)) but for rounding."""
        codec = codec_of(bits=bits, center=True)
        x = vectors(sum(lengths), seed=sum(lengths))
        transform = codec.fit(vectors(300))
        parts = [codec.encode(part, transform) for part in x.split(lengths, 2)]
        together = codec.encode(x, transform)
        assert_same(together, PackedVectors.cat(parts))
        decoded = torch.cat([codec.decode(part, transform) for part in parts], 2)
        torch.testing.assert_close(codec.decode(together, transform), decoded, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("tokens", [300, 10])
    @pytest.mark.parametrize("head_dim", [8, 40, 64, 128])
    def test_a_row_alone_is_the_row_in_a_batch(self, head_dim, tokens) -> None:
        """Axes, plans and words, bit for bit, whatever the others are like."""
        codec = codec_of(head_dim, 2.25 if head_dim > BLOCK else 2, center=True)
        x = vectors(tokens, head_dim, (6.0, 12.0), batch=3) * torch.tensor([1.0, 1e3, 1e-3]).view(3, 1, 1, 1)
        together = codec.fit(x)
        packed = codec.encode(x, together)
        for row in range(3):
            alone = codec.fit(x[row : row + 1].clone())
            for name in ("basis", "step"):
                assert torch.equal(getattr(alone.rotation, name)[0], getattr(together.rotation, name)[row])
            assert alone.plans is not None
            assert together.plans is not None
            assert torch.equal(alone.plans[0], together.plans[row])
            assert_same(
                codec.encode(x[row : row + 1], alone), packed.map(lambda tensor, row=row: tensor[row : row + 1])
            )

    def test_map_follows_the_batch(self) -> None:
        codec = codec_of(center=True)
        x = vectors(200, batch=3)
        transform = codec.fit(x)
        packed = codec.encode(x, transform)
        rows = torch.tensor([2, 0, 0, 1])

        def reorder(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, rows)

        decoded = codec.decode(packed.map(reorder), transform.map_batch(reorder))
        torch.testing.assert_close(decoded, reorder(codec.decode(packed, transform)), rtol=1e-5, atol=1e-6)
        assert_same(codec.encode(reorder(x), transform.map_batch(reorder)), packed.map(reorder))

    def test_fit_does_not_depend_on_memory_order(self) -> None:
        codec = codec_of()
        x = vectors(300, batch=2)
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert_same(codec.encode(turned, codec.fit(turned)), codec.encode(x, codec.fit(x)))


class TestDecode:
    @pytest.mark.parametrize("bits", [0.5, 1, 1.75, 2.25, 2.625, 3, 4])
    @pytest.mark.parametrize("head_dim", [16, 40, 64, 128])
    def test_is_the_definition(self, head_dim, bits) -> None:
        """Unpack each block of each head by its own plan, add up the axes, multiply by the scale, add the mean."""
        codec = codec_of(head_dim, bits, center=True)
        x = 3 + vectors(600, head_dim, batch=2)
        transform = codec.fit(x)
        packed = codec.encode(x, transform)
        assert transform.plans is not None
        assert transform.mean is not None
        assert isinstance(transform.rotation, PrincipalRotation)
        if 1 < bits < 4 and head_dim == 64:
            assert len(transform.heads_by_plan) > 1  # or else this says little
        axes = transform.rotation.basis.double() * transform.rotation.step
        scales = decode_scales(packed.scales, transform.reference)
        expected = torch.empty(x.shape, dtype=torch.float64)
        for row in range(2):
            for head in range(3):
                layout = codec.layouts[int(transform.plans[row, head])]
                codes = unpack(packed.words[row, head], layout)
                blocks = [
                    decode_blocks(code, rate) if rate else torch.zeros(600, BLOCK)
                    for code, rate in zip(codes.unbind(-1), layout.block_bits, strict=True)
                ]
                y = torch.cat(blocks, -1).double() @ axes[row, head]
                expected[row, head] = y * scales[row, head, :, None] + transform.mean[row, head]
        torch.testing.assert_close(codec.decode(packed, transform).double(), expected, rtol=1e-5, atol=1e-5)

    def test_words_have_one_size_for_all_heads(self) -> None:
        codec = codec_of(bits=2.25)
        transform = codec.fit(vectors(500))
        packed = codec.encode(vectors(500), transform)
        assert len(transform.heads_by_plan) > 1
        assert packed.words.shape == (1, 3, 500, 18)
        assert codec.bytes_per_vector == 19
        assert packed.words.nbytes + packed.scales.nbytes == 3 * 500 * codec.bytes_per_vector


class TestError:
    @pytest.mark.parametrize("bits", [1, 1.75, 2.25, 3])
    @pytest.mark.parametrize("octaves", [4.0, 8.0, 14.0])
    def test_gains_what_the_variances_promise(self, bits, octaves) -> None:
        """Within 0.5 dB of the distortion of the best plan over that of the flat one at the mean variance."""
        x = vectors(2000, 64, (octaves,))
        variances = 2.0 ** (-octaves * torch.linspace(0, 1, 64)).view(-1, BLOCK).mean(-1)

        def error(plan: CodeLayout, variances: Tensor) -> float:
            return float((variances * torch.tensor([DISTORTION[b] for b in plan.block_bits])).sum())

        flat = CodeLayout.flat(64, bits)
        best = min(error(plan, variances) for plan in sloped_layouts(64, flat.bytes_per_vector))
        promised = error(flat, variances.mean().expand(8)) / best
        measured = [
            relative_error(x, round_trip(codec_of(64, bits, transform=t), x)) for t in ("hadamard", "principal")
        ]
        assert promised > 1.05
        assert decibels(measured[0] / measured[1]) > decibels(promised) - 0.5

    @pytest.mark.parametrize("bits", [1, 2, 2.625, 4])
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_is_hardly_worse_where_there_is_nothing_to_gain(self, head_dim, bits) -> None:
        """White vectors cost less than 1 dB, on tokens that the axes were not fitted to.

        With 16 tokens for each channel: variances of fewer tokens seem to differ where they do not.
        """
        fitted_tokens = 16 * head_dim
        x = torch.randn(1, 1, fitted_tokens + 300, head_dim)
        errors = []
        for transform in ("hadamard", "principal"):
            codec = codec_of(head_dim, bits, transform=transform)
            fitted, later = codec.fit(x[:, :, :fitted_tokens]), x[:, :, fitted_tokens:]
            errors.append(relative_error(later, codec.decode(codec.encode(later, fitted), fitted)))
        assert decibels(errors[1] / errors[0]) < 1

    @pytest.mark.parametrize("size", [1e30, 1e-30])
    def test_is_relative(self, size) -> None:
        """Huge and tiny vectors, whose squares are no float32 numbers, choose the same plans and words."""
        codec, x = codec_of(center=False), vectors(300)
        transform, scaled = codec.fit(x), codec.fit(size * x)
        assert transform.plans is not None
        assert scaled.plans is not None
        assert torch.equal(scaled.plans, transform.plans)
        assert len(transform.heads_by_plan) > 1
        error = relative_error(x, round_trip(codec, x))
        assert relative_error(size * x, codec.decode(codec.encode(size * x, scaled), scaled)) < 1.01 * error

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_encoded_as_its_float32_value(self, dtype) -> None:
        codec, x = codec_of(bits=2.25, center=True), (5 + vectors(200)).to(dtype)
        transform = codec.fit(x)
        assert_same(codec.encode(x, transform), codec.encode(x.float(), codec.fit(x.float())))
        assert relative_error(x.float() - 5, codec.decode(codec.encode(x, transform), transform) - 5) < 0.12

    def test_fewer_tokens_than_channels(self) -> None:
        """They span a few axes, which get all bits."""
        x = torch.randn(1, 2, 10, 64)
        assert relative_error(x, round_trip(codec_of(), x)) < 0.03

    @pytest.mark.parametrize("center", [False, True])
    def test_one_token(self, center) -> None:
        x = torch.randn(2, 2, 1, 64)
        assert relative_error(x, round_trip(codec_of(center=center), x)) < 0.05

    @pytest.mark.parametrize("center", [False, True])
    def test_channels_that_never_change(self, center) -> None:
        x = vectors(300, octaves=(0.0,))
        x[..., 10:30] = 7
        errors = [
            relative_error(x, round_trip(codec_of(center=center, transform=t), x)) for t in ("principal", "hadamard")
        ]
        assert errors[0] < errors[1]

    def test_zeros_decode_to_zeros(self) -> None:
        codec, x = codec_of(), vectors(200)
        x[:, :, 7] = 0
        x[:, 1] = 0
        decoded = round_trip(codec, x)
        assert decoded[:, :, 7].abs().max() == 0
        assert decoded[:, 1].abs().max() == 0

    def test_a_head_of_zeros_can_come_to_life(self) -> None:
        """Nothing is known of its axes then, so any will do as well as a Hadamard matrix."""
        codec = codec_of()
        x = vectors(200, octaves=(2.0, 0.0))
        x[:, 1] = 0
        transform = codec.fit(x)
        later = torch.randn(1, 2, 200, 64)
        decoded = codec.decode(codec.encode(later, transform), transform)
        assert relative_error(later[:, 1], decoded[:, 1]) < 1.2 * DISTORTION[2]

    def test_norms_are_those_of_vectors(self) -> None:
        """What is kept is the norm of the vector, in which channels count as much as the axes are long."""
        layout = CodeLayout(32, (4, 2, 1, 0))
        weights = torch.tensor([1.0, 0.2, 0.05, 0.01])[:, None].expand(-1, 100)
        y = torch.randn(32, 100)
        codes, scales = ScaleSearch(layout, weights).encode(y, (0.92, 1.1))
        q = decode_rows(pack(codes, layout), layout).T

        def norm(x: Tensor) -> Tensor:
            return (x.square().view(4, BLOCK, -1).sum(1) * weights)[:3].sum(0).sqrt()

        torch.testing.assert_close(norm(scales * q), norm(y))
        assert not torch.equal(ScaleSearch(layout, None).encode(y, (0.92, 1.1))[1], scales)


AXES = 64 * (64 + 4)  # bytes that axes of 64 channels take


class TestForTokens:
    """Which transform a layer gets that begins with vectors like these."""

    @staticmethod
    def saved(codec: E8Codec, x: Tensor) -> float:
        """Return how many more bits a Hadamard rotation gets, in the place of axes that do not pay."""
        chosen = codec.for_tokens(x, 0)
        assert chosen.transform == "hadamard"
        return chosen.layout.bits_per_channel - codec.layout.bits_per_channel

    @pytest.mark.parametrize("octaves", [3.5, 6.0])
    def test_takes_axes_where_they_pay(self, octaves) -> None:
        codec = codec_of(bits=2, transform="auto", center=True)
        x = vectors(2000, octaves=(octaves,))
        most, least = (self.saved(codec, x) + rounding for rounding in (1 / 16, -1 / 16))  # bits come in eighths
        assert codec.for_tokens(x, math.ceil(AXES / (8 * least))) == replace(codec, transform="principal")
        assert codec.for_tokens(x, int(AXES / (8 * most))).transform == "hadamard"

    @pytest.mark.parametrize(("octaves", "bits"), [(3.0, 2), (4.5, 2), (4.5, 3), (9.0, 2.25)])
    @pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
    def test_the_choices_are_as_good_as_each_other(self, octaves, bits, scale) -> None:
        x = scale * vectors(3000, octaves=(octaves,))
        codec = codec_of(bits=bits, transform="auto")
        few, many = (round_trip(codec.for_tokens(x, count), x) for count in (1, 3000))
        assert abs(decibels(relative_error(x, few) / relative_error(x, many))) < 0.8

    @pytest.mark.parametrize(("tokens", "off"), [(100, 0.25), (200, 0.25), (400, 0.125), (3000, 0.125)])
    @pytest.mark.parametrize("octaves", [3.0, 6.0])
    def test_what_axes_save_is_half_the_logarithm_of_the_mean_over_the_geometric_mean(
        self, tokens, off, octaves
    ) -> None:
        """Whether few tokens show it or many (Huang & Schultheiss 1963)."""
        variances = 2.0 ** (-octaves * torch.linspace(0, 1, 64, dtype=torch.float64))
        expected = float(0.5 * (variances.mean().log2() - variances.log2().mean()))
        found = self.saved(codec_of(bits=2, transform="auto"), vectors(tokens, octaves=(octaves,)))
        assert abs(found - expected) <= off

    def test_heads_count_alike(self) -> None:
        codec = codec_of(bits=2, transform="auto")
        flat, steep, both = (self.saved(codec, vectors(3000, octaves=of)) for of in ((0.0,), (6.0,), (0.0, 6.0)))
        assert flat == 0
        assert abs(both - steep / 2) <= 0.125

    def test_the_row_of_which_most_is_saved_decides(self) -> None:
        codec = codec_of(bits=2, transform="auto")
        flat, steep = (vectors(500, octaves=(octaves,)) for octaves in (0.0, 6.0))
        both, turned = (codec.for_tokens(torch.cat(rows), 1) for rows in ([flat, steep], [steep, flat]))
        assert both == turned == codec.for_tokens(steep, 1) != codec.for_tokens(flat, 1)

    def test_wrong_channels_are_refused(self) -> None:
        with pytest.raises(ShapeError):
            codec_of(bits=2, transform="auto").for_tokens(vectors(9, 32), 1)

    def test_where_nearly_nothing_would_pay_nobody_looks(self) -> None:
        codec, nothing = codec_of(bits=2, transform="auto"), vectors(0)
        assert codec.for_tokens(nothing, math.ceil(AXES / 0.8)).transform == "principal"

    @pytest.mark.parametrize("x", [*map(vectors, (0, 1, 2, 15)), torch.zeros(1, 2, 50, 64), torch.ones(1, 2, 50, 64)])
    def test_where_there_is_nothing_to_see_axes_save_nothing(self, x) -> None:
        codec = codec_of(bits=2, transform="auto", center=True)
        assert codec.for_tokens(x, 1) == replace(codec, transform="hadamard")

    def test_four_bits_are_the_most(self) -> None:
        codec = codec_of(bits=3.75, transform="auto")
        assert codec.for_tokens(vectors(100), 1).layout == CodeLayout.uniform(64, 4)

    @pytest.mark.parametrize("transform", ["principal", "hadamard"])
    def test_a_choice_that_is_made_stays(self, transform) -> None:
        codec = codec_of(transform=transform)
        assert codec.for_tokens(vectors(9), 1) is codec.for_tokens(vectors(9), 10**6) is codec

    def test_without_it_auto_has_axes(self) -> None:
        x = vectors(100)
        auto, principal = codec_of(transform="auto"), codec_of()
        assert_same(auto.encode(x, auto.fit(x)), principal.encode(x, principal.fit(x)))


class TestCodec:
    def test_layouts(self) -> None:
        layout = CodeLayout.flat(64, 2)
        assert E8Codec(layout).layouts == (layout,)
        assert codec_of().layouts == sloped_layouts(64, 16)
        steep = CodeLayout(16, (1, 3))
        assert E8Codec(steep, transform="auto").layouts == (steep, *sloped_layouts(16, 4))

    def test_with_more_bits(self) -> None:
        codec = codec_of(bits=2.25, center=True, seed=3)
        more = codec.with_more_bits()
        assert more == replace(codec, layout=CodeLayout.flat(64, 3.25))
        assert more is not None
        most = more.with_more_bits()
        assert most == replace(codec, layout=CodeLayout.flat(64, 4))
        assert most is not None
        assert most.with_more_bits() is None

    @pytest.mark.usefixtures("unchecked")
    def test_refuses_other_transforms(self) -> None:
        with pytest.raises(OptionError, match=r"unknown transform 'principals'\. Did you mean 'principal'\?"):
            E8Codec(CodeLayout.uniform(64, 2), transform="principals")

    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    def test_no_tokens(self, bits) -> None:
        codec = codec_of(bits=bits)
        transform = codec.fit(vectors(20))
        packed = codec.encode(torch.zeros(1, 3, 0, 64), transform)
        assert packed.words.shape == (1, 3, 0, 8 * bits)
        assert codec.decode(packed, transform).shape == (1, 3, 0, 64)
