"""What the cache decides before any token arrives: layers, codecs, rotary phases."""

import logging

import torch
from transformers import DeepseekV3Config, GPT2Config, LlamaConfig

from nexusquant_cache import NexusQuantCache

LLAMA = LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


def compressed(cache: NexusQuantCache, layers: int = 3) -> NexusQuantCache:
    for index in range(layers):
        cache.update(*torch.randn(2, 1, 2, 300, 16).unbind(0), index)
    cache.compress()
    return cache


def test_latents_are_coded_as_they_come():
    """What latent attention caches as keys is not rotary."""
    cache = NexusQuantCache(config=DeepseekV3Config(num_hidden_layers=2))
    cache.update(torch.randn(1, 1, 300, 512), torch.randn(1, 1, 300, 64), 0)
    cache.compress()
    assert cache.layers[0].phase is None
    assert [x.shape for x in (cache.layers[0].keys, cache.layers[0].values)] == [
        (1, 1, cache.layers[0].kept, 512),
        (1, 1, cache.layers[0].kept, 64),
    ]


def test_layers_share_one_rotary_phase():
    cache = compressed(NexusQuantCache(config=LLAMA))
    assert len({id(layer.phase) for layer in cache.layers}) == 1
    assert cache.layers[0].phase is not None


def test_the_rotary_phase_stays_where_asked_for_or_unknown(caplog):
    with caplog.at_level(logging.INFO, logger="nexusquant_cache"):
        kept = compressed(NexusQuantCache(config=LLAMA, remove_rope=False))
        assert not caplog.records
        unknown = compressed(NexusQuantCache())
        learned = compressed(NexusQuantCache(config=GPT2Config(n_layer=3)))
    assert [record.getMessage() for record in caplog.records] == [
        "keys are coded with their rotary phase; config=model.config lets the cache remove it"
    ]
    assert [layer.phase for cache in (kept, unknown, learned) for layer in cache.layers] == [None] * 9


def test_there_is_no_maximum_length():
    cache = compressed(NexusQuantCache(config=LLAMA))
    assert cache.get_max_length() == -1
    assert cache.layers[0].get_max_cache_shape() == -1
