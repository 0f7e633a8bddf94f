"""`nexusquant_cache.cache.report`: which tensors count, the numbers of a small case by hand, and the table."""

from dataclasses import dataclass

import pytest
import torch
from feeding import GROUP, feed
from integration.tiny import SMALL, random_states, reachable_bytes, tiny_config
from torch import Tensor
from transformers import Gemma3TextConfig

from nexusquant_cache import EvictionPolicy, LayerReport, MemoryReport, NexusQuantCache, ScoreInputs
from nexusquant_cache.cache.report import storage_bytes, tensors_of
from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.codec.transform import Rotation


@dataclass
class Box:
    content: object


def test_tensors_are_found_in_containers_and_dataclasses() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    loop: list[object] = [{"a": a}, (Box([b]), "text", None), c]
    loop.append(loop)
    assert {id(x) for x in tensors_of(loop)} == {id(a), id(b), id(c)}


def test_a_storage_counts_once_and_whole() -> None:
    """A view of three floats holds the storage of a hundred."""
    x = torch.zeros(100)
    assert storage_bytes(x[:3]) == 400
    assert storage_bytes(x[:3], [x[50:], x.view(10, 10)]) == 400
    assert storage_bytes(x, x.clone()) == 800
    assert storage_bytes(torch.zeros(0), None) == 0


def row(layer_idx: int, kind: str = "compressed", **numbers: int) -> LayerReport:
    names = ("seen_tokens", "kept_tokens", "exact_bytes", "code_bytes", "other_bytes", "dense_bytes")
    return LayerReport(layer_idx, kind, *(numbers.get(name, 0) for name in names))


def report(*rows: LayerReport, **numbers: int) -> MemoryReport:
    return MemoryReport(rows, numbers.get("shared_bytes", 0), numbers.get("peak_bytes", 0), "max")


def test_the_numbers_of_a_small_case_by_hand() -> None:
    """100 float32 tokens of 2 heads x 16 channels: 2 sinks, 8 recent, 90 between them of which half are kept."""
    cache = NexusQuantCache("quant", keep_ratio=0.5, key_bits=3, value_bits=2, transform="hadamard", **SMALL)
    feed(cache, *random_states((1, 2, 100, 16), 0), 0)
    plain, queries = cache.memory_report().layers[0], 64 * GROUP * 2 * 16 * 4  # the last of them wait too
    assert (plain.exact_bytes, plain.code_bytes, plain.other_bytes) == (
        100 * 2 * 32 * 4 + queries + 100 * 2 * 4,
        0,
        0,
    )  # and far attention
    assert cache.memory_report().compression_factor == 12800 / (25600 + queries + 800)  # float32 against 16 bit

    cache.compress()
    row, whole = cache.memory_report().layers[0], cache.memory_report()
    assert (row.seen_tokens, row.kept_tokens) == (whole.seen_tokens, whole.kept_tokens) == (100, 55)
    assert row.exact_bytes == (2 + 8) * 2 * 32 * 4
    assert row.code_bytes == 45 * 2 * ((6 + 1) + (4 + 1))
    bitmap, means, references = 2 * 12, 2 * 16 * 2, 2 * 2 * 4
    counts = 2 * 8  # of tokens by head
    assert row.other_bytes == bitmap + means + references + counts
    assert row.held_bytes == whole.held_bytes == 2560 + 1080 + 104 + counts
    assert whole.dense_bytes == 100 * 2 * 32 * 2
    assert whole.compression_factor == 12800 / (3744 + counts)
    assert whole.peak_bytes == 25600 + queries + 800
    assert whole.shared_bytes == 0


def test_room_to_grow_is_counted() -> None:
    """Four more tokens make the buffers of 45 grow to 45 + 4 + 32."""
    cache = NexusQuantCache("quant", keep_ratio=0.5, transform="hadamard", **SMALL)
    feed(cache, *random_states((1, 2, 100, 16), 0), 0)
    for step in range(5):
        feed(cache, *random_states((1, 2, 1, 16), step), 0)
    assert cache.memory_report().layers[0].code_bytes == (45 + 4 + 32) * 2 * (5 + 1 + 5 + 1)
    assert cache.memory_report().held_bytes == reachable_bytes(cache)


def test_rotary_tables_are_counted_once() -> None:
    config = tiny_config()
    cache = NexusQuantCache("quant", config=config, **SMALL)
    for layer_idx in range(2):
        feed(cache, *random_states((1, 2, 300, 16), layer_idx), layer_idx)
    cache.compress()
    assert cache.memory_report().shared_bytes == 8 * 4  # frequencies; what happens once has sines of its own
    for layer_idx in range(2):
        feed(cache, *random_states((1, 2, 1, 16), layer_idx), layer_idx)
    whole = cache.memory_report()
    # 8 frequencies in float32 and in float64, 256 + 2 rows of 8 cosines and 8 sines
    assert whole.shared_bytes == 8 * 4 + 8 * 8 + (256 + 2) * 16 * 4
    assert whole.held_bytes == sum(layer.held_bytes for layer in whole.layers) + whole.shared_bytes
    assert reachable_bytes(cache) == whole.held_bytes


def test_the_peak_is_the_exact_prompt() -> None:
    """It is noted when a generation step starts the compression, too, and forgotten by `reset`."""
    cache = NexusQuantCache("max", **SMALL)
    for length in (300, 1):
        feed(cache, *random_states((1, 2, length, 16), 0, torch.bfloat16), 0)
    queries = 64 * GROUP * 2 * 16 * 2
    assert cache.memory_report().peak_bytes == 300 * 2 * 32 * 2 + queries + 300 * 2 * 4  # and far attention
    assert cache.memory_report().held_bytes < 300 * 2 * 32 * 2 / 4
    cache.reset()
    assert cache.memory_report().peak_bytes == 0


def test_what_the_prompt_waits_for() -> None:
    cache = NexusQuantCache("balanced", **SMALL)
    said = []
    for tokens in (None, 20, 60, 1, 30, 1, 1):
        if tokens is not None:
            feed(cache, *random_states((1, 2, tokens, 16), 1), 0)
        said.append(cache.memory_report().state)
    short = "10 tokens are too few to code between the first and the newest (min_tokens is 16)"
    waits = "waits for the {} generation step"
    assert said == [
        "empty",
        f"not compressed yet: {short}",
        f"not compressed yet: {waits.format('first')}",
        "compressed",
        f"compressed; a later turn: {waits.format('next')}",
        "compressed",
        "compressed",
    ]
    cache.reset()
    cache.layers[0].activate_past_recording()
    feed(cache, *random_states((1, 2, 60, 16), 1), 0)
    assert cache.memory_report().state == "not compressed yet: waits for the next crop"
    cache.crop(-1)
    assert cache.memory_report().state == "compressed"


def test_a_short_prompt_is_never_compressed_and_the_report_says_so_all_the_time() -> None:
    cache = NexusQuantCache("balanced", **SMALL)
    for tokens in (12, 1, 1, 1):
        feed(cache, *random_states((1, 2, tokens, 16), 1), 0)
    layer = cache.memory_report().layers[0]
    assert layer.waits_for == "5 tokens are too few to code between the first and the newest (min_tokens is 16)"
    assert not layer.is_compressed


@pytest.mark.parametrize(
    ("keys", "values", "said"),
    [
        (torch.float32, torch.float32, "float32"),
        (torch.bfloat16, torch.bfloat16, "bfloat16"),
        (torch.float16, torch.float32, "float16/float32"),
    ],
)
def test_the_dtype_of_exact_tokens(keys: torch.dtype, values: torch.dtype, said: str) -> None:
    cache = NexusQuantCache("quant", **SMALL)
    given = random_states((1, 2, 60, 16), 1)
    cache.update(given[0].to(keys), given[1].to(values), 0)
    cache.compress()
    assert cache.memory_report().layers[0].exact_dtype == said
    assert str(cache.memory_report()).splitlines()[-1] == f"compressed; exact tokens in {said}"


def test_an_empty_cache() -> None:
    for cache in (NexusQuantCache(), NexusQuantCache(config=tiny_config())):
        whole = cache.memory_report()
        assert (whole.held_bytes, whole.dense_bytes, whole.seen_tokens, whole.kept_tokens) == (0, 0, 0, 0)
        assert whole.compression_factor == 1.0
        assert "preset balanced" in str(whole)


def test_presets_and_changed_presets_are_named() -> None:
    assert NexusQuantCache("max").memory_report().preset == "max"
    assert NexusQuantCache("max", sink_tokens=8).memory_report().preset == "custom"
    assert NexusQuantCache(NexusQuantCache("max").cache_config).memory_report().preset == "custom"


def test_layers_of_transformers_are_reported_with_what_they_hold() -> None:
    config = Gemma3TextConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    cache = NexusQuantCache("balanced", config=config, **SMALL)
    for layer_idx in range(2):
        feed(cache, *random_states((1, 2, 100, 16), layer_idx, torch.bfloat16), layer_idx)
    cache.compress()
    sliding, ours = cache.memory_report().layers
    assert (sliding.kind, sliding.seen_tokens, sliding.kept_tokens) == ("DynamicSlidingWindowLayer", 100, 7)
    assert sliding.dense_bytes == 7 * 2 * 32 * 2
    assert sliding.held_bytes >= sliding.dense_bytes
    assert (ours.kind, ours.seen_tokens, ours.kept_tokens) == ("compressed", 100, 47)
    whole = cache.memory_report()
    assert (whole.seen_tokens, whole.kept_tokens) == (100, 47)
    assert reachable_bytes(cache) == whole.held_bytes


def test_without_layers_of_ours_all_layers_count() -> None:
    assert report(row(0, "DynamicLayer", seen_tokens=5, kept_tokens=4)).seen_tokens == 5
    assert report(row(0, "DynamicLayer", seen_tokens=5, kept_tokens=4)).kept_tokens == 4


def test_the_table() -> None:
    one = {"seen_tokens": 12345, "kept_tokens": 678, "exact_bytes": 100, "code_bytes": 1536, "dense_bytes": 16360}
    lines = str(
        report(
            row(0, **one),
            row(1, **one),
            row(2, "DynamicSlidingWindowLayer", exact_bytes=3 * 2**20, dense_bytes=3 * 2**20),
            row(3, **one),
            shared_bytes=5 * 2**30,
            peak_bytes=7,
        )
    ).splitlines()
    assert lines[0] == "NexusQuantCache, preset max"
    assert lines[1].split() == ["layers", "kind", "seen", "kept", "exact", "codes", "other", "factor"]
    first = ["0-1", "compressed", "12,345", "678", "100", "B", "1.5", "KiB", "0", "B", "10.0x"]
    assert lines[2].split() == first
    assert lines[3].split()[:5] == ["2", "DynamicSlidingWindowLayer", "0", "0", "3.0"]
    assert lines[4].split() == ["3", *first[1:]]
    assert lines[5] == (
        "held 5.00 GiB (tables 5.00 GiB, peak 7 B) in place of 3.0 MiB in 16 bit: 0.0x"  # 3 MiB + 48 KiB
    )
    assert len({len(line.rstrip()) for line in (lines[1], lines[2], lines[4])}) == 1


def test_a_layer_that_holds_nothing_prints() -> None:
    assert "1.0x" in str(report(row(0)))


class HeadBasis(Rotation):
    """A user's rotation with a tensor of its own, and no dataclass."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    def rotate(self, x: Tensor) -> Tensor:
        return x.float() @ self.basis

    def unrotate(self, y: Tensor, first_stride: int = 1) -> Tensor:
        assert first_stride == 1
        return y @ self.basis.mT


class HeadBasisCodec(E8Codec):
    def make_rotation(self, vectors: Tensor) -> Rotation:
        basis = torch.linalg.svd(vectors.float(), full_matrices=False).Vh.mT
        return HeadBasis(basis.contiguous())


class HeadBasisCache(NexusQuantCache):
    def make_codec(self, side: str, head_dim: int, layer_idx: int) -> VectorCodec:
        del side, layer_idx
        return HeadBasisCodec(CodeLayout.uniform(head_dim, 2))


class OwnPhaseCache(NexusQuantCache):
    def make_phase(self, layer_idx: int, seen_tokens: int) -> RotaryPhase:
        del layer_idx, seen_tokens
        return RotaryPhase(torch.tensor([1.0, 0.1]))


class LearnedPolicy(EvictionPolicy):
    def __init__(self) -> None:
        self.weights = torch.ones(1000)

    def score(self, inputs: ScoreInputs) -> Tensor:
        return inputs.keys.float().sum(-1) * self.weights[0]


@pytest.mark.parametrize("cache_class", [HeadBasisCache, OwnPhaseCache])
def test_what_a_users_parts_hold_is_counted(cache_class: type[NexusQuantCache]) -> None:
    cache = cache_class("balanced", **SMALL)
    feed(cache, *random_states((1, 2, 100, 16), 0), 0)
    feed(cache, *random_states((1, 2, 1, 16), 1), 0)
    assert cache.memory_report().held_bytes == reachable_bytes(cache)


def test_a_policys_tensors_are_not_the_caches() -> None:
    """A policy holds no state of a cache and may be shared, so what it holds is no part of the KV cache."""
    cache = NexusQuantCache("balanced", policy=LearnedPolicy(), **SMALL)
    feed(cache, *random_states((1, 2, 100, 16), 0), 0)
    feed(cache, *random_states((1, 2, 1, 16), 1), 0)
    assert reachable_bytes(cache) - cache.memory_report().held_bytes == 4000
