"""Rows of a result file put together: what tables and plots show."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any, TypeVar

from nexusquant_cache.evaluation.asking import ABSENT, PLACES
from nexusquant_cache.evaluation.caches import PLAIN, Footprint
from nexusquant_cache.evaluation.facts import CONTENT
from nexusquant_cache.evaluation.intervals import Interval, mean_interval, wilson_interval
from nexusquant_cache.evaluation.quality import QualitySummary, TextQuality, summarize

LOST = 1.5
"""Nats per token below the plain cache from which on an answer counts as lost."""
HIDDEN = "hidden facts"
OWN = "the text's own"
_Group = TypeVar("_Group")


@dataclass(frozen=True)
class Recall:
    """Needles found, and what the cache held while they were looked for.

    Attributes:
        found: Needles found.
        asked: Needles asked for, at least one.
        held_bytes: Bytes held, summed over the needles.
        dense_bytes: Bytes a plain 16-bit cache would have held.
    """

    found: int
    asked: int
    held_bytes: int
    dense_bytes: int

    @property
    def rate(self) -> Interval:
        """Part of the needles found, with its 95 % interval."""
        return wilson_interval(self.found, self.asked)


@dataclass(frozen=True)
class FactSummary:
    """One cache over questions about facts, each against the plain cache on the same question.

    Attributes:
        asked: Questions.
        log_prob: Mean log probability of the answers, in nats per token.
        against_plain: How much above the plain cache's that is, with its 95 % interval over facts: wordings and
            repetitions of one fact count as one sample.
        lost: Answers more than `LOST` nats per token below the plain cache's.
        found: Greedy answers that contain what is asked for.
    """

    asked: int
    log_prob: float
    against_plain: Interval
    lost: int
    found: int


@dataclass(frozen=True)
class CacheSummary:
    """One cache over all texts and needles.

    Attributes:
        name: The candidate's name.
        kept_tokens: Tokens kept of the prefixes, on average.
        seen_tokens: Tokens of the prefixes, on average.
        quality: Its predictions.
        recall: Needles by kind; kinds without a needle are left out.
        compress_seconds: Time to prepare and compress, averaged over texts and needles; None if it does neither.
    """

    name: str
    kept_tokens: float
    seen_tokens: float
    quality: QualitySummary
    recall: Mapping[str, Recall]
    compress_seconds: Interval | None

    @property
    def all_recall(self) -> Recall | None:
        """All kinds together; None if no needle was asked for."""
        parts = self.recall.values()
        if not parts:
            return None
        return Recall(*(sum(getattr(part, field.name) for part in parts) for field in fields(Recall)))

    @property
    def dense_bytes(self) -> float:
        """Bytes a plain 16-bit cache of the prefixes holds, on average."""
        return self.quality.held_bytes * self.quality.compression_factor


def summaries(content: Mapping[str, Any]) -> list[CacheSummary]:
    """Return a summary per cache that has predictions, in the order of the file's settings, the plain one first."""
    names = [name for name in (PLAIN, *content["caches"]) if any(r["cache"] == name for r in content["quality"])]
    return [_summary(name, content) for name in dict.fromkeys(names)]


def recall_by_place(content: Mapping[str, Any], cache: str, kind: str) -> dict[tuple[int, float], Recall]:
    """Return a cache's recall of a kind of needles by length and depth."""
    rows = [row for row in content["needles"] if row["cache"] == cache and row["kind"] == kind]
    places = sorted({(row["length"], row["depth"]) for row in rows})
    return {place: _recall(row for row in rows if (row["length"], row["depth"]) == place) for place in places}


def fact_summaries(content: Mapping[str, Any]) -> dict[str, dict[tuple[str, str], FactSummary]]:
    """Return by cache, the plain one and `ABSENT` first, what became of the facts.

    The keys are what is asked for, `HIDDEN` facts or what the text says on its `OWN`, and the place of the question.
    Questions that the plain cache has not been asked yet are left out, and so is what nothing was asked about.
    """
    groups = {
        (what, place): [row for row in content.get("facts", []) if (row["place"], _is_own(row)) == (place, what == OWN)]
        for what in (HIDDEN, OWN)
        for place in PLACES
    }
    return _by_cache(content, groups)


def fact_kinds(content: Mapping[str, Any], place: str) -> dict[str, dict[str, FactSummary]]:
    """Return by cache what became of the facts of each kind, asked for in this place."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in content.get("facts", []):
        if row["place"] == place:
            groups.setdefault(row["kind"], []).append(row)
    return _by_cache(content, groups)


def _by_cache(
    content: Mapping[str, Any], groups: Mapping[_Group, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[_Group, FactSummary]]:
    plain = {row["task"]: row["log_prob"] for row in content.get("facts", []) if row["cache"] == PLAIN}
    found = {}
    for name in dict.fromkeys((PLAIN, ABSENT, *content["caches"])):
        rows = {
            key: [row for row in group if row["cache"] == name and row["task"] in plain]
            for key, group in groups.items()
        }
        if any(rows.values()):
            found[name] = {key: _fact_summary(each, plain) for key, each in rows.items() if each}
    return found


def _fact_summary(rows: Sequence[Mapping[str, Any]], plain: Mapping[str, float]) -> FactSummary:
    above: dict[str, list[float]] = {}
    for row in rows:
        above.setdefault(row["expected"], []).append(row["log_prob"] - plain[row["task"]])
    return FactSummary(
        asked=len(rows),
        log_prob=fmean(row["log_prob"] for row in rows),
        against_plain=mean_interval([fmean(each) for each in above.values()]),
        lost=sum(difference < -LOST for each in above.values() for difference in each),
        found=sum(row["found"] for row in rows),
    )


def _is_own(row: Mapping[str, Any]) -> bool:
    return bool(row["kind"] == CONTENT)


def _summary(name: str, content: Mapping[str, Any]) -> CacheSummary:
    rows = [_quality(row) for row in content["quality"] if row["cache"] == name]
    needles = [row for row in content["needles"] if row["cache"] == name]
    kinds = dict.fromkeys(row["kind"] for row in needles)
    seconds = [
        row["compress_seconds"]
        for row in (*content["quality"], *needles)
        if row["cache"] == name and row.get("compress_seconds") is not None
    ]
    return CacheSummary(
        name=name,
        kept_tokens=sum(row.footprint.kept_tokens for row in rows) / len(rows),
        seen_tokens=sum(row.footprint.seen_tokens for row in rows) / len(rows),
        quality=summarize(rows),
        recall={kind: _recall(row for row in needles if row["kind"] == kind) for kind in kinds},
        compress_seconds=mean_interval(seconds) if seconds else None,
    )


def _recall(rows: Iterable[Mapping[str, Any]]) -> Recall:
    given = list(rows)
    footprints = [row["footprint"] for row in given]
    return Recall(
        found=sum(row["found"] for row in given),
        asked=len(given),
        held_bytes=sum(held["held_bytes"] for held in footprints),
        dense_bytes=sum(held["dense_bytes"] for held in footprints),
    )


def _quality(row: Mapping[str, Any]) -> TextQuality:
    given = {field.name: row[field.name] for field in fields(TextQuality) if field.name in row}
    return TextQuality(**{**given, "footprint": Footprint(**row["footprint"])})
