"""Measure caches on texts and needles: the work behind ``nexusquant-cache evaluate``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from nexusquant_cache.evaluation.asking import ABSENT, FactText, ask_all, check_counts, fact_texts
from nexusquant_cache.evaluation.caches import PLAIN, Candidate, prefill
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.kinds import KINDS, check_kinds
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.evaluation.needle import NeedleTask, ask, needle_grid, prefill_needle
from nexusquant_cache.evaluation.presets import PLAIN_CANDIDATE
from nexusquant_cache.evaluation.quality import Continuation, measure_quality, plain_quality, run_plain
from nexusquant_cache.evaluation.results import Results, environment, fingerprint, model_id, text_id
from nexusquant_cache.evaluation.steps import Report, Step, no_report
from nexusquant_cache.evaluation.texts import token_windows

_Row: TypeAlias = dict[str, Any]
_Rows: TypeAlias = Callable[[Candidate, Sequence[str]], Iterator[_Row]]
"""Measures a cache on these tasks, one after the other."""
_ABSENT_CANDIDATE = replace(PLAIN_CANDIDATE, name=ABSENT)


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure.

    Attributes:
        windows: Windows whose continuation is predicted, in all; at least one is cut from each text.
        prefix: Tokens of a window that go into the cache.
        continuation: Tokens that are predicted after them.
        lengths: Lengths of the prompts that hide a needle or facts, in tokens.
        depths: Where needles are hidden, 0 (beginning of the text) to 1 (end).
        kinds: Kinds of needles, see `KINDS`; with none, recall is left out.
        facts: Facts in ordinary words, of `FACTS`; each is asked for at the end of the prompt and in a later turn, and
            so are passages of texts that questions are known for.  With none, those are left out, too.
        wordings: Wordings of each question about a fact.
        repeats: Needles per kind, length and depth; times that a fact is hidden per length.
        seed: Chooses needles, places and texts, and is the seed of torch at the beginning of every row.

    Raises:
        EvaluationError: If a number is outside its range, or a kind does not exist.
    """

    windows: int = 4
    prefix: int = 2048
    continuation: int = 256
    lengths: tuple[int, ...] = (1024, 2048)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    kinds: tuple[str, ...] = KINDS
    facts: int = 12
    wordings: int = 1
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check before a model is loaded."""
        check_kinds(self.kinds)
        check_counts(self.facts, self.wordings)
        for what in ("windows", "prefix", "continuation", "repeats"):
            _check_positive(what, getattr(self, what))
        for length in self.lengths:
            _check_positive("every length", length)
        for depth in self.depths:
            if not 0 <= depth <= 1:
                msg = f"every depth must be from 0 (beginning of the text) to 1 (its end), got {depth}"
                raise EvaluationError(msg)


def evaluate(  # noqa: PLR0913 - all but three have defaults
    loaded: LoadedModel,
    candidates: Sequence[Candidate],
    texts: Mapping[str, str],
    options: EvaluationOptions | None = None,
    *,
    output: Path | None = None,
    fresh: bool = False,
    report: Report = no_report,
) -> dict[str, Any]:
    """Measure quality, recall and facts of the plain cache and of every candidate, each against the bytes it holds.

    Every prompt is read once, for all candidates.  With an ``output`` each row is written as soon as it is measured,
    and rows that a run before has measured are taken over, as long as model, text, options and the candidate's
    settings that decide them are the same.

    Args:
        loaded: The model, see `load_model`.
        candidates: The caches to measure, see `preset_candidates`; the plain one is always measured too.
        texts: Real texts by name.
        options: What to measure.
        output: The result file, JSON.
        fresh: Measure everything again, as is needed after a change of a cache's program.
        report: Called before every row.

    Returns:
        What stands in the result file; see `summaries` and `write_report`.

    Raises:
        EvaluationError: If a text is too short, two candidates have one name, or the file is no result file.
    """
    options = EvaluationOptions() if options is None else options
    caches = _by_name(candidates)
    windows = cut_windows(loaded, texts, options)
    needles = _needles(loaded, texts, options)
    hiding = _fact_texts(loaded, texts, options)
    model = model_id(loaded)
    results = Results(
        output,
        {
            "environment": environment(),
            "settings": {
                "model": model["name"],
                "dtype": model["dtype"],
                "checksum": model["checksum"],
                "texts": [text_id(name, text) for name, text in texts.items()],
                **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()},
            },
            "caches": {name: dict(cache.settings) for name, cache in caches.items() if name != PLAIN},
        },
        {
            "quality": {task.name: _fingerprints((model, options.seed, asdict(task)), caches) for task in windows},
            "needles": {task.name: _fingerprints((model, options.seed, asdict(task)), caches) for task in needles},
            "facts": {
                question.name: _fingerprints(
                    (model, options.seed, read, asdict(question)),
                    {PLAIN: caches[PLAIN], ABSENT: _ABSENT_CANDIDATE, **caches},
                )
                for text in hiding
                for read in [fingerprint(text.context_ids, text.without_ids)]
                for question in text.questions
            },
        },
        fresh=fresh,
    )
    work = _Work({**caches, ABSENT: _ABSENT_CANDIDATE}, results, options.seed, report)
    for window in windows:
        work.measure("quality", (window.name,), window.name, partial(_quality_rows, loaded, window))
    for needle in needles:
        work.measure("needles", (needle.name,), needle.name, partial(_needle_rows, loaded, needle))
    for text in hiding:
        names = [question.name for question in text.questions]
        work.measure("facts", names, text.name, partial(_fact_rows, loaded, text))
    results.write()
    return results.content


def cut_windows(loaded: LoadedModel, texts: Mapping[str, str], options: EvaluationOptions) -> list[Continuation]:
    """Return the windows to continue: equally many from each text.

    Raises:
        EvaluationError: If there is no text, or one is too short.
    """
    if not texts:
        msg = "there is no text to measure on"
        raise EvaluationError(msg)
    each = -(-options.windows // len(texts))
    length = options.prefix + options.continuation + 1
    return [
        Continuation.split(f"{name} {index + 1}", window, options.continuation)
        for name, text in texts.items()
        for index, window in enumerate(token_windows(loaded.tokenizer, text, length=length, count=each, name=name))
    ]


class _Work:
    """Goes through tasks and caches, and measures the rows that are missing."""

    def __init__(self, caches: Mapping[str, Candidate], results: Results, seed: int, report: Report) -> None:
        self._caches = caches
        self._results = results
        self._seed = seed
        self._report = report
        self._done = 0
        self._total = results.count_missing()

    def measure(self, section: str, tasks: Sequence[str], text: str, read: Callable[[], _Rows]) -> None:
        """Read the text that tasks share once, and measure every cache on each that it has no row of yet."""
        missing: dict[str, list[str]] = {}
        for task in tasks:
            for name in self._results.missing(section, task):
                missing.setdefault(name, []).append(task)
        if not missing:
            return
        self._tell(f"{text}: reading")
        rows_of = read()
        for name, left in missing.items():
            rows = rows_of(self._caches[name], left)
            for task in left:
                self._tell(f"{task}: {name}")
                with torch.random.fork_rng():
                    torch.manual_seed(self._seed)
                    self._results.add(section, task, name, next(rows))
                self._done += 1

    def _tell(self, detail: str) -> None:
        self._report(Step("measuring", self._done, self._total, detail))


def _quality_rows(loaded: LoadedModel, text: Continuation) -> _Rows:
    plain = run_plain(loaded.model, text)

    def rows(candidate: Candidate, _tasks: Sequence[str]) -> Iterator[_Row]:
        is_plain = candidate.name == PLAIN
        row = plain_quality(plain) if is_plain else measure_quality(loaded, plain, candidate)
        yield {**asdict(row), "dppl_percent": row.dppl_percent}

    return rows


def _needle_rows(loaded: LoadedModel, task: NeedleTask) -> _Rows:
    plain = prefill_needle(loaded.model, task)

    def rows(candidate: Candidate, _tasks: Sequence[str]) -> Iterator[_Row]:
        yield asdict(ask(loaded, task, plain, candidate))

    return rows


def _fact_rows(loaded: LoadedModel, text: FactText) -> _Rows:
    context = prefill(loaded.model, text.context_ids)

    def rows(candidate: Candidate, tasks: Sequence[str]) -> Iterator[_Row]:
        read = prefill(loaded.model, text.without_ids) if candidate.name == ABSENT else context
        questions = [question for question in text.questions if question.name in tasks]
        return map(asdict, ask_all(loaded, read, candidate, questions))

    return rows


def _needles(loaded: LoadedModel, texts: Mapping[str, str], options: EvaluationOptions) -> list[NeedleTask]:
    return needle_grid(
        loaded.tokenizer,
        texts,
        lengths=options.lengths,
        depths=options.depths,
        kinds=options.kinds,
        repeats=options.repeats,
        seed=options.seed,
    )


def _fact_texts(loaded: LoadedModel, texts: Mapping[str, str], options: EvaluationOptions) -> list[FactText]:
    return fact_texts(
        loaded.tokenizer,
        texts,
        lengths=options.lengths,
        count=options.facts,
        wordings=options.wordings,
        repeats=options.repeats,
        seed=options.seed,
    )


def _by_name(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    caches: dict[str, Candidate] = {PLAIN: PLAIN_CANDIDATE}
    for candidate in candidates:
        if candidate.name in {*caches, ABSENT}:
            taken = f"{PLAIN!r} and {ABSENT!r} are taken"
            msg = f"every candidate needs a name of its own, and {taken}; got {candidate.name!r} twice"
            raise EvaluationError(msg)
        caches[candidate.name] = candidate
    return caches


def _fingerprints(decided_by: tuple[object, ...], caches: Mapping[str, Candidate]) -> dict[str, str]:
    return {name: fingerprint(*decided_by, cache.settings) for name, cache in caches.items()}


def _check_positive(what: str, value: int) -> None:
    if value < 1:
        msg = f"{what} must be at least 1, got {value}"
        raise EvaluationError(msg)
