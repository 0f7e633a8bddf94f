"""What single choices are worth: `balanced` with one stage switched off or replaced at a time.

python benchmarks/ablations.py --text frankenstein.txt moby_dick.txt
python benchmarks/ablations.py --rows "key mean kept" "one scale tried"

The first rows are about codes: those of `balanced` at 2 bits, with nothing evicted.  The rows ``scorer: ...`` are about
what is kept: `balanced` as it is, with one policy after the other, each shown all it can look at; ``scorer: default``
is the default without queries, as ``generate`` alone uses it.  The last rows change something else in `balanced` with
that policy: evicted tokens are merged into kept ones, decoded keys are sharpened, layers at the model's ends get 4
bits.  No layer gets more bits where its codes are bad (``most_code_error``): that would hide what a choice costs.

Writes ``benchmarks/results/ablations.json``, which `docs/decisions.md` shows.  Rows survive an interruption; those that
are not asked for stay in the file, and a run without ``--rows`` shows all of them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from _codes import UNCHECKED, FlatPlanCache, MoreSharpenedCache, ScalarCache, SharpenedCache, candidate_of
from _common import RESULTS, add_measuring, measuring, read_texts, shown_steps

from nexusquant_cache import PRESETS, CacheConfig, NexusQuantCache
from nexusquant_cache.attention import reconstruct
from nexusquant_cache.evaluation import Candidate, EvaluationOptions, LoadedModel, evaluate, load_model
from nexusquant_cache.policy import (
    DEFAULT_POLICY,
    Combined,
    EvictionPolicy,
    ExpectedAttentionPolicy,
    KeyDiffPolicy,
    KeyKeyPolicy,
    KeyNormPolicy,
    LeveragePolicy,
    MeanKeyKeyPolicy,
    ReconstructionPolicy,
    ScoreInputs,
    SharedOverHeads,
    ValueAware,
    WindowAttentionPolicy,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
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


@dataclass(frozen=True)
class MergingPolicy(EvictionPolicy):
    """Folds every evicted token into the coded token whose key is most similar to its own, without the rotary phase.

    A policy is shown the very tensors that the cache encodes next, not copies.  `select` makes use of that and writes
    the averages into them: nothing but an experiment may do so.  Sinks and recent tokens stay as they are.

    Args:
        policy: Chooses what is kept.
        keys: Whether keys are averaged too; they turn to the position of the token that stays.
    """

    policy: EvictionPolicy = DEFAULT_POLICY
    keys: bool = False

    def score(self, inputs: ScoreInputs) -> Float[Tensor, "b h n"]:
        """Return the other policy's scores."""
        return self.policy.checked_scores(inputs)

    def select(self, inputs: ScoreInputs, count: int) -> Bool[Tensor, "b h n"]:
        """Return which tokens to keep, when the others have been averaged into them."""
        keep = super().select(inputs, count)
        unrotated = inputs.unrotated_keys
        owners = nearest_kept(unrotated, keep, keep & ~inputs.protected)
        inputs.values.copy_(group_means(inputs.values, owners))
        if self.keys:
            merged = group_means(unrotated, owners)
            turned = merged if inputs.phase is None else inputs.phase.rotate(merged, inputs.positions)
            inputs.keys.copy_(torch.where(keep[..., None], turned, inputs.keys))
        return keep


def nearest_kept(
    keys: Float[Tensor, "b h n d"], keep: Bool[Tensor, "b h n"], targets: Bool[Tensor, "b h n"]
) -> Int[Tensor, "b h n"]:
    """Return the index of each kept token itself, and for others that of the target with the most similar direction."""
    units = F.normalize(keys, dim=-1)
    similar = (units @ units.mT).masked_fill(~targets[:, :, None], -torch.inf)
    return torch.where(keep, torch.arange(keep.shape[-1], device=keep.device), similar.argmax(-1))


def group_means(x: Float[Tensor, "b h n d"], owners: Int[Tensor, "b h n"]) -> Float[Tensor, "b h n d"]:
    """Return for each token the mean over those that it owns; tokens that own none stay as they are."""
    index = owners[..., None].expand_as(x)
    sums = torch.zeros_like(x).scatter_add_(2, index, x)
    counts = torch.zeros_like(x).scatter_add_(2, index, torch.ones_like(x))
    return torch.where(counts > 0, sums / counts, x)


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
            "default": None,
            "default with queries": DEFAULT_POLICY,
        }.items()
    },
    "tokens merged": Row(EVICTING, policy=MergingPolicy()),
    "tokens merged, keys too": Row(EVICTING, policy=MergingPolicy(keys=True)),
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
