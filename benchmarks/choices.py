"""What single choices of the codec are worth: `balanced`'s codes without eviction, one thing changed at a time.

python benchmarks/choices.py --text frankenstein.txt moby_dick.txt pride_and_prejudice.txt wikitext2_raw_test.txt

Writes ``benchmarks/results/choices.json``, which `docs/decisions.md` shows.  Rows survive an interruption.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from _common import RESULTS, factory_of, text_id
from quality import PLAIN, Candidate, Results, cut_windows, measure_windows
from rich.progress import Progress
from transformers import DynamicCache

from nexusquant_cache import PRESETS
from nexusquant_cache.evaluation import load_model, python_topics, read_text

if TYPE_CHECKING:
    from nexusquant_cache.evaluation import CacheFactory

BASE = replace(PRESETS["balanced"], key_bits=2, value_bits=2, keep_ratio=1.0)
CHOICES = {
    "as it is": BASE,
    "rotary phase kept": replace(BASE, remove_rope=False),
    "rotary phase and mean kept": replace(BASE, remove_rope=False, center_keys=False),
    "one scale tried": replace(BASE, scale_candidates=(1.0,)),
    "four scales tried": replace(BASE, scale_candidates=(0.9, 1.0, 1.12, 1.3)),
    "gains: least squares": replace(BASE, key_gain="least_squares", value_gain="least_squares"),
    "gains: unbiased": replace(BASE, key_gain="unbiased", value_gain="unbiased"),
    "keys 3 bits": replace(BASE, key_bits=3),
    "values 3 bits": replace(BASE, value_bits=3),
}


def main() -> None:
    """Measure what is missing and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 texts; Python's help topics by default")
    parser.add_argument("--windows", type=int, default=4, help="windows in all, at least one per text")
    parser.add_argument("--prefix", type=int, default=3072, help="tokens in the cache")
    parser.add_argument("--continuation", type=int, default=256, help="tokens predicted after them")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    given = parser.parse_args()
    texts = {path.name: read_text(path) for path in given.text} or {"Python's help topics": python_topics()}
    with Progress() as progress:
        task = progress.add_task("loading the model", total=None)
        loaded = load_model()
        caches = {name: Candidate(settings) for name, settings in CHOICES.items()}
        factories: dict[str, CacheFactory] = {
            PLAIN: DynamicCache,
            **{name: factory_of(item.settings, loaded.model.config) for name, item in caches.items()},
        }
        settings = {
            "model": loaded.name,
            "texts": [text_id(name, text) for name, text in texts.items()],
            **{key: getattr(given, key) for key in ("windows", "prefix", "continuation")},
        }
        results = Results(RESULTS / "choices.json", settings, caches, fresh=given.fresh)
        windows = cut_windows(loaded, texts, given)
        progress.update(task, total=len(windows) * len(factories), completed=0)
        for step in measure_windows(loaded, windows, factories, results):
            progress.update(task, description=step)
            progress.advance(task)


if __name__ == "__main__":
    main()
