"""Bytes really held by every preset at several prompt lengths: random keys and values, no model.

python benchmarks/memory.py

Variances of the keys fall, so that principal axes save about as much as of a model's keys (``transforms.py``).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS
from rich.progress import track
from transformers import LlamaConfig

from nexusquant_cache import PRESETS, NexusQuantCache, RecentAttentionPolicy
from nexusquant_cache.evaluation.caches import update
from nexusquant_cache.evaluation.fit import random_tokens
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.results import environment, write_json

LAYERS = 2
KV_HEADS = 8
WINDOW = 64  # queries that the policy looks at


def measure(preset: str, tokens: int, head_dim: int) -> dict[str, Any]:
    """Fill a cache with a prompt in bfloat16, compress it, and read its report."""
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=head_dim,
        hidden_size=KV_HEADS * head_dim,
        max_position_embeddings=131_072,
    )
    # Which tokens stay is nothing to bytes: the default policy would look at all pairs of them.
    cache = NexusQuantCache(
        preset, config=config, policy=RecentAttentionPolicy(observation_window=WINDOW, aggregate="max")
    )
    random = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        keys, values = (x.bfloat16() for x in random_tokens(KV_HEADS, tokens, head_dim, random))
        update(cache, keys.clone(), values.clone(), layer, keys[:, :, -WINDOW:])  # attention of all would take long
    cache.compress()
    report = cache.memory_report()
    return {
        "preset": preset,
        "tokens": tokens,
        "head_dim": head_dim,
        "kept_tokens": report.kept_tokens,
        "held_bytes": report.held_bytes,
        "dense_bytes": report.dense_bytes,
        "compression_factor": report.compression_factor,
    }


def main() -> None:
    """Measure and write ``results/memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 32_768], help="prompt lengths")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128], help="head dimensions")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json", help="result file")
    given = parser.parse_args()
    cases = [(preset, n, dim) for dim in given.head_dims for n in given.tokens for preset in PRESETS]
    rows = [measure(*case) for case in track(cases, description="filling caches")]
    content = {
        "environment": environment(),
        "settings": {"layers": LAYERS, "kv_heads": KV_HEADS, "batch": 1, "dtype": "bfloat16", "seed": 0},
        "presets": {name: describe(settings) for name, settings in PRESETS.items()},
        "rows": rows,
    }
    write_json(given.output, content)
    for row in rows:
        print(
            f"{row['preset']:>9} {row['tokens']:>7,} tokens, head_dim {row['head_dim']:>3}: "
            f"{row['held_bytes']:>12,} bytes, {row['compression_factor']:5.2f}x"
        )


if __name__ == "__main__":
    main()
