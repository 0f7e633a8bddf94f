"""What compression costs in time: encoding, and each generated token against the plain cache, in one run.

python benchmarks/speed.py
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from _common import RESULTS
from rich.progress import Progress

from nexusquant_cache import PRESETS
from nexusquant_cache.evaluation import load_model, preset_candidates, python_topics, read_text
from nexusquant_cache.evaluation.caches import prefill
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.results import environment, text_id, write_json
from nexusquant_cache.evaluation.texts import token_windows
from nexusquant_cache.evaluation.timing import encode_throughput, time_steps

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    """Measure and write ``results/speed_cpu.json`` (or ``speed_cuda.json``)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text to read; Python's help topics by default")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; the median counts")
    parser.add_argument("--steps", type=int, default=16, help="generated tokens per cache and round")
    parser.add_argument("--output", type=Path, help="result file")
    given = parser.parse_args()

    text = python_topics() if given.text is None else read_text(given.text)
    name = "Python's help topics" if given.text is None else given.text.name
    with Progress() as progress:
        loading = progress.add_task("loading the model", total=None)
        loaded = load_model()
        progress.update(loading, total=1, completed=1)
        (window,) = token_windows(loaded.tokenizer, text, length=given.tokens, count=1, name=name)
        plain = prefill(loaded.model, window, progress=_bar(progress, "prefill"))
        factories = {preset.name: preset.factory for preset in preset_candidates(loaded)}
        encoding = {
            key: encode_throughput(plain, factories[key]) for key in progress.track(PRESETS, description="encoding")
        }
        times = time_steps(
            loaded.model,
            plain,
            factories,
            rounds=given.rounds,
            steps=given.steps,
            progress=_bar(progress, "generation steps"),
        )
    content = {
        "environment": environment(),
        "settings": {
            "model": loaded.name,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "text": text_id(name, text),
            "tokens": given.tokens,
            "rounds": given.rounds,
            "steps": given.steps,
        },
        "presets": {key: describe(settings) for key, settings in PRESETS.items()},
        "rows": [
            {
                "cache": key,
                **asdict(taken),
                "encode_tokens_per_s": encoding.get(key),
            }
            for key, taken in times.items()
        ],
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_json(given.output or RESULTS / f"speed_{device}.json", content)
    for key, taken in times.items():
        speed = f", encodes {encoding[key]:,.0f} tokens/s" if key in encoding else ""
        print(f"{key:>18} {taken.milliseconds:7.1f} ms per token, {taken.relative:.2f}x plain{speed}")


def _bar(progress: Progress, what: str) -> Callable[[int, int], None]:
    task = progress.add_task(what, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
