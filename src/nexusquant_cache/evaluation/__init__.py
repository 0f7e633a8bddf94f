"""Measure any cache against the plain one: quality, recall, bytes, time.

A cache to measure is a `Candidate`, whose factory makes a new cache each time, so that caches of this package and
of others are measured in the same way.  The prompt is read once, with a plain `transformers.DynamicCache`; each
candidate's cache is then filled with those keys and values through the ordinary `Cache.update`.
"""

from nexusquant_cache.evaluation.caches import (
    PLAIN,
    CacheFactory,
    Candidate,
    Compressed,
    Footprint,
    Prefilled,
    compress,
    fill,
    fill_and_compress,
    footprint,
    prefill,
)
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.experiment import EvaluationOptions, evaluate
from nexusquant_cache.evaluation.intervals import Interval, mean_interval, wilson_interval
from nexusquant_cache.evaluation.kinds import KINDS, Needle
from nexusquant_cache.evaluation.models import LoadedModel, load_model
from nexusquant_cache.evaluation.needle import NeedleResult, NeedleTask, ask, make_needle, needle_grid, prefill_needle
from nexusquant_cache.evaluation.presets import PLAIN_CANDIDATE, describe, nexusquant_candidate, preset_candidates
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
from nexusquant_cache.evaluation.report import write_report
from nexusquant_cache.evaluation.results import Results, environment, read_json, text_id, write_json
from nexusquant_cache.evaluation.summary import CacheSummary, Recall, recall_by_place, summaries
from nexusquant_cache.evaluation.texts import python_topics, read_text, token_windows
from nexusquant_cache.evaluation.timing import StepTime, encode_throughput, time_steps

__all__ = [
    "KINDS",
    "PLAIN",
    "PLAIN_CANDIDATE",
    "CacheFactory",
    "CacheSummary",
    "Candidate",
    "Compressed",
    "Continuation",
    "EvaluationError",
    "EvaluationOptions",
    "Footprint",
    "Interval",
    "LoadedModel",
    "Needle",
    "NeedleResult",
    "NeedleTask",
    "PlainRun",
    "Prefilled",
    "QualitySummary",
    "Recall",
    "Results",
    "StepTime",
    "TextQuality",
    "ask",
    "compress",
    "describe",
    "encode_throughput",
    "environment",
    "evaluate",
    "fill",
    "fill_and_compress",
    "footprint",
    "load_model",
    "make_needle",
    "mean_interval",
    "measure_quality",
    "needle_grid",
    "nexusquant_candidate",
    "plain_quality",
    "prefill",
    "prefill_needle",
    "preset_candidates",
    "python_topics",
    "read_json",
    "read_text",
    "recall_by_place",
    "run_plain",
    "summaries",
    "summarize",
    "text_id",
    "time_steps",
    "token_windows",
    "wilson_interval",
    "write_json",
    "write_report",
]
