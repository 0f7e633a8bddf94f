"""What the cache decides before any token arrives: layers, codecs, rotary phases."""

import logging

import pytest
import torch
from feeding import feed
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MptConfig,
)

from nexusquant_cache import NexusQuantCache, UnsupportedError

LLAMA = LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


def compressed(cache: NexusQuantCache, layers: int = 3) -> NexusQuantCache:
    for index in range(layers):
        feed(cache, *torch.randn(2, 1, 2, 300, 16).unbind(0), index)
    cache.compress()
    return cache


def test_latents_are_coded_as_they_come():
    """What latent attention caches as keys is not rotary."""
    cache = NexusQuantCache(config=DeepseekV3Config(num_hidden_layers=2))
    feed(cache, torch.randn(1, 1, 300, 512), torch.randn(1, 1, 300, 64), 0)
    cache.compress()
    assert cache.layers[0].state.phase is None
    assert [x.shape for x in (cache.layers[0].keys, cache.layers[0].values)] == [
        (1, 1, cache.layers[0].state.kept, 512),
        (1, 1, cache.layers[0].state.kept, 64),
    ]


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]]), "gpt_neo cuts a local window"),
        (BloomConfig(n_layer=2), r"bloom weighs tokens by their distance \(ALiBi\)"),
        (FalconConfig(num_hidden_layers=2, alibi=True), r"falcon weighs tokens by their distance \(ALiBi\)"),
        (MptConfig(n_layers=2), r"mpt weighs tokens by their distance \(ALiBi\)"),
    ],
)
def test_models_with_a_bias_by_distance_are_not_evicted_from(config, what):
    """Scores of tokens know nothing of it."""
    with pytest.raises(UnsupportedError, match=what):
        NexusQuantCache("balanced", config=config)
    assert len(NexusQuantCache("quant", config=config)) == 2


def test_a_window_that_no_layer_has_is_no_hindrance():
    config = GPTNeoConfig(num_layers=2, attention_types=[[["global"], 2]])
    assert len(NexusQuantCache("balanced", config=config)) == 2


def test_layers_share_one_rotary_phase():
    cache = compressed(NexusQuantCache(config=LLAMA))
    assert len({id(layer.state.phase) for layer in cache.layers}) == 1
    assert cache.layers[0].state.phase is not None


def test_the_rotary_phase_stays_where_asked_for_or_unknown(caplog):
    with caplog.at_level(logging.INFO, logger="nexusquant_cache"):
        kept = compressed(NexusQuantCache(config=LLAMA, remove_rope=False))
        assert not caplog.records
        unknown = compressed(NexusQuantCache())
        learned = compressed(NexusQuantCache(config=GPT2Config(n_layer=3)))
    assert [record.getMessage() for record in caplog.records] == [
        "keys are coded with their rotary phase; config=model.config lets the cache remove it"
    ]
    assert [layer.state.phase for cache in (kept, unknown, learned) for layer in cache.layers] == [None] * 9


def test_there_is_no_maximum_length():
    cache = compressed(NexusQuantCache(config=LLAMA))
    assert cache.get_max_length() == -1
    assert cache.layers[0].get_max_cache_shape() == -1
