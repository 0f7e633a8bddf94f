"""Measure any cache against the plain one: quality, recall, bytes, time (docs/evaluate.md).

A cache to measure is a `Candidate`, whose factory makes a new cache each time, so that caches of this package and
of others are measured in the same way.  The prompt is read once, with a plain `transformers.DynamicCache`; each
candidate's cache is then filled with those keys and values through the ordinary `Cache.update`.

What stands here is for users.  The scripts in `benchmarks` also use the modules behind it, which may change.
"""

from nexusquant_cache.evaluation.caches import Candidate
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.experiment import EvaluationOptions, evaluate
from nexusquant_cache.evaluation.kinds import KINDS
from nexusquant_cache.evaluation.models import LoadedModel, load_model
from nexusquant_cache.evaluation.presets import nexusquant_candidate, preset_candidates
from nexusquant_cache.evaluation.report import write_report
from nexusquant_cache.evaluation.summary import CacheSummary, FactSummary, fact_summaries, summaries
from nexusquant_cache.evaluation.texts import python_topics, read_text

__all__ = [
    "KINDS",
    "CacheSummary",
    "Candidate",
    "EvaluationError",
    "EvaluationOptions",
    "FactSummary",
    "LoadedModel",
    "evaluate",
    "fact_summaries",
    "load_model",
    "nexusquant_candidate",
    "preset_candidates",
    "python_topics",
    "read_text",
    "summaries",
    "write_report",
]
