"""Compiled functions compute what plain torch does: codes, vectors and attention."""

import time
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from feeding import attended
from integration.packed import codec_of, correlated, logits_of, poisoned
from integration.tiny import SMALL
from torch import Tensor

pytest.importorskip("numba", reason="an extra")

import numba
import numpy as np

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.codec import impl as selector
from nexusquant_cache.codec.base import PackedVectors, RaggedVectors, is_there
from nexusquant_cache.codec.cpu import attend, compiled, decode, encode, kernels_read, support, workers
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.held import CodedSide, HeldTokens
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.torch import attend as plain_attend
from nexusquant_cache.codec.torch import decode as plain_decode
from nexusquant_cache.codec.torch import encode as plain_encode
from nexusquant_cache.errors import UnsupportedError

IS_WANTED = support.is_wanted  # before tests begin, see conftest.py

# Axes are rounded to 16 bits, which is 2 ** -16 of the largest in a block.
TOLERANCE = 3e-4


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `auto` choose compiled functions, as it does outside these tests."""
    monkeypatch.setattr(support, "is_wanted", IS_WANTED)


# Codes


UNEVEN = CodeLayout(64, (4, 3, 0, 1, 2, 0, 1, 2))


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        (E8Codec(CodeLayout.flat(128, 3), center=True, transform="principal"), torch.bfloat16),
        (E8Codec(CodeLayout.flat(64, 2.625), center=True, transform="principal"), torch.float32),
        (E8Codec(CodeLayout.flat(64, 1), candidates=(1.0,)), torch.float16),
        (E8Codec(CodeLayout.flat(80, 4), candidates=(0.8, 1.0, 1.2)), torch.float32),
        (E8Codec(UNEVEN, center=True), torch.float32),
        (E8Codec(CodeLayout.flat(256, 0.5), transform="principal"), torch.float32),
        (E8Codec(CodeLayout.flat(80, 1.5), transform="principal"), torch.float32),
        (E8Codec(CodeLayout.flat(24, 2), center=True, transform="principal"), torch.float16),
        (E8Codec(CodeLayout.flat(8, 3), transform="principal"), torch.float32),
    ],
    ids=lambda x: f"{x.layout.head_dim}-{x.layout.bits_per_channel:g}" if isinstance(x, E8Codec) else None,
)
def test_codes_and_vectors_of_plain_torch(codec: E8Codec, dtype: torch.dtype) -> None:
    """The words are the same but for rounded ties, and in rows whose number is none of chunks."""
    vectors = correlated(2, 4, 301, codec.layout.head_dim).to(dtype)
    transform = codec.fit(vectors)
    vectors = vectors[:, :, :141]
    expected = plain_encode.encode(vectors, transform, codec.layouts, codec.candidates)
    found = encode.encode(vectors, transform, codec.layouts, codec.candidates)
    same = (found.words == expected.words).all(-1) & (found.scales == expected.scales)
    assert same.float().mean() >= 0.995
    vectors = plain_decode.decode(expected, transform, codec.layouts)
    decoded = decode.decode(
        PackedVectors(poisoned(expected.words), poisoned(expected.scales)), transform, codec.layouts
    )
    assert (decoded - vectors).abs().max() <= TOLERANCE * vectors.abs().max()


def test_vectors_of_any_size() -> None:
    codec = E8Codec(CodeLayout.flat(64, 2))
    transform = codec.fit(torch.randn(1, 1, 9, 64))
    vectors = torch.randn(1, 1, 12, 64)
    vectors[0, 0, :8] *= torch.tensor([0.0, 1e30, 1e-30, 1e-20, -1e20, 1e8, 0.0, 1e-8])[:, None]
    vectors[0, 0, 8, 1:] = 0.0
    expected = plain_encode.encode(vectors, transform, codec.layouts, codec.candidates)
    found = encode.encode(vectors, transform, codec.layouts, codec.candidates)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.words, expected.words)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("codec", [codec_of(64, 2.5), E8Codec(CodeLayout.flat(64, 2.5), transform="principal")])
def test_few_vectors(tokens: int, codec: E8Codec) -> None:
    vectors = correlated(1, 2, 300, 64)
    transform = codec.fit(vectors)
    found = encode.encode(vectors[:, :, :tokens], transform, codec.layouts, codec.candidates)
    expected = plain_encode.encode(vectors[:, :, :tokens], transform, codec.layouts, codec.candidates)
    assert torch.equal(found.words, expected.words)
    assert decode.decode(found, transform, codec.layouts).shape == (1, 2, tokens, 64)


def test_a_processor_without_an_instruction_for_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_read, "_has_dots", lambda _context: False)

    @numba.njit
    def run(pairs, factors, sums, rows):
        kernels_read.add_whole_products(pairs, factors, np.float32(0.5), sums, rows)

    generator = np.random.default_rng(0)
    pairs = generator.integers(-356, 357, (4, kernels_read.CHUNK, 2)).astype(np.int16)
    factors = generator.integers(-32767, 32768, (6, 4, 2)).astype(np.int16)
    sums = np.ones((6, kernels_read.CHUNK), np.float32)
    run(pairs.reshape(-1), factors.reshape(-1), sums.reshape(-1), 6)
    expected = np.einsum("ktp,rkp->rt", pairs.astype(np.float64), factors.astype(np.float64))
    assert np.allclose(sums, 1 + 0.5 * expected, rtol=1e-6)


# Attention


@dataclass(frozen=True)
class Case:
    """One attention; the defaults are the plainest."""

    tokens: int = 141
    head_dim: int = 64
    value_dim: int | None = None
    batch: int = 1
    heads: int = 2
    group: int = 2
    queries: int = 1
    key_bits: float = 1.75
    value_bits: float = 2.25
    transform: str = "principal"
    center: bool = True
    rotary_dim: int = 0
    interleaved: bool = False
    start: int | None = None  # of contiguous positions; by default each head has its own
    softcap: float | None = None
    sinks: bool = False
    ragged: bool = False
    mask: str | None = None
    padded: bool = False
    tail: int = 5
    dtype: torch.dtype = torch.float32


def side_of(case: Case, head_dim: int, bits: float, places: PositionMap | None = None) -> CodedSide:
    """Return packed tokens with poison around them, whose heads have plans of their own."""
    codec = codec_of(head_dim, bits, case.transform, center=case.center)
    vectors = correlated(case.batch, case.heads, case.tokens + 300, head_dim)
    transform = codec.fit(vectors)
    packed = plain_encode.encode(vectors[:, :, : case.tokens], transform, codec.layouts, codec.candidates)
    return CodedSide(
        codec, packed.map(poisoned) if places is None or places.counts is None else ragged(packed, places), transform
    )


def ragged(packed: PackedVectors, places: PositionMap) -> RaggedVectors:
    """Return packed tokens without what stands in empty places."""
    there = is_there(places.counts, packed.words.device)
    front, rest = packed.part(slice(places.kept)), packed.part(slice(places.kept, None))
    words, scales = (poisoned(x[there][None, None])[0, 0] for x in (front.words, front.scales))
    return RaggedVectors(words, scales, places.counts, rest.map(poisoned))


def places_of(case: Case) -> PositionMap:
    """Return where tokens stand: in each head elsewhere, and the last seven behind all that is covered."""
    if case.start is not None:
        return PositionMap(case.start, dense=case.tokens)
    covered, dense = 3 * case.tokens + 5, min(case.tokens, 7)
    keep = torch.zeros(case.batch, case.heads, covered, dtype=torch.bool)
    for index, head in enumerate(keep.flatten(0, 1)):
        fewer = 11 * index if case.ragged else 0
        head[torch.randperm(covered)[: case.tokens - dense - fewer]] = True
    places = PositionMap(3)
    places.append(keep)
    places.append_all(dense)
    return places


def held_of(case: Case) -> HeldTokens:
    """Return a layer at one moment."""
    key_dim, value_dim = case.head_dim, case.value_dim or case.head_dim
    places = places_of(case)
    exact = [
        tuple(torch.randn(case.batch, case.heads, count, dim).to(case.dtype) for dim in (key_dim, value_dim))
        for count in (3, case.tail)
    ]
    phase = None
    if case.rotary_dim:
        phase = RotaryPhase(0.5 ** torch.linspace(0, 10, case.rotary_dim // 2), case.interleaved)
    return HeldTokens(
        tail=exact[1],
        seen=places.end + case.tail,
        sinks=exact[0],
        keys=side_of(case, key_dim, case.key_bits, places),
        values=side_of(case, value_dim, case.value_bits, places),
        positions=places,
        phase=phase,
        sink_positions=torch.tensor([[0, 1, 2], [1, 2, 40]])[: case.batch] if case.padded else None,
        origins=torch.tensor([0, 9])[: case.batch] if case.padded else None,
    )


def mask_of(case: Case, seen: int) -> Tensor | None:
    if case.mask is None:
        return None
    heads = 1 if case.mask == "shown" else case.heads * case.group
    shown = torch.rand(case.batch, heads, case.queries, seen) < 0.7
    if case.mask != "added":
        return shown
    return torch.randn(case.batch, heads, case.queries, seen).masked_fill(~shown, torch.finfo(case.dtype).min)


def assert_alike(case: Case) -> None:
    """Compare with plain torch, from which much of the tolerance is the rounding of outputs beside larger ones."""
    held, query_heads = held_of(case), case.heads * case.group
    queries = torch.randn(case.batch, case.queries, query_heads, case.head_dim).to(case.dtype).transpose(1, 2)
    sinks = torch.randn(query_heads) + 2 if case.sinks else None
    softmax, mask = Softmax(case.head_dim**-0.5, case.softcap, sinks), mask_of(case, held.seen)
    expected = plain_attend.attend(queries, held, mask, softmax)[0]
    found = attend.attend(queries, held, mask, softmax)[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


PLAIN = Case()


@pytest.mark.parametrize(
    "case",
    [
        *(replace(PLAIN, tokens=tokens, rotary_dim=64) for tokens in (8, 127, 128, 129, 700)),
        Case(heads=4, head_dim=128, rotary_dim=128, interleaved=True),
        Case(heads=3, batch=2, transform="hadamard", group=1, start=0, rotary_dim=64),
        Case(head_dim=128, value_dim=64, key_bits=2, value_bits=3, transform="hadamard", center=False),
        Case(head_dim=64, value_dim=128, key_bits=2.625, value_bits=1),
        Case(head_dim=80, transform="hadamard", rotary_dim=20, start=3),  # most channels do not turn
        Case(head_dim=96, key_bits=4, value_bits=4, rotary_dim=32, interleaved=True),
        Case(head_dim=256, tokens=40, key_bits=0.5, rotary_dim=256),
        Case(group=9, queries=16, rotary_dim=64, mask="by head"),
        Case(queries=5, group=4, batch=2, mask="added", rotary_dim=48),
        Case(softcap=2.0),
        Case(softcap=20.0, sinks=True, dtype=torch.bfloat16, mask="shown", queries=3),
        Case(sinks=True, tail=0, dtype=torch.float16),
        Case(ragged=True, batch=2, rotary_dim=64),
        Case(ragged=True, batch=2, mask="added", rotary_dim=32, dtype=torch.bfloat16),
        Case(padded=True, batch=2, rotary_dim=64, mask="shown"),
        Case(tail=300, queries=2),
    ],
    ids=str,
)
def test_attention_of_plain_torch(case: Case) -> None:
    assert_alike(case)


def test_rates_and_plans_are_all_met() -> None:
    """What the cases above count on."""
    blocks = set()
    for head_dim, bits in ((128, 1.75), (96, 4), (64, 2.625)):
        side = side_of(replace(PLAIN, heads=4), head_dim, bits)
        plans = side.transform.plan_of_heads
        blocks |= {rate for plan in plans for rate in side.codec.layouts[plan].block_bits}
    assert blocks == {0, 1, 2, 3, 4}


def test_nothing_to_attend_to_gives_zeros() -> None:
    held = held_of(replace(PLAIN, batch=2))
    queries = torch.randn(2, 4, 1, 64)
    mask = torch.ones(2, 1, 1, held.seen, dtype=torch.bool)
    mask[1] = False
    found = attend.attend(queries, held, mask, Softmax(0.125))[0]
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_shows(value: float) -> None:
    held, queries = held_of(replace(PLAIN, rotary_dim=64)), torch.randn(1, 4, 1, 64)
    queries[0, 1, 0, 3] = value
    found = attend.attend(queries, held, None, Softmax(0.125))[0]
    assert not found[0, 1].isfinite().any()
    assert found[0, [0, 2, 3]].isfinite().all()


# Whole generations


@pytest.mark.parametrize(
    ("preset", "rotary", "dtype", "pads", "options"),
    [
        ("balanced", True, torch.float32, 12, {}),
        ("quant", True, torch.bfloat16, 0, {"transform": "principal"}),
        ("max", False, torch.float32, 12, {"transform": "principal"}),
    ],
)
def test_generation(  # noqa: PLR0917 - the columns of the table
    preset: str, rotary: bool, dtype: torch.dtype, pads: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With eviction and without, padded, several tokens at once, tokens encoded on the way."""
    expected = logits_of("torch", preset, rotary, dtype, pads, **options)
    seen = []
    real = attend.attend
    monkeypatch.setattr(attend, "attend", lambda *given: seen.append(given[0].shape) or real(*given))
    found = logits_of("auto", preset, rotary, dtype, pads, **options)
    assert len(seen) == 3
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < (1e-3 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("what", ["attend", "encode", "decode"])
def test_what_is_wrong_is_not_used(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a compiler might make it: `auto` computes in plain torch and says so, `cpu` refuses."""
    expected = logits_of("torch", "quant", rotary=False, dtype=torch.float32)
    monkeypatch.setattr(selector, "_ERRORS", {})
    selector._say_once.cache_clear()
    kernels = kernels_read if what != "encode" else encode.kernels_encode
    monkeypatch.setattr(kernels, what, lambda *given: given[-1].fill(0))
    with pytest.raises(UnsupportedError, match=f"a kernel differs from plain torch on this device.*{what}"):
        logits_of("cpu", "quant", rotary=False, dtype=torch.float32)
    found = logits_of("auto", "quant", rotary=False, dtype=torch.float32)
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert any(f"'{what}'" in message for message in caplog.messages)


def test_a_machine_that_keeps_nothing_on_disk_compiles_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiled.njit

    def njit(*given: Any, **options: Any) -> Any:
        if options.get("cache"):
            msg = "no locator available"
            raise RuntimeError(msg)
        return real(*given, **options)

    monkeypatch.setattr(compiled, "njit", njit)

    @compiled.entry(compiled.array(numba.types.float32, 1))
    def double(x):
        for i in range(len(x)):
            x[i] *= np.float32(2)

    numbers = np.ones(3, np.float32)
    double(numbers)
    assert numbers.tolist() == [2, 2, 2]


def test_that_the_codec_is_compiled_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_PATIENCE", 0.01)
    compiled._announce.cache_clear()
    for seconds in (0.0, 0.3, 0.3):
        with compiled._announced():
            time.sleep(seconds)
    assert [message for message in caplog.messages if message.startswith("compiling the codec")] == [
        "compiling the codec for this machine, once; that can take minutes"
    ]
    compiled._announce.cache_clear()


def test_a_cache_goes_on_after_whatever_is_done_to_it() -> None:
    """Tokens are cropped, rows reordered, repeated and chosen; tensors move to memory that processes share."""
    caches = {impl: NexusQuantCache("balanced", impl=impl, **SMALL) for impl in ("torch", "cpu")}

    def step(count: int, tokens: int = 1) -> None:
        layers = caches["cpu"].layers
        rows = len(layers[0].state.exact[0]) if layers else 2
        for _ in range(count):
            states = torch.randn(2, rows, 2, tokens, 16)
            seen = caches["cpu"].get_seq_length() + tokens
            visible = torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens) if tokens > 1 else None
            expected, found = (attended(cache, *states.clone(), 0, mask=visible) for cache in caches.values())
            assert (found - expected).norm() <= TOLERANCE * expected.norm()

    step(1, 150)
    step(40)
    for change in (
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([3, 0])),
        ForkingPickler.dumps,  # as a queue between processes does: storages move, tensors stay
    ):
        for cache in caches.values():
            change(cache)
        step(5)
    step(1, 90)  # a later turn, of which some is dropped
    step(20)
    assert caches["cpu"].memory_report().kept_tokens < caches["cpu"].get_seq_length()


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    held, queries = held_of(replace(PLAIN, tokens=700, batch=2, rotary_dim=64)), torch.randn(2, 4, 2, 64)
    side = held.keys
    vectors = plain_decode.decode(side.packed, side.transform, side.codec.layouts)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = attend.attend(queries, held, None, Softmax(0.125))[0]
        encoded = encode.encode(vectors, side.transform, side.codec.layouts, (1.0,))
        found.append((out, encoded.words, decode.decode(side.packed, side.transform, side.codec.layouts)))
    assert workers.workers_for(2 * 2 * 700 // kernels_read.CHUNK) == 3
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])
