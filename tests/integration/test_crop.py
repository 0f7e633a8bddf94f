"""Taking tokens back: `crop`, past recording, and what assisted decoding makes of them."""

import copy
import warnings
from typing import Any

import pytest
import torch
from integration.tiny import (
    ROUNDING,
    SMALL,
    TINY,
    balanced,
    fingerprint,
    generate,
    kept_mask,
    logits,
    lossless_cache,
    masks,
    prompt,
    random_states,
    reachable_bytes,
    tiny_llama,
    visible_mask,
)
from torch import Tensor
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from grids import combined
from nexusquant_cache import KeyKeyPolicy, NexusQuantCache
from nexusquant_cache.errors import UnsupportedError


def grown(model: LlamaForCausalLM, cache: Any, steps: int = 15) -> Any:
    """Give a cache a prompt of 60 tokens and some single tokens."""
    logits(model, prompt(60), cache)
    for step in range(steps):
        logits(model, prompt(1, seed=step), cache)
    return cache


@combined(preset=["quant", "balanced", "max"], tokens=[1, 5, 30], when=["post_prefill", "during_prefill"])
def test_a_recorded_rollback_leaves_no_trace(model: LlamaForCausalLM, preset: str, tokens: int, when: str) -> None:
    """After crop(-n) the same tokens get the same logits, bit for bit, and so does what follows."""
    cache = grown(model, NexusQuantCache(preset, config=model.config, when=when, **SMALL))
    cache.activate_past_recording()
    cache.crop(0)  # whatever was due before
    before = fingerprint(cache)
    candidates = prompt(tokens, seed=9)
    first = logits(model, candidates, cache)
    cache.crop(-tokens)
    assert fingerprint(cache) == before
    assert torch.equal(logits(model, candidates, cache), first)


def test_while_recording_nothing_is_encoded_before_it_is_accepted(model: LlamaForCausalLM) -> None:
    """A tail that is due to be encoded waits for the crop, which encodes what is left."""
    cache = grown(model, balanced(model), 20)
    cache.activate_past_recording()
    cache.crop(0)
    coded = cache.layers[0].state.body.positions.tokens
    for accepted, rejected in ((5, 3), (9, 0), (2, 8)):
        logits(model, prompt(accepted + rejected, seed=accepted), cache)
        assert cache.layers[0].state.body.positions.tokens == coded
        cache.crop(-rejected)
        assert cache.layers[0].state.tail_tokens <= SMALL["residual_length"] + SMALL["flush_length"]
        coded = cache.layers[0].state.body.positions.tokens
    assert cache.get_seq_length() == 60 + 20 + 16


def test_candidates_are_never_evicted_and_a_prompt_is(model: LlamaForCausalLM) -> None:
    """Of what is fed while recording, the first forward is the prompt (with its first candidates)."""
    cache = balanced(model)
    cache.activate_past_recording()
    logits(model, prompt(60), cache)
    assert cache.layers[0].state.kept == 60
    cache.crop(-4)
    evicted = cache.layers[0].state.seen - cache.layers[0].state.kept
    assert evicted > 20
    for seed in range(4):
        logits(model, prompt(20, seed=seed), cache)
        cache.crop(-3)
    assert cache.layers[0].state.seen - cache.layers[0].state.kept == evicted


def test_going_on_without_crop_ends_the_recording(model: LlamaForCausalLM) -> None:
    """An ordinary turn after an assisted one is compressed as usual."""
    cache, usual = balanced(model), balanced(model)
    cache.activate_past_recording()
    logits(model, prompt(60), cache)
    cache.crop(0)
    logits(model, prompt(60), usual)
    usual.compress()
    for each in (cache, usual):
        for tokens in (50, 1, 1):
            logits(model, prompt(tokens, seed=tokens), each)
    assert not any(layer.record_past for layer in cache.layers)
    assert cache.layers[0].state.kept == usual.layers[0].state.kept < 0.7 * cache.layers[0].state.seen
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, usual.layers, strict=True))


@pytest.mark.parametrize("tokens", [3, 12, 25, 70, 77, 80])
def test_cut_anywhere_without_loss_or_eviction_it_is_the_plain_cache(model: LlamaForCausalLM, tokens: int) -> None:
    """Into the tail, the generated codes, the prompt's codes, the sinks, and to nothing."""
    cache, plain = (grown(model, each, 20) for each in (lossless_cache(model.config), DynamicCache()))
    for each in (cache, plain):
        each.crop(-tokens)
    assert cache.get_seq_length() == plain.get_seq_length() == 80 - tokens
    for turn in (7, 1, 30, 1, 1, 1, 1, 1):
        given, expected = (logits(model, prompt(turn, seed=turn), each) for each in (cache, plain))
        assert (given - expected).abs().max() < ROUNDING
    assert reachable_bytes(cache) == cache.memory_report().held_bytes


@pytest.mark.parametrize("tokens", [12, 30, 50, 66])
def test_cut_where_tokens_were_evicted_it_is_a_mask_on_the_plain_cache(model: LlamaForCausalLM, tokens: int) -> None:
    """Heads are left with what they have before the cut, and nothing is said."""
    cache, plain = lossless_cache(keep_ratio=0.4, policy=KeyKeyPolicy()), DynamicCache()

    def both(turn: int, seed: int) -> Tensor:
        ids = prompt(turn, seed=seed)
        given = logits(model, ids, cache)
        with masks(model, [visible_mask(cache, index, turn, 2) for index in range(2)]):
            return (given - logits(model, ids, plain)).abs().max()

    for turn in (60, *[1] * 15):
        both(turn, turn)
    before = [kept_mask(cache, index) for index in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.crop(-tokens)
    plain.crop(-tokens)
    for index, held in enumerate(before):
        assert torch.equal(kept_mask(cache, index), held[..., :-tokens])
    for turn in (7, 1, 1):
        assert both(turn, turn) < ROUNDING
    assert reachable_bytes(cache) == cache.memory_report().held_bytes


def test_a_crop_encodes_nothing_anew(model: LlamaForCausalLM) -> None:
    """The codes that are left are those that were there."""
    cache = grown(model, balanced(model), 30)
    words = [words_of(layer) for layer in cache.layers]
    cache.crop(-20)
    for layer, before in zip(cache.layers, words, strict=True):
        for left, whole in zip(words_of(layer), before, strict=True):
            assert 0 < len(left) < len(whole)
            assert torch.equal(left, whole[: len(left)])


def words_of(layer: Any) -> list[Tensor]:
    """Return the words of the keys of each head."""
    stored, positions = layer.state.body.keys.words.stored(), layer.state.body.positions
    if positions.counts is None:
        return [x.clone() for x in stored.flatten(0, 1)]
    return list(stored.split((positions.counts.flatten() + positions.dense).tolist()))


def test_a_prompt_taken_back_before_it_was_compressed(model: LlamaForCausalLM) -> None:
    """A later turn that is cropped away leaves the flush of generated tokens where it was; if it was not coded yet."""
    cache = grown(model, balanced(model, when="post_prefill"), 14)
    twin = copy.deepcopy(cache)
    logits(model, prompt(30, seed=3), cache)
    cache.crop(-30)
    assert fingerprint(cache) == fingerprint(twin)
    assert not cache.layers[0].state.turn.is_pending


def test_croppable_says_so() -> None:
    cache = NexusQuantCache("balanced", config=tiny_llama().config)
    assert cache.is_croppable


# Assisted decoding


def lookup_prompt() -> Tensor:
    """Return ids that repeat themselves, so that candidates are found."""
    return torch.cat([prompt(1), prompt(20, seed=1).repeat(1, 4)], 1)


@pytest.mark.parametrize("mode", ["lookup", "assistant", "itself"])
def test_assisted_without_loss_is_greedy(model: LlamaForCausalLM, mode: str) -> None:
    ids = lookup_prompt()
    expected = generate(model, ids, DynamicCache(), 40)
    options: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": tiny_llama(model.config._attn_implementation, num_hidden_layers=1)},
        "itself": {"assistant_model": tiny_llama(model.config._attn_implementation)},
    }[mode]
    cache = lossless_cache(model.config)
    assert torch.equal(generate(model, ids, cache, 40, **options), expected)
    assert all(layer.state.body is not None for layer in cache.layers)
    assert cache.get_seq_length() == expected.shape[1] - 1


@pytest.mark.parametrize("mode", ["lookup", "assistant"])
def test_assisted_with_eviction_goes_on_in_a_second_turn(model: LlamaForCausalLM, mode: str) -> None:
    options: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": tiny_llama(model.config._attn_implementation, num_hidden_layers=1)},
    }[mode]
    cache = balanced(model)
    text = generate(model, lookup_prompt(), cache, 30, **options)
    kept = cache.layers[0].state.kept
    assert kept < 0.75 * cache.get_seq_length()
    # transformers 5.23 feeds an assisted second turn whole, the first turn again included, to any cache.
    text = generate(model, torch.cat([text, prompt(40, seed=2)], 1), cache, 20)
    assert cache.get_seq_length() == text.shape[1] - 1
    assert cache.layers[0].state.kept < kept + 50
    assert reachable_bytes(cache) == cache.memory_report().held_bytes


def test_forward_after_forward_without_crop_frees_what_is_coded() -> None:
    """A cache that records and is never cropped behaves as one that does not record."""
    cache = NexusQuantCache("quant", **SMALL)
    cache.activate_past_recording()  # no layers yet: nothing to activate
    cache.update(*random_states((1, 2, 60, 16), 0), 0)
    cache.activate_past_recording()
    for seed in range(3):
        cache.update(*random_states((1, 2, 1, 16), seed), 0)
    assert cache.layers[0].state.body is not None


def test_what_slid_out_of_a_window_does_not_come_back() -> None:
    """transformers' class goes on without those tokens: logits were wrong, and nobody said so."""
    config = Gemma2Config(**TINY, head_dim=16, sliding_window=12, layer_types=["sliding_attention", "full_attention"])
    model = Gemma2ForCausalLM(config).eval()
    cache = NexusQuantCache("quant", config=config, **SMALL)
    logits(model, prompt(40), cache)
    cache.activate_past_recording()
    logits(model, prompt(3, seed=1), cache)
    with pytest.raises(UnsupportedError, match=r"newest 4 of 43 tokens: layer 0 .* of the 11 .* 1 are gone\. Call"):
        cache.crop(-4)
    assert cache.get_seq_length() == 43
    again = copy.deepcopy(cache)
    cache.crop(-3)
    found = logits(model, prompt(3, seed=1), cache)
    again.crop(-2)
    assert torch.allclose(logits(model, prompt(3, seed=1)[:, 1:], again), found[:, 1:], atol=ROUNDING)
