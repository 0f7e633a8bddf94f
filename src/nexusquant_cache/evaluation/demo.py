"""The demo: one real text, one hidden fact, the plain cache and every preset, as plain results without output."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import Cache

from nexusquant_cache.evaluation.caches import PLAIN, Footprint, fill, fill_and_compress, prefill
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.kinds import Needle
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.evaluation.needle import NeedleResult, NeedleTask, ask, make_needle, prefill_needle
from nexusquant_cache.evaluation.presets import PLAIN_CANDIDATE, preset_candidates
from nexusquant_cache.evaluation.quality import (
    Continuation,
    TextQuality,
    plain_quality,
    quality_of,
    run_plain,
)
from nexusquant_cache.evaluation.steps import Report, Step, no_report, progress_of
from nexusquant_cache.evaluation.texts import tokenize
from nexusquant_cache.evaluation.timing import StepTime, time_steps
from nexusquant_cache.presets import PRESETS, preset_names

LOADING, COMPILING, READING = "loading the model", "compiling the codec, once", "reading the text"
COMPARING, TIMING = "predicting and answering", "timing generation"
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

    def expected_seconds(self) -> dict[str, float]:
        """Return about how long each phase takes with the default model on two cores, for `with_time_left`."""
        text = self.tokens / 4096
        presets = len(self.presets) or len(PRESETS)
        parts = {LOADING: 18.0, READING: 12 * text, COMPILING: 10, COMPARING: 10 * text * presets}
        return {**parts, TIMING: 3.0 * self.rounds * (1 + presets) / 2} if self.rounds else parts


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


def run_demo(  # noqa: PLR0913 - half of them have defaults
    loaded: LoadedModel,
    text: str,
    options: DemoOptions,
    *,
    name: str = "text",
    report: Report = no_report,
    ready: Callable[[], None] | None = None,
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
        ready: Waits until the codec is compiled; called when it is needed.

    Raises:
        EvaluationError: If the text is too short.
    """
    presets = preset_candidates(loaded, options.presets)
    task, next_ids = _prepare(loaded, text, options, name)
    context = prefill(loaded.model, task.context_ids, progress=progress_of(report, READING))
    plain = run_plain(loaded.model, Continuation(name, task.context_ids, next_ids), prefilled=context)
    prompt = prefill_needle(loaded.model, task, context=context) if options.new_tokens else None
    if ready is not None:
        report(Step(COMPILING))
        ready()
    qualities, answers = {PLAIN: plain_quality(plain)}, {}
    compressed: dict[str, Cache] = {}
    for done, candidate in enumerate((PLAIN_CANDIDATE, *presets)):
        report(Step(COMPARING, done, 1 + len(presets), candidate.name))
        read = fill(candidate.factory, context)
        if prompt is not None:
            answers[candidate.name] = ask(
                loaded, task, prompt, candidate, start=read, max_new_tokens=options.new_tokens
            )
        if candidate is PLAIN_CANDIDATE:
            continue
        held = fill_and_compress(loaded, candidate, context, start=read)
        compressed[candidate.name] = copy.deepcopy(held.cache)
        qualities[candidate.name] = quality_of(loaded.model, plain, held)
    times: dict[str, StepTime] = {}
    if options.rounds:
        named = progress_of(report, TIMING)
        times = time_steps(loaded.model, context, compressed, rounds=options.rounds, progress=named)
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
