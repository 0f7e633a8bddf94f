"""What eviction alone costs: which queries are asked, how widely scores are pooled, budgets shared or equal.

python benchmarks/eviction.py --text frankenstein.txt wikitext2_raw_test.txt
python benchmarks/eviction.py --model gemma3 --text frankenstein.txt wikitext2_raw_test.txt

The model reads a text with the plain cache, and nothing is coded.  Each rule scores the tokens as the default policies
do, from exact queries and keys, and what it lets go is hidden by a mask from what follows: from the text's own
continuation, whose predictions are compared with the plain cache's, and from questions about hidden facts, at the end
of the prompt or in a later turn (see ``facts.py``).  Some facts are numbers of six digits: the model looks for each
digit when it has said the one before.  A number is found if the model would say all its digits.  Layers with a sliding
window keep what they have.  Writes ``benchmarks/results/eviction_MODEL.json``.
"""

from __future__ import annotations

import argparse
import copy
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import MODELS, RESULTS, load_measured, read_texts, shown_steps
from transformers import DynamicCache

from nexusquant_cache import (
    Averaged,
    Combined,
    EvictionPolicy,
    FarAttentionPolicy,
    LeveragePolicy,
    RecentAttentionPolicy,
    ScoreInputs,
)
from nexusquant_cache.evaluation.asking import LATER, PLACES, answer_predictions, fact_texts, make_fact_text
from nexusquant_cache.evaluation.caches import Prefilled, prefill
from nexusquant_cache.evaluation.facts import Fact
from nexusquant_cache.evaluation.intervals import mean_interval
from nexusquant_cache.evaluation.quality import Continuation, predict
from nexusquant_cache.evaluation.results import environment, model_id, text_id, write_json
from nexusquant_cache.evaluation.steps import Step
from nexusquant_cache.evaluation.summary import LOST
from nexusquant_cache.evaluation.texts import token_windows
from nexusquant_cache.layer.observations import FAR, greatest_attention
from nexusquant_cache.layer.selection import Scores, shared_counts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from nexusquant_cache.evaluation import LoadedModel
    from nexusquant_cache.evaluation.asking import FactQuestion, FactText

SINKS, RECENT = 4, 24  # always kept
PREDICTIONS = 128
GATES = {"north": "381946", "south": "750283", "east": "629417", "west": "914605"}
NUMBERS = tuple(
    Fact(
        "number",
        (f"The code of the {gate} gate is {code}.",),
        (f"What is the code of the {gate} gate?",),
        f"The code of the {gate} gate is",
        code,
    )
    for gate, code in GATES.items()
)
Kept = dict[int, "Tensor"]
"""Of each layer that evicts, the tokens that its heads keep, ``[kv_heads, tokens]``."""


@dataclass(frozen=True)
class Rule:
    """Which tokens stay: the default policies with another end, another pooling, or another budget.

    Attributes:
        window: How many of the last queries are asked.
        pool: Width of the max-pooling.
        shares: Whether all heads of all layers share one budget.
        besides: What else some of the places of each head are for: nothing, the question, or unusual keys.
        every: Of so many tokens one is asked for far attention.
    """

    window: int
    pool: int
    shares: bool
    besides: str = ""
    every: int = 1

    @property
    def name(self) -> str:
        """What to call it."""
        queries = f"{self.window} queries, pooled over {self.pool}"
        name = f"{queries}, {'one budget' if self.shares else 'equal budgets'}{self.besides and f', {self.besides}'}"
        return name if self.every == 1 else f"{name}, one far query in {self.every}"

    @property
    def policy(self) -> EvictionPolicy:
        """The policy that scores so."""
        end = RecentAttentionPolicy(observation_window=self.window, aggregate="max", pool=self.pool)
        policy = Averaged((end, FarAttentionPolicy(pool=self.pool)), weights=(1.0, 0.3))
        if not self.besides:
            return policy
        other, share = BESIDES[self.besides]
        return Combined((policy, other), shares=(1 - share, share))

    def keep(self, read: list[dict[int, ScoreInputs]], ratio: float) -> Kept:
        """Return what stays of a text, in the layers that are given."""
        policy, scored = self.policy, []
        layers = [layer[self.every] for layer in read]
        for inputs in layers:
            scores = policy.checked_scores(inputs).double().masked_fill(inputs.protected, -torch.inf)
            budget = math.ceil(ratio * len(inputs.free))
            scored.append(Scores(scores, (budget,), is_comparable=self.shares))
        counts = shared_counts(scored) if self.shares else [each.equal() for each in scored]
        kept = zip(layers, scored, counts, strict=True)
        return {inputs.layer_idx: (each.best(count) | inputs.protected)[0] for inputs, each, count in kept}


QUESTION = RecentAttentionPolicy(observation_window=16, aggregate="max", pool=21)
BESIDES: dict[str, tuple[EvictionPolicy, float]] = {
    "a fifth for the question": (QUESTION, 0.2),
    "three tenths for unusual keys": (LeveragePolicy(pool=1), 0.3),
}
RULES = (
    Rule(64, 21, shares=True),  # `DEFAULT_POLICY`
    Rule(64, 21, shares=False),
    Rule(64, 1, shares=True),
    Rule(64, 1, shares=False),
    Rule(256, 21, shares=True),
    Rule(256, 1, shares=False),
    Rule(256, 1, shares=False, besides="a fifth for the question"),  # `DEFAULT_BESIDE_WINDOWS`
    Rule(256, 1, shares=False, besides="three tenths for unusual keys"),
    *(
        replace(rule, every=every)  # the default policies, with fewer queries
        for rule in (Rule(64, 21, shares=True), Rule(256, 1, shares=False, besides="a fifth for the question"))
        for every in (2, 4)
    ),
)


def evicting_layers(model: PreTrainedModel) -> list[int]:
    """Return the layers without a sliding window."""
    layers = DynamicCache(config=model.config).layers
    return [index for index, layer in enumerate(layers) if not layer.is_sliding]


def scored_layers(model: PreTrainedModel, read: Prefilled) -> list[dict[int, ScoreInputs]]:
    """Return what policies are shown of each layer of a text that was read: exact keys, queries, and far attention.

    The latter by how many tokens of which one is asked.
    """
    tokens = read.cache.get_seq_length()
    place, real = torch.arange(tokens), torch.ones(1, tokens, dtype=torch.bool)
    protected = (place < SINKS) | (place >= tokens - RECENT)
    found = []
    for index in evicting_layers(model):
        keys, values = read.cache.layers[index].keys, read.cache.layers[index].values
        queries = read.queries[index]
        seen = ScoreInputs(keys, values, place, protected, index, queries=queries)
        found.append(
            {
                every: replace(
                    seen, far_attention=greatest_attention(queries, keys, real, least_distance=FAR, every=every)
                )
                for every in sorted({rule.every for rule in RULES})
            }
        )
    return found


@contextmanager
def hidden(model: PreTrainedModel, cache: DynamicCache, kept: Kept) -> Iterator[None]:
    """Hide the tokens that are not kept from all that is fed behind them."""

    def hide(index: int) -> Any:
        def hook(_: object, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            states = named["hidden_states"] if "hidden_states" in named else given[0]
            seen, new = cache.get_seq_length(index), states.shape[1]
            allowed = torch.ones(len(kept[index]), new, seen + new, dtype=torch.bool).tril(seen)
            allowed[:, :, : kept[index].shape[1]] &= kept[index][:, None]
            group = model.config.get_text_config().num_attention_heads // len(allowed)
            mask = torch.zeros(allowed.shape, dtype=states.dtype).masked_fill(~allowed, torch.finfo(states.dtype).min)
            return given, named | {"attention_mask": mask.repeat_interleave(group, 0)[None]}

        return hook

    decoder = model.get_decoder()
    handles = [
        decoder.layers[index].self_attn.register_forward_pre_hook(hide(index), with_kwargs=True) for index in kept
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def divergence(model: PreTrainedModel, text: Continuation, read: Prefilled, kept: Kept, plain: Tensor) -> float:
    """Return how far the predictions move, in nats per token."""
    cache = copy.deepcopy(read.cache)
    with torch.no_grad(), hidden(model, cache, kept):
        ours = predict(model, text.next_ids, cache)
    return float((plain.exp() * (plain - ours)).sum(-1).mean())


def hiding(loaded: LoadedModel, texts: dict[str, str], given: argparse.Namespace) -> list[FactText]:
    """Return the texts that hide facts in words, and one of each text that hides numbers."""
    found = fact_texts(loaded.tokenizer, texts, lengths=[given.tokens], count=given.facts)
    for name, text in texts.items():
        (window,) = token_windows(loaded.tokenizer, text, length=given.tokens, count=1, name=name)
        found.append(make_fact_text(loaded.tokenizer, window, NUMBERS, name=f"{name}, numbers"))
    return found


def answered(loaded: LoadedModel, question: FactQuestion, cache: DynamicCache) -> tuple[float, bool]:
    """Return the answer's mean log probability, and whether each of its tokens is the most likely one."""
    log_probs, answer = answer_predictions(loaded, question, cache), question.answer_ids[0]
    own = log_probs.gather(1, answer[:, None])[question.scored]
    is_first = log_probs.argmax(1) == answer
    return float(own.double().mean()), bool(is_first[question.scored].all())


@torch.no_grad()
def measure(loaded: LoadedModel, texts: dict[str, str], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for the plain cache, and one for each rule and ratio."""
    model, all_kept = loaded.model, ("plain", 1.0)
    rules = {(rule.name, ratio): rule for rule in RULES for ratio in given.ratios}
    moved: dict[tuple[str, float], list[float]] = {case: [] for case in (all_kept, *rules)}
    answers: dict[tuple[str, float], dict[tuple[str, str], list[tuple[float, bool]]]] = {
        case: {(what, place): [] for what in ("facts", "numbers") for place in PLACES} for case in moved
    }
    each = max(given.windows // len(texts), 1)
    windows = [
        (name, window)
        for name, text in texts.items()
        for window in token_windows(
            loaded.tokenizer, text, length=given.tokens + PREDICTIONS + 1, count=each, name=name
        )
    ]
    asked = hiding(loaded, texts, given)
    total, done = len(windows) + sum(len(text.questions) for text in asked), 0

    def chosen(read: Prefilled) -> dict[tuple[str, float], Kept]:
        layers = scored_layers(model, read)
        return {case: rule.keep(layers, case[1]) for case, rule in rules.items()}

    with shown_steps() as report:
        for name, window in windows:
            report(Step("predicting", done, total, name))
            text = Continuation.split(name, window, PREDICTIONS)
            read = prefill(model, text.prefix_ids)
            plain = predict(model, text.next_ids, copy.deepcopy(read.cache))
            moved[all_kept].append(0.0)
            for case, kept in chosen(read).items():
                moved[case].append(divergence(model, text, read, kept, plain))
            done += 1
        for fact_text in asked:
            context = prefill(model, fact_text.context_ids)
            later = chosen(context)
            for question in fact_text.questions:
                report(Step("asking", done, total, question.fact.answer))
                read = context if question.place == LATER else prefill(model, question.read_ids, start=context)
                which = "numbers" if question.fact in NUMBERS else "facts", question.place
                exact, is_said = answered(loaded, question, copy.deepcopy(read.cache))
                answers[all_kept][which].append((0.0, is_said))
                for case, kept in (later if question.place == LATER else chosen(read)).items():
                    cache = copy.deepcopy(read.cache)
                    with hidden(model, cache, kept):
                        log_prob, is_said = answered(loaded, question, cache)
                    answers[case][which].append((log_prob - exact, is_said))
                done += 1
    return [
        {
            "rule": name,
            **(asdict(rules[name, ratio]) if (name, ratio) in rules else {}),
            "ratio": ratio,
            "kl": asdict(mean_interval(moved[name, ratio])),
            "answers": [
                {
                    "what": what,
                    "place": place,
                    "log_prob": asdict(mean_interval([change for change, _ in found])),
                    "lost": sum(change < -LOST for change, _ in found),
                    "found": sum(is_said for _, is_said in found),
                    "asked": len(found),
                }
                for (what, place), found in answers[name, ratio].items()
            ],
        }
        for name, ratio in moved
    ]


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="SmolLM2-135M-Instruct, or Gemma 3 270M")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="texts")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a text that is read")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.403, 0.201], help="parts of them that are kept")
    parser.add_argument("--windows", type=int, default=4, help="windows to predict behind, in all")
    parser.add_argument("--facts", type=int, default=12, help="facts to hide")
    parser.add_argument("--output", type=Path, help="result file")
    given = parser.parse_args()
    loaded, texts = load_measured(given.model), read_texts(given.text)
    rows = measure(loaded, texts, given)
    settings = {name: getattr(given, name) for name in ("tokens", "windows", "facts")}
    content = {
        "environment": environment(),
        "settings": {"model": model_id(loaded)["name"], **settings, "sinks": SINKS, "recent": RECENT, "lost": LOST},
        "texts": [text_id(name, text) for name, text in texts.items()],
        "rows": rows,
    }
    write_json(given.output or RESULTS / f"eviction_{given.model}.json", content)
    for row in rows:
        said = ", ".join(f"{x['what']} {x['place']} {x['lost']} lost {x['found']} found" for x in row["answers"])
        print(f"{row['rule']:>70} {row['ratio']:.3f}: KL {row['kl']['mean']:.4f}, {said}")


if __name__ == "__main__":
    main()
