"""What the caches of well-known shapes of models hold at long contexts; no weights are needed.

python benchmarks/fit.py

``nexusquant-cache fit`` shows the same of any model.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from _common import RESULTS
from rich.progress import track

from nexusquant_cache import PRESETS
from nexusquant_cache.evaluation.fit import Shape, fit
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.results import environment, write_json

# Layers, key heads, channels of a head.
SHAPES = {
    "Llama 3.1 8B": (32, 8, 128),
    "Qwen3 14B": (40, 8, 128),
    "Qwen3 32B": (64, 8, 128),
    "Llama 3.1 70B": (80, 8, 128),
}


def main() -> None:
    """Compute and write ``results/fit.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 131_072], help="prompt lengths")
    parser.add_argument("--output", type=Path, default=RESULTS / "fit.json", help="result file")
    given = parser.parse_args()
    cases = [(name, tokens) for tokens in given.tokens for name in SHAPES]
    rows = []
    for name, tokens in track(cases, description="compressing heads"):
        layers, heads, head_dim = SHAPES[name]
        found = fit(Shape(layers, (), heads, head_dim), tokens)
        rows += [{"model": name, "tokens": tokens, **asdict(row)} for row in found]
    content = {
        "environment": environment(),
        "settings": {"shapes": SHAPES},
        "presets": {name: describe(settings) for name, settings in PRESETS.items()},
        "rows": rows,
    }
    write_json(given.output, content)
    for row in rows:
        print(f"{row['model']:>14} {row['tokens']:>8,} tokens {row['name']:>9}: {row['held_bytes'] / 2**30:7.2f} GiB")


if __name__ == "__main__":
    main()
