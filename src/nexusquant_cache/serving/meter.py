"""What the caches of two chats hold, as numbers and as a table for a page."""

import html
from dataclasses import dataclass

from nexusquant_cache.cache.report import MemoryReport

_NOTHING = "-"


@dataclass(frozen=True)
class Meter:
    """What a cache holds.

    Attributes:
        seen_tokens: Tokens seen.
        kept_tokens: Tokens kept, on average over layers and heads.
        held_bytes: Bytes held.
        dense_bytes: Bytes of a plain 16-bit cache of the tokens seen.
        last: What was done last, and how long it took.
    """

    seen_tokens: int
    kept_tokens: int
    held_bytes: int
    dense_bytes: int
    last: str

    @classmethod
    def of(cls, report: MemoryReport, last: str) -> "Meter":
        """Read a cache's report."""
        return cls(report.seen_tokens, report.kept_tokens, report.held_bytes, report.dense_bytes, last)

    @property
    def factor(self) -> float:
        """How many times smaller than a plain 16-bit cache."""
        return self.dense_bytes / self.held_bytes if self.held_bytes else 1.0


def meter_html(meters: dict[str, Meter | None]) -> str:
    """Return a table with a row for each cache, and a bar as long as its bytes; the longest is that of the largest.

    Args:
        meters: By the name of the cache; None where there is nothing to show.
    """
    most = max((meter.held_bytes for meter in meters.values() if meter), default=0)
    heads = ("cache", "tokens seen", "kept", "bytes held", "", "against 16 bit", "last")
    lines = ["<table class='meter'><thead><tr>", *(f"<th>{head}</th>" for head in heads), "</tr></thead><tbody>"]
    for name, meter in meters.items():
        cells = _cells(meter, most) if meter else [_NOTHING, _NOTHING, _NOTHING, "", _NOTHING, _NOTHING]
        lines += ["<tr>", f"<th>{html.escape(name)}</th>", *(f"<td>{cell}</td>" for cell in cells), "</tr>"]
    return "".join([*lines, "</tbody></table>"])


def _cells(meter: Meter, most: int) -> list[str]:
    width = 100 * meter.held_bytes / most if most else 0
    return [
        f"{meter.seen_tokens:,}",
        f"{meter.kept_tokens:,}",
        f"{meter.held_bytes / 2**20:,.2f} MiB",
        f"<div class='bar'><div style='width: {width:.1f}%'></div></div>",
        f"{meter.factor:.1f}x smaller" if meter.factor >= 1 else f"{1 / meter.factor:.1f}x larger",
        html.escape(meter.last),
    ]
