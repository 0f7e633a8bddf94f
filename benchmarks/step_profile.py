"""Where the time of a generation step goes, for each layer: compiled attention, and what of ours is around it.

python benchmarks/step_profile.py           # writes results/step_profile.json
python benchmarks/step_profile.py --check   # fails where more is around it than the budget allows

*Around* is what the update of a layer and its attention take but for the compiled function: checks, views, arguments
and the way from torch's attention to the function and back.  Caches are profiled one after the other; `speed.py` lets
them take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from _common import RESULTS, shown_steps
from transformers import DynamicCache

from nexusquant_cache import PRESETS, NexusQuantCache
from nexusquant_cache.codec.cpu import attend, kernels_read
from nexusquant_cache.evaluation import load_model, python_topics
from nexusquant_cache.evaluation.caches import fill, prefill
from nexusquant_cache.evaluation.clock import now
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.results import environment, text_id, write_json
from nexusquant_cache.evaluation.steps import Step, progress_of
from nexusquant_cache.releases import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUDGET = 0.1  # milliseconds for each layer and step
_WARM_UP = 3  # steps


class Stopwatch:
    """Adds up how long calls of some functions take, in the thread that made it; calls inside them count once."""

    def __init__(self) -> None:
        self.seconds, self.is_inside, self.thread = 0.0, False, threading.get_ident()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same, and is timed."""

        def call(*given: Any, **named: Any) -> Any:
            if self.is_inside or threading.get_ident() != self.thread:
                return function(*given, **named)
            self.is_inside, start = True, now()
            try:
                return function(*given, **named)
            finally:
                self.is_inside = False
                self.seconds += now() - start

        return call


@contextmanager
def stopwatches(kind: type[DynamicCache]) -> Iterator[dict[str, Stopwatch]]:
    """Time the update of a kind of cache, torch's attention, and the compiled function in it."""
    watches = {name: Stopwatch() for name in ("update", "attention", "compiled")}
    attention = torch.nn.functional.scaled_dot_product_attention
    with ExitStack() as stack:
        for place, name, watch, function in (
            (kind, "update", "update", kind.update),
            (torch.nn.functional, "scaled_dot_product_attention", "attention", attention),
            (attend, "share", "compiled", attend.share),
            (kernels_read, "attend", "compiled", kernels_read.attend),
        ):
            stack.enter_context(patch.object(place, name, watches[watch].timed(function)))
        yield watches


@torch.no_grad()
def profiled(model: Any, cache: Any, ids: torch.Tensor, steps: int) -> dict[str, float]:
    """Return milliseconds of a step, and of its parts for each layer; medians over the steps."""
    kind = NexusQuantCache if isinstance(cache, NexusQuantCache) else DynamicCache
    layers = model.config.num_hidden_layers
    found: list[dict[str, float]] = []
    with stopwatches(kind) as watches:
        for at in range(_WARM_UP + steps):
            for watch in watches.values():
                watch.seconds = 0.0
            start = now()
            model(input_ids=ids[:, at : at + 1], **{CACHE: cache}, use_cache=True)
            found.append({"step": now() - start} | {name: watch.seconds / layers for name, watch in watches.items()})
            if kind is NexusQuantCache:
                found[-1]["around"] = found[-1]["update"] + found[-1]["attention"] - found[-1]["compiled"]
    return {name: 1e3 * statistics.median(each[name] for each in found[_WARM_UP:]) for name in found[0]}


def main() -> None:
    """Measure, and write the result file or check the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in the cache")
    parser.add_argument("--steps", type=int, default=32, help="steps; the median counts")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="presets to measure")
    parser.add_argument("--check", action="store_true", help="compare with the budget, and write nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_profile.json", help="result file")
    given = parser.parse_args()

    text, loaded = python_topics(), load_model()
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    rows = []
    with shown_steps() as report:
        read = prefill(loaded.model, ids[:, : given.tokens], progress=progress_of(report, "reading"))
        caches: dict[str, Callable[[], Any]] = {"plain": lambda: DynamicCache(config=loaded.model.config)} | {
            name: lambda name=name: NexusQuantCache(name, config=loaded.model.config) for name in given.presets
        }
        for number, (name, make) in enumerate(caches.items()):
            report(Step("profiling", number, len(caches), name))
            cache = fill(make, read)
            rows.append({"cache": name} | profiled(loaded.model, cache, ids[:, given.tokens :], given.steps))
    for row in rows:
        parts = f"attention {row['attention']:.3f} ms, update {row['update']:.3f} ms"
        if "around" in row:
            parts += f"; compiled {row['compiled']:.3f} ms, around it {row['around']:.3f} ms"
        print(f"{row['cache']:>10} {row['step']:7.1f} ms a step; a layer: {parts}")
    over = [row["cache"] for row in rows[1:] if row["around"] > BUDGET]
    print(f"budget {BUDGET} ms around the compiled function: {'exceeded by ' + ', '.join(over) if over else 'kept'}")
    if given.check:
        sys.exit(bool(over))
    content = {
        "environment": environment(),
        "settings": {
            "model": loaded.name,
            "text": text_id("Python's help topics", text),
            "tokens": given.tokens,
            "steps": given.steps,
            "budget_ms": BUDGET,
        },
        "presets": {name: describe(PRESETS[name]) for name in given.presets},
        "rows": rows,
    }
    write_json(given.output, content)


if __name__ == "__main__":
    main()
