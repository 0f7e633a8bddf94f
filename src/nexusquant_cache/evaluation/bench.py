"""What caches cost in time and bytes on this machine: the work behind ``nexusquant-cache bench``."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from transformers import Cache, PretrainedConfig, QuantizedCache

from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.evaluation.caches import PLAIN, Candidate, Footprint, fill, fill_and_compress, prefill
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.evaluation.presets import PLAIN_CANDIDATE, preset_candidates
from nexusquant_cache.evaluation.results import environment
from nexusquant_cache.evaluation.steps import Report, Step, no_report, progress_of
from nexusquant_cache.evaluation.texts import token_windows
from nexusquant_cache.evaluation.timing import StepTime, time_steps
from nexusquant_cache.presets import preset_names

_BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}
_QUANTIZED_BITS = 4


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        tokens: Tokens of the prompt.
        presets: Presets to measure, all if none is named.
        rounds: Rounds; the median counts.
        steps: Generated tokens of each cache and round.
        fills: How often a prompt is compressed; the median time counts.

    Raises:
        EvaluationError: If a number is below 1.
        OptionError: If there is no such preset.
    """

    tokens: int = 4096
    presets: tuple[str, ...] = ()
    rounds: int = 5
    steps: int = 16
    fills: int = 1

    def __post_init__(self) -> None:
        """Check before a model is loaded."""
        for what in ("tokens", "rounds", "steps", "fills"):
            if getattr(self, what) < 1:
                msg = f"{what} must be at least 1, got {getattr(self, what)}"
                raise EvaluationError(msg)
        object.__setattr__(self, "presets", preset_names(self.presets))


@dataclass(frozen=True)
class BenchRow:
    """One cache.

    Attributes:
        name: Its name.
        footprint: What it holds once the prompt is read; None if it cannot be counted.
        compress_seconds: Time to compress the prompt; None if there is nothing to do.
        time: Time per generated token.
    """

    name: str
    footprint: Footprint | None
    compress_seconds: float | None
    time: StepTime


@dataclass(frozen=True)
class BenchResult:
    """What was measured, in one run.

    Attributes:
        model: Name of the model.
        dtype: Of its weights.
        text: Name of the text.
        options: What was asked for.
        rows: The caches, the plain one first.
        left_out: Caches that were not measured, and why.
    """

    model: str
    dtype: str
    text: str
    options: BenchOptions
    rows: tuple[BenchRow, ...]
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain containers, with what it was measured on."""
        return {"environment": environment(), **asdict(self)}


def run_bench(
    loaded: LoadedModel, text: str, options: BenchOptions, *, name: str = "text", report: Report = no_report
) -> BenchResult:
    """Time generation through the plain cache, presets and transformers' quantized caches, in turn in one run.

    The prompt is read once, for all caches.  Quantized caches of transformers are left out where their package is not
    installed, or where they fail.

    Args:
        loaded: The model.
        text: A real text.
        options: What to measure.
        name: What to call the text.
        report: Called as work goes on.

    Raises:
        EvaluationError: If the text is too short.
    """
    (window,) = token_windows(loaded.tokenizer, text, length=options.tokens, count=1, name=name)
    plain = prefill(loaded.model, window, progress=progress_of(report, "reading the text"))
    others = _quantized(loaded.model.config)
    candidates = [PLAIN_CANDIDATE, *preset_candidates(loaded, options.presets), *others]
    held: dict[str, tuple[Footprint | None, float | None]] = {}
    caches: dict[str, Cache] = {}
    left_out = {f"{name}, {_QUANTIZED_BITS} bits": f"{package} is not installed" for name, package in _missing()}
    for done, candidate in enumerate(candidates):
        report(Step("compressing", done, len(candidates), candidate.name))
        try:
            taken = [fill_and_compress(loaded, candidate, plain) for _ in range(options.fills)]
        except UnsupportedError:  # a cache that does not say what it holds
            held[candidate.name] = None, None
            caches[candidate.name] = fill(candidate.factory, plain)
        except Exception as error:
            if candidate not in others:
                raise
            left_out[candidate.name] = f"{type(error).__name__}: {error}"
        else:
            seconds = [each.seconds for each in taken if each.seconds is not None]
            held[candidate.name] = taken[0].footprint, statistics.median(seconds) if seconds else None
            caches[candidate.name] = taken[0].cache
    del caches[PLAIN]  # it is timed anyway
    times = time_steps(
        loaded.model,
        plain,
        caches,
        rounds=options.rounds,
        steps=options.steps,
        progress=progress_of(report, "timing generation"),
    )
    rows = tuple(BenchRow(key, *held[key], taken) for key, taken in times.items())
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return BenchResult(loaded.name, dtype, name, options, rows, left_out)


def _missing() -> Iterator[tuple[str, str]]:
    """Yield the quantized caches of transformers whose package is not installed."""
    for name, package in _BACKENDS.items():
        parts = package.split(".")
        if any(find_spec(".".join(parts[: end + 1])) is None for end in range(len(parts))):
            yield name, package


def _quantized(config: PretrainedConfig) -> list[Candidate]:
    """Return transformers' own quantized caches, as far as they are installed."""
    missing = {name for name, _ in _missing()}
    return [
        Candidate(f"{name}, {_QUANTIZED_BITS} bits", partial(QuantizedCache, name, config, nbits=_QUANTIZED_BITS))
        for name in _BACKENDS
        if name not in missing
    ]
