"""A preset, a policy and a cache of a user's own, as in `docs/extending.md`, each under twenty lines."""

import inspect
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from integration.tiny import SMALL, LosslessCache, LosslessCodec, generate, kept_positions, prompt, tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from nexusquant_cache import PRESETS, CacheConfig, EvictionPolicy, NexusQuantCache
from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.policy import ScoreInputs
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
    plain = NexusQuantCache("quant", **SMALL)
    model(input_ids=prompt(100), **{CACHE: plain})
    norms = [layer.values.norm(dim=-1)[0, :, 2:92] for layer in plain.layers]
    cache = NexusQuantCache("quant", policy=ValueNormPolicy(), keep_ratio=0.25, **SMALL)
    model(input_ids=prompt(100), **{CACHE: cache})
    cache.compress()
    for layer_idx, norm in enumerate(norms):
        kept = kept_positions(cache, layer_idx)[0]
        expected = norm.topk(23).indices.sort().values + 2
        assert torch.equal(kept[:, 2:25], expected)
        assert kept[:, [0, 1]].tolist() == [[0, 1]] * 2
        assert kept[:, 25:].tolist() == [list(range(92, 100))] * 2


def test_a_cache_of_ones_own(model: LlamaForCausalLM) -> None:
    cache = CarefulStart("balanced", config=model.config, transform="hadamard", **SMALL)
    text = generate(model, prompt(100), cache, 4)
    assert text.shape == (1, 104)
    first, second = cache.memory_report().layers
    assert first.code_bytes - second.code_bytes == 2 * 2 * 4 * (
        first.kept_tokens - 2 - cache.layers[0].state.tail_tokens
    )


def test_a_policy_per_layer(model: LlamaForCausalLM) -> None:
    caches = [FirstLayerByValue("balanced", **SMALL), NexusQuantCache("balanced", **SMALL)]
    for cache in caches:
        model(input_ids=prompt(100), **{CACHE: cache})
        cache.compress()
    assert not torch.equal(kept_positions(caches[0], 0), kept_positions(caches[1], 0))
    assert torch.equal(kept_positions(caches[0], 1), kept_positions(caches[1], 1))


def test_a_codec_of_ones_own_needs_no_more_than_four_methods(model: LlamaForCausalLM) -> None:
    cache = LosslessCache("quant", **SMALL)
    generate(model, prompt(60), cache, 4)
    assert cache.layers[0].state.body.keys.words.view().shape[-1] == 4 * 16
