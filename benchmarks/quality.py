"""Quality and recall of every preset, and of the predecessor's recipe at the same bytes, on SmolLM2-135M.

python benchmarks/quality.py --text frankenstein.txt moby_dick.txt pride_and_prejudice.txt wikitext2_raw_test.txt

Every row is written as soon as it is measured; run again to go on after an interruption.  Rows of a cache
whose settings changed are measured again; after a change of the package itself use ``--fresh``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from _codes import UNCHECKED, KeyAxesCache, candidate_of, held_bytes, ratio_for
from _common import IMAGES, RESULTS, add_measuring, measuring, read_texts, shown_steps

from nexusquant_cache import PRESETS, MeanKeyKeyPolicy, NexusQuantCache
from nexusquant_cache.evaluation import (
    Candidate,
    EvaluationOptions,
    evaluate,
    load_model,
    nexusquant_candidate,
    summaries,
)
from nexusquant_cache.evaluation.plots import quality_figure
from nexusquant_cache.evaluation.report import measured_on
from nexusquant_cache.evaluation.results import read_json
from nexusquant_cache.pages.pictures import save_png

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREDECESSOR = "predecessor@"
PRINCIPAL = "principal@"


def principal(name: str, config: PretrainedConfig) -> Candidate:
    """Return a preset whose keys have principal axes, however much these weigh."""
    return candidate_of(PRINCIPAL + name, KeyAxesCache, PRESETS[name], config)


def candidates(config: PretrainedConfig, tokens: int) -> list[Candidate]:
    """Return the presets, each followed by its variants and the predecessor's recipe in as many bytes.

    From some thousand kept tokens on, every preset codes keys in principal axes; below, ``auto`` may take a Hadamard
    rotation and more bits, which then takes fewer bytes.  ``principal@`` takes the axes at once: the quality at 32k
    tokens, for which the presets state their factor, without the length.

    The recipe is Hadamard codes of 2 bits on keys with their mean and their rotary phase, and eviction by mean
    key-key scores; with the bytes of ``balanced`` it evicts about the 60 % that the predecessor evicted.
    """
    found = []
    for name, settings in PRESETS.items():
        found.append(nexusquant_candidate(name, name, config))
        if settings.keep_ratio < 1:  # with all tokens kept, the axes pay at once
            found.append(principal(name, config))
        recipe = replace(
            settings,
            min_kept=0,
            short_text_bits=0.0,
            key_bits=2,
            value_bits=2,
            center_keys=False,
            remove_rope=False,
            transform="hadamard",
            most_code_error=UNCHECKED,
        )
        target = held_bytes(NexusQuantCache, settings, config, tokens)
        keep_ratio = ratio_for(NexusQuantCache, recipe, target, config, tokens)
        recipe = replace(recipe, keep_ratio=keep_ratio)
        found.append(nexusquant_candidate(PREDECESSOR + name, recipe, config, MeanKeyKeyPolicy()))
    return found


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measuring(parser, RESULTS / "quality_smollm2.json", EvaluationOptions(windows=8, prefix=3072, facts=0))
    parser.add_argument("--caches", nargs="*", help="only these; all by default")
    parser.add_argument("--plot", type=Path, default=IMAGES / "quality_vs_bytes.png", help="image file")
    parser.add_argument("--plot-only", action="store_true", help="draw the plot from the result file and stop")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, write the result file, draw the plot."""
    given = arguments()
    if not given.plot_only:
        run(given)
    content = read_json(given.output)
    rows = summaries(content)
    save_png(quality_figure(rows, measured_on(content, rows)), given.plot)


def run(given: argparse.Namespace) -> None:
    """Measure what is missing."""
    options = measuring(given)
    with shown_steps() as report:
        loaded = load_model()
        caches = candidates(loaded.model.config, given.prefix)
        wanted = [cache for cache in caches if not given.caches or cache.name in given.caches]
        evaluate(loaded, wanted, read_texts(given.text), options, output=given.output, fresh=given.fresh, report=report)


if __name__ == "__main__":
    main()
