"""Rows of the result files put together: what tables and plot show."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from nexusquant_cache.evaluation import Footprint, Interval, QualitySummary, TextQuality, summarize, wilson_interval


@dataclass(frozen=True)
class CacheSummary:
    """One cache over all texts and needles."""

    name: str
    kept_tokens: float
    seen_tokens: float
    quality: QualitySummary
    found: int
    asked: int

    @property
    def recall(self) -> Interval | None:
        """Part of the needles found, None if none was asked for."""
        return wilson_interval(self.found, self.asked) if self.asked else None


def summaries(content: dict[str, Any]) -> list[CacheSummary]:
    """Return a summary per cache, the plain one first, then in the order of the file's settings."""
    names = [name for name in ("plain", *content["caches"]) if any(r["cache"] == name for r in content["quality"])]
    return [_summary(name, content) for name in names]


def _summary(name: str, content: dict[str, Any]) -> CacheSummary:
    rows = [_quality(row) for row in content["quality"] if row["cache"] == name]
    needles = [row for row in content["needles"] if row["cache"] == name]
    return CacheSummary(
        name=name,
        kept_tokens=sum(row.footprint.kept_tokens for row in rows) / len(rows),
        seen_tokens=sum(row.footprint.seen_tokens for row in rows) / len(rows),
        quality=summarize(rows),
        found=sum(row["found"] for row in needles),
        asked=len(needles),
    )


def _quality(row: dict[str, Any]) -> TextQuality:
    given = {field.name: row[field.name] for field in fields(TextQuality)}
    return TextQuality(**{**given, "footprint": Footprint(**row["footprint"])})
