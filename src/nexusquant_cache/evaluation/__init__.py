"""Measure any cache against the plain one: quality, recall, time.

Every function takes a cache *factory*, ``Callable[[], Cache]``, so that caches of this package and of others
are measured in the same way.  The prompt is prefilled once, with a plain `transformers.DynamicCache`; each
factory's cache is then filled with those keys and values through the ordinary `Cache.update`.
"""

from nexusquant_cache.evaluation.caches import CacheFactory, Footprint, compress, fill, footprint, prefill
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.intervals import Interval, mean_interval, wilson_interval
from nexusquant_cache.evaluation.models import LoadedModel, load_model
from nexusquant_cache.evaluation.needle import (
    Fact,
    NeedleResult,
    NeedleTask,
    ask,
    make_needle,
    needle_grid,
    prefill_needle,
)
from nexusquant_cache.evaluation.quality import (
    Continuation,
    PlainRun,
    QualitySummary,
    TextQuality,
    measure_quality,
    plain_quality,
    run_plain,
    summarize,
)
from nexusquant_cache.evaluation.texts import python_topics, read_text, token_windows
from nexusquant_cache.evaluation.timing import StepTime, encode_throughput, time_steps

__all__ = [
    "CacheFactory",
    "Continuation",
    "EvaluationError",
    "Fact",
    "Footprint",
    "Interval",
    "LoadedModel",
    "NeedleResult",
    "NeedleTask",
    "PlainRun",
    "QualitySummary",
    "StepTime",
    "TextQuality",
    "ask",
    "compress",
    "encode_throughput",
    "fill",
    "footprint",
    "load_model",
    "make_needle",
    "mean_interval",
    "measure_quality",
    "needle_grid",
    "plain_quality",
    "prefill",
    "prefill_needle",
    "python_topics",
    "read_text",
    "run_plain",
    "summarize",
    "time_steps",
    "token_windows",
    "wilson_interval",
]
