"""When tokens are compressed, and what that costs: during the prefill, in chunks, and over long answers."""

from math import ceil
from typing import Any

import pytest
import torch
from feeding import feed
from integration.tiny import (
    SMALL,
    fingerprint,
    generate,
    logits,
    lossless_cache,
    prompt,
    random_states,
    reachable_bytes,
    tiny_llama,
)
from oracle_cache import Counter, CountingCodec
from torch import Tensor
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from nexusquant_cache import PRESETS, NexusQuantCache
from nexusquant_cache.cache.forward import Forward
from nexusquant_cache.cache.report import content, storage_bytes
from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.layer.parts import Part
from nexusquant_cache.policy import KeyNormPolicy

HEADS, HEAD_DIM = 2, 64


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return tiny_llama(request.param, num_hidden_layers=3)


# During the prefill


@pytest.mark.parametrize("preset", ["quant", "balanced", "max"])
def test_a_prompt_in_one_piece_is_answered_alike_under_both_schedules(model: LlamaForCausalLM, preset: str) -> None:
    """The prompt attends to itself exactly in both, and the same tokens are kept and coded.

    That is so where layers choose for themselves: during the prefill, none knows what those behind it will say.
    """
    results, held = [], []
    for when in ("post_prefill", "during_prefill"):
        cache = NexusQuantCache(preset, config=model.config, when=when, policy=KeyNormPolicy(), **SMALL)
        results.append(generate(model, prompt(80, 2), cache, 24))
        held.append(fingerprint(cache))
    assert torch.equal(*results)
    assert held[0] == held[1]


@pytest.mark.parametrize("chunk", [7, 20, 79])
def test_chunks_without_loss_or_eviction_are_the_plain_cache(model: LlamaForCausalLM, chunk: int) -> None:
    ids = prompt(80, 2)
    plain = generate(model, ids, DynamicCache(), 16)
    cache = lossless_cache(model.config, when="during_prefill")
    assert torch.equal(generate(model, ids, cache, 16, prefill_chunk_size=chunk), plain)
    assert all(layer.state.body is not None for layer in cache.layers)


def test_the_layers_never_part(model: LlamaForCausalLM) -> None:
    """Chunks, single tokens and turns in any order: layers that see the same keep equally many."""
    cache = NexusQuantCache("balanced", config=model.config, policy=KeyNormPolicy(), **SMALL)
    for seed, tokens in enumerate((30, 3, 5, 40, 1, 2, 1, 1, 19, 27, 1, 60, 4, 1, 1)):
        logits(model, prompt(tokens, 2, seed), cache)
        assert len({layer.state.kept for layer in cache.layers}) == 1
    cache.compress()
    assert len({layer.state.kept for layer in cache.layers}) == 1
    assert cache.layers[0].state.kept < 0.7 * cache.layers[0].state.seen


def exact_layers(model: LlamaForCausalLM, cache: NexusQuantCache, tokens: int, chunk: int) -> list[float]:
    """Prefill, and return the exact bytes held after each update, in layers of ``chunk`` tokens."""
    sizes: list[float] = []
    update = cache.update

    def measured(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        held = update(keys, values, layer_idx, *args, **kwargs)
        exact = [layer.state.tail for layer in cache.layers if layer.state.tail is not None]
        layer_bytes = (keys.nbytes + values.nbytes) / keys.shape[2] * chunk
        sizes.append(sum(x.nbytes for pair in exact for x in pair) / layer_bytes)
        return held

    cache.update = measured
    for start in range(0, tokens, chunk):
        logits(model, prompt(tokens)[:, start : start + chunk], cache)
    return sizes


@pytest.mark.parametrize("chunk", [100, 400])
def test_about_one_layer_at_a_time_is_exact(chunk: int) -> None:
    """Besides the residual (8 of 400 tokens) of the others; in chunks the bound is one chunk."""
    model = tiny_llama(num_hidden_layers=6)
    peaks = {}
    for when in ("post_prefill", "during_prefill"):
        cache = NexusQuantCache("balanced", config=model.config, when=when, **SMALL)
        peaks[when] = max(exact_layers(model, cache, 400, chunk))
    residuals = 6 * (SMALL["residual_length"] + SMALL["flush_length"]) / chunk
    assert peaks["post_prefill"] == 6 * 400 / chunk
    assert peaks["during_prefill"] <= 1 + residuals


def test_the_peak_that_is_reported(model: LlamaForCausalLM) -> None:
    """One layer exact and two packed, against three exact ones; what attention was seen to do waits with them."""
    peaks = {}
    for when in ("post_prefill", "during_prefill"):
        cache = NexusQuantCache("balanced", config=model.config, when=when)
        generate(model, prompt(2000), cache, 2)
        peaks[when] = cache.memory_report().peak_bytes
        assert reachable_bytes(cache) == cache.memory_report().held_bytes
    dense, queries, far = 3 * 2 * 2 * 2000 * 16 * 4, 3 * 4 * 64 * 16 * 4, 3 * 2 * 2000 * 4
    assert peaks["post_prefill"] == dense + queries + far
    assert peaks["during_prefill"] < 0.55 * dense


def test_the_peak_is_that_of_all_layers_if_some_are_not_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer holds is noted when it changes; layers with a window stand between those that are encoded."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32}
    config = Gemma3TextConfig(
        num_hidden_layers=5, layer_types=kinds, sliding_window=16, intermediate_size=32, vocab_size=128, **sizes
    )
    model = Gemma3ForCausalLM(config).eval()
    note, held = Forward.note_peak, [0]

    def noted(forward: Forward, parts: list[Part], index: int | None = None) -> None:
        note(forward, parts, index)
        layers = storage_bytes([content(part) for part in parts])
        held.append(max(held[-1], layers + storage_bytes(forward.shared_content(parts))))
        assert forward.peak_bytes == held[-1]

    monkeypatch.setattr(Forward, "note_peak", noted)
    cache = NexusQuantCache("balanced", config=model.config, **SMALL)
    ids = prompt(400) % 128
    for start in range(0, 400, 100):
        logits(model, ids[:, start : start + 100], cache)
    assert len(held) > 4 * len(kinds)


# Long answers


class MeteredCodec(CountingCodec):
    """Notes how many tokens each call encodes; decodes to zeros, which is quicker."""

    def __init__(self, inner: VectorCodec, head_dim: int) -> None:
        super().__init__(inner, Counter())
        self.head_dim = head_dim
        self.encoded: list[int] = []

    def encode(self, vectors: Tensor, transform: VectorTransform) -> PackedVectors:
        self.encoded.append(vectors.shape[2])
        return super().encode(vectors, transform)

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Tensor:
        del transform
        return torch.zeros(*packed.scales.shape, self.head_dim)


class MeteredCache(NexusQuantCache):
    def make_codec(self, side: Any, head_dim: int, layer_idx: int) -> VectorCodec:
        return MeteredCodec(super().make_codec(side, head_dim, layer_idx), head_dim)


@pytest.mark.parametrize("preset", ["quant", "balanced"])
def test_a_long_answer_costs_the_bits_of_the_preset_and_is_encoded_once(preset: str) -> None:
    """4,000 tokens after a prompt of 2,000: one layer, fed as a model would feed it."""
    cache, settings = MeteredCache(preset, most_code_error=1e9), PRESETS[preset]  # its codec stores nothing of use
    feed(cache, *random_states((1, HEADS, 2000, HEAD_DIM), 0, torch.bfloat16), 0)
    keys, values = random_states((1, HEADS, 4000, HEAD_DIM), 1, torch.bfloat16)
    held, calls = [], []
    for step in range(4000):
        before = len(cache.layers[0].state.codecs[0].encoded)
        cache.update(keys[:, :, step : step + 1], values[:, :, step : step + 1], 0)
        calls.append(len(cache.layers[0].state.codecs[0].encoded) - before)
        if step in (991, 3999):  # with equally long tails
            held.append(cache.memory_report().held_bytes)
    bits = 8 * (held[1] - held[0]) / 3008 / (2 * HEADS * HEAD_DIM)
    layer = cache.layers[0]
    # The preset's bits, or those that a prompt too short for principal axes gets in their place.
    sides = [codec.inner.layout.bits_per_channel for codec in (layer.state.codecs[0], layer.state.codecs[1])]
    assert 0 <= sum(sides) - settings.key_bits - settings.value_bits < 1.5
    # Besides these, a byte of scale per vector; the buffers' spare room varies by a fraction of that.
    assert bits == pytest.approx(sum(sides) / 2 + 8 / HEAD_DIM, rel=0.02)
    assert calls[0] == 1  # the prompt, at the first step
    assert set(calls[1:]) == {0, 1}
    assert sum(calls[1:]) == (4000 - 1) // settings.flush_length
    for codec in (layer.state.codecs[0], layer.state.codecs[1]):
        assert codec.counter.fitted_rows == 1
        assert set(codec.encoded[1:]) == {settings.flush_length}
        assert sum(codec.encoded) == int(layer.state.body.positions.mean_tokens) + layer.state.evicted // HEADS
    candidates = 2000 - settings.sink_tokens - settings.residual_length
    assert layer.state.seen - layer.state.kept == candidates - ceil(settings.keep_ratio * candidates)
    assert layer.state.seen == 6000
