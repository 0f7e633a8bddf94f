"""The laws of the E8 codec: each vector on its own, small errors, norms that are kept."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

import strategies
from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import BLOCK, CodeLayout
from nexusquant_cache.codec.packing import pack
from nexusquant_cache.codec.rotation import HadamardRotation
from nexusquant_cache.codec.scale import STEPS_PER_OCTAVE
from nexusquant_cache.codec.tables import decode_rows
from nexusquant_cache.codec.torch import encode as plain
from nexusquant_cache.codec.torch.encode import ScaleSearch
from nexusquant_cache.codec.transform import Rotation, VectorTransform
from nexusquant_cache.errors import OptionError, ShapeError

BITS = (1, 2, 3, 4)
# Of N(0, 1), per channel: what is the least error e at the best scale becomes a little more where the norm is kept.
DISTORTION = {bits: 2 - 2 * (1 - e) ** 0.5 for bits, e in {1: 0.35, 2: 0.100, 3: 0.028, 4: 0.0075}.items()}
COMMON = (32, 64, 80, 96, 128, 192, 256)
SCALE_ERROR = 2 ** (0.5 / STEPS_PER_OCTAVE) - 1  # largest relative error of a stored scale
EPS = torch.finfo(torch.float32).eps


@st.composite
def codecs(draw: st.DrawFn) -> Callable[[], E8Codec]:
    """Draw how to build a codec; see `strategies.layout_of` for why not the codec itself."""
    plan = draw(strategies.bit_plans(max_blocks=6).filter(any))
    candidates = draw(st.sampled_from([(1.0,), (0.92, 1.04), (0.9, 0.97, 1.05, 1.2)]))
    center, seed = draw(st.booleans()), draw(st.integers(0, 99))
    return lambda: E8Codec(strategies.layout_of(plan), candidates, center, seed)


def round_trip(codec: E8Codec, x: Tensor, transform: VectorTransform | None = None) -> Tensor:
    transform = codec.fit(x) if transform is None else transform
    return codec.decode(codec.encode(x, transform), transform)


def relative_error(x: Tensor, decoded: Tensor) -> float:
    return float((x.double() - decoded.double()).square().sum() / x.double().square().sum())


def assert_same(a: PackedVectors, b: PackedVectors) -> None:
    assert torch.equal(a.words, b.words)
    assert torch.equal(a.scales, b.scales)


class TestOneVectorAtATime:
    @given(codecs(), st.lists(st.sampled_from([1, 7, 63, 65]), min_size=1, max_size=4), st.data())
    def test_encoding_a_concatenation(self, make, lengths, data) -> None:
        """encode(cat(x)) = cat(encode(x)) and decode(cat(c)) = cat(decode(c)), bit for bit."""
        codec = make()
        x = data.draw(strategies.normal(1, 2, sum(lengths), codec.layout.head_dim))
        transform = codec.fit(x)
        parts = [codec.encode(part, transform) for part in x.split(lengths, 2)]
        together = codec.encode(x, transform)
        assert_same(together, PackedVectors.cat(parts))
        decoded = torch.cat([codec.decode(part, transform) for part in parts], 2)
        assert torch.equal(codec.decode(together, transform), decoded)

    @pytest.mark.parametrize("head_dim", COMMON)
    @pytest.mark.parametrize("bits", BITS)
    def test_ragged_lengths_at_the_head_dims_of_models(self, bits, head_dim) -> None:
        """The same for 1, 7, 63, 65 and 1000 tokens."""
        codec = E8Codec(CodeLayout.uniform(head_dim, bits), candidates=(0.95, 1.05), center=True)
        lengths = list(strategies.RAGGED_ROWS)
        x = 3 + torch.randn(1, 1, sum(lengths), head_dim)
        transform = codec.fit(x[:, :, :200])
        parts = [codec.encode(part, transform) for part in x.split(lengths, 2)]
        together = codec.encode(x, transform)
        assert_same(together, PackedVectors.cat(parts))
        decoded = torch.cat([codec.decode(part, transform) for part in parts], 2)
        assert torch.equal(codec.decode(together, transform), decoded)

    def test_chunks_of_the_encoder_do_not_show(self, monkeypatch) -> None:
        codec = E8Codec(CodeLayout.uniform(80, 2))
        x = torch.randn(1, 3, 100, 80)
        transform = codec.fit(x)
        whole = codec.encode(x, transform)
        monkeypatch.setattr(plain, "_CHUNK", 64)
        assert_same(codec.encode(x, transform), whole)

    @given(codecs(), st.data())
    def test_rows_of_the_batch_are_independent(self, make, data) -> None:
        """A batch of three is three batches of one, mean and reference scale included."""
        codec = make()
        x = data.draw(strategies.normal(3, 2, 30, codec.layout.head_dim))
        x = x * torch.tensor([1.0, 50.0, 0.01]).view(3, 1, 1, 1)
        together = round_trip(codec, x)
        for row in range(3):
            alone = round_trip(codec, x[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))

    @given(codecs(), st.data())
    def test_map_follows_the_batch(self, make, data) -> None:
        """Decoding a reordered batch is the reordered decoded batch, bit for bit."""
        codec = make()
        x = data.draw(strategies.normal(3, 2, 5, codec.layout.head_dim)) + 2
        transform = codec.fit(x)
        packed = codec.encode(x, transform)
        rows = torch.tensor([2, 0, 0, 1])

        def reorder(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, rows)

        decoded = codec.decode(packed.map(reorder), transform.map_batch(reorder))
        assert torch.equal(decoded, reorder(codec.decode(packed, transform)))

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("head_dim", [8, 40, 64])
    def test_any_token_decodes_alone(self, bits, head_dim) -> None:
        """Wherever its row starts in memory: rows of an odd number of bytes start at odd addresses."""
        codec = E8Codec(CodeLayout.uniform(head_dim, bits))
        x = torch.randn(1, 1, 4, head_dim)
        transform = codec.fit(x)
        packed = codec.encode(x, transform)
        together = codec.decode(packed, transform)
        for i in range(4):
            one = packed.map(lambda tensor, i=i: tensor[:, :, i : i + 1])
            assert torch.equal(codec.decode(one, transform), together[:, :, i : i + 1])

    def test_memory_order_of_the_input_does_not_matter(self) -> None:
        codec = E8Codec(CodeLayout.uniform(64, 3))
        x = torch.randn(2, 9, 3, 64).transpose(1, 2)  # as a projection leaves it
        transform = codec.fit(x.contiguous())
        assert not x.is_contiguous()
        assert_same(codec.encode(x, transform), codec.encode(x.contiguous(), transform))


class TestError:
    @given(codecs(), st.data())
    def test_no_decoded_vector_points_away(self, make, data) -> None:
        """|x - decode(encode(x))| <= sqrt(2) |x| but for a rounded scale, whatever the vector."""
        made = make()
        codec = E8Codec(made.layout, made.candidates, seed=made.seed)
        head_dim = codec.layout.head_dim
        x = data.draw(st.lists(strategies.vectors(length=head_dim), min_size=1, max_size=4).map(torch.stack))
        transform = VectorTransform(HadamardRotation(head_dim, codec.seed), None, torch.ones(1, 1, 1))
        norm = x.norm(dim=-1)
        x = x[(norm > 0.1 * head_dim**0.5) & (norm < 100 * head_dim**0.5)][None, None]  # the reach of the scales
        if x.shape[2]:
            error = (x - round_trip(codec, x, transform)).norm(dim=-1)
            assert (error <= x.norm(dim=-1) * ((1 + (1 + SCALE_ERROR) ** 2) ** 0.5 + 64 * EPS)).all()

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("center", [False, True])
    def test_distortion_on_a_gaussian(self, bits, center) -> None:
        codec = E8Codec(CodeLayout.uniform(128, bits), center=center)
        x = torch.randn(1, 4, 1000, 128)
        assert relative_error(x, round_trip(codec, x)) < DISTORTION[bits]

    @pytest.mark.parametrize("head_dim", COMMON)
    def test_distortion_holds_for_every_head_dim(self, head_dim) -> None:
        x = torch.randn(1, 2, 300, head_dim)
        for bits, limit in DISTORTION.items():
            assert relative_error(x, round_trip(E8Codec(CodeLayout.uniform(head_dim, bits)), x)) < limit

    @pytest.mark.parametrize("bits", BITS)
    def test_an_outlier_channel_is_spread(self, bits) -> None:
        """A channel thirty times the others costs no more than a Gaussian vector of that norm would."""
        x = torch.randn(1, 1, 1000, 128)
        x[..., 17] *= 30
        assert relative_error(x, round_trip(E8Codec(CodeLayout.uniform(128, bits)), x)) < (1.25 * DISTORTION[bits])

    @pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
    def test_error_is_relative(self, size) -> None:
        x = size * torch.randn(1, 1, 500, 64)
        assert relative_error(x, round_trip(E8Codec(CodeLayout.uniform(64, 2)), x)) < DISTORTION[2]

    def test_tokens_of_very_different_size(self) -> None:
        """Each token has its own scale: small ones are as exact as large ones, over some 200 times each way."""
        codec = E8Codec(CodeLayout.uniform(64, 2))
        x = torch.randn(1, 1, 400, 64)
        sizes = torch.logspace(-2.2, 2.2, 400)[None, None, torch.randperm(400), None]
        error = (x - round_trip(codec, x * sizes) / sizes).square().mean(-1)
        assert error.mean() < DISTORTION[2]
        assert error.max() < 0.25

    @given(codecs(), st.integers(1, 9), st.data())
    def test_zeros_decode_to_zeros(self, make, tokens, data) -> None:
        """Zero vectors decode to zeros, alone or among others, and the mean comes back when centring."""
        made = make()
        codec = E8Codec(made.layout, made.candidates, seed=made.seed)
        head_dim = codec.layout.head_dim
        assert torch.equal(round_trip(codec, torch.zeros(1, 2, tokens, head_dim)), torch.zeros(1, 2, tokens, head_dim))
        x = data.draw(strategies.normal(1, 2, tokens + 1, head_dim))
        x[:, :, tokens // 2] = 0
        assert torch.equal(round_trip(codec, x)[:, :, tokens // 2], torch.zeros(1, 2, head_dim))

    @given(codecs(), st.integers(1, 9))
    def test_equal_vectors_are_exact_when_centred(self, make, tokens) -> None:
        """A constant is all mean, which is stored in float16."""
        made = make()
        codec = E8Codec(made.layout, made.candidates, center=True, seed=made.seed)
        x = torch.full((1, 1, tokens, codec.layout.head_dim), 3.0)
        assert torch.equal(round_trip(codec, x), x)

    @pytest.mark.parametrize("offset", [1.0, 30.0, 1000.0])
    def test_centring_removes_a_constant_offset(self, offset) -> None:
        """The error does not grow with what all tokens share; without centring it does."""
        x = torch.randn(1, 2, 500, 64)
        shared = offset * torch.randn(1, 2, 1, 64)
        errors = {}
        for center in (True, False):
            codec = E8Codec(CodeLayout.uniform(64, 2), center=center)
            errors[center] = relative_error(x, round_trip(codec, x + shared) - shared)
        assert errors[True] < 1.05 * DISTORTION[2]
        assert errors[False] > 1.3 * errors[True]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_encoded_as_its_float32_value(self, dtype) -> None:
        codec = E8Codec(CodeLayout.uniform(96, 2), center=True)
        x = (5 + torch.randn(1, 2, 50, 96)).to(dtype)
        transform = codec.fit(x)
        assert_same(codec.encode(x, transform), codec.encode(x.float(), transform))
        decoded = codec.decode(codec.encode(x, transform), transform)
        assert decoded.dtype == torch.float32
        assert relative_error(x - 5, decoded - 5) < 0.12

    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize(
        ("dtype", "size"), [(torch.float16, 65504.0), (torch.float32, 1e15), (torch.bfloat16, 1e30)]
    )
    def test_huge_finite_vectors_stay_finite(self, dtype, size, center) -> None:
        codec = E8Codec(CodeLayout.uniform(64, 2), center=center)
        x = (size * torch.rand(1, 1, 9, 64)).to(dtype)
        decoded = round_trip(codec, x)
        assert decoded.isfinite().all()
        assert relative_error(x, decoded) < 0.2

    @pytest.mark.parametrize("size", [1e-15, 1e-30, 1e-42])
    def test_tiny_vectors_stay_finite_and_tiny(self, size) -> None:
        x = size * torch.randn(1, 1, 9, 64)
        decoded = round_trip(E8Codec(CodeLayout.uniform(64, 2)), x)
        assert decoded.isfinite().all()
        assert decoded.norm() <= 1.1 * x.norm() + 64 * 1e-19  # squares below are no float32 numbers


def codes_and_scales(codec: E8Codec, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codewords ``[n, d]`` chosen for rotated vectors ``y [n, d]`` and their scales, in float64."""
    codes, scales = ScaleSearch(codec.layout, None).encode(y.T.contiguous(), codec.candidates)
    return decode_rows(pack(codes, codec.layout), codec.layout).double(), scales.double()[:, None]


def coded(layout: CodeLayout, y: Tensor) -> Tensor:
    """Return rotated vectors without what lies in blocks that store nothing: the scale does not look at it."""
    return y * torch.tensor([float(bits > 0) for bits in layout.block_bits]).repeat_interleave(BLOCK)


class TestScale:
    @given(codecs(), st.data())
    def test_keeps_the_norm(self, make, data) -> None:
        """|scale * q| = |y|; in coded blocks, before it is a byte."""
        codec = make()
        y = data.draw(strategies.normal(20, codec.layout.head_dim))
        q, scale = codes_and_scales(codec, y)
        expected = coded(codec.layout, y).double().norm(dim=-1)
        torch.testing.assert_close((scale * q).norm(dim=-1), expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("bits", BITS)
    def test_keeps_the_norm_of_decoded_vectors(self, bits) -> None:
        """As a scale byte: within half a step."""
        x = torch.randn(1, 2, 1000, 64)
        norms = round_trip(E8Codec(CodeLayout.uniform(64, bits)), x).norm(dim=-1) / x.norm(dim=-1)
        assert norms.min() > 1 / (1 + SCALE_ERROR) - 1e-4
        assert norms.max() < 1 + SCALE_ERROR + 1e-4

    @given(strategies.bits_per_channel, st.data())
    def test_a_further_candidate_never_hurts(self, bits, data) -> None:
        """The least error of any multiple of the codeword falls with every scale that is tried, in any order."""
        y = data.draw(strategies.normal(20, 32))
        layout, previous = CodeLayout.uniform(32, bits), None
        for candidates in [(1.0,), (1.1, 1.0), (0.9, 1.1, 1.0), (1.0, 0.7, 1.1, 0.9)]:
            q, _ = codes_and_scales(E8Codec(layout, candidates), y)
            error = y.square().sum(-1) - (q * y).sum(-1).square() / q.square().sum(-1)
            if previous is not None:
                assert (error <= previous + 1e-5 * y.square().sum(-1)).all()
            previous = error

    @pytest.mark.parametrize(("bits", "share"), [(1, 1.0), (2, 0.99), (3, 0.96), (4, 0.92)])
    def test_candidates_help_on_average(self, bits, share) -> None:
        x = torch.randn(1, 1, 1000, 64)
        layout = CodeLayout.uniform(64, bits)
        one, four = (E8Codec(layout, c) for c in [(1.0,), (0.92, 0.98, 1.04, 1.1)])
        assert relative_error(x, round_trip(four, x)) < share * relative_error(x, round_trip(one, x))


class TestStorage:
    @given(codecs(), st.data())
    def test_bytes_are_exactly_those_promised(self, make, data) -> None:
        """Words and scales of n tokens take n x bytes_per_vector, as one byte of scale and b bits per channel."""
        codec = make()
        x = data.draw(strategies.normal(2, 3, 5, codec.layout.head_dim))
        packed = codec.encode(x, codec.fit(x))
        assert packed.tokens == 5
        held = sum(tensor.untyped_storage().nbytes() for tensor in (packed.words, packed.scales))
        assert held == 2 * 3 * 5 * codec.bytes_per_vector
        assert codec.bytes_per_vector == sum(codec.layout.block_bits) + 1

    def test_fit_shares_little(self) -> None:
        """One float16 mean and one float32 reference per head, independent of the number of tokens."""
        x = torch.randn(2, 3, 50, 64)
        transform = E8Codec(CodeLayout.uniform(64, 2), center=True).fit(x)
        assert transform.mean is not None
        assert (transform.mean.shape, transform.mean.dtype) == ((2, 3, 1, 64), torch.float16)
        assert (transform.reference.shape, transform.reference.dtype) == ((2, 3, 1), torch.float32)
        assert E8Codec(CodeLayout.uniform(64, 2)).fit(x).mean is None

    def test_reference_is_the_median_scale(self) -> None:
        x = torch.ones(1, 1, 5, 64) * torch.tensor([1.0, 2, 3, 4, 1000])[:, None]
        transform = E8Codec(CodeLayout.uniform(64, 2)).fit(x)
        assert transform.reference.item() == pytest.approx(3.0)

    def test_encoding_changes_nothing_that_it_is_given(self) -> None:
        codec = E8Codec(CodeLayout.uniform(64, 2), center=True)
        x = torch.randn(1, 2, 30, 64)
        before = x.clone()
        transform = codec.fit(x)
        packed = codec.encode(x, transform)
        words, scales = packed.words.clone(), packed.scales.clone()
        first = codec.decode(packed, transform)
        second = codec.decode(packed, transform)
        assert torch.equal(x, before)
        assert torch.equal(packed.words, words)
        assert torch.equal(packed.scales, scales)
        assert first.data_ptr() != second.data_ptr()
        assert torch.equal(first, second)

    @pytest.mark.parametrize("bits", BITS)
    def test_no_tokens(self, bits) -> None:
        codec = E8Codec(CodeLayout.uniform(64, bits))
        transform = codec.fit(torch.randn(1, 2, 30, 64))
        packed = codec.encode(torch.zeros(1, 2, 0, 64), transform)
        assert packed.words.shape == (1, 2, 0, 8 * bits)
        assert codec.decode(packed, transform).shape == (1, 2, 0, 64)

    def test_a_plan_that_stores_nothing_decodes_to_the_mean(self) -> None:
        codec = E8Codec(CodeLayout(16, (0, 0)), center=True)
        x = 3 + torch.randn(1, 2, 30, 16)
        assert codec.bytes_per_vector == 1
        torch.testing.assert_close(round_trip(codec, x), x.mean(2, keepdim=True).expand_as(x), rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize(
        ("bits", "row"),
        [
            (1, "985e92"),
            (2, "9494f4178e"),
            (3, "a1b6487b44998d"),
            (4, "708594a150bb3d498d"),
        ],
    )
    def test_stored_codes_do_not_change(self, bits, row) -> None:
        """A fixed vector has these bytes on every platform and in every version of the format."""
        x = (torch.arange(16) * 37 % 101 - 50.0) / 16
        codec = E8Codec(CodeLayout.uniform(16, bits), candidates=(0.95, 1.05))
        transform = VectorTransform(HadamardRotation(16), None, torch.ones(1, 1, 1))
        packed = codec.encode(x[None, None, None], transform)
        stored = bytes(packed.words.flatten().tolist() + packed.scales.flatten().tolist())
        assert stored.hex() == row


@dataclass(frozen=True)
class HeadBasis(Rotation):
    """A rotation with an orthogonal matrix of its own for every head: what a user might write."""

    basis: Float[Tensor, "b h d d"]

    def rotate(self, x: Tensor) -> Tensor:
        return x.float() @ self.basis

    def unrotate(self, y: Tensor, first_stride: int = 1) -> Tensor:
        assert first_stride == 1
        return y @ self.basis.mT

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> "HeadBasis":
        return HeadBasis(function(self.basis))


@dataclass(frozen=True)
class PrincipalCodec(E8Codec):
    """Codes in the principal axes of each head, the strongest first."""

    def make_rotation(self, vectors: Tensor) -> Rotation:
        return HeadBasis(torch.linalg.eigh(vectors.mT @ vectors).eigenvectors.flip(-1))


def low_rank(tokens: int = 400) -> Tensor:
    """Return vectors of 64 channels that fill 32 dimensions, different ones in each head and row."""
    axes = torch.linalg.qr(torch.randn(2, 3, 64, 32)).Q
    return torch.randn(2, 3, tokens, 32) @ axes.mT


class TestUserRotation:
    """The interfaces carry a basis per head and bits per block."""

    def test_a_basis_per_head_with_a_mixed_plan_works(self) -> None:
        """All bits go to the 32 channels that matter: 4 there are far better than 2 everywhere."""
        x = low_rank()
        plan = CodeLayout(64, (4, 4, 4, 4, 0, 0, 0, 0))
        mine = PrincipalCodec(plan, candidates=(2**0.5,))
        plain = E8Codec(CodeLayout.uniform(64, 2))
        assert mine.bytes_per_vector == plain.bytes_per_vector
        assert relative_error(x, round_trip(mine, x)) < 0.01
        assert relative_error(x, round_trip(plain, x)) > 0.08

    @pytest.mark.parametrize("plan", [(3,) * 8, (4, 3, 3, 2, 2, 1, 1, 0)])
    def test_its_tensors_follow_the_batch(self, plan) -> None:
        codec = PrincipalCodec(CodeLayout(64, plan), center=True)
        x = low_rank(50) + 5
        transform = codec.fit(x)
        packed = codec.encode(x, transform)
        rows = torch.tensor([1, 1, 0])

        def reorder(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, rows)

        moved = transform.map_batch(reorder)
        assert isinstance(moved.rotation, HeadBasis)
        assert moved.rotation.basis.shape == (3, 3, 64, 64)
        torch.testing.assert_close(
            codec.decode(packed.map(reorder), moved), codec.decode(packed, transform)[rows], rtol=1e-4, atol=1e-4
        )

    def test_rotation_sees_centred_vectors(self) -> None:
        seen = []

        @dataclass(frozen=True)
        class Spy(E8Codec):
            def make_rotation(self, vectors: Tensor) -> Rotation:
                seen.append(vectors)
                return HadamardRotation(self.layout.head_dim)

        Spy(CodeLayout.uniform(16, 2), center=True).fit(7 + torch.randn(1, 2, 100, 16))
        assert seen[0].mean(2).abs().max() < 1e-2

    @given(strategies.bit_plans(max_blocks=6).filter(any), st.data())
    def test_blocks_have_the_error_of_their_bits(self, plan, data) -> None:
        """In a mixed plan a block is as exact as its own bits allow, and 0 bits decode to 0."""
        layout = strategies.layout_of(plan)
        codec = E8Codec(layout, candidates=(1.0,))
        y = data.draw(strategies.normal(300, layout.head_dim))
        q, _ = codes_and_scales(codec, y)
        square = coded(layout, y).square().sum(-1, keepdim=True) / (BLOCK * sum(bits > 0 for bits in plan))
        y = y / square.sqrt()
        for bits, error, block in zip(
            plan,
            (y - q).square().view(300, -1, BLOCK).mean((0, 2)).tolist(),
            q.view(300, -1, BLOCK).unbind(1),
            strict=True,
        ):
            if bits == 0:
                assert not block.any()
            else:
                assert error < 1.25 * DISTORTION[bits]


@pytest.mark.usefixtures("unchecked")
class TestRefusals:
    @pytest.mark.parametrize("shape", [(1, 1, 5, 32), (1, 5, 64), (64,), (1, 1, 1, 5, 64)])
    def test_shapes(self, shape) -> None:
        codec = E8Codec(CodeLayout.uniform(64, 2))
        transform = codec.fit(torch.randn(1, 1, 5, 64))
        for refuse in (codec.fit, lambda x: codec.encode(x, transform)):
            with pytest.raises(ShapeError, match=r"expected \[batch, kv_heads, tokens, 64\], got shape \("):
                refuse(torch.zeros(shape))

    @pytest.mark.parametrize("candidates", [(), (0.0,), (1.0, -1.0), (float("nan"),), (1.0, float("nan"))])
    def test_candidates(self, candidates) -> None:
        with pytest.raises(OptionError, match="scale candidates must be positive numbers, at least one"):
            E8Codec(CodeLayout.uniform(64, 2), candidates=candidates)
