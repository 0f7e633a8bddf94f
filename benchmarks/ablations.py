"""What single choices are worth: `balanced` with one stage switched off or replaced at a time.

python benchmarks/ablations.py --text frankenstein.txt moby_dick.txt
python benchmarks/ablations.py --rows "key mean kept" "one scale tried"

The first rows are about codes: those of `balanced` at 2 bits, with nothing evicted.  The others, ``scorer: ...``, are
about what is kept: `balanced` as it is, with one policy after the other, each shown all it can look at.  No layer gets
more bits where its codes are bad (``most_code_error``): that would hide what a choice costs.

Writes ``benchmarks/results/ablations.json``, which `docs/decisions.md` shows.  Rows survive an interruption; those that
are not asked for stay in the file, and a run without ``--rows`` shows all of them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from _codes import UNCHECKED, FlatPlanCache, ScalarCache, candidate_of
from _common import RESULTS, read_texts, shown_steps

from nexusquant_cache import PRESETS, CacheConfig, NexusQuantCache
from nexusquant_cache.attention import reconstruct
from nexusquant_cache.evaluation import KINDS, Candidate, EvaluationOptions, LoadedModel, evaluate, load_model
from nexusquant_cache.policy import (
    Combined,
    EvictionPolicy,
    ExpectedAttentionPolicy,
    KeyDiffPolicy,
    KeyKeyPolicy,
    KeyNormPolicy,
    LeveragePolicy,
    MeanKeyKeyPolicy,
    ReconstructionPolicy,
    SharedOverHeads,
    ValueAware,
    WindowAttentionPolicy,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PretrainedConfig

EVICTING = replace(PRESETS["balanced"], most_code_error=UNCHECKED)
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


def read_again(cache: Cache, loaded: LoadedModel, ids: Tensor) -> None:
    """Let the model read the prompt a second time."""
    assert isinstance(cache, NexusQuantCache)
    reconstruct(loaded.model, cache, ids)


ROWS = {
    "as it is": Row(CODES),
    "key mean kept": Row(replace(CODES, center_keys=False)),
    "rotary phase kept": Row(replace(CODES, remove_rope=False)),
    "rotary phase and mean kept": Row(replace(CODES, remove_rope=False, center_keys=False)),
    "Hadamard rotation everywhere": Row(replace(CODES, transform="hadamard")),
    "principal axes everywhere": Row(replace(CODES, transform="principal")),
    "principal axes, as many bits for each": Row(replace(CODES, transform="principal"), FlatPlanCache),
    "Hadamard rotation and scalar codes": Row(replace(CODES, transform="hadamard"), ScalarCache),
    "one scale tried": Row(replace(CODES, scale_candidates=(1.0,))),
    "four scales tried": Row(replace(CODES, scale_candidates=(0.9, 1.0, 1.12, 1.3))),
    "gains: least squares": Row(replace(CODES, key_gain="least_squares", value_gain="least_squares")),
    "gains: unbiased": Row(replace(CODES, key_gain="unbiased", value_gain="unbiased")),
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
        }.items()
    },
}


def main() -> None:
    """Measure what is missing and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 texts; Python's help topics by default")
    parser.add_argument("--windows", type=int, default=4, help="windows in all, at least one per text")
    parser.add_argument("--prefix", type=int, default=2048, help="tokens in the cache")
    parser.add_argument("--continuation", type=int, default=128, help="tokens predicted after them")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024], help="needle prompts")
    parser.add_argument("--depths", type=float, nargs="*", default=[0.1, 0.5, 0.9], help="needle depths")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=["single", "later"], help="kinds of needles")
    parser.add_argument("--repeats", type=int, default=1, help="needles per kind, length and depth")
    parser.add_argument("--seed", type=int, default=0, help="chooses the needles")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "ablations.json", help="result file")
    given = parser.parse_args()
    options = EvaluationOptions(
        windows=given.windows,
        prefix=given.prefix,
        continuation=given.continuation,
        lengths=tuple(given.lengths),
        depths=tuple(given.depths),
        kinds=tuple(given.kinds),
        repeats=given.repeats,
        seed=given.seed,
    )
    with shown_steps() as report:
        loaded = load_model()
        caches = [ROWS[name].candidate(name, loaded.model.config) for name in given.rows]
        evaluate(loaded, caches, read_texts(given.text), options, output=given.output, fresh=given.fresh, report=report)


if __name__ == "__main__":
    main()
