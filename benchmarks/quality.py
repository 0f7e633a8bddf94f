"""Quality and recall of every preset, and of the predecessor's recipe at the same bytes, on SmolLM2-135M.

python benchmarks/quality.py --text frankenstein.txt moby_dick.txt pride_and_prejudice.txt wikitext2_raw_test.txt

Every row is written as soon as it is measured; run again to go on after an interruption.  Rows of a cache
whose settings changed are measured again; after a change of the code itself use ``--fresh``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import IMAGES, RESULTS, describe, environment, factory_of, read_json, text_id, write_json
from _plot import plot_quality
from rich.progress import Progress
from transformers import DynamicCache

from nexusquant_cache import PRESETS, CacheConfig, EvictionPolicy, MeanKeyKeyPolicy
from nexusquant_cache.evaluation import (
    Continuation,
    LoadedModel,
    NeedleTask,
    ask,
    load_model,
    measure_quality,
    needle_grid,
    plain_quality,
    prefill_needle,
    python_topics,
    read_text,
    run_plain,
    token_windows,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PretrainedConfig

    from nexusquant_cache.evaluation import CacheFactory

PLAIN = "plain"
PREDECESSOR = "predecessor@"


@dataclass(frozen=True)
class Candidate:
    """A cache to measure."""

    settings: CacheConfig
    policy: EvictionPolicy | None = None


def candidates(config: PretrainedConfig, tokens: int) -> dict[str, Candidate]:
    """Return the presets, each followed by the predecessor's recipe in as many bytes.

    The recipe is Hadamard codes of 2 bits on keys with their mean and their rotary phase, and eviction by mean
    key-key scores; with the bytes of ``balanced`` it evicts about the 60 % that the predecessor evicted.
    """
    found: dict[str, Candidate] = {}
    for name, settings in PRESETS.items():
        found[name] = Candidate(settings)
        recipe = dataclasses.replace(
            settings, key_bits=2, value_bits=2, center_keys=False, remove_rope=False, key_gain="norm", value_gain="norm"
        )
        keep_ratio = _matching_ratio(recipe, _held_bytes(settings, config, tokens), config, tokens)
        found[PREDECESSOR + name] = Candidate(dataclasses.replace(recipe, keep_ratio=keep_ratio), MeanKeyKeyPolicy())
    return found


def _matching_ratio(recipe: CacheConfig, target: float, config: PretrainedConfig, tokens: int) -> float:
    """Return the part of the tokens to keep so that the bytes held reach the target; bytes grow linearly with it."""
    low, high = 0.2, 0.8
    at_low, at_high = (
        _held_bytes(dataclasses.replace(recipe, keep_ratio=ratio), config, tokens) for ratio in (low, high)
    )
    ratio = low + (target - at_low) / (at_high - at_low) * (high - low)
    return round(min(max(ratio, 0.01), 1.0), 3)


def _held_bytes(settings: CacheConfig, config: PretrainedConfig, tokens: int) -> float:
    """Return the bytes a cache of the whole model would hold, from one layer of random keys and values."""
    cache = factory_of(settings, config)()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys, values = torch.randn(2, 1, config.num_key_value_heads, tokens, head_dim)
    cache.update(keys.clone(), values.clone(), 0)
    cache.compress()
    report = cache.memory_report()
    return float(report.shared_bytes + report.layers[0].held_bytes * config.num_hidden_layers)


class Results:
    """The result file: rows by task and cache, written one by one."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], caches: Mapping[str, Candidate], *, fresh: bool
    ) -> None:
        """Take over the rows of an earlier run that are still valid."""
        self._path = path
        earlier = {} if fresh else read_json(path)
        described = {name: describe(item.settings, item.policy) for name, item in caches.items()}
        known = earlier.get("caches", {})
        valid = {PLAIN, *(name for name in described if known.get(name) == described[name])}
        if earlier.get("settings") != settings:
            valid = set()
        self.content: dict[str, Any] = {"environment": environment(), "settings": settings, "caches": described}
        for kind in ("quality", "needles"):
            self.content[kind] = [row for row in earlier.get(kind, []) if row["cache"] in valid]

    def missing(self, kind: str, task: str, names: Mapping[str, Any]) -> list[str]:
        """Return the caches not yet measured on a task."""
        done = {row["cache"] for row in self.content[kind] if row["task"] == task}
        return [name for name in names if name not in done]

    def add(self, kind: str, task: str, cache: str, row: Mapping[str, Any]) -> None:
        """Add a row and write the file."""
        self.content[kind].append({"task": task, "cache": cache, **row})
        write_json(self._path, self.content)


def measure_windows(
    loaded: LoadedModel, windows: list[Continuation], factories: Mapping[str, CacheFactory], results: Results
) -> Iterator[str]:
    """Compare predictions; one plain prefill per window serves all caches.  Yields what was done."""
    for window in windows:
        missing = results.missing("quality", window.name, factories)
        plain = run_plain(loaded.model, window) if missing else None
        for name in factories:
            yield f"{window.name}: {name}"
            if plain is None or name not in missing:
                continue
            row = plain_quality(plain) if name == PLAIN else measure_quality(loaded.model, plain, factories[name])
            results.add("quality", window.name, name, {**asdict(row), "dppl_percent": row.dppl_percent})


def measure_needles(
    loaded: LoadedModel, tasks: list[NeedleTask], factories: Mapping[str, CacheFactory], results: Results
) -> Iterator[str]:
    """Ask for the hidden facts; one plain prefill per task serves all caches.  Yields what was done."""
    for task in tasks:
        missing = results.missing("needles", task.name, factories)
        plain = prefill_needle(loaded.model, task) if missing else None
        for name in factories:
            yield f"{task.name}: {name}"
            if plain is not None and name in missing:
                results.add("needles", task.name, name, asdict(ask(loaded, task, plain, factories[name])))


def cut_windows(loaded: LoadedModel, texts: Mapping[str, str], given: argparse.Namespace) -> list[Continuation]:
    """Return the windows to continue: equally many from each text."""
    each = -(-given.windows // len(texts))
    length = given.prefix + given.continuation + 1
    return [
        Continuation.split(f"{name} {index + 1}", window, given.continuation)
        for name, text in texts.items()
        for index, window in enumerate(token_windows(loaded.tokenizer, text, length=length, count=each, name=name))
    ]


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 texts; Python's help topics by default")
    parser.add_argument("--windows", type=int, default=8, help="windows in all, at least one per text")
    parser.add_argument("--prefix", type=int, default=3072, help="tokens in the cache")
    parser.add_argument("--continuation", type=int, default=256, help="tokens predicted after them")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 3072, 4096], help="needle prompts")
    parser.add_argument("--depths", type=float, nargs="*", default=[0.1, 0.3, 0.5, 0.7, 0.9], help="needle depths")
    parser.add_argument("--caches", nargs="*", help="only these; all by default")
    parser.add_argument("--seed", type=int, default=0, help="chooses the needles")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality_smollm2.json", help="result file")
    parser.add_argument("--plot", type=Path, default=IMAGES / "quality_vs_bytes.png", help="image file")
    parser.add_argument("--plot-only", action="store_true", help="draw the plot from the result file and stop")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, write the result file, draw the plot."""
    given = arguments()
    if not given.plot_only:
        run(given)
    plot_quality(read_json(given.output), given.plot)


def run(given: argparse.Namespace) -> None:
    """Measure what is missing."""
    texts = {path.name: read_text(path) for path in given.text} or {"Python's help topics": python_topics()}
    with Progress() as progress:
        task = progress.add_task("loading the model", total=None)
        loaded = load_model()
        caches = candidates(loaded.model.config, given.prefix)
        factories: dict[str, CacheFactory] = {
            PLAIN: DynamicCache,
            **{name: factory_of(item.settings, loaded.model.config, item.policy) for name, item in caches.items()},
        }
        factories = {name: make for name, make in factories.items() if not given.caches or name in given.caches}
        windows = cut_windows(loaded, texts, given)
        needles = needle_grid(loaded.tokenizer, texts, lengths=given.lengths, depths=given.depths, seed=given.seed)
        settings = {
            "model": loaded.name,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "texts": [text_id(name, text) for name, text in texts.items()],
            **{key: getattr(given, key) for key in ("windows", "prefix", "continuation", "lengths", "depths", "seed")},
        }
        results = Results(given.output, settings, caches, fresh=given.fresh)
        progress.update(task, total=(len(windows) + len(needles)) * len(factories), completed=0)
        steps = itertools.chain(
            measure_windows(loaded, windows, factories, results), measure_needles(loaded, needles, factories, results)
        )
        for step in steps:
            progress.update(task, description=step)
            progress.advance(task)


if __name__ == "__main__":
    main()
