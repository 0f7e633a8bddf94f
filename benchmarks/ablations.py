"""What single choices are worth: `balanced` with one stage switched off or replaced at a time.

python benchmarks/ablations.py --text frankenstein.txt moby_dick.txt
python benchmarks/ablations.py --rows "key mean kept" "one scale tried"

The first rows are about codes: those of `balanced` at 2 bits, with nothing evicted.  The rows ``scorer: ...`` are about
what is kept: `balanced` as it is, with one policy after the other; those whose scores can be compared share one budget
over all heads and layers.  In the last rows decoded keys are sharpened.  No layer gets more bits where its codes are
bad (``most_code_error``): that would hide what a choice costs.

Writes ``benchmarks/results/ablations.json``, which `docs/decisions.md` shows.  Rows survive an interruption; those that
are not asked for stay in the file, and a run without ``--rows`` shows all of them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from _codes import (
    UNCHECKED,
    CentredValuesCache,
    FlatPlanCache,
    MoreSharpenedCache,
    ScalarCache,
    SharpenedCache,
    candidate_of,
)
from _common import RESULTS, add_measuring, measuring, read_texts, shown_steps

from nexusquant_cache import PRESETS, CacheConfig, NexusQuantCache
from nexusquant_cache.evaluation import Candidate, EvaluationOptions, evaluate, load_model
from nexusquant_cache.evaluation.presets import read_again
from nexusquant_cache.policy import (
    Averaged,
    Combined,
    EvictionPolicy,
    ExpectedAttentionPolicy,
    FarAttentionPolicy,
    KeyDiffPolicy,
    KeyKeyPolicy,
    KeyNormPolicy,
    LeveragePolicy,
    MeanKeyKeyPolicy,
    RecentAttentionPolicy,
    ReconstructionPolicy,
    SharedOverHeads,
    ValueAware,
    WindowAttentionPolicy,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EVICTING = replace(PRESETS["balanced"], most_code_error=UNCHECKED)
WINDOW = RecentAttentionPolicy(observation_window=64, aggregate="max")
CODES = replace(EVICTING, key_bits=2, value_bits=2, keep_ratio=1.0)


@dataclass(frozen=True)
class Row:
    """One changed choice."""

    settings: CacheConfig
    kind: type[NexusQuantCache] = NexusQuantCache
    policy: EvictionPolicy | None = None

    def candidate(self, name: str, config: PretrainedConfig) -> Candidate:
        """Return it as a candidate."""
        found = candidate_of(name, self.kind, self.settings, config, self.policy)
        needs_second_reading = self.policy is not None and self.policy.requires_reconstruction
        return replace(found, prepare=read_again) if needs_second_reading else found


ROWS = {
    "as it is": Row(CODES),
    "key mean kept": Row(replace(CODES, center_keys=False)),
    "rotary phase kept": Row(replace(CODES, remove_rope=False)),
    "rotary phase and mean kept": Row(replace(CODES, remove_rope=False, center_keys=False)),
    "Hadamard rotation everywhere": Row(replace(CODES, transform="hadamard")),
    "principal axes everywhere": Row(replace(CODES, transform="principal")),
    "value mean removed": Row(CODES, CentredValuesCache),
    "principal axes, as many bits for each": Row(replace(CODES, transform="principal"), FlatPlanCache),
    "Hadamard rotation and scalar codes": Row(replace(CODES, transform="hadamard"), ScalarCache),
    "one scale tried": Row(replace(CODES, scale_candidates=(1.0,))),
    "two scales tried": Row(replace(CODES, scale_candidates=(0.92, 1.1))),
    "five scales tried": Row(replace(CODES, scale_candidates=(0.9, 1.0, 1.12, 1.3, 1.55))),
    "keys 3 bits": Row(replace(CODES, key_bits=3)),
    "values 3 bits": Row(replace(CODES, value_bits=3)),
    **{
        f"scorer: {name}": Row(EVICTING, policy=policy)
        for name, policy in {
            "key-key": KeyKeyPolicy(),
            "key-key, mean": MeanKeyKeyPolicy(),
            "key norm": KeyNormPolicy(),
            "key difference": KeyDiffPolicy(),
            "leverage": LeveragePolicy(),
            "window attention": WindowAttentionPolicy(),
            "window attention, mean": WindowAttentionPolicy(aggregate="mean", pool=7),
            "window attention times value": ValueAware(WindowAttentionPolicy(pool=1), pool=21),
            "window attention, heads share": SharedOverHeads(WindowAttentionPolicy()),
            "window attention or leverage": Combined((WindowAttentionPolicy(), LeveragePolicy())),
            "expected attention": ExpectedAttentionPolicy(),
            "expected attention times value": ValueAware(ExpectedAttentionPolicy(pool=1), pool=21),
            "second reading": ReconstructionPolicy(),
            "second reading and window attention": Averaged((WINDOW, ReconstructionPolicy())),
            "far attention": FarAttentionPolicy(),
            "far attention, pooled over 5": FarAttentionPolicy(pool=5),
            "leverage or recent attention": Combined((LeveragePolicy(), RecentAttentionPolicy()), shares=(0.7, 0.3)),
            "default": None,
        }.items()
    },
    "keys sharpened 2 %": Row(EVICTING, SharpenedCache),
    "keys sharpened 5 %": Row(EVICTING, MoreSharpenedCache),
}


NAMES = ", ".join(ROWS).replace("%", "%%")


def main() -> None:
    """Measure what is missing and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=NAMES)
    defaults = EvaluationOptions(continuation=128, lengths=(1024,), kinds=("single", "later"), facts=0)
    add_measuring(parser, RESULTS / "ablations.json", defaults)
    given = parser.parse_args()
    options = measuring(given)
    with shown_steps() as report:
        loaded = load_model()
        caches = [ROWS[name].candidate(name, loaded.model.config) for name in given.rows]
        evaluate(loaded, caches, read_texts(given.text), options, output=given.output, fresh=given.fresh, report=report)


if __name__ == "__main__":
    main()
