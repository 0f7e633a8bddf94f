"""The encoding kernel writes what the torch encoder writes, in the interpreter of triton."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is for Linux")

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import DISTORTION, CodeLayout
from nexusquant_cache.codec.operands import PackedOperand, side_plan
from nexusquant_cache.codec.triton import kernels_encode as kernel
from nexusquant_cache.errors import ShapeError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter of triton must be chosen before torch is imported",
)
SENTINEL = 0xA5


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    # The interpreter takes as long for a large tile as for a small one.
    monkeypatch.setattr(kernel, "_ROWS", 64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sloped(batch, heads, tokens, head_dim, seed=0):
    """Vectors with a mean whose channels fall by a different number of octaves in every head."""
    slopes = torch.linspace(0, 6, batch * heads).view(batch, heads, 1, 1) * torch.linspace(0, 1, head_dim)
    return normal(batch, heads, tokens, head_dim, seed=seed) * torch.exp2(-slopes) + normal(batch, heads, 1, head_dim)


def operands(codec, transform):
    """Return what the kernel reads of a fitted transform."""
    batch, heads = transform.reference.shape[:2]
    head_dim = codec.layout.head_dim
    unused = torch.zeros(1, 1, head_dim, head_dim, dtype=torch.int8)
    plan = side_plan(transform.reference, unused, torch.ones(head_dim), transform.mean, codec.layouts, transform.plans)
    forward = transform.rotation.rotate(torch.eye(head_dim).expand(batch, heads, -1, -1))
    return kernel.encode_operand(plan, forward, transform.reference, transform.rotation.block_variances)


def buffers(codec, *shape):
    return tuple(
        torch.full((*shape, *last), SENTINEL, dtype=torch.uint8) for last in ([codec.layout.bytes_per_vector], [])
    )


def by_kernel(codec, vectors, transform):
    words, scales = buffers(codec, *vectors.shape[:3])
    operand = operands(codec, transform)
    kernel.encode(vectors, operand, codec.candidates, PackedOperand(operand.plan, words, scales))
    return PackedVectors(words, scales)


def assert_alike(codec, vectors, transform, found=None):
    """Nearly all rows are the same, and those that are not, at a rounded tie, are as good."""
    expected = codec.encode(vectors, transform)
    found = by_kernel(codec, vectors, transform) if found is None else found
    same = (found.words == expected.words).all(-1) & (found.scales == expected.scales)
    assert same.float().mean() >= 0.995
    errors = [(codec.decode(x, transform) - vectors.float()).norm(dim=-1)[~same] for x in (found, expected)]
    assert torch.allclose(*errors, rtol=1e-3)


UNEVEN = CodeLayout(64, (4, 3, 0, 1, 2, 0, 1, 2))


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        (E8Codec(CodeLayout.flat(128, 2)), torch.float32),
        (E8Codec(CodeLayout.flat(128, 3), center=True, transform="principal"), torch.bfloat16),
        (E8Codec(CodeLayout.flat(64, 2.625), center=True, transform="principal"), torch.float32),
        (E8Codec(CodeLayout.flat(64, 1), candidates=(1.0,)), torch.float16),
        (E8Codec(CodeLayout.flat(80, 4), candidates=(0.8, 1.0, 1.2)), torch.float32),
        (E8Codec(UNEVEN, center=True), torch.float32),
        (E8Codec(CodeLayout.flat(72, 2.5), transform="principal"), torch.float16),
    ],
    ids=lambda x: f"{x.layout.head_dim}-{x.layout.bits_per_channel:g}" if isinstance(x, E8Codec) else None,
)
def test_rows_of_the_torch_encoder(codec, dtype):
    vectors = sloped(1, 2, 65, codec.layout.head_dim).to(dtype)
    assert_alike(codec, vectors, codec.fit(vectors))


def test_heads_of_one_launch_may_have_different_plans():
    codec = E8Codec(CodeLayout.flat(64, 2), transform="principal")
    vectors = sloped(1, 4, 200, 64)
    transform = codec.fit(vectors)
    assert len(transform.heads_by_plan) > 1
    assert_alike(codec, vectors[:, :, :40], transform)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_any_number_of_vectors(tokens):
    codec = E8Codec(CodeLayout.flat(64, 2.5), center=True)
    transform = codec.fit(sloped(1, 2, 30, 64))
    vectors = sloped(1, 2, tokens, 64, seed=1)
    expected, found = codec.encode(vectors, transform), by_kernel(codec, vectors, transform)
    assert torch.equal(found.words, expected.words)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("bits", [2, *(pytest.param(bits, marks=pytest.mark.grid) for bits in (1, 3, 4))])
def test_distortion_of_a_gaussian(bits):
    codec = E8Codec(CodeLayout.flat(128, bits))
    vectors = normal(1, 1, 320, 128)
    transform = codec.fit(vectors)
    decoded = codec.decode(by_kernel(codec, vectors, transform), transform)
    error = (decoded - vectors).square().mean().item()
    expected = 2 - 2 * (1 - DISTORTION[bits]) ** 0.5  # where norms are kept
    assert 0.9 * expected < error < 1.03 * expected  # less at high rates: each vector has its own scale


def test_vectors_of_any_size():
    codec = E8Codec(CodeLayout.flat(64, 2))
    transform = codec.fit(normal(1, 1, 9, 64))
    vectors = normal(1, 1, 12, 64, seed=1)
    vectors[0, 0, :8] *= torch.tensor([0.0, 1e30, 1e-30, 1e-20, -1e20, 1e8, 0.0, 1e-8])[:, None]
    vectors[0, 0, 8, 1:] = 0.0
    vectors[0, 0, 9] = 1.0
    expected, found = codec.encode(vectors, transform), by_kernel(codec, vectors, transform)
    assert found.scales[0, 0, :8].tolist() == [0, 255, 1, 1, 255, 255, 0, 1]
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.words[:, :, :9], expected.words[:, :, :9])  # row 9 is full of ties


def test_a_head_of_any_size():
    codec = E8Codec(CodeLayout.flat(64, 2), center=True, transform="principal")
    vectors = sloped(1, 4, 40, 64) * torch.tensor([1e30, 1e-30, 1.0, 0.0]).view(1, 4, 1, 1)
    assert_alike(codec, vectors, E8Codec(codec.layout, transform="principal").fit(vectors))


def test_every_scale_byte():
    codec = E8Codec(CodeLayout.flat(64, 1), candidates=(1.0,))
    vectors = normal(1, 1, 1, 64) * torch.linspace(-8.3, 8.3, 600).exp2()[:, None]
    transform = codec.fit(normal(1, 1, 9, 64))
    found = by_kernel(codec, vectors, transform)
    assert set(found.scales.flatten().tolist()) == set(range(1, 256))
    assert_alike(codec, vectors, transform, found)


@pytest.mark.parametrize("bits", [2, 2.625])
def test_touches_nothing_but_its_rows(bits):
    codec = E8Codec(CodeLayout.flat(64, bits), center=True)
    tokens, room = 37, 50
    vectors = torch.full((2, room, 3, 80), torch.nan)
    vectors = vectors.transpose(1, 2)[:, 1:, 5 : 5 + tokens, 8:72]
    vectors.copy_(sloped(2, 2, tokens, 64))
    transform = codec.fit(vectors)
    words, scales = buffers(codec, 2, 3, room)
    operand = operands(codec, transform)
    part = (slice(None), slice(1, None), slice(6, 6 + tokens))
    out = PackedOperand(operand.plan, words[part], scales[part])
    kernel.encode(vectors, operand, codec.candidates, out)
    assert_alike(codec, vectors, transform, PackedVectors(words[part], scales[part]))
    words[part], scales[part] = SENTINEL, SENTINEL
    assert words.eq(SENTINEL).all()
    assert scales.eq(SENTINEL).all()


def test_refuses_what_does_not_fit():
    codec = E8Codec(CodeLayout.flat(64, 2))
    vectors = normal(1, 2, 5, 64)
    operand = operands(codec, codec.fit(vectors))
    out = PackedOperand(operand.plan, *buffers(codec, 1, 2, 4))
    with pytest.raises(ShapeError, match=r"\(1, 2, 5, 64\).*\(1, 2, 4, 16\).*head_dim 64"):
        kernel.encode(vectors, operand, codec.candidates, out)
    with pytest.raises(ShapeError):
        kernel.encode(normal(1, 2, 4, 72), operand, codec.candidates, out)
