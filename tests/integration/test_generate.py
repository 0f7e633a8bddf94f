"""Whole conversations on tiny random models: what `generate` yields, compared with plain caches."""

import copy
from typing import Any

import pytest
import torch
from integration.tiny import (
    ROUNDING,
    SMALL,
    fingerprint,
    generate,
    kept_positions,
    logits,
    lossless_cache,
    masks,
    prompt,
    reachable_bytes,
    tiny_llama,
    visible_mask,
)
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from nexusquant_cache import CacheStateError, NexusQuantCache, ScoreInputs, UnsupportedError, WindowAttentionPolicy
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.parts import part_of
from nexusquant_cache.releases import CACHE

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 50},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "chunked": {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_keeping_all_without_loss_is_the_plain_cache(
    model: LlamaForCausalLM, mode: str, batch: int, with_config: bool
) -> None:
    """The same tokens, though all but the sinks and the tail went through the codec."""
    ids, results = prompt(60, batch), []
    cache = lossless_cache(model.config if with_config else None)
    for each in (DynamicCache(), cache):
        torch.manual_seed(1)
        results.append(generate(model, ids, each, **MODES[mode]))
    assert torch.equal(*results)
    assert all(layer.state.body is not None for layer in cache.layers)


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("full_ids", [True, False])
def test_a_conversation_without_loss_is_the_plain_cache(
    model: LlamaForCausalLM, with_config: bool, full_ids: bool
) -> None:
    """Three turns of several new tokens, given as the whole text or as new tokens with the whole mask."""
    texts = []
    for cache in (DynamicCache(), lossless_cache(model.config if with_config else None)):
        text = generate(model, prompt(50), cache, 10)
        for turn in range(2):
            text = torch.cat([text, prompt(30, seed=1 + turn)], -1)
            new = text if full_ids else text[:, cache.get_seq_length() :]
            answer = generate(model, new, cache, 10, attention_mask=torch.ones_like(text))
            text = torch.cat([text, answer[:, -10:]], -1)
        texts.append(text)
    assert torch.equal(*texts)


def test_eviction_without_loss_is_a_mask_on_the_plain_cache(model: LlamaForCausalLM) -> None:
    """Evicted tokens, other ones in each layer and head, are merely out of sight; all else stays where it was.

    Turns of several tokens find a wrong offset of the mask, which single tokens cannot.
    """
    cache, plain = lossless_cache(keep_ratio=0.3), DynamicCache()
    turns = [60, 1, 1, 7, 1, 6, 1, 40, 1, 1, 9]
    for seed, tokens in enumerate(turns):
        ids = prompt(tokens, batch=2, seed=seed)
        given = logits(model, ids, cache)
        hidden = [visible_mask(cache, index, tokens, 2) for index in range(2)]
        with masks(model, hidden):
            expected = logits(model, ids, plain)
        assert (given - expected).abs().max() < ROUNDING
    assert len({tuple(row.tolist()) for index in range(2) for row in kept_positions(cache, index).flatten(0, 1)}) > 3
    assert cache.get_seq_length() == sum(turns)
    assert cache.layers[0].state.kept < 0.6 * sum(turns)


def test_the_reference_of_the_last_test_sees_a_difference(sdpa: LlamaForCausalLM) -> None:
    """Eviction matters to these models, so equality under the mask says something."""
    cache, plain = lossless_cache(keep_ratio=0.3), DynamicCache()
    for tokens in (60, 1):
        given, expected = (logits(sdpa, prompt(tokens, seed=tokens), each) for each in (cache, plain))
    assert (given - expected).abs().max() > 100 * ROUNDING


@pytest.mark.parametrize("preset", ["quant", "balanced"])
def test_eager_is_sdpa(preset: str) -> None:
    results = [
        generate(model, prompt(80, 2), NexusQuantCache(preset, config=model.config, **SMALL), 24)
        for model in (tiny_llama("eager"), tiny_llama("sdpa"))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("preset", ["quant", "balanced"])
def test_a_batch_of_two_is_two_batches_of_one(sdpa: LlamaForCausalLM, preset: str) -> None:
    ids = prompt(80, 2)
    make = lambda: NexusQuantCache(preset, config=sdpa.config, **SMALL)  # noqa: E731 - short and used twice
    together = generate(sdpa, ids, make(), 24)
    alone = [generate(sdpa, row[None], make(), 24) for row in ids]
    assert torch.equal(together, torch.cat(alone))


def test_a_prompt_too_short_to_compress_stays_exact(model: LlamaForCausalLM) -> None:
    """Sinks, residual and fewer than 128 others: 147 tokens in all, the generated ones included."""
    cache = NexusQuantCache("max", config=model.config)
    plain = generate(model, prompt(130), DynamicCache(), 14)
    assert torch.equal(generate(model, prompt(130), cache, 14), plain)
    assert all(layer.state.body is None for layer in cache.layers)
    assert cache.layers[0].state.kept == cache.get_seq_length() == 143
    assert cache.memory_report().compression_factor == 0.5  # float32, against 16 bit


def test_a_long_answer_to_a_short_prompt_is_coded_and_not_evicted(sdpa: LlamaForCausalLM) -> None:
    cache = NexusQuantCache("max", config=sdpa.config, **SMALL)
    generate(sdpa, prompt(12), cache, 100)
    for layer in cache.layers:
        assert layer.state.kept == layer.state.seen == 111
        assert layer.state.body is not None
        assert layer.state.tail_tokens <= SMALL["residual_length"] + SMALL["flush_length"]
    assert reachable_bytes(cache) == cache.memory_report().held_bytes


def test_what_is_held_after_generating(sdpa: LlamaForCausalLM) -> None:
    cache = NexusQuantCache("balanced", config=sdpa.config, **SMALL)
    text = generate(sdpa, prompt(200), cache, 40)
    assert reachable_bytes(cache) == cache.memory_report().held_bytes
    generate(sdpa, torch.cat([text, prompt(50, seed=1)], -1), cache, 40)
    report = cache.memory_report()
    assert reachable_bytes(cache) == report.held_bytes
    assert report.dense_bytes == report.seen_tokens * 2 * 2 * 2 * 16 * 2
    assert report.seen_tokens == 200 + 40 + 50 + 40 - 1
    assert report.kept_tokens < 0.7 * report.seen_tokens


def test_the_cache_as_a_sequence_of_layers(sdpa: LlamaForCausalLM) -> None:
    cache = NexusQuantCache("balanced", config=sdpa.config, **SMALL)
    assert (len(cache), cache.get_seq_length()) == (2, 0)
    result = generate(sdpa, prompt(60), cache, 5, return_dict_in_generate=True)
    assert result[CACHE] is cache
    assert (len(cache), cache.get_seq_length(), cache.get_seq_length(1)) == (2, 64, 64)
    assert cache.is_sliding == [False, False]
    assert not cache.is_compileable
    with pytest.raises(UnsupportedError, match="has evicted tokens"):
        next(iter(cache))
    whole = NexusQuantCache("quant", config=sdpa.config, **SMALL)
    generate(sdpa, prompt(60), whole, 5)
    for (keys, values, window), layer in zip(whole, whole.layers, strict=True):
        assert keys.shape == values.shape == (1, 2, 64, 16)
        assert torch.equal(keys, layer.keys)
        assert window is None
    assert DynamicCache(list(whole)).get_seq_length() == 64
    lazy = NexusQuantCache("balanced")
    assert len(lazy) == 0
    generate(sdpa, prompt(60), lazy, 2)
    assert len(lazy) == 2


def test_a_copy_goes_on_like_the_original(sdpa: LlamaForCausalLM) -> None:
    cache = NexusQuantCache("balanced", config=sdpa.config, **SMALL)
    text = generate(sdpa, prompt(100), cache, 5)
    clone, text = copy.deepcopy(cache), torch.cat([text, prompt(7, seed=1)], -1)
    assert torch.equal(generate(sdpa, text, cache, 30), generate(sdpa, text, clone, 30))
    assert fingerprint(cache) == fingerprint(clone)


# Layers of other kinds

SLIDING_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.1,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(num_hidden_layers=2, **SLIDING_TINY))


def gemma3() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(num_hidden_layers=3, layer_types=KINDS, **SLIDING_TINY))


@pytest.mark.parametrize("make", [mistral, gemma3])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_layers_with_a_sliding_window_are_left_to_transformers(make: Any, attention: str) -> None:
    model = make().eval()
    model.set_attn_implementation(attention)
    cache, texts = lossless_cache(model.config), []
    for each in (DynamicCache(config=model.config), cache):
        text = generate(model, prompt(50), each, 10)
        text = torch.cat([text, prompt(6, seed=1)], -1)
        texts.append(generate(model, text, each, 10))
    assert torch.equal(*texts)
    plain = DynamicCache(config=model.config)
    assert cache.is_sliding == plain.is_sliding
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        if layer.is_sliding:
            assert type(layer) is type(other)
        else:
            assert type(layer) is NexusQuantLayer
            assert layer.state.body is not None


def test_eviction_in_a_hybrid_model() -> None:
    model = gemma3().eval()
    cache = NexusQuantCache("balanced", config=model.config, **SMALL)
    text = generate(model, prompt(100), cache, 10)
    generate(model, torch.cat([text, prompt(9, seed=1)], -1), cache, 10)
    sliding, ours, _ = cache.memory_report().layers
    assert (sliding.kept_tokens, ours.kind) == (7, "compressed")
    assert ours.kept_tokens < 0.7 * ours.seen_tokens
    factor = ours.dense_bytes / ours.held_bytes
    assert f"of these the layers that are compressed: {ours.held_bytes / 1024:.1f} KiB" in str(cache.memory_report())
    assert f": {factor:.1f}x\n" in str(cache.memory_report())
    assert reachable_bytes(cache) == cache.memory_report().held_bytes


@pytest.mark.parametrize("make", [mistral, gemma3])
def test_the_prompt_is_not_held_behind_a_sliding_window(make: Any) -> None:
    model = make().eval()
    cache = NexusQuantCache("quant", config=model.config, **SMALL)
    with torch.no_grad():
        model(prompt(100), **{CACHE: cache})
    for layer in (each for each in cache.layers if each.is_sliding):
        assert layer.keys.shape[-2] == SLIDING_TINY["sliding_window"] - 1
        for states in (layer.keys, layer.values):
            assert states.untyped_storage().nbytes() == states.nbytes


class KeysAreValues(DynamicSlidingWindowLayer):
    """A window with one tensor for both, as DeepSeek V4 has it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = super().update(key_states, value_states, *args, **kwargs)
        self.values = self.keys
        return found


def test_a_window_with_one_tensor_for_keys_and_values_still_has_one() -> None:
    layer, states = KeysAreValues(sliding_window=8), torch.randn(1, 2, 30, 16)
    part = part_of(layer, 0)
    layer.update(states, states)
    part.trim(30)
    assert layer.values is layer.keys
    assert layer.keys.untyped_storage().nbytes() == 7 * 2 * 16 * 4
    assert torch.equal(layer.keys, states[:, :, -7:])


def test_a_policy_is_shown_as_many_queries_as_it_looks_at(sdpa: LlamaForCausalLM) -> None:
    shown = []

    class Wide(WindowAttentionPolicy):
        def score(self, inputs: ScoreInputs) -> torch.Tensor:
            assert inputs.queries is not None
            shown.append(inputs.queries.shape[2])
            return super().score(inputs)

    for window in (100, 5):
        cache = NexusQuantCache("max", config=sdpa.config, policy=Wide(observation_window=window), **SMALL)
        generate(sdpa, prompt(150), cache, 3)
    layers = sdpa.config.num_hidden_layers
    assert shown == [100] * layers + [64] * layers


# Misuse


@pytest.mark.parametrize("tokens", [2, 30, 63])
def test_a_prompt_of_half_the_length_or_less_is_refused(sdpa: LlamaForCausalLM, tokens: int) -> None:
    """It reaches the cache as a forward without tokens; after `reset` the cache is as good as new."""
    cache, fresh = (NexusQuantCache("balanced", config=sdpa.config, **SMALL) for _ in range(2))
    generate(sdpa, prompt(120), cache, 9)
    before = fingerprint(cache)
    with pytest.raises(CacheStateError, match=r"has seen 128:.*cache.reset\(\)"):
        generate(sdpa, prompt(tokens, seed=1), cache)
    assert fingerprint(cache) == before
    cache.reset()
    other = prompt(90, seed=1)
    assert torch.equal(generate(sdpa, other, cache, 20), generate(sdpa, other, fresh, 20))
    assert fingerprint(cache) == fingerprint(fresh)
    assert cache.memory_report() == fresh.memory_report()
