"""Does it pay to code tokens at several rates, by their importance?  A simulation.

python benchmarks/tiers.py --text frankenstein.txt moby_dick.txt

The cache has one rate for all tokens that it keeps.  Here the bytes of a budget are spent in other ways: half of the
kept tokens, those with the best scores, at half a bit more and the others at one bit, so that more are kept; or two
rates and nothing evicted, as many tokens at the higher one as the bytes allow.  Scores are those of the default policy,
without queries.

**Nothing is packed**: decoded tokens stand in a plain cache in place of the exact ones, and the bytes are computed, as
they grow with the prompt: codes and scale byte of key and value of each kept token, and for each token seen one bit for
every class of tokens beyond the first (evicted ones are a class).  The axes, which all rates of a head share, and sinks
and recent tokens, which stay exact, are the same for all and left out.  So factors are those of a very long prompt.

The budgets are those of the presets `high`, `balanced` and `max`.  Writes ``benchmarks/results/tiers.json``; rows
survive an interruption.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from _codes import dense_bytes, head_dim_of
from _common import RESULTS, add_measuring, measuring, read_texts, shown_steps
from _packages import MaskedLayer, PeerReport
from transformers import Cache

from nexusquant_cache import PRESETS
from nexusquant_cache.cache.rotary import rotary_phases
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.evaluation import Candidate, EvaluationOptions, LoadedModel, evaluate, load_model
from nexusquant_cache.policy import DEFAULT_POLICY, ScoreInputs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PretrainedConfig

    from nexusquant_cache.codec.rope import RotaryPhase

SINKS, RECENT = 4, 64
BUDGETS = ("high", "balanced", "max")
LOW = 1.0
MORE = 0.5
# The lower rate of the plan that evicts nothing: of these, the highest that a budget can pay for all tokens.
LOWEST = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Rate:
    """Bits per channel of keys and values."""

    key_bits: float
    value_bits: float

    def layouts(self, head_dim: int) -> tuple[CodeLayout, CodeLayout]:
        """Return the flat layouts of both."""
        return CodeLayout.flat(head_dim, self.key_bits), CodeLayout.flat(head_dim, self.value_bits)

    def token_bytes(self, head_dim: int) -> int:
        """Return the bytes of a token in one head: codes and scale bytes of both."""
        return sum(layout.bytes_per_vector + 1 for layout in self.layouts(head_dim))


@dataclass(frozen=True)
class Plan:
    """Which part of the tokens, from the best score down, is coded at which rate; the rest is evicted."""

    tiers: tuple[tuple[float, Rate], ...]

    @property
    def kept(self) -> float:
        """Part of the tokens that is kept."""
        return round(sum(part for part, _ in self.tiers), 9)

    def seen_bytes(self, head_dim: int) -> float:
        """Return the bytes per token seen, in one head."""
        classes = len(self.tiers) + (self.kept < 1)
        return sum(part * rate.token_bytes(head_dim) for part, rate in self.tiers) + (classes - 1) / 8

    def counts(self, tokens: int) -> list[int]:
        """Return how many of so many tokens each tier gets; with nothing evicted, the last one gets what is left."""
        counts = [ceil(part * tokens) for part, _ in self.tiers]
        counts[-1] = min(ceil(self.kept * tokens), tokens) - sum(counts[:-1])
        return counts


def one_tier(preset: str) -> Plan:
    """Return what a preset does."""
    settings = PRESETS[preset]
    return Plan(((settings.keep_ratio, Rate(settings.key_bits, settings.value_bits)),))


def two_tiers(budget: float, high: Rate, low: Rate, head_dim: int) -> Plan:
    """Return equally many tokens at either rate, as many as fit in the bytes per token seen, and the others evicted."""
    marks = Plan(((0.0, high), (0.0, low))).seen_bytes(head_dim)
    part = (budget - marks) / (high.token_bytes(head_dim) + low.token_bytes(head_dim))
    return Plan(((part, high), (part, low)))


def nothing_evicted(budget: float, high: Rate, low: Rate, head_dim: int) -> Plan:
    """Return as many tokens at the higher rate as fit in the bytes per token seen, and all others at the lower."""
    marks = 1 / 8
    cheap, dear = low.token_bytes(head_dim), high.token_bytes(head_dim)
    part = (budget - marks - cheap) / (dear - cheap)
    return Plan(((part, high), (1 - part, low)))


def plans(preset: str, head_dim: int) -> dict[str, Plan]:
    """Return the ways to spend the bytes of a preset, by name."""
    one = one_tier(preset)
    budget, rate = one.seen_bytes(head_dim), one.tiers[0][1]
    more = Rate(rate.key_bits + MORE, rate.value_bits + MORE)
    cheap = [Rate(bits, bits) for bits in LOWEST]
    lowest = next(low for low in cheap if low.token_bytes(head_dim) + 1 / 8 <= budget)
    return {
        f"one rate@{preset}": one,
        f"two rates@{preset}": two_tiers(budget, more, Rate(LOW, LOW), head_dim),
        f"two rates, none evicted@{preset}": nothing_evicted(budget, rate, lowest, head_dim),
    }


class SimulatedCache(Cache):
    """A plain cache in which decoded tokens take the place of exact ones, once a plan has been applied.

    Args:
        plan: What to do with the tokens between sinks and recent ones.
        config: The model's config.
    """

    def __init__(self, plan: Plan, config: PretrainedConfig) -> None:
        """Make an empty cache."""
        super().__init__(layer_class_to_replicate=MaskedLayer)
        self.layers: list[Any]
        self.plan = plan
        self.model_config = config

    def memory_report(self) -> PeerReport:
        """Return the bytes that the plan would take, by the prompt's length alone."""
        seen = self.get_seq_length()
        dense = dense_bytes(self.model_config, seen)
        heads = self.model_config.num_hidden_layers * self.model_config.num_key_value_heads
        held = round(self.plan.seen_bytes(head_dim_of(self.model_config)) * seen * heads)
        return PeerReport(seen, self.layers[0].keys.shape[2], held, dense, dense, held)

    def apply_plan(self) -> None:
        """Replace the tokens of every layer by what would be decoded of them."""
        phases = rotary_phases(self.model_config, self.get_seq_length())
        for index, (layer, phase) in enumerate(zip(self.layers, phases, strict=True)):
            seen = layer.keys.shape[2]
            layer.keys, layer.values = simulate(layer.keys, layer.values, self.plan, phase, index)
            layer.evicted = seen - layer.keys.shape[2]


def simulate(
    keys: Float[Tensor, "b h n d"],
    values: Float[Tensor, "b h n d"],
    plan: Plan,
    phase: RotaryPhase | None,
    layer_idx: int,
) -> tuple[Float[Tensor, "b h kept d"], Float[Tensor, "b h kept d"]]:
    """Return sinks, decoded kept tokens in the order of their positions, and recent tokens of a layer."""
    tokens = keys.shape[2]
    positions = torch.arange(tokens, device=keys.device)
    is_exact = (positions < SINKS) | (positions >= tokens - RECENT)
    inputs = ScoreInputs(keys, values, positions, is_exact, layer_idx, phase=phase)
    scores = DEFAULT_POLICY.checked_scores(inputs)[..., inputs.free]
    ranked = inputs.free[scores.argsort(dim=-1, descending=True, stable=True)]
    counts = plan.counts(len(inputs.free))
    parts = ranked[..., : sum(counts)].split(counts, -1)
    coded_keys, coded_values = (
        coded(x, parts, [rate.layouts(keys.shape[-1])[side] for _, rate in plan.tiers], center=side == 0)
        for side, x in enumerate((inputs.unrotated_keys, values))
    )
    order = torch.cat(parts, -1)
    if phase is not None:
        coded_keys = phase.rotate(coded_keys, order)
    back = order.argsort(-1)
    new_keys, new_values = (
        torch.cat([exact[:, :, :SINKS], picked(body, back), exact[:, :, tokens - RECENT :]], 2)
        for exact, body in ((keys, coded_keys), (values, coded_values))
    )
    return new_keys, new_values


def coded(
    x: Float[Tensor, "b h n d"], parts: tuple[Int[Tensor, "b h m"], ...], layouts: list[CodeLayout], *, center: bool
) -> Float[Tensor, "b h kept d"]:
    """Return what is decoded of these tokens, part after part, each with its layout; axes are fitted to all of them."""
    sample = picked(x, torch.cat(parts, -1))
    decoded = []
    for tokens, layout in zip(parts, layouts, strict=True):
        codec = E8Codec(layout, center=center, transform="principal")
        transform = codec.fit(sample)
        decoded.append(codec.decode(codec.encode(picked(x, tokens), transform), transform))
    return torch.cat(decoded, 2)


def picked(x: Float[Tensor, "b h n d"], tokens: Int[Tensor, "b h m"]) -> Float[Tensor, "b h m d"]:
    """Return these tokens of each head."""
    return x.gather(2, tokens[..., None].expand(*tokens.shape, x.shape[-1]))


def candidate(name: str, plan: Plan, config: PretrainedConfig) -> Candidate:
    """Return a plan as a candidate."""

    def prepare(cache: Cache, loaded: LoadedModel, ids: Tensor) -> None:
        del loaded, ids
        assert isinstance(cache, SimulatedCache)
        cache.apply_plan()

    tiers = [{"part": part, **asdict(rate)} for part, rate in plan.tiers]
    return Candidate(name, lambda: SimulatedCache(plan, config), prepare, {"tiers": tiers})


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = EvaluationOptions(continuation=128, lengths=(1024,), kinds=("later",), facts=0, repeats=2)
    add_measuring(parser, RESULTS / "tiers.json", defaults)
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=BUDGETS, help="presets whose bytes are spent")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing and write the result file."""
    given = arguments()
    options = measuring(given)
    with shown_steps() as report:
        loaded = load_model()
        config = loaded.model.config
        found = [plan for name in given.budgets for plan in plans(name, head_dim_of(config)).items()]
        caches = [candidate(name, plan, config) for name, plan in found]
        evaluate(loaded, caches, read_texts(given.text), options, output=given.output, fresh=given.fresh, report=report)


if __name__ == "__main__":
    main()
