"""What compression adds to reading a prompt: a prefill and the first step through each cache, in turn, in one run.

python benchmarks/reading.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import RESULTS, shown_steps
from transformers import DynamicCache

from nexusquant_cache import PRESETS, NexusQuantCache, RecentAttentionPolicy
from nexusquant_cache.evaluation import load_model, python_topics, read_text
from nexusquant_cache.evaluation.clock import now
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.results import environment, text_id, write_json
from nexusquant_cache.evaluation.steps import Step
from nexusquant_cache.releases import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

CACHES: dict[str, Callable[[], Any]] = {
    "plain": DynamicCache,
    "quant": partial(NexusQuantCache, "quant"),
    "balanced without far attention": partial(NexusQuantCache, "balanced", policy=RecentAttentionPolicy()),
    "balanced": partial(NexusQuantCache, "balanced"),
    "max": partial(NexusQuantCache, "max"),
}


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> dict[str, float]:
    """Return seconds, and CPU seconds of all threads, of a prefill and of the step after it."""
    found = {}
    for name, tokens in (("read", ids), ("step", ids[:, -1:])):
        start, cpu = now(), time.process_time()
        model(input_ids=tokens, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        found |= {f"{name}_seconds": now() - start, f"{name}_cpu_seconds": time.process_time() - cpu}
    return found


def summary(rounds: dict[str, list[dict[str, float]]], name: str) -> dict[str, Any]:
    """Return the medians of a cache; ratios to the plain cache are those within each round."""
    found: dict[str, Any] = {"cache": name}
    for key in ("read_seconds", "read_cpu_seconds", "step_seconds"):
        found[key] = statistics.median(each[key] for each in rounds[name])
    for kind in ("seconds", "cpu_seconds"):
        totals = {
            cache: [each[f"read_{kind}"] + each[f"step_{kind}"] for each in rounds[cache]] for cache in ("plain", name)
        }
        ratios = (a / b for a, b in zip(totals[name], totals["plain"], strict=True))
        found[f"relative_{kind}"] = statistics.median(ratios)
    return found


def main() -> None:
    """Measure and write ``results/reading.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text to read; Python's help topics by default")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS / "reading.json", help="result file")
    given = parser.parse_args()

    text = python_topics() if given.text is None else read_text(given.text)
    name = "Python's help topics" if given.text is None else given.text.name
    loaded = load_model()
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, : given.tokens].to(loaded.model.device)
    rounds: dict[str, list[dict[str, float]]] = {cache: [] for cache in CACHES}
    with shown_steps() as report:
        for make in CACHES.values():  # compiles, and compares with plain torch
            read(loaded.model, ids[:, : min(given.tokens, 1024)], make())
        for number in range(given.rounds):
            for cache, make in CACHES.items() if number % 2 == 0 else reversed(CACHES.items()):
                report(Step("reading", sum(map(len, rounds.values())), given.rounds * len(CACHES), cache))
                rounds[cache].append(read(loaded.model, ids, make()))
    rows = [summary(rounds, cache) for cache in CACHES]
    content = {
        "environment": environment(),
        "settings": {
            "model": loaded.name,
            "text": text_id(name, text),
            "tokens": ids.shape[1],
            "rounds": given.rounds,
        },
        "presets": {key: describe(PRESETS[key]) for key in ("quant", "balanced", "max")},
        "rows": rows,
    }
    write_json(given.output, content)
    for row in rows:
        print(
            f"{row['cache']:>32} {row['read_seconds']:6.1f} s, first step {row['step_seconds']:5.2f} s: "
            f"{row['relative_seconds']:.2f}x plain ({row['relative_cpu_seconds']:.2f}x in CPU seconds)"
        )


if __name__ == "__main__":
    main()
