"""A preset, a policy, a codec and a cache of a user's own, as in `docs/extending.md`, each a few lines."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.tiny import (
    SMALL,
    LosslessCache,
    LosslessCodec,
    generate,
    kept_positions,
    logits,
    lossless_cache,
    prompt,
    tiny_llama,
)
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from nexusquant_cache import (
    PRESETS,
    CacheConfig,
    EvictionPolicy,
    FormatError,
    NexusQuantCache,
    OptionError,
    register_codec,
)
from nexusquant_cache.codec import registry
from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.torch import attend as plain
from nexusquant_cache.files import inspect_file
from nexusquant_cache.policy import KeyNormPolicy, ScoreInputs
from nexusquant_cache.releases import CACHE


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


class ValueNormPolicy(EvictionPolicy):
    """Keep the tokens with the largest values: the others add little to any output."""

    def score(self, inputs: ScoreInputs) -> Tensor:
        """Return the norm of each token's value."""
        return inputs.values.float().norm(dim=-1)


class CarefulStart(NexusQuantCache):
    """Spend 4 bits per channel on the first layer."""

    def make_codec(self, side: str, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of the keys or the values (`side`) of a layer."""
        codec = super().make_codec(side, head_dim, layer_idx)
        return replace(codec, layout=CodeLayout.uniform(head_dim, 4)) if layer_idx == 0 else codec


class FirstLayerByValue(NexusQuantCache):
    """Choose by another policy in the first layer."""

    def make_policy(self, layer_idx: int) -> EvictionPolicy:
        """Return the policy of a layer."""
        return ValueNormPolicy() if layer_idx == 0 else super().make_policy(layer_idx)


@pytest.mark.parametrize("example", [ValueNormPolicy, CarefulStart, FirstLayerByValue, LosslessCache, LosslessCodec])
def test_examples_are_short(example: type) -> None:
    assert len(inspect.getsource(example).splitlines()) < 25 - 5 * (example is not LosslessCodec)


@pytest.fixture
def _careful_preset() -> Iterator[None]:
    PRESETS["careful"] = CacheConfig(4, 3, transform="hadamard", min_tokens=16, residual_length=8)
    yield
    del PRESETS["careful"]


@pytest.mark.usefixtures("_careful_preset")
def test_a_preset_of_ones_own(model: LlamaForCausalLM) -> None:
    """A changed preset is given as it is, or entered by name."""
    novel = replace(PRESETS["balanced"], keep_ratio=0.6, **SMALL)
    cache = NexusQuantCache(novel, config=model.config)
    generate(model, prompt(100), cache, 4)
    assert cache.cache_config.keep_ratio == 0.6
    assert cache.memory_report().kept_tokens == 2 + 54 + 8 + 3
    named = NexusQuantCache("careful", config=model.config)
    generate(model, prompt(100), named, 4)
    assert named.memory_report().preset == "careful"
    assert named.layers[0].state.body.keys.words.view().shape[-1] == 4 * 16 // 8
    assert named.layers[0].state.body.values.words.view().shape[-1] == 3 * 16 // 8
    by_option = NexusQuantCache("careful", keep_ratio=0.6)
    assert by_option.cache_config == replace(PRESETS["careful"], keep_ratio=0.6)


def test_a_policy_of_ones_own(model: LlamaForCausalLM) -> None:
    """The kept tokens are those with the largest values, and the protected ones."""
    plain = DynamicCache()
    model(input_ids=prompt(100), **{CACHE: plain})
    norms = [layer.values.norm(dim=-1)[0, :, 2:92] for layer in plain.layers]
    cache = lossless_cache(policy=ValueNormPolicy(), keep_ratio=0.25)
    model(input_ids=prompt(100), **{CACHE: cache})
    cache.compress()
    for layer_idx, norm in enumerate(norms):
        kept = kept_positions(cache, layer_idx)[0]
        expected = norm.topk(23).indices.sort().values + 2
        assert torch.equal(kept[:, 2:25], expected)
        assert kept[:, [0, 1]].tolist() == [[0, 1]] * 2
        assert kept[:, 25:].tolist() == [list(range(92, 100))] * 2


def test_a_cache_of_ones_own(model: LlamaForCausalLM) -> None:
    cache = CarefulStart("balanced", config=model.config, policy=KeyNormPolicy(), transform="hadamard", **SMALL)
    text = generate(model, prompt(100), cache, 4)
    assert text.shape == (1, 104)
    first, second = cache.memory_report().layers
    assert first.code_bytes - second.code_bytes == 2 * 2 * 4 * (
        first.kept_tokens - 2 - cache.layers[0].state.tail_tokens
    )


def test_a_policy_per_layer(model: LlamaForCausalLM) -> None:
    by_value = NexusQuantCache("balanced", policy=ValueNormPolicy(), **SMALL)
    caches = [FirstLayerByValue("balanced", **SMALL), NexusQuantCache("balanced", **SMALL), by_value]
    for cache in caches:
        model(input_ids=prompt(100), **{CACHE: cache})
        cache.compress()
    for layer_idx in (0, 1):
        mixed, default, chosen = (kept_positions(cache, layer_idx) for cache in caches)
        assert not torch.equal(default, chosen)
        assert torch.equal(mixed, chosen) == (layer_idx == 0)


def test_a_codec_of_ones_own_needs_no_more_than_four_methods(model: LlamaForCausalLM) -> None:
    cache = LosslessCache("quant", **SMALL)
    generate(model, prompt(60), cache, 4)
    assert cache.layers[0].state.body.keys.words.view().shape[-1] == 4 * 16


PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def shown(section: str) -> list[str]:
    """Return the code that a section of the page shows."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```\{testcode\}\n(.*?)```", text, re.DOTALL)
    return [block for block in blocks if not block.startswith(":hide:")]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    monkeypatch.setattr(registry, "_CODECS", dict(registry._CODECS))


@pytest.mark.usefixtures("registered")
class TestACodecOfOnesOwn:
    def test_the_page(self, model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Generation, attention from its codes, saved and loaded: all by the class and its registration."""
        reads: list[int] = []
        whole = plain.attend

        def spy(*given: Any) -> Any:
            reads.append(1)
            return whole(*given)

        monkeypatch.setattr(plain, "attend", spy)
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {"__name__": "page", "model": model, "inputs": {"input_ids": prompt(300)}}
        definition, use = shown("A codec of your own")
        exec(definition, names)  # noqa: S102 - our own page
        assert len(definition.splitlines()) < 60
        exec(use.replace("cache=cache", f"{CACHE}=cache"), names)  # noqa: S102 - the page has the newest name
        cache, again = names["cache"], names["again"]
        assert len(reads) == 2 * 3  # layers and steps
        four_bits = names["FourBits"]
        assert cache.layers[0].state.codecs[0] == again.layers[0].state.codecs[0] == four_bits(16)
        assert cache.layers[1].state.body.values.words.view().shape[-1] == 8
        assert again.cache_config == cache.cache_config
        assert inspect_file(tmp_path / "cache.safetensors").meta.codecs == (
            registry.CodecMeta("example.four_bits", {"head_dim": 16, "step": 0.34}),
        )
        for seed in range(3):
            assert torch.equal(*[logits(model, prompt(1, seed=seed), each) for each in (cache, again)])

    def test_its_vectors_are_near(self) -> None:
        names: dict[str, Any] = {"__name__": "page"}
        exec(shown("A codec of your own")[0], names)  # noqa: S102
        codec, x = names["FourBits"](64), torch.randn(1, 2, 300, 64)
        transform = codec.fit(x)
        error = codec.decode(codec.encode(x, transform), transform) - x
        assert error.square().mean() < 0.02
        zeros = torch.zeros(1, 2, 3, 64)
        assert torch.equal(codec.decode(codec.encode(zeros, transform), transform), zeros)

    def test_a_class_may_be_defined_again(self) -> None:
        """As when a cell of a notebook is run again."""
        for _ in range(2):
            exec(shown("A codec of your own")[0], {"__name__": "page"})  # noqa: S102
        with pytest.raises(OptionError, match="taken by FourBits"):
            register_codec("example.four_bits", LosslessCodec, lambda _: {}, lambda _: LosslessCodec(16))

    def test_what_is_no_dataclass_says_how_it_is_made(self) -> None:
        with pytest.raises(OptionError, match="LosslessCodec is no dataclass: give register_codec both"):
            register_codec("tests.lossless_by_default", LosslessCodec)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"head_dim": "16"}, "head_dim must be of type int, got '16'"),
            ({"head_dim": 16, "steps": 1}, "steps"),
            ({}, "head_dim"),
        ],
    )
    def test_what_a_file_says_wrongly_is_refused(self, options: dict[str, Any], message: str) -> None:
        exec(shown("A codec of your own")[0], {"__name__": "page"})  # noqa: S102
        with pytest.raises(FormatError, match=f"describes no codec 'example.four_bits': .*{message}"):
            registry.make_codec(registry.CodecMeta("example.four_bits", options))
        made: Any = registry.make_codec(registry.CodecMeta("example.four_bits", {"head_dim": 16, "step": 1}))
        assert type(made.step) is float
