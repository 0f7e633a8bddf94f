"""Ways of running a model other than a plain `generate`: pipelines, threads, compilation, autocast, training."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from feeding import feed
from integration.tiny import (
    LosslessCache,
    balanced,
    fingerprint,
    generate,
    kept_mask,
    logits,
    lossless_cache,
    prompt,
    random_states,
    reachable_tensors,
    tiny_llama,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.generation import utils as generation_utils

from nexusquant_cache import CacheStateError, NexusQuantCache
from nexusquant_cache.layer.parts import part_of
from nexusquant_cache.policy import EvictionPolicy, KeyKeyPolicy, KeyNormPolicy, MeanKeyKeyPolicy
from nexusquant_cache.releases import CACHE


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def evicting(model: LlamaForCausalLM, **options: Any) -> LosslessCache:
    return lossless_cache(model.config, keep_ratio=0.4, **options)


# Pipelines

TEMPLATE = "{% for message in messages %}{{ message['content'] }} w3 {% endfor %}"
WORDS = ["<pad>", "<s>", "<unk>", *(f"w{index}" for index in range(3, 256))]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one word for each id, which pads on the left."""
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))  # noqa: S106
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        padding_side="left",
        chat_template=TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",  # noqa: S106 - not that kind of token
        bos_token="<s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )


def words(tokens: int, seed: int = 0) -> str:
    return " ".join(WORDS[index] for index in prompt(tokens, seed=seed)[0].tolist())


@pytest.fixture(scope="module")
def pipeline(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """Return a text-generation pipeline that answers with token ids."""
    made = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")

    def run(text: Any, cache: object, **options: Any) -> Any:
        settings = {"max_new_tokens": 12, "do_sample": False, "return_tensors": True} | options
        return made(text, **{CACHE: cache}, **settings)

    return run


@pytest.mark.parametrize("kind", ["string", "chat"])
def test_a_pipeline_is_generate(model: LlamaForCausalLM, tokenizer: Any, pipeline: Any, kind: str) -> None:
    """A string or a chat, with the cache as an argument of the call: the tokens of `generate`."""
    text, ids = words(60), tokenizer(words(60), return_tensors="pt").input_ids
    if kind == "chat":
        text = [{"role": "user", "content": words(60)}]
        ids = tokenizer.apply_chat_template(text, return_tensors="pt", return_dict=True).input_ids
        assert ids.shape == (1, 61)
    cache = balanced(model)
    given = pipeline(text, cache)[0]["generated_token_ids"]
    assert given == generate(model, ids, balanced(model))[0].tolist()
    assert cache.layers[0].state.kept < cache.get_seq_length()
    plain = pipeline(text, DynamicCache())[0]["generated_token_ids"]
    assert pipeline(text, lossless_cache(model.config))[0]["generated_token_ids"] == plain


def test_a_pipeline_over_a_padded_batch(model: LlamaForCausalLM, tokenizer: Any, pipeline: Any) -> None:
    """All prompts in one batch, with the mask stated: a row's answer is that of the row with its pads written out."""
    texts = [words(60), words(44, seed=1), words(53, seed=2)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch.attention_mask.sum(1).tolist() == [60, 44, 53]
    cache = balanced(model, attention_mask=batch.attention_mask)
    given = [row[0]["generated_token_ids"] for row in pipeline(texts, cache, batch_size=3)]
    assert cache.layers[0].state.kept < cache.get_seq_length()
    expected = balanced(model, attention_mask=batch.attention_mask)
    rows = generate(model, batch.input_ids, expected, attention_mask=batch.attention_mask)
    assert given == [row.tolist() for row in rows]
    plain = [row[0]["generated_token_ids"] for row in pipeline(texts, DynamicCache(), batch_size=3)]
    whole = lossless_cache(model.config, attention_mask=batch.attention_mask)
    assert [row[0]["generated_token_ids"] for row in pipeline(texts, whole, batch_size=3)] == plain


def test_prompts_one_after_the_other_need_a_cache_each(model: LlamaForCausalLM, pipeline: Any) -> None:
    """Without ``batch_size`` a pipeline hands one cache to prompt after prompt; a much shorter one is noticed."""
    texts = [words(60), words(30, seed=1)]
    with pytest.raises(CacheStateError, match="not its continuation"):
        pipeline(texts, balanced(model))
    alone = [pipeline(text, balanced(model)) for text in texts]
    assert alone[1][0]["generated_token_ids"][:30] == prompt(30, seed=1)[0].tolist()


# Threads


def test_streams_of_two_threads_at_once(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """One cache for each request: both stream what they would have said alone."""
    requests = [prompt(60), prompt(70, seed=1)]
    streamers = [TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60) for _ in requests]
    caches = [balanced(model) for _ in requests]

    def answer(index: int) -> None:
        generate(model, requests[index], caches[index], 20, streamer=streamers[index])

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    streamed = ["".join(streamer) for streamer in streamers]
    for thread in threads:
        thread.join()
    for index, ids in enumerate(requests):
        cache = balanced(model)
        text = generate(model, ids, cache, 20)
        assert streamed[index].split() == tokenizer.decode(text[0, ids.shape[1] :]).split()
        assert fingerprint(caches[index]) == fingerprint(cache)


# Compilation


@pytest.mark.slow
def test_a_compiled_model_says_the_same(model: LlamaForCausalLM) -> None:
    """`torch.compile(model.forward)`, two turns with eviction: the same tokens, and no compilation for each token."""
    import torch._dynamo  # noqa: PLC0415 - heavy
    from torch._dynamo.utils import counters  # noqa: PLC0415

    def converse(forward_of: LlamaForCausalLM, cache: NexusQuantCache) -> Tensor:
        text = generate(forward_of, prompt(60), cache, 24)
        return generate(forward_of, torch.cat([text, prompt(30, seed=1)], -1), cache, 24)

    compiled, plain_cache = tiny_llama(), balanced(model)
    expected = converse(model, plain_cache)
    torch._dynamo.reset()
    counters.clear()
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    try:
        # Beyond its limit of 8 versions of a frame torch falls silently back to eager; here that is an error.  Turns of
        # other lengths need 6 (torch 2.13), which leaves no room for versions that depend on what the cache holds.
        with torch._dynamo.config.patch(recompile_limit=6, fail_on_recompile_limit_hit=True):
            cache = balanced(model)
            assert torch.equal(converse(compiled, cache), expected)
            assert fingerprint(cache) == fingerprint(plain_cache)
            frames = counters["frames"]["total"]
            assert frames > 0
            assert torch.equal(converse(compiled, balanced(model)), expected)
            assert counters["frames"]["total"] == frames  # all that this conversation needs is there
    finally:
        torch._dynamo.reset()


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    plain = generate(model, prompt(60), DynamicCache())
    assert torch.equal(generate(model, prompt(60), lossless_cache(model.config)), plain)
    cache = balanced(model)
    text = generate(model, prompt(60), cache, 12)
    generate(model, torch.cat([text, prompt(30, seed=1)], -1), cache, 12)
    assert [x.dtype for x in part_of(cache.layers[0], 0).dense()] == [dtype, dtype]
    assert cache.layers[0].state.kept < cache.get_seq_length()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_autocast_gives_keys_and_values_of_two_dtypes(attention: str) -> None:
    """Each comes back in its own; without loss the tokens are those of the plain cache, up to roundings.

    The plain cache's attention rounds queries and keys to bfloat16, codes are read in float32.
    """
    model, caches, texts = tiny_llama(attention), [], []
    for make in (DynamicCache, lambda: lossless_cache(model.config), lambda: balanced(model)):
        cache = make()
        with torch.autocast("cpu", torch.bfloat16):
            text = generate(model, prompt(60), cache, 12)
            text = generate(model, torch.cat([text, prompt(30, seed=1)], -1), cache, 12)
        texts.append(text)
        caches.append(cache)
    assert torch.equal(texts[0][:, :72], texts[1][:, :72])
    assert (texts[0] != texts[1]).sum() <= (attention == "sdpa") * 4
    for cache in caches[1:]:
        assert [x.dtype for x in part_of(cache.layers[0], 0).dense()] == [torch.float32, torch.bfloat16]
        assert [x.dtype for x in cache.layers[0].state.sinks] == [torch.float32, torch.bfloat16]
    assert caches[2].layers[0].state.kept < caches[2].get_seq_length()


@pytest.mark.parametrize(
    "policy", [KeyKeyPolicy(), MeanKeyKeyPolicy(), KeyNormPolicy()], ids=lambda x: type(x).__name__
)
def test_autocast_does_not_reach_into_the_cache(model: LlamaForCausalLM, policy: EvictionPolicy) -> None:
    """Given the same keys and values it stores and returns the same: scores are as exact as without autocast."""
    for seed in range(5):
        keys, values = random_states((2, 2, 200, 16), seed)
        results = []
        for enabled in (False, True):
            cache = balanced(model, policy=policy, attention_mask=torch.ones(2, 200, dtype=torch.int64))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                feed(cache, keys, values, 0)
                if seed % 2:
                    cache.compress()
                feed(cache, keys[:, :, :1], values[:, :, :1], 0)
            layer = cache.layers[0]
            results.append((fingerprint(cache), [x.tolist() for x in (layer.keys, layer.values)]))
        assert results[0] == results[1]


# What else `generate` can be asked


def test_embeddings_in_place_of_tokens(model: LlamaForCausalLM) -> None:
    embeddings = model.get_input_embeddings()(prompt(60)).detach()
    mask = torch.ones(1, 60, dtype=torch.int64)
    for make in (balanced, evicting):
        expected, cache = make(model), make(model)
        text = generate(model, prompt(60), expected, 12)
        given = model.generate(
            inputs_embeds=embeddings, attention_mask=mask, **{CACHE: cache}, do_sample=False, max_new_tokens=12
        )
        assert torch.equal(given, text[:, 60:])
        assert fingerprint(cache) == fingerprint(expected)


def test_everything_that_generate_can_return(model: LlamaForCausalLM) -> None:
    eager = tiny_llama("eager")
    cache = balanced(eager)
    wanted = ["output_scores", "output_logits", "output_attentions", "output_hidden_states"]
    result = generate(eager, prompt(60), cache, 6, return_dict_in_generate=True, **dict.fromkeys(wanted, True))
    assert result[CACHE] is cache
    assert torch.equal(result.sequences, generate(model, prompt(60), balanced(model), 6))
    assert torch.equal(torch.stack(result.logits, 1).argmax(-1), result.sequences[:, 60:])
    # Attention weights are those of all tokens seen; evicted ones have none.
    assert [step[0].shape[-1] for step in result.attentions] == [*range(60, 66)]
    assert torch.equal((result.attentions[-1][0] != 0)[:, ::2, 0], kept_mask(cache, 0))
    assert cache.memory_report().kept_tokens < 60


def test_a_decoding_loop_of_ones_own_gets_the_cache(model: LlamaForCausalLM) -> None:
    """``custom_generate`` with the simplest loop there is: the tokens of `generate`."""
    received = []

    def loop(given: LlamaForCausalLM, input_ids: Tensor, **arguments: Any) -> Tensor:
        received.append(arguments[CACHE])
        new = input_ids
        for _ in range(12):
            new = logits(given, new, received[0])[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, new], -1)
        return input_ids

    cache = balanced(model)
    text = generate(model, prompt(60), cache, custom_generate=loop)
    assert received == [cache]
    assert torch.equal(text, generate(model, prompt(60), balanced(model), 12))


def test_use_cache_false_feeds_everything_again(model: LlamaForCausalLM) -> None:
    """transformers then gives the whole text to the cache at each step, whichever cache it is; nobody can want that."""
    for cache in (DynamicCache(), lossless_cache(model.config)):
        generate(model, prompt(60), cache, 4, use_cache=False)
        assert cache.get_seq_length() == 60 + 61 + 62 + 63


# Gradients and inference mode


def test_training_on_one_forward_ignores_the_cache(model: LlamaForCausalLM) -> None:
    """The first forward gets its own keys and values back, so gradients are those without a cache; what is stored has
    none, and can be copied.
    """
    gradients, model = [], copy.deepcopy(model).requires_grad_()
    for cache in (None, balanced(model)):
        model.zero_grad()
        model(prompt(60), **{CACHE: cache}, use_cache=cache is not None).logits.square().mean().backward()
        gradients.append([x.grad.clone() for x in model.parameters()])
    model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not any(x.requires_grad for x in reachable_tensors(cache))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # the name of 5.17
def test_gradient_checkpointing_sets_the_cache_aside() -> None:
    """transformers then trains without any cache, since each layer runs twice."""
    model = tiny_llama().train()
    model.gradient_checkpointing_enable()
    cache = balanced(model)
    given = model(prompt(60), **{CACHE: cache}).logits
    assert (cache.get_seq_length(), len(list(reachable_tensors(cache.layers)))) == (0, 0)
    assert torch.equal(given, tiny_llama()(prompt(60)).logits)


@pytest.mark.parametrize("tokens", [1, 3, 6, 9])
@pytest.mark.parametrize("then", [torch.no_grad, torch.enable_grad])
def test_a_cache_filled_in_inference_mode_goes_on_outside(model: LlamaForCausalLM, tokens: int, then: Any) -> None:
    """Tensors made in inference mode must not be written to outside of it, nor take part in training."""
    cache, expected = balanced(model), balanced(model)
    text = generate(model, prompt(60), expected, 12)
    with torch.inference_mode():
        for new in (text[:, :60], *text[:, 60 : 60 + tokens].split(1, dim=-1)):
            model(new, **{CACHE: cache})
    with then():
        for new in text[:, 60 + tokens : 71].split(1, dim=-1):
            result = model(new, **{CACHE: cache}).logits
        if result.requires_grad:
            result.sum().backward()
            model.zero_grad(set_to_none=True)
    assert torch.equal(result[:, -1].argmax(-1), text[:, -1])
    assert fingerprint(cache) == fingerprint(expected)


# A prefix for several questions


def test_a_compressed_prefix_serves_several_questions(model: LlamaForCausalLM) -> None:
    """Prefill once, compress, and ask copies: each answer is that of a cache which did the same steps for it alone."""
    prefix = balanced(model)
    logits(model, prompt(80), prefix)
    prefix.compress()
    before = fingerprint(prefix)
    assert prefix.layers[0].state.kept < 80
    for seed, tokens in ((1, 9), (2, 1), (3, 40)):
        question = torch.cat([prompt(80), prompt(tokens, seed=seed)], -1)
        clone, fresh = copy.deepcopy(prefix), balanced(model)
        logits(model, prompt(80), fresh)
        fresh.compress()
        assert torch.equal(generate(model, question, clone, 20), generate(model, question, fresh, 20))
        assert fingerprint(clone) == fingerprint(fresh)
    assert fingerprint(prefix) == before


# Deferred stopping: transformers reads whether to stop one step late, and takes the step too many back


class NoEvent:
    """An event of a device that never waits, as the CPU; torch has none for it."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def one_step_more(model: LlamaForCausalLM, text: Tensor, cache: NexusQuantCache) -> list[object]:
    """Return the state after another generation step.

    While recording, tokens are encoded at the end of a step, and otherwise at the beginning of the next.
    """
    clone = copy.deepcopy(cache)
    logits(model, text[:, -1:], clone)
    return fingerprint(clone)


@pytest.mark.parametrize("make", [balanced, evicting])
@pytest.mark.parametrize("stop_after", [None, 2, 3, 4, 5, 9])
def test_deferred_stopping_leaves_no_trace(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, make: Any, stop_after: int | None
) -> None:
    """It runs on MPS only; here its own code runs on the CPU."""
    # Random tokens, so that the one that ends the answer is new.
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_k": 0, "pad_token_id": 0}

    def answer(cache: NexusQuantCache) -> Tensor:
        torch.manual_seed(1)
        return generate(model, prompt(60), cache, 16, **options)

    full = answer(make(model))[0, 60:].tolist()
    if stop_after is not None:
        options["eos_token_id"] = full[stop_after]
        assert options["eos_token_id"] not in full[:stop_after]
    plain, deferred = make(model), make(model)
    expected, used = answer(plain), []
    assert expected.shape[1] == 60 + (16 if stop_after is None else stop_after + 1)
    monkeypatch.setattr(torch, "Event", NoEvent)
    monkeypatch.setattr(
        generation_utils.DeferredStopCheck,
        "is_supported",
        staticmethod(lambda _, cache, *__, **___: used.append(cache.is_croppable) or cache.is_croppable),
    )
    assert torch.equal(answer(deferred), expected)
    assert used == [True]
    assert deferred.get_seq_length() == expected.shape[1] - 1
    assert one_step_more(model, expected, deferred) == one_step_more(model, expected, plain)


@pytest.mark.parametrize("make", [balanced, evicting])
@pytest.mark.parametrize("steps", [1, 2, 5, 13])
def test_the_calls_of_deferred_stopping_by_hand(model: LlamaForCausalLM, make: Any, steps: int) -> None:
    """Prefill, activate, then `crop(0)` before each step, and `crop(-1)` for the step too many."""
    plain, deferred = make(model), make(model)
    text = generate(model, prompt(60), plain, steps + 1)
    logits(model, prompt(60), deferred)
    deferred.activate_past_recording()
    for new in text[:, 60:].split(1, dim=-1):
        deferred.crop(0)
        last = logits(model, new, deferred)
    deferred.crop(-1)
    for layer in deferred.layers:
        layer.record_past = False
    assert one_step_more(model, text, deferred) == one_step_more(model, text, plain)
    assert torch.equal(logits(model, text[:, -1:], deferred), last)
