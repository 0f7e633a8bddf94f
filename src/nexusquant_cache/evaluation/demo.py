"""The demo: one real text, one hidden fact, the plain cache and every preset, as plain results without output."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.evaluation.caches import PLAIN, Candidate, Footprint, Prefilled, prefill
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.kinds import Needle
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.evaluation.needle import NeedleResult, NeedleTask, ask, make_needle, prefill_needle
from nexusquant_cache.evaluation.presets import PLAIN_CANDIDATE, preset_candidates
from nexusquant_cache.evaluation.quality import (
    Continuation,
    PlainRun,
    TextQuality,
    measure_quality,
    plain_quality,
    run_plain,
)
from nexusquant_cache.evaluation.steps import Report, Step, no_report, progress_of
from nexusquant_cache.evaluation.texts import tokenize
from nexusquant_cache.evaluation.timing import StepTime, time_steps
from nexusquant_cache.presets import preset_names

_SHORTEST = 256  # tokens; below this nothing would be compressed worth looking at


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does.

    Attributes:
        presets: Names of presets; all if empty.
        tokens: Tokens of the prompt that holds the text.
        predictions: Tokens of the continuation that the caches are compared on.
        new_tokens: Longest answer; 0 leaves the question out.
        depth: Where the fact is hidden, 0 (beginning) to 1 (end).
        rounds: Rounds of timing; 0 leaves it out.
        seed: Chooses the fact.

    Raises:
        OptionError: If there is no such preset.
        EvaluationError: If a number is outside its range.
    """

    presets: tuple[str, ...] = ()
    tokens: int = 4096
    predictions: int = 256
    new_tokens: int = 20
    depth: float = 0.4
    rounds: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check before a model is loaded."""
        object.__setattr__(self, "presets", preset_names(self.presets))
        for what, least in (("tokens", _SHORTEST), ("predictions", 1), ("new_tokens", 0), ("rounds", 0)):
            if getattr(self, what) < least:
                msg = f"{what} must be at least {least}, got {getattr(self, what)}"
                raise EvaluationError(msg)


@dataclass(frozen=True)
class DemoRow:
    """One cache in the demo."""

    name: str
    quality: TextQuality
    needle: NeedleResult | None
    time: StepTime | None

    @property
    def footprint(self) -> Footprint:
        """What the cache held when it had read the text."""
        return self.quality.footprint


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo shows."""

    model: str
    text: str
    options: DemoOptions
    needle: Needle
    rows: tuple[DemoRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON, with the derived numbers."""
        result = asdict(self)
        for row, given in zip(self.rows, result["rows"], strict=True):
            given["quality"]["dppl_percent"] = row.quality.dppl_percent
            given["compression_factor"] = row.footprint.compression_factor
        return result


def run_demo(
    loaded: LoadedModel,
    text: str,
    options: DemoOptions,
    *,
    name: str = "text",
    report: Report = no_report,
) -> DemoResult:
    """Read a text once, then predict and answer through the plain cache and every preset.

    The fact is hidden in the text itself: the same prefix is continued with the text for quality, and with the
    question for recall.

    Args:
        loaded: The model.
        text: A real text.
        options: What to do.
        name: What to call the text.
        report: Called as work goes on.

    Raises:
        EvaluationError: If the text is too short.
    """
    candidates = preset_candidates(loaded, options.presets)
    task, next_ids = _prepare(loaded, text, options, name)
    context = prefill(loaded.model, task.context_ids, progress=progress_of(report, "reading the text"))
    report(Step("predicting", detail=PLAIN))
    plain = run_plain(loaded.model, Continuation(name, task.context_ids, next_ids), prefilled=context)
    qualities = _measure_all(loaded, plain, candidates, report)
    answers = _ask_all(loaded, task, context, (PLAIN_CANDIDATE, *candidates), options, report)
    times: dict[str, StepTime] = {}
    if options.rounds:
        named = progress_of(report, "timing generation")
        factories = {candidate.name: candidate.factory for candidate in candidates}
        times = time_steps(loaded.model, context, factories, rounds=options.rounds, progress=named)
    rows = (DemoRow(key, quality, answers.get(key), times.get(key)) for key, quality in qualities.items())
    return DemoResult(loaded.name, name, options, task.needle, tuple(rows))


def _prepare(loaded: LoadedModel, text: str, options: DemoOptions, name: str) -> tuple[NeedleTask, Int[Tensor, "1 m"]]:
    """Return the prompt, and the tokens of the text that follow the part it holds."""
    ids = tokenize(loaded.tokenizer, text)
    needed = options.tokens + options.predictions + 1
    if ids.shape[1] < needed:
        have = ids.shape[1]
        msg = f"{name} is too short: it has {have} tokens, {needed} are needed; take a longer text or fewer tokens"
        raise EvaluationError(msg)
    needle = Needle.draw("single", options.seed)
    task = make_needle(loaded.tokenizer, ids[:, : options.tokens], needle, depth=options.depth, name=name)
    return task, ids[:, task.text_tokens :][:, : options.predictions + 1]


def _measure_all(
    loaded: LoadedModel, plain: PlainRun, candidates: Sequence[Candidate], report: Report
) -> dict[str, TextQuality]:
    rows = {PLAIN: plain_quality(plain)}
    for index, candidate in enumerate(candidates):
        report(Step("predicting", index, len(candidates), candidate.name))
        rows[candidate.name] = measure_quality(loaded, plain, candidate)
    return rows


def _ask_all(  # noqa: PLR0913, PLR0917 - private, called once
    loaded: LoadedModel,
    task: NeedleTask,
    context: Prefilled,
    candidates: Sequence[Candidate],
    options: DemoOptions,
    report: Report,
) -> dict[str, NeedleResult]:
    if not options.new_tokens:
        return {}
    prompt = prefill_needle(loaded.model, task, context=context)
    answers = {}
    for index, candidate in enumerate(candidates):
        report(Step("answering", index, len(candidates), candidate.name))
        answers[candidate.name] = ask(loaded, task, prompt, candidate, max_new_tokens=options.new_tokens)
    return answers
