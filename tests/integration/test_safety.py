"""Safe to hold wrong: what a cache cannot do it refuses or says, and an interrupt leaves it as an error does.

**The law.**  Whoever holds the cache in another way than the documents show gets the answer of the plain cache, or is
told; never another answer in silence.
"""

import asyncio
import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from feeding import feed
from integration.tiny import (
    ROUNDING,
    SMALL,
    TINY,
    balanced,
    fingerprint,
    generate,
    logits,
    lossless_cache,
    prompt,
    random_states,
    tiny_config,
    tiny_llama,
)
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from nexusquant_cache import (
    CacheStateError,
    NexusQuantCache,
    OptionError,
    PrefixStore,
    UnsupportedError,
)
from nexusquant_cache.cache.cache import placeholder_ids
from nexusquant_cache.cache.rotary import bias_by_distance
from nexusquant_cache.layer import layer as layer_module
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.selection import Scope
from nexusquant_cache.releases import CACHE

MAKE = {"lossless": lossless_cache, "coded": lambda config: NexusQuantCache("quant", config=config, **SMALL)}


def forward(model: PreTrainedModel, ids: Tensor, cache: object) -> Tensor:
    """Return logits with whatever grad mode there is."""
    return model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits


def frozen(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return model.requires_grad_(requires_grad=False)


# Interrupts

INTERRUPTS = [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]


def interrupt(monkeypatch: pytest.MonkeyPatch, layer_idx: int, kind: type[BaseException]) -> None:
    """Let the next choice in a layer, and in no other, fail half-way: layers before it have let go of tokens."""
    original, fails = Scope.keep, [True]

    def keep(scope: Scope, kept: Any) -> None:
        if scope.state.layer_idx == layer_idx and fails:
            fails.clear()
            raise kind
        original(scope, kept)

    monkeypatch.setattr(Scope, "keep", keep)


def read(model: LlamaForCausalLM, **options: Any) -> NexusQuantCache:
    """Return a cache that has read a prompt and waits for its first step."""
    cache = lossless_cache(model.config, keep_ratio=0.5, **options)
    logits(model, prompt(60), cache)
    return cache


@pytest.fixture(scope="module")
def three() -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=3)


@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("layer_idx", [0, 1, 2])
@pytest.mark.parametrize("kind", INTERRUPTS)
def test_an_interrupt_inside_a_compression_takes_the_step_back(
    three: LlamaForCausalLM,
    kind: type[BaseException],
    layer_idx: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    offloading: bool,
) -> None:
    """All layers have seen the prompt alone, and the step repeated says what it would have said."""
    cache, step = read(three, offloading=offloading), torch.tensor([[9]])
    expected = logits(three, step, read(three, offloading=offloading))
    with monkeypatch.context() as patch:
        interrupt(patch, layer_idx, kind)
        with pytest.raises(kind):
            logits(three, step, cache)
    assert [cache.get_seq_length(index) for index in range(3)] == [60] * 3
    torch.testing.assert_close(logits(three, step, cache), expected, rtol=0, atol=ROUNDING)
    assert [cache.get_seq_length(index) for index in range(3)] == [61] * 3


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize("layer_idx", [0, 1, 2])
def test_an_interrupt_in_a_later_flush_takes_the_step_back(
    three: LlamaForCausalLM, kind: type[BaseException], layer_idx: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is pending then: the tail is full."""
    cache = read(three)
    for token in range(4):
        logits(three, torch.tensor([[token + 9]]), cache)
    other, step = copy.deepcopy(cache), torch.tensor([[50]])
    original = layer_module.encode_oldest

    def encode_oldest(state: Any, shared: Any) -> None:
        if state.layer_idx == layer_idx:
            raise kind
        original(state, shared)

    with monkeypatch.context() as patch:
        patch.setattr(layer_module, "encode_oldest", encode_oldest)
        with pytest.raises(kind):
            logits(three, step, cache)
    assert [cache.get_seq_length(index) for index in range(3)] == [64] * 3
    for tokens in range(9):
        step = torch.tensor([[50 + tokens]])
        torch.testing.assert_close(logits(three, step, cache), logits(three, step, other), rtol=0, atol=ROUNDING)


def test_an_error_while_values_are_encoded_leaves_no_keys_behind(
    three: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of generated tokens, keys are encoded first, then values: either both are stored or none."""
    cache, other = read(three), read(three)
    for each in (cache, other):
        logits(three, torch.tensor([[9]]), each)  # which compresses the prompt
    codec = type(cache.layers[0].state.codecs[0])
    encode, calls, steps = codec.encode, [], 0

    def failing(self: Any, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012 - at whichever step is due
        patch.setattr(codec, "encode", failing)
        for _ in range(20):
            logits(three, torch.tensor([[10]]), cache)
            steps += 1
    for _ in range(steps):
        logits(three, torch.tensor([[10]]), other)
    assert fingerprint(cache) == fingerprint(other)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("layer_idx", [0, 1, 2])
def test_an_interrupt_during_the_prefill_is_undone_or_said(
    three: LlamaForCausalLM, kind: type[BaseException], layer_idx: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a chunk may be evicted already: then the cache refuses to go on until it is reset."""
    chunks = [prompt(60), prompt(60, seed=1), torch.tensor([[9]])]
    cache, fresh = (lossless_cache(three.config, keep_ratio=0.5, when="during_prefill") for _ in range(2))
    expected = [logits(three, chunk, fresh) for chunk in chunks]
    is_broken = False
    with monkeypatch.context() as patch:
        interrupt(patch, layer_idx, kind)
        for index, chunk in enumerate(chunks):
            seen = cache.get_seq_length()
            try:
                given = logits(three, chunk, cache)
            except kind:
                try:
                    given = logits(three, chunk, cache)
                except CacheStateError:
                    is_broken = True
                    break
                assert cache.get_seq_length() == seen + chunk.shape[1]
            torch.testing.assert_close(given, expected[index], rtol=0, atol=ROUNDING)
    if is_broken:
        cache.reset()
        for chunk, right in zip(chunks, expected, strict=True):
            assert torch.equal(logits(three, chunk, cache), right)


# What a prompt is made of besides token ids

IMAGE = TINY["vocab_size"] - 1


def image_config(**options: Any) -> PreTrainedConfig:
    """Return the config of a model that reads images where a certain id stands."""
    return LlavaConfig(text_config=tiny_config(**options), image_token_index=IMAGE)


def reader(config: PreTrainedConfig, tokens: int, seed: int) -> NexusQuantCache:
    """Return a cache that has read a prompt of so many tokens, whose image is drawn from the seed."""
    cache = NexusQuantCache("quant", config=config, **SMALL)
    for layer_idx in range(2):
        cache.update(*random_states((1, 2, tokens, 16), seed), layer_idx)
    return cache


def with_image(tokens: int) -> Tensor:
    ids = prompt(tokens)
    ids[ids == IMAGE] = 5
    ids[:, 20:24] = IMAGE
    return ids


def pixels(seed: int) -> Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def shown(found: tuple[NexusQuantCache, int] | None) -> list[Tensor]:
    assert found is not None
    return [x for layer in found[0].layers for x in (layer.keys, layer.values)]


@pytest.fixture
def kept(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path)


def test_two_images_are_two_prompts(kept: PrefixStore) -> None:
    config, ids = image_config(), with_image(60)
    for seed in (1, 2):
        kept.put(reader(config, 60, seed), ids, besides={"pixel_values": pixels(seed)})
    assert len(kept.entries()) == 2
    for seed in (1, 2):
        found = kept.get(with_image(70), config=config, besides={"pixel_values": pixels(seed)})
        expected = reader(config, 60, seed)
        expected.compress()
        right = [x for layer in expected.layers for x in (layer.keys, layer.values)]
        assert all(torch.equal(x, y) for x, y in zip(shown(found), right, strict=True))
    assert kept.get(with_image(70), config=config, besides={"pixel_values": pixels(3)}) is None
    assert kept.get(with_image(70), config=config) is None


@pytest.mark.parametrize("name", ["image_token_id", "video_token_id", "audio_token_id", "image_token_index"])
def test_a_placeholder_is_never_served_by_ids_alone(kept: PrefixStore, name: str) -> None:
    """Who puts such a prompt without a word is told, whatever the placeholder stands for."""
    config = tiny_config(**{name: IMAGE})
    with pytest.warns(UserWarning, match=r"stand for images or sounds.*besides="):
        kept.put(reader(config, 60, 1), with_image(60))
    assert kept.get(with_image(70), config=config) is None
    assert kept.longest_prefix(with_image(60), config=config, leave=0) is None
    assert kept.longest_prefix(with_image(60), config=config, leave=0, besides={}) is None


def test_a_config_without_placeholders_finds_nothing_that_has_some(kept: PrefixStore) -> None:
    """The text part of a config does not name them, and would have served any image."""
    config = image_config()
    with pytest.warns(UserWarning, match="stand for images or sounds"):
        kept.put(reader(config, 60, 1), with_image(60))
    assert kept.get(with_image(70), config=config.get_text_config()) is None


def test_placeholders_in_a_part_of_the_config(configs: dict[str, PreTrainedConfig]) -> None:
    config = configs["phi4_multimodal"]
    assert {config.vision_config.image_token_id, config.audio_config.audio_token_id} <= placeholder_ids(config)


def test_every_model_that_names_placeholders_has_them_found(configs: dict[str, PreTrainedConfig]) -> None:
    """Whatever the name: an id that is no mark of a beginning or an end, of something that is no text."""
    kinds = re.compile(r"(image|video|audio|speech)_token_(id|index)")
    for config in configs.values():
        named = {name for name in dir(config) if kinds.fullmatch(name) and isinstance(getattr(config, name), int)}
        assert {getattr(config, name) for name in named} <= placeholder_ids(config)


def test_what_comes_before_an_image_is_found(kept: PrefixStore) -> None:
    """The system prompt says the same to all images."""
    config, ids = image_config(), with_image(70)
    kept.put(reader(config, 18, 1), ids[:, :18])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept.put(reader(config, 40, 1), ids[:, :40])
    found = kept.longest_prefix(ids, config=config)
    assert found is not None
    assert found.n_tokens == 18
    kept.put(reader(config, 20, 1), ids[:, :20])  # up to the image
    found = kept.longest_prefix(ids, config=config)
    assert found is not None
    assert found.n_tokens == 20


def test_text_of_a_model_that_reads_images_is_found_as_ever(kept: PrefixStore) -> None:
    config, ids = image_config(), prompt(70)
    ids[ids == IMAGE] = 5
    kept.put(reader(config, 60, 1), ids[:, :60])
    assert kept.get(ids, config=config) is not None
    assert kept.get(ids, config=config, besides={"pixel_values": pixels(1)}) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"adapter": "law"}, {"adapter": "medicine"}),
        ({"adapter": "law"}, {"adapter": b"law"}),
        ({"adapter": "law"}, {"prompt": "law"}),
        ({"adapter": "law"}, {"adapter": "law", "audio": "x"}),
        ({"x": torch.zeros(4)}, {"x": torch.zeros(2, 2)}),
        ({"x": torch.zeros(4)}, {"x": torch.zeros(4, dtype=torch.int32)}),
        ({"x": torch.zeros(4)}, {"x": torch.zeros(4, dtype=torch.bfloat16)}),
        ({"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])}),
        ({"x": torch.arange(6).view(2, 3)}, {"x": torch.arange(6).view(3, 2).T}),
        ({"a": "1", "b": "2"}, {"a": "2", "b": "1"}),
    ],
)
def test_things_that_differ_are_told_apart(kept: PrefixStore, one: dict[str, Any], other: dict[str, Any]) -> None:
    config, ids = tiny_config(), prompt(40)
    kept.put(reader(config, 40, 1), ids, besides=one)
    assert kept.get(ids, config=config, leave=0, besides=other) is None
    assert kept.get(ids, config=config, leave=0) is None
    assert kept.get(ids, config=config, leave=0, besides=one) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}),
        ({"x": torch.arange(6).view(2, 3)}, {"x": torch.arange(6).view(3, 2).T.contiguous().T.reshape(2, 3)}),
        ({"x": torch.arange(12).view(3, 4)[:, ::2]}, {"x": torch.arange(12).view(3, 4)[:, ::2].clone()}),
        ({"x": torch.ones(3, requires_grad=True)}, {"x": torch.ones(3)}),
        ({"x": torch.tensor(2.0)}, {"x": torch.tensor(2.0)}),
        ({"x": torch.zeros(0, 4)}, {"x": torch.zeros(0, 4)}),
        ({"x": torch.ones(3, dtype=torch.bool)}, {"x": torch.ones(3, dtype=torch.bool)}),
        ({}, None),
    ],
)
def test_things_that_are_equal_are_found(kept: PrefixStore, one: dict[str, Any], other: dict[str, Any] | None) -> None:
    config, ids = tiny_config(), prompt(40)
    kept.put(reader(config, 40, 1), ids, besides=one)
    assert kept.get(ids, config=config, leave=0, besides=other) is not None


def test_the_same_prompt_replaces_its_entry_and_no_other(kept: PrefixStore) -> None:
    config, ids, adapters = tiny_config(), prompt(40), ({"adapter": "law"}, {"adapter": "medicine"}, None)
    for seed in (1, 2):
        for besides in adapters:
            kept.put(reader(config, 40, seed), ids, besides=besides)
    assert len(kept.entries()) == 3
    assert kept.remove(ids, config=config, besides={"adapter": "law"}) == 1
    assert kept.remove(ids, config=config, besides={"adapter": "law"}) == 0
    assert kept.get(ids, config=config, leave=0, besides={"adapter": "law"}) is None
    assert kept.remove(ids, config=config) == 1
    assert kept.get(ids, config=config, leave=0, besides={"adapter": "medicine"}) is not None


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_hashed_is_refused(kept: PrefixStore) -> None:
    with pytest.raises(OptionError, match=r"besides\['scale'\] must be a tensor, bytes or a text, got int"):
        kept.get(prompt(40), besides={"scale": 3})  # type: ignore[dict-item]
    assert not kept.entries()


# Layers that are no self-attention over the text with positions of its own

ENCODERS = {"mpnet", "pix2struct_vision_model"}  # no cache, so it does not matter what is said of them
# What the configs of transformers call biases by distance.
BIASES = ("relative_attention_num_buckets", "position_bias_num_buckets", "relative_max_distance", "alibi")


def all_configs() -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield the default config of every model type of the installed transformers."""
    transformers.logging.set_verbosity_error()
    for name in CONFIG_MAPPING:
        try:
            yield name, CONFIG_MAPPING[name]()
        except Exception:  # noqa: BLE001, PERF203, S112 - some have none
            continue


@pytest.fixture(scope="module")
def configs() -> dict[str, PreTrainedConfig]:
    return dict(all_configs())


def test_biases_by_distance_are_recognised_in_every_model_type(configs: dict[str, PreTrainedConfig]) -> None:
    found, missed = set(), set()
    for name, config in configs.items():
        text = config.get_text_config(decoder=True)
        if any(getattr(text, bias, None) not in {None, False} for bias in BIASES):
            (missed if bias_by_distance(text) is None else found).add(name)
    assert {"t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano", "pix2struct"} <= found
    assert not missed
    for name in ("bloom", "mpt", "gpt_neo"):
        assert bias_by_distance(configs[name]) is not None


@pytest.mark.parametrize("name", ["cpmant", "prophetnet"])
def test_other_names_of_buckets(configs: dict[str, PreTrainedConfig], name: str) -> None:
    assert bias_by_distance(configs[name].get_text_config(decoder=True)) is not None


@pytest.mark.parametrize("preset", ["high", "asym", "balanced", "max"])
def test_eviction_is_refused_where_attention_has_a_bias_by_distance(preset: str) -> None:
    config = T5Config(d_model=64, d_kv=16, num_layers=1, num_decoder_layers=2, num_heads=4)
    with pytest.raises(UnsupportedError, match="relative position buckets"):
        NexusQuantCache(preset, config=config)
    assert NexusQuantCache("quant", config=config).layers
    assert NexusQuantCache(preset, config=config, keep_ratio=1.0).layers


def test_layers_over_images_stay_those_of_transformers(configs: dict[str, PreTrainedConfig]) -> None:
    """Everywhere where a config names them; the others are ours."""
    found = set()
    for name, config in configs.items():
        text = config.get_text_config(decoder=True)
        crossing = getattr(text, "cross_attention_layers", None)
        if isinstance(crossing, list):
            found.add(name)
            layers = NexusQuantCache("balanced", config=config).layers
            assert [isinstance(layer, NexusQuantLayer) for layer in layers] == [
                index not in crossing for index in range(len(layers))
            ]
    assert "mllama" in found


def test_layers_over_images_are_left_alone_by_everything() -> None:
    """Their tokens are the image's: neither `compress` nor a prefill nor a crop touches them."""
    config = MllamaTextConfig(**TINY, cross_attention_layers=[1])
    for when in ("post_prefill", "during_prefill"):
        cache = NexusQuantCache("balanced", config=config, when=when, **SMALL)
        image = random_states((1, 2, 130, 16), 5)
        feed(cache, *random_states((1, 2, 60, 16), 1), 0)
        cache.update(*image, 1)
        cache.compress()
        feed(cache, *random_states((1, 2, 1, 16), 2), 0)
        assert torch.equal(cache.layers[1].keys, image[0])
        assert torch.equal(cache.layers[1].values, image[1])
        assert cache.layers[0].state.body is not None
        kinds = [layer.kind for layer in cache.memory_report().layers]
        assert kinds[0] == "compressed"
        assert kinds[1] != "compressed"


# Held wrong


@pytest.mark.usefixtures("unchecked")
def test_a_config_in_the_place_of_the_preset(sdpa: LlamaForCausalLM) -> None:
    with pytest.raises(OptionError, match=r"preset is the first argument, got LlamaConfig: .*config=model\.config"):
        NexusQuantCache(sdpa.config)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("what", ["model", "dict", "text"])
def test_something_else_in_the_place_of_the_config(sdpa: LlamaForCausalLM, what: str) -> None:
    given = {"model": sdpa, "dict": sdpa.config.to_dict(), "text": "llama"}[what]
    with pytest.raises(OptionError, match=r"config must be the config of a model, got .*config=model\.config"):
        NexusQuantCache(config=given)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_config_of_a_smaller_model(three: LlamaForCausalLM, layers: int) -> None:
    cache = NexusQuantCache(config=tiny_config(num_hidden_layers=layers))
    with pytest.raises(OptionError, match=rf"has {layers} layers, and the model updates layer {layers}: give the conf"):
        logits(three, prompt(40), cache)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 0, 1], [True, False, True], torch.tensor([1, 2])])
def test_rows_are_chosen_by_lists_too(rows: Any) -> None:
    given, expected = (NexusQuantCache("balanced", config=tiny_config(), **SMALL) for _ in range(2))
    for cache in (given, expected):
        for layer_idx in range(2):
            feed(cache, *random_states((3, 2, 60, 16), 4), layer_idx)
        cache.compress()
    given.batch_select_indices(rows)
    expected.batch_select_indices(torch.as_tensor(rows))
    assert fingerprint(given) == fingerprint(expected)
    assert given.layers[0].keys.shape[0] == (sum(rows) if rows == [True, False, True] else len(rows))


# A second question about one text


@pytest.mark.parametrize(
    ("way", "make"),
    [
        ("copy", balanced),
        ("copy", lambda model: lossless_cache(model.config)),
        # Of the text's last tokens, which were exact, the answer leaves codes: here they lose nothing.
        ("crop", lambda model: lossless_cache(model.config)),
        ("crop", lambda model: lossless_cache(model.config, keep_ratio=0.5)),
    ],
)
def test_a_second_question_about_the_same_text(
    sdpa: LlamaForCausalLM, way: str, make: Callable[[LlamaForCausalLM], NexusQuantCache]
) -> None:
    """As the quick start has it: a copy answers as a cache of its own would, and so does one that is cut back."""
    document, questions = prompt(60), [prompt(6, seed=1), prompt(6, seed=2)]
    cache = make(sdpa)
    logits(sdpa, document, cache)
    cache.compress()
    answers, expected = [], []
    for question in questions:
        fresh = make(sdpa)
        logits(sdpa, document, fresh)
        fresh.compress()
        text = torch.cat([document, question], 1)
        expected.append(generate(sdpa, text, fresh, 6))
        used = copy.deepcopy(cache) if way == "copy" else cache
        answers.append(generate(sdpa, text, used, 6))
        if way == "crop":
            used.crop(60 - used.get_seq_length())
    assert cache.get_seq_length() == 60
    assert all(torch.equal(given, right) for given, right in zip(answers, expected, strict=True))
