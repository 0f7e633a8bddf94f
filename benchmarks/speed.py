"""What compression costs in time: encoding, and each generated token against the plain cache, in one run.

python benchmarks/speed.py
python benchmarks/speed.py --tokens 16384 --rounds 3 --fills 1
python benchmarks/speed.py --model gemma3 --tokens 16384 --rounds 3 --fills 1
python benchmarks/speed.py --dtype bfloat16

``nexusquant-cache bench`` measures the same on a model of yours.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from _common import MODELS, RESULTS, load_measured, shown_steps

from nexusquant_cache import PRESETS
from nexusquant_cache.evaluation import python_topics, read_text
from nexusquant_cache.evaluation.bench import BenchOptions, run_bench
from nexusquant_cache.evaluation.presets import nexusquant_candidate
from nexusquant_cache.evaluation.results import environment, model_id, text_id, write_json


def main() -> None:
    """Measure and write ``results/speed_cpu.json``, with what differs from the defaults in its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="SmolLM2-135M-Instruct, or Gemma 3 270M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    parser.add_argument("--text", type=Path, help="text to read; Python's help topics by default")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; the median counts")
    parser.add_argument("--steps", type=int, default=16, help="generated tokens per cache and round")
    parser.add_argument("--fills", type=int, default=3, help="times that each cache is filled; the median time counts")
    parser.add_argument("--output", type=Path, help="result file")
    given = parser.parse_args()

    text = python_topics() if given.text is None else read_text(given.text)
    name = "Python's help topics" if given.text is None else given.text.name
    options = BenchOptions(given.tokens, rounds=given.rounds, steps=given.steps, fills=given.fills)
    with shown_steps() as report:
        loaded = load_measured(given.model)
        loaded.model.to(getattr(torch, given.dtype))
        result = run_bench(loaded, text, options, name=name, report=report)
    rows = [
        {
            "cache": row.name,
            **asdict(row.time),
            "encode_tokens_per_s": given.tokens / row.compress_seconds if row.compress_seconds else None,
        }
        for row in result.rows
    ]
    content = {
        "environment": environment(),
        "settings": {
            "model": model_id(loaded)["name"],
            "dtype": result.dtype,
            "text": text_id(name, text),
            "tokens": given.tokens,
            "fills": given.fills,
            "rounds": given.rounds,
            "steps": given.steps,
        },
        "presets": {name: nexusquant_candidate(name, name, loaded.model.config).settings for name in PRESETS},
        "rows": rows,
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = ("model", "dtype", "tokens")
    asked = [f"_{value}" for name in named if (value := getattr(given, name)) != parser.get_default(name)]
    write_json(given.output or RESULTS / f"speed_{device}{''.join(asked)}.json", content)
    for row in rows:
        encodes = row["encode_tokens_per_s"]
        speed = f", encodes {encodes:,.0f} tokens/s" if encodes else ""
        print(f"{row['cache']:>18} {row['milliseconds']:7.1f} ms per token, {row['relative']:.2f}x plain", end="")
        print(f" ({row['relative_cpu']:.2f}x in CPU seconds){speed}")


if __name__ == "__main__":
    main()
