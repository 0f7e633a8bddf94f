"""`compressed_generation`: generation inside the block is generation with a cache that is passed."""

import copy
import gc
import importlib
import pickle
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integration.families import build, inputs
from integration.tiny import SMALL, TINY, LosslessCodec, balanced, fingerprint, generate, prompt, tiny_llama
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ContinuousBatchingConfig,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nexusquant_cache import (
    CacheStateError,
    KeyNormPolicy,
    NexusQuantCache,
    NexusQuantError,
    OptionError,
    UnsupportedError,
    attention,
)
from nexusquant_cache.dropin import compressed_generation
from nexusquant_cache.releases import CACHE, CACHE_NAMES

# `generate` warns about its own settings once it makes drafts.
LOSSLESS = "nexusquant_cache.NexusQuantCache.make_codec", lambda *given: LosslessCodec(given[2])
DRAFTS = pytest.mark.filterwarnings("ignore:Passing `generation_config` together")


@pytest.fixture(autouse=True)
def _no_hook_stays(sdpa: LlamaForCausalLM) -> Iterator[None]:
    """Whatever a test does, the model has no hooks when it is over."""
    yield
    assert hooks_of(sdpa) == 0


@pytest.fixture(autouse=True)
def _annotations(request: pytest.FixtureRequest) -> None:
    """Check annotations in all tests but the eager half of those in two halves: it takes longer than the rest."""
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("model") == "eager":
        request.getfixturevalue("unchecked")


def warns_of(name: str) -> AbstractContextManager[object]:
    """Expect that transformers itself warns of the name of an argument, if it is the old one."""
    return nullcontext() if name == CACHE else pytest.warns(FutureWarning, match=f"`{name}` is deprecated")


def hooks_of(model: nn.Module) -> int:
    tables = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def assistant_of(model: PreTrainedModel, noise: float = 0.03) -> PreTrainedModel:
    """Return a noisy copy of a model, which drafts four tokens at a time and guesses some of them."""
    assistant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in assistant.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


def repetitive(tokens: int) -> Tensor:
    """Return a prompt that ends by saying something twice."""
    ids = prompt(tokens)
    ids[:, -18:] = ids[:, -36:-18].clone()
    return ids


def padded(pads: tuple[int, ...], tokens: int = 60) -> tuple[Tensor, Tensor]:
    """Return a batch whose rows begin with so many pads, and its mask."""
    ids, mask = prompt(tokens, len(pads)), torch.ones(len(pads), tokens, dtype=torch.long)
    for row, count in enumerate(pads):
        ids[row, :count], mask[row, :count] = 0, 0
    return ids, mask


def run(model: PreTrainedModel, ids: Tensor, cache: object, options: dict[str, Any]) -> Tensor:
    """Generate, always in the same random state."""
    torch.manual_seed(1)
    return generate(model, ids, cache, **options)


def check_against_passed(
    model: PreTrainedModel, ids: Tensor, preset: str, settings: dict[str, Any], **options: Any
) -> NexusQuantCache:
    """Check that the block yields the tokens and the cache of a cache that is passed, and return it."""
    mask = options.get("attention_mask", torch.ones_like(ids))
    passed = NexusQuantCache(preset, config=model.config, attention_mask=mask, **settings)
    expected = run(model, ids, passed, options)
    with compressed_generation(model, preset, **settings) as compressed:
        assert torch.equal(run(model, ids, None, options), expected)
    if all(not hasattr(layer, "sliding_window") for layer in passed.layers):
        assert fingerprint(compressed.cache) == fingerprint(passed)
    assert compressed.cache.memory_report().layers == passed.memory_report().layers
    return compressed.cache


MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (2, {}),
    "sampled": (2, {"do_sample": True, "top_k": 50}),
    "several": (1, {"do_sample": True, "num_return_sequences": 3}),
    "beams": (2, {"num_beams": 3}),
    "sampled beams": (1, {"num_beams": 2, "do_sample": True}),
    "chunked": (2, {"prefill_chunk_size": 16}),
    "chunked, one token left": (1, {"prefill_chunk_size": 59}),
    "prompt lookup": (1, {"prompt_lookup_num_tokens": 4}),
    "assisted": (1, {"assistant_model": True, "tokens": 20}),
}


@DRAFTS
@pytest.mark.parametrize(
    ("preset", "when"), [("quant", "post_prefill"), ("balanced", "post_prefill"), ("balanced", "during_prefill")]
)
@pytest.mark.parametrize("mode", MODES)
def test_a_block_is_a_cache_that_is_passed(model: LlamaForCausalLM, mode: str, preset: str, when: str) -> None:
    batch, options = MODES[mode]
    if "assistant_model" in options:
        options = options | {"assistant_model": assistant_of(model)}
    ids = repetitive(60) if batch == 1 else prompt(60, batch)
    cache = check_against_passed(model, ids, preset, SMALL | {"when": when}, **options)
    assert cache.layers[0].state.body is not None
    assert (cache.layers[0].state.kept < cache.layers[0].state.seen) == (preset == "balanced")


@DRAFTS
@pytest.mark.parametrize("options", [{"assistant_model": "itself"}, {"assistant_early_exit": 1}], ids=["self", "exit"])
def test_drafts_of_the_model_itself_cost_no_token(
    sdpa: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """The drafts get compressed caches too; without loss, they and the model say what they say without any."""
    monkeypatch.setattr(*LOSSLESS)
    model = assistant_of(sdpa, noise=0)
    if "assistant_model" in options:
        options = {"assistant_model": model}
    expected = generate(model, prompt(60), None, 20)
    with compressed_generation(model, "quant", **SMALL) as compressed:
        assert torch.equal(generate(model, prompt(60), None, 20, **options), expected)
    assert all(layer.state.body is not None for layer in compressed.cache.layers)


@DRAFTS
def test_an_assistant_may_have_a_block_of_its_own(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*LOSSLESS)
    assistant = assistant_of(model)
    expected = generate(model, prompt(60), None, 20)
    with (
        compressed_generation(model, "quant", **SMALL) as main,
        compressed_generation(assistant, "quant", **SMALL) as draft,
    ):
        assert torch.equal(generate(model, prompt(60), None, 20, assistant_model=assistant), expected)
    for compressed in (main, draft):
        assert all(layer.state.body is not None for layer in compressed.cache.layers)


@pytest.mark.parametrize(
    ("pads", "options"),
    [
        ((0, 1, 11), {}),
        ((0, 25, 48), {"num_beams": 2}),
        ((5, 0), {"do_sample": True, "num_return_sequences": 2}),
        ((0, 3, 40), {"prefill_chunk_size": 16}),  # a row whose first chunks are nothing but pads
        ((50, 0), {"prefill_chunk_size": 59}),
        ((7,), {"prompt_lookup_num_tokens": 3}),
    ],
)
def test_padding_is_seen_in_the_mask(model: LlamaForCausalLM, pads: tuple[int, ...], options: dict[str, Any]) -> None:
    ids, mask = padded(pads)
    check_against_passed(model, ids, "balanced", SMALL, attention_mask=mask, **options)


def test_padding_is_seen_in_each_chunk_while_compressing(sdpa: LlamaForCausalLM) -> None:
    ids, mask = padded((0, 3, 40), 70)
    options: dict[str, Any] = {"attention_mask": mask, "prefill_chunk_size": 20}
    check_against_passed(sdpa, ids, "balanced", SMALL | {"when": "during_prefill", "min_tokens": 8}, **options)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_prompt_without_mask_has_no_padding(sdpa: LlamaForCausalLM, batch: int) -> None:
    """Also where a cache that is passed could not be sure of it: rows that begin with different tokens."""
    ids = prompt(60, batch)
    ids[:, 0] += torch.arange(batch)
    with compressed_generation(sdpa, "balanced", **SMALL) as compressed:
        sdpa.generate(ids, max_new_tokens=5, do_sample=False)
    assert compressed.cache.layers[0].state.kept < 0.7 * compressed.cache.layers[0].state.seen


def test_embeddings_in_place_of_ids(sdpa: LlamaForCausalLM) -> None:
    embeddings = sdpa.get_input_embeddings()(prompt(60, 2)).detach()
    passed = NexusQuantCache("balanced", config=sdpa.config, **SMALL)
    expected = sdpa.generate(inputs_embeds=embeddings, **{CACHE: passed}, max_new_tokens=9, do_sample=False)
    with compressed_generation(sdpa, "balanced", **SMALL) as compressed:
        given = sdpa.generate(inputs_embeds=embeddings, max_new_tokens=9, do_sample=False)
    assert torch.equal(given, expected)
    assert fingerprint(compressed.cache) == fingerprint(passed)


def sliding() -> PreTrainedModel:
    return small(MistralForCausalLM, MistralConfig, num_hidden_layers=2)


def mixed() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    return small(Gemma3ForCausalLM, Gemma3TextConfig, num_hidden_layers=2, layer_types=kinds)


def small(model_class: Any, config_class: Any, **options: Any) -> PreTrainedModel:
    torch.manual_seed(7)
    return model_class(config_class(**(TINY | {"sliding_window": 12, "head_dim": 16} | options))).eval()


@DRAFTS
@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked", "prompt lookup", "assisted"])
@pytest.mark.parametrize("make", [sliding, mixed])
def test_layers_with_a_sliding_window(sdpa: LlamaForCausalLM, make: Any, mode: str) -> None:
    """Layers of transformers record in assisted decoding, or they could not go back."""
    batch, options = MODES[mode]
    if "assistant_model" in options:
        options = options | {"assistant_model": assistant_of(sdpa)}
    ids = repetitive(60) if batch == 1 else prompt(60, batch)
    check_against_passed(make(), ids, "balanced", SMALL, **options)


@DRAFTS
def test_a_model_with_sliding_layers_may_draft_for_itself() -> None:
    model = mixed()
    with compressed_generation(model, "quant", **SMALL):
        answer = generate(model, prompt(60), None, 20, assistant_model=model)
    assert answer.shape == (1, 80)


@pytest.mark.parametrize("name", ["gemma4", "qwen3_next", "deepseek_v3", "llava"])
def test_models_of_other_kinds(name: str) -> None:
    """Layers that share their keys, linear attention, latent attention, images."""
    model = build(name, "eager")
    given = inputs(model, 60, 2)
    passed = NexusQuantCache("balanced", config=model.config, **SMALL)
    # DeepSeek makes keys and values of what is in the cache, so its attention cannot be seen.
    says = pytest.warns(UserWarning, match="was not seen") if name == "deepseek_v3" else nullcontext()
    with says:
        expected = model.generate(**given, **{CACHE: passed}, max_new_tokens=5, do_sample=False)
        with compressed_generation(model, "balanced", **SMALL) as compressed:
            assert torch.equal(model.generate(**given, max_new_tokens=5, do_sample=False), expected)
    assert compressed.cache.memory_report().layers == passed.memory_report().layers


# Conversations and loops of other kinds


def test_a_conversation_goes_on_with_the_cache_that_came_out(model: LlamaForCausalLM) -> None:
    """Two turns in one block, one in another, one outside; all as with a cache that is passed from the start."""

    def turn(talk: dict[str, Any], seed: int) -> None:
        text = torch.cat([talk["text"], prompt(9, 2, seed=seed)], -1)
        out = generate(model, text, talk["cache"], return_dict_in_generate=True)
        talk.update(text=out.sequences, cache=out[CACHE])

    expected = {"text": prompt(60, 2), "cache": NexusQuantCache("balanced", config=model.config, **SMALL)}
    talk = {"text": prompt(60, 2), "cache": None}
    for seed in range(4):
        turn(expected, seed)
    with compressed_generation(model, "balanced", **SMALL) as compressed:
        turn(talk, 0)
        turn(talk, 1)
        assert talk["cache"] is compressed.cache
    with compressed_generation(model, "quant"):
        turn(talk, 2)
    turn(talk, 3)
    assert torch.equal(talk["text"], expected["text"])
    assert fingerprint(talk["cache"]) == fingerprint(expected["cache"])


@pytest.mark.parametrize("given", [None, "empty"])
@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_loop_of_ones_own(model: LlamaForCausalLM, given: str | None, positional: bool, keep: bool) -> None:
    """Whether the loop makes an empty plain cache or none, and goes on with its own object or with what came out."""

    @torch.no_grad()
    def loop(cache: Any) -> list[Tensor]:
        outputs = []
        for tokens in (60, 1, 1, 7, 1, 1):
            ids, positions = prompt(tokens, 2, seed=tokens), None
            if cache is not None:  # the cache that was made must know its length
                positions = cache.get_seq_length() + torch.arange(tokens)[None]
            args, kwargs = ((ids, None, positions, cache), {}) if positional else ((ids,), {CACHE: cache})
            out = model(*args, **kwargs)
            cache = cache if keep and cache is not None else out[CACHE]
            outputs.append(out.logits)
        return outputs

    passed = NexusQuantCache("balanced", config=model.config, **SMALL)
    expected = loop(passed)
    with compressed_generation(model, "balanced", **SMALL) as compressed:
        outputs = loop(DynamicCache(config=model.config) if given else None)
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    assert fingerprint(compressed.cache) == fingerprint(passed)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_argument_under_every_name(sdpa: LlamaForCausalLM, name: str) -> None:
    """A cache that is passed is left alone, an empty plain one is taken over, and None is as good as nothing."""
    with compressed_generation(sdpa, "balanced", **SMALL) as compressed:
        expected = generate(sdpa, prompt(60), None)
        passed = balanced(sdpa)
        with warns_of(name):
            text = sdpa.generate(prompt(60), **{name: passed}, max_new_tokens=12, do_sample=False)
        assert torch.equal(text, expected)
        assert compressed.cache is not passed
        with warns_of(name), torch.no_grad():
            sdpa(prompt(9), **{name: passed})
        assert passed.get_seq_length() == 71 + 9
        plain, before = DynamicCache(config=sdpa.config), compressed.cache
        with warns_of(name), torch.no_grad():
            assert sdpa(prompt(60), **{name: plain})[CACHE] is plain
        assert compressed.cache is plain
        assert isinstance(plain, NexusQuantCache)
        with warns_of(name), torch.no_grad():
            out = sdpa(prompt(60), **{name: None})
        assert out[CACHE] is compressed.cache
        assert compressed.cache not in (before, plain)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_without_a_block_every_name_works(sdpa: LlamaForCausalLM, name: str) -> None:
    expected, cache = balanced(sdpa), balanced(sdpa)
    text = generate(sdpa, prompt(60), expected)
    with warns_of(name):
        assert torch.equal(sdpa.generate(prompt(60), **{name: cache}, max_new_tokens=12, do_sample=False), text)
    assert fingerprint(cache) == fingerprint(expected)


def test_decoding_by_a_function_of_ones_own(sdpa: LlamaForCausalLM) -> None:
    """It may hold on to the cache that `generate` made, ask it for its length and roll it back."""

    @torch.no_grad()
    def decode(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        cache = kwargs[CACHE]
        for _ in range(8):
            new = input_ids[:, cache.get_seq_length() :]
            out = model(new, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            input_ids = torch.cat([input_ids, out.logits.argmax(-1)], -1)
            model(input_ids[:, -1:], **{CACHE: cache}, use_cache=True)  # looks ahead, and goes back
            cache.crop(-1)
        return input_ids

    passed = NexusQuantCache("balanced", config=sdpa.config, **SMALL)
    expected = generate(sdpa, prompt(60), passed, custom_generate=decode)
    with compressed_generation(sdpa, "balanced", **SMALL) as compressed:
        assert torch.equal(generate(sdpa, prompt(60), None, custom_generate=decode), expected)
    assert fingerprint(compressed.cache) == fingerprint(passed)


def test_errors_of_the_model_are_its_own(sdpa: LlamaForCausalLM) -> None:
    with compressed_generation(sdpa), pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        sdpa()


@torch.no_grad()
def test_going_back_after_several_forwards_begins_no_recording(sdpa: LlamaForCausalLM) -> None:
    """Only a decoder that asked for a recording crops right after the first forward."""
    caches = [NexusQuantCache("balanced", config=sdpa.config, **SMALL), DynamicCache(config=sdpa.config)]
    with compressed_generation(sdpa, "balanced", **SMALL):
        for cache in caches:
            for tokens in (60, 1):
                sdpa(prompt(tokens), **{CACHE: cache})
            cache.crop(-1)
            cache.crop(0)
    assert fingerprint(caches[0]) == fingerprint(caches[1])


def test_a_model_in_training_mode_is_not_served_unless_it_generates(sdpa: LlamaForCausalLM) -> None:
    model = copy.deepcopy(sdpa).train()
    with compressed_generation(model, **SMALL) as compressed:
        assert type(model(prompt(9))[CACHE]) is DynamicCache
        with pytest.raises(CacheStateError):
            _ = compressed.cache
        generate(model, prompt(60), None)
        assert compressed.cache.get_seq_length() == 71


def test_gradients_of_a_single_forward_are_the_models() -> None:
    """A loss in evaluation mode, where transformers makes a cache unasked."""
    model = tiny_llama().requires_grad_(requires_grad=True)

    def gradient() -> Tensor:
        model.zero_grad()
        model(prompt(30), labels=prompt(30)).loss.backward()
        return model.model.embed_tokens.weight.grad.clone()

    expected = gradient()
    with compressed_generation(model, **SMALL) as compressed:
        assert torch.equal(gradient(), expected)
    assert compressed.cache.get_seq_length() == 30


def test_who_wants_no_cache_gets_none(sdpa: LlamaForCausalLM) -> None:
    model = copy.deepcopy(sdpa)
    with compressed_generation(model, **SMALL) as compressed, torch.no_grad():
        assert model(prompt(9), use_cache=False).get(CACHE) is None
        generate(model, prompt(9), None, use_cache=False)
        model.config.use_cache = False
        assert model(prompt(9)).get(CACHE) is None
        with pytest.raises(CacheStateError, match=r"no compressed cache has been made .* without use_cache=False"):
            _ = compressed.cache
        assert model(prompt(9), use_cache=True)[CACHE] is compressed.cache


# What is left alone


def test_a_cache_that_is_passed_is_left_alone(sdpa: LlamaForCausalLM) -> None:
    theirs = NexusQuantCache("quant", config=sdpa.config, **SMALL)
    for cache in (DynamicCache(), DynamicCache(config=sdpa.config), theirs, StaticCache(sdpa.config, 128)):
        kind = type(cache)
        outside = generate(sdpa, prompt(60), copy.deepcopy(cache))
        with compressed_generation(sdpa, "max", **SMALL) as compressed:
            assert torch.equal(generate(sdpa, prompt(60), cache), outside)
            with pytest.raises(CacheStateError):
                _ = compressed.cache
        assert type(cache) is kind
        assert int(cache.get_seq_length()) == 71


def test_a_plain_cache_that_holds_tokens_is_left_alone(sdpa: LlamaForCausalLM) -> None:
    with torch.no_grad():
        cache = sdpa(prompt(60))[CACHE]
        with compressed_generation(sdpa, "max", **SMALL):
            out = sdpa(prompt(1), **{CACHE: cache})
    assert out[CACHE] is cache
    assert type(cache) is DynamicCache


def test_blocks_in_blocks(sdpa: LlamaForCausalLM) -> None:
    """The inner one wins, and the outer one is back behind it, also after an error."""
    with compressed_generation(sdpa, "quant", **SMALL) as outer:
        generate(sdpa, prompt(60), None)
        first = outer.cache
        with suppress(ZeroDivisionError), compressed_generation(sdpa, "max", **SMALL) as inner:
            generate(sdpa, prompt(60), None)
            assert inner.cache.cache_config.keep_ratio < 1
            assert outer.cache is first
            raise ZeroDivisionError
        generate(sdpa, prompt(60), None)
        assert outer.cache is not first
        assert outer.cache.cache_config.keep_ratio == 1
        assert hooks_of(sdpa) == 2


def test_threads_get_caches_of_their_own(sdpa: LlamaForCausalLM) -> None:
    ids = [prompt(60, seed=seed) for seed in range(4)]
    expected = [generate(sdpa, each, NexusQuantCache(config=sdpa.config, **SMALL)) for each in ids]
    together = threading.Barrier(2)

    def answer(each: Tensor) -> Any:
        together.wait(60)
        return generate(sdpa, each, None, return_dict_in_generate=True)

    with compressed_generation(sdpa, **SMALL), ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(answer, ids))
    assert all(torch.equal(given.sequences, each) for given, each in zip(answers, expected, strict=True))
    assert len({id(given[CACHE]) for given in answers}) == 4
    assert {given[CACHE].get_seq_length() for given in answers} == {71}


# No trace


def test_nothing_is_left_of_a_block(sdpa: LlamaForCausalLM) -> None:
    before = vars(sdpa).copy(), pickle.dumps(sdpa.state_dict()), sdpa.config.to_dict()
    with compressed_generation(sdpa, **SMALL):
        assert hooks_of(sdpa) == 2
        generate(sdpa, prompt(60), None)
    assert hooks_of(sdpa) == 0
    assert (vars(sdpa), pickle.dumps(sdpa.state_dict()), sdpa.config.to_dict()) == before
    answer = generate(sdpa, prompt(60), None, return_dict_in_generate=True)
    assert type(answer[CACHE]) is DynamicCache


def test_nothing_is_left_after_an_error_in_the_middle(sdpa: LlamaForCausalLM) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), compressed_generation(sdpa, **SMALL):
        generate(sdpa, prompt(60), None, logits_processor=[fail])
    assert hooks_of(sdpa) == 0


def test_hooks_of_others_stay(sdpa: LlamaForCausalLM) -> None:
    calls = []
    handle = sdpa.register_forward_pre_hook(lambda *_: calls.append(1))
    with compressed_generation(sdpa, **SMALL):
        generate(sdpa, prompt(20), None, 3)
    generate(sdpa, prompt(20), None, 3)
    assert len(calls) == 6
    assert hooks_of(sdpa) == 1
    handle.remove()


def test_a_block_keeps_nothing_alive() -> None:
    model = tiny_llama()
    with compressed_generation(model, **SMALL) as compressed:
        generate(model, prompt(60), None)
        first = weakref.ref(compressed.cache)
        generate(model, prompt(60), None)
        gc.collect()
        assert first() is None
    model_ref, cache_ref = weakref.ref(model), weakref.ref(compressed.cache)
    del model
    gc.collect()
    assert model_ref() is None
    assert compressed.cache.get_seq_length() == 71
    del compressed
    gc.collect()
    assert cache_ref() is None


def test_copies_of_the_model(sdpa: LlamaForCausalLM) -> None:
    """A copy made inside is served as long as the block lasts; one cannot be saved with the hooks in it."""
    model = copy.deepcopy(sdpa)
    with compressed_generation(model, **SMALL) as compressed:
        clone = copy.deepcopy(model)
        generate(clone, prompt(60), None)
        assert compressed.cache.get_seq_length() == 71
        with pytest.raises(UnsupportedError, match="cannot be pickled inside compressed_generation"):
            pickle.dumps(model)
    answer = generate(clone, prompt(60), None, return_dict_in_generate=True)
    assert type(answer[CACHE]) is DynamicCache
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert hooks_of(copied) == 0
        assert torch.equal(generate(copied, prompt(60), None), answer.sequences)


def test_a_cache_that_was_put_in_is_copied_and_pickled(sdpa: LlamaForCausalLM) -> None:
    with compressed_generation(sdpa, **SMALL) as compressed:
        text = torch.cat([generate(sdpa, prompt(60), None), prompt(7)], -1)
    cache = compressed.cache
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]  # noqa: S301 - our own
    answers = [generate(sdpa, text, each) for each in (cache, *copies)]
    assert all(torch.equal(answers[0], each) for each in answers[1:])


# Attention that cannot be seen


def hidden_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Compute what sdpa does out of the sight of torch functions, as a kernel of another library."""
    with torch._C.DisableTorchFunctionSubclass():
        plain = [x.as_subclass(Tensor) for x in (query, key, value)]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *plain, mask, **options)


@pytest.fixture
def hidden(sdpa: LlamaForCausalLM) -> Iterator[LlamaForCausalLM]:
    """Return a model with such attention."""
    AttentionInterface.register("of_another_library", hidden_attention)
    AttentionMaskInterface.register("of_another_library", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = copy.deepcopy(sdpa)
    model.set_attn_implementation("of_another_library")
    yield model
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        table._global_mapping.pop("of_another_library", None)


def test_attention_that_is_not_torchs_own_is_enabled_for_the_block(
    sdpa: LlamaForCausalLM, hidden: LlamaForCausalLM
) -> None:
    """Outside it a cache that is passed keeps everything and says so."""
    expected = NexusQuantCache("balanced", config=sdpa.config, **SMALL)
    text = generate(sdpa, prompt(60), expected)
    name = hidden.config._attn_implementation
    with compressed_generation(hidden, "balanced", **SMALL) as compressed:
        assert hidden.config._attn_implementation == f"nexusquant_{name}"
        assert torch.equal(generate(hidden, prompt(60), None), text)
    assert fingerprint(compressed.cache) == fingerprint(expected)
    assert hidden.config._attn_implementation == name
    with pytest.warns(UserWarning, match="attention of layer 0 was not seen"):
        generate(hidden, prompt(60), NexusQuantCache("balanced", config=hidden.config, **SMALL))


def test_a_model_that_was_enabled_stays_enabled(hidden: LlamaForCausalLM, sdpa: LlamaForCausalLM) -> None:
    attention.enable(hidden)
    name = hidden.config._attn_implementation
    with compressed_generation(hidden, **SMALL):
        assert hidden.config._attn_implementation == name
    assert hidden.config._attn_implementation == name
    with compressed_generation(sdpa, **SMALL):
        assert sdpa.config._attn_implementation == "sdpa"


def test_the_last_of_several_blocks_disables(hidden: LlamaForCausalLM) -> None:
    """Whichever that is, also after an error."""
    name = hidden.config._attn_implementation
    first, second = compressed_generation(hidden, **SMALL), compressed_generation(hidden, **SMALL)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert hidden.config._attn_implementation == f"nexusquant_{name}"
    with suppress(ZeroDivisionError):
        second.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert hidden.config._attn_implementation == name


def test_a_model_that_cannot_be_enabled_is_left_alone(
    hidden: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise UnsupportedError

    monkeypatch.setattr(importlib.import_module("nexusquant_cache.attention.enable"), "_enable", refuse)
    with (
        pytest.warns(UserWarning, match="attention of layer 0 was not seen"),
        compressed_generation(hidden, "balanced", **SMALL) as compressed,
    ):
        generate(hidden, prompt(60), None)
    assert compressed.cache.layers[0].state.is_whole
    assert hidden.config._attn_implementation == "of_another_library"


# Options and wrappers


def test_options_reach_the_cache(sdpa: LlamaForCausalLM) -> None:
    policy = KeyNormPolicy()
    with compressed_generation(sdpa, "high", policy=policy, when="during_prefill", residual_length=9) as compressed:
        generate(sdpa, prompt(20), None)
    cache = compressed.cache
    assert isinstance(cache, NexusQuantCache)
    assert (cache.policy, cache.shared.when, cache.cache_config.residual_length) == (policy, "during_prefill", 9)
    assert cache.model_config is sdpa.config


class Wrapper(nn.Module):
    """Wraps a model as PEFT does: generation by the inner model, and a forward that passes its hooks by."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.generate(*args, **kwargs)

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return self.inner.forward(input_ids=input_ids, **kwargs)


class Calling(nn.Module):
    """Wraps a model like `torch.nn.parallel.DistributedDataParallel`."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.module = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_wrappers_of_a_model(sdpa: LlamaForCausalLM) -> None:
    wrapped: Any
    for wrapped in (Wrapper(sdpa), torch.compile(sdpa, backend="eager")):
        with compressed_generation(wrapped, "balanced", **SMALL) as compressed:
            answer = generate(wrapped, prompt(60), None, return_dict_in_generate=True)
            assert answer[CACHE] is compressed.cache
            assert compressed.cache.get_seq_length() == 71
    for wrapped, hooks in ((Wrapper(sdpa), 4), (Calling(sdpa), 2)):
        with compressed_generation(wrapped, "balanced", **SMALL) as compressed, torch.no_grad():
            assert hooks_of(wrapped) == hooks
            out = wrapped(input_ids=prompt(60), use_cache=True)
            assert out[CACHE] is compressed.cache
            assert wrapped(input_ids=prompt(1), **{CACHE: out[CACHE]})[CACHE] is compressed.cache
        assert compressed.cache.layers[0].state.kept < compressed.cache.layers[0].state.seen == 61


# What is refused


@pytest.mark.parametrize(
    ("implementation", "kind"),
    [
        ("static", "a StaticCache"),
        ("offloaded_static", "an offloading StaticCache"),
        ("offloaded", "an offloading DynamicCache"),
    ],
)
@pytest.mark.parametrize("chunk", [None, 16])
def test_caches_of_other_kinds_are_refused(
    sdpa: LlamaForCausalLM, implementation: str, kind: str, chunk: int | None
) -> None:
    model = copy.deepcopy(sdpa)
    model.generation_config.cache_implementation = implementation
    with compressed_generation(model) as compressed:
        with pytest.raises(UnsupportedError, match=rf"told to use {kind} \(cache_implementation, .*Leave that out"):
            generate(model, prompt(60), None, prefill_chunk_size=chunk)
        model.generation_config.cache_implementation = None
        generate(model, prompt(20), None)
        assert compressed.cache.get_seq_length() == 31


def test_a_quantized_cache_is_refused(sdpa: LlamaForCausalLM) -> None:
    """Made without its constructor, which asks for packages that are not installed here."""
    cache = QuantizedCache.__new__(QuantizedCache)
    Cache.__init__(cache, layers=[DynamicLayer(), DynamicLayer()])
    with compressed_generation(sdpa), pytest.raises(UnsupportedError, match="told to use a QuantizedCache"):
        sdpa(prompt(20), **{CACHE: cache})


def test_continuous_batching_is_refused(sdpa: LlamaForCausalLM) -> None:
    model = copy.deepcopy(sdpa)
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    small_pool = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    with compressed_generation(model):
        answers = model.generate_batch(
            [prompt(20)[0].tolist()],
            generation_config=settings,
            continuous_batching_config=small_pool,
            progress_bar=False,
        )
    assert "continuous batching (generate_batch, or 'paged') has a cache of its own" in answers["req_0"].error


@pytest.mark.parametrize("preset", ["balanced", "quant"])
def test_a_batch_whose_second_turns_differ_in_length(sdpa: LlamaForCausalLM, preset: str) -> None:
    """Padding in the middle is under the model's own mask, as with a cache that is passed."""
    ids, mask = padded((0, 3))
    turn, turn_mask = padded((4, 0), 9)

    def talk(cache: Any) -> tuple[Tensor, Any]:
        out = generate(sdpa, ids, cache, attention_mask=mask, return_dict_in_generate=True)
        answer_mask = torch.ones(2, out.sequences.shape[1] - ids.shape[1], dtype=torch.long)
        text, full = torch.cat([out.sequences, turn], -1), torch.cat([mask, answer_mask, turn_mask], -1)
        return generate(sdpa, text, out[CACHE], attention_mask=full), out[CACHE]

    expected, passed = talk(NexusQuantCache(preset, config=sdpa.config, **SMALL))
    with compressed_generation(sdpa, preset, **SMALL):
        given, served = talk(None)
    assert torch.equal(given, expected)
    assert fingerprint(served) == fingerprint(passed)


@pytest.mark.parametrize("preset", ["balanced", "quant"])
@pytest.mark.parametrize(
    "mask",
    [torch.cat([torch.ones(2, 50), torch.zeros(2, 10)], -1), torch.ones(2, 1, 60, 60).tril().bool()],
    ids=["right padding", "4-D"],
)
def test_masks_of_every_form_are_the_models_own(sdpa: LlamaForCausalLM, mask: Any, preset: str) -> None:
    with torch.no_grad():
        expected = sdpa(prompt(60, 2), attention_mask=mask).logits
        with compressed_generation(sdpa, preset, **SMALL) as compressed:
            assert torch.equal(sdpa(prompt(60, 2), attention_mask=mask).logits, expected)
    assert compressed.cache.get_seq_length() == 60


def test_models_that_cannot_be_served_are_refused(sdpa: LlamaForCausalLM, unchecked: None) -> None:
    del unchecked
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    pipeline: Any = SimpleNamespace(model=sdpa)
    cases: list[tuple[Any, type[NexusQuantError], str]] = [
        (t5, UnsupportedError, "T5ForConditionalGeneration is an encoder-decoder model"),
        (nn.Sequential(sdpa, t5), UnsupportedError, "T5ForConditionalGeneration is an encoder-decoder model"),
        (mamba, UnsupportedError, "MambaForCausalLM does not generate with a cache of keys and values"),
        (sdpa.model, UnsupportedError, "LlamaModel has no part that transformers can generate with"),
        (pipeline, OptionError, "must be a torch module, got SimpleNamespace; of a pipeline, give its .model"),
    ]
    for model, error, message in cases:
        with pytest.raises(error, match=message), compressed_generation(model):
            pytest.fail("the block was entered")
        assert not isinstance(model, nn.Module) or hooks_of(model) == 0


def test_wrong_options_are_found_at_once(sdpa: LlamaForCausalLM, unchecked: None) -> None:
    del unchecked
    options: list[dict[str, Any]] = [{"preset": "balancd"}, {"residual_lenth": 3}, {"when": "now"}, {"policy": 3}]
    for wrong in options:
        with pytest.raises(OptionError), compressed_generation(sdpa, **wrong):
            pytest.fail("the block was entered")
        assert hooks_of(sdpa) == 0
