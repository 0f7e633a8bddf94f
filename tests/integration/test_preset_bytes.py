"""Presets reach their factor in bytes really held: the storages of all tensors that the cache reaches."""

import pytest
import torch
from feeding import feed
from integration.tiny import reachable_bytes, tiny_config

from grids import combined
from nexusquant_cache import PRESETS, NexusQuantCache, RecentAttentionPolicy
from nexusquant_cache.codec.rotation import PrincipalRotation
from nexusquant_cache.evaluation.fit import random_tokens

LAYERS = 2
AXES_PAY = 128 * (128 + 4) / (128 / 8 * 0.7)  # tokens with heads of 128 channels, where axes save 0.7 bits
FACTORS = {"quant": 6, "high": 10, "asym": 14, "balanced": 17, "max": 33}


def filled(preset: str, tokens: int, head_dim: int, generated: int = 20, impl: str = "torch") -> NexusQuantCache:
    """Compress random keys and values of one bfloat16 head and add generated tokens.

    Keys get principal axes, as those of a real prompt would, since there are so many.  The policy looks at the last
    queries alone: which tokens stay is nothing to bytes.
    """
    cache = NexusQuantCache(preset, policy=RecentAttentionPolicy(), impl=impl)
    for length in (tokens, *[1] * generated):
        for layer_idx in range(LAYERS):
            states = torch.randn(2, 1, 1, length, head_dim, dtype=torch.bfloat16)
            feed(cache, states[0], states[1], layer_idx)
        if length > 1:
            cache.compress()
    return cache


def test_every_preset_has_its_factor_here() -> None:
    assert FACTORS.keys() == PRESETS.keys()


@combined(preset=list(FACTORS), head_dim=[64, 128])
def test_the_factor_at_32k_tokens(preset: str, head_dim: int) -> None:
    pytest.importorskip("numba", reason="an extra; codes are the same without, and take long")
    cache = filled(preset, 32_768, head_dim, impl="cpu")
    report, held = cache.memory_report(), reachable_bytes(cache)
    dense = LAYERS * (32_768 + 20) * 2 * head_dim * 2
    assert all(isinstance(fitted.keys.rotation, PrincipalRotation) for fitted in cache.transforms if fitted)
    assert held == report.held_bytes
    assert dense == report.dense_bytes
    assert dense / held >= FACTORS[preset]
    assert report.compression_factor == dense / held
    # Codes of all tokens, and of one layer the exact ones.
    exact = 32_768 * 2 * head_dim * 2
    assert exact < report.peak_bytes < exact + LAYERS * exact / 4


@pytest.mark.parametrize(
    ("preset", "tokens", "factor"),
    [
        ("quant", 2048, 5.0),
        *[("balanced", 2048, 11.5), ("balanced", 4096, 13.5), ("balanced", 8192, 15.3)],
        *[("max", 2048, 20), ("max", 4096, 25), ("max", 8192, 28)],
    ],
)
def test_the_factor_at_usual_lengths(preset: str, tokens: int, factor: float) -> None:
    """Of a model with 4 KV heads of 128 channels, and its config.

    Axes of the keys are worth as much as a model's.

    Compiled functions need no tables of rotary phases, which would be a tenth of what two layers hold.
    """
    pytest.importorskip("numba", reason="an extra")
    config = tiny_config(num_key_value_heads=4, head_dim=128)
    cache = NexusQuantCache(preset, config=config, impl="cpu")
    random = torch.Generator().manual_seed(0)
    for length in (tokens, 1):
        for layer_idx in range(LAYERS):
            feed(cache, *(x.bfloat16() for x in random_tokens(4, length, 128, random)), layer_idx)
    report = cache.memory_report()
    assert report.held_bytes == reachable_bytes(cache)
    assert report.compression_factor >= factor
    kept = PRESETS[preset].keep_ratio * tokens
    bits = [layer.codecs[0].layout.bits_per_channel for layer in cache.transforms if layer]
    more = 0.7 if kept < AXES_PAY else 0  # in the place of axes
    assert bits == pytest.approx([PRESETS[preset].key_bits + more] * LAYERS, abs=0.1)


@pytest.mark.parametrize("preset", FACTORS)
def test_the_report_is_honest_about_short_texts(preset: str) -> None:
    """At a thousand tokens the exact tail weighs more, and the factor says so."""
    cache = filled(preset, 1024, 64)
    report = cache.memory_report()
    assert report.held_bytes == reachable_bytes(cache)
    assert 1.5 < report.compression_factor < 0.9 * FACTORS[preset]
    assert f"{report.compression_factor:.1f}x" in str(report).splitlines()[-2]


@pytest.mark.parametrize("preset", FACTORS)
def test_too_short_texts_are_not_called_compressed(preset: str) -> None:
    assert filled(preset, 100, 64).memory_report().compression_factor == 1.0
