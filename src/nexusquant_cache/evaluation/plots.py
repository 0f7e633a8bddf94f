"""Pictures of results; needs matplotlib."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nexusquant_cache.evaluation.caches import PLAIN
from nexusquant_cache.evaluation.intervals import Interval
from nexusquant_cache.evaluation.summary import CacheSummary, Recall, recall_by_place
from nexusquant_cache.pages.pictures import INK, STYLE
from nexusquant_cache.presets import PRESETS

# Colours that people who confuse red and green can tell apart (Okabe and Ito 2008, "Color universal design").
_COLORS = ("#009e73", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_MARKERS = "osD^vPX"
_RATES = LinearSegmentedColormap.from_list("recall", ["#c2410c", "#f3e6c4", "#0f766e"])
_PRESETS = "presets"
_READABLE = (0.2, 0.8)  # rates between these have a light cell, with dark writing
_Value = Callable[[CacheSummary], Interval | None]


@dataclass(frozen=True)
class Picture:
    """A figure with its name, which becomes that of its file, and what it shows."""

    name: str
    figure: Figure
    caption: str


def pictures(content: Mapping[str, Any], rows: Sequence[CacheSummary], heading: str) -> list[Picture]:
    """Draw everything there is to draw."""
    quality = quality_figure(rows, heading)
    drawn = [Picture("quality_vs_bytes", quality, "Quality against the bytes held, with 95 % intervals.")]
    kinds = list(rows[0].recall)
    if kinds:
        by_kind = "Recall against the bytes held, by kind of needle."
        by_place = "Where needles are found: length of the prompt against depth in the text; found of asked."
        drawn += [
            Picture("recall_vs_bytes", recall_figure(rows, kinds), by_kind),
            Picture("recall_by_place", place_figure(content, rows, kinds), by_place),
        ]
    return drawn


def quality_figure(rows: Sequence[CacheSummary], caption: str) -> Figure:
    """Draw perplexity, divergence and, if needles were asked for, recall against bytes held, with 95 % intervals."""
    with mpl.rc_context(STYLE):
        has_recall = any(row.recall for row in rows)
        figure = Figure(figsize=(12.5 if has_recall else 8.4, 4.2), layout="constrained")
        perplexity, divergence, *rest = figure.subplots(1, 3 if has_recall else 2)
        _panel(perplexity, rows, lambda row: row.quality.dppl_percent, "change of perplexity, %")
        perplexity.set_yscale("symlog", linthresh=1)
        _panel(divergence, rows, lambda row: row.quality.kl, "KL(plain || cache), nats")
        divergence.set_yscale("log")
        divergence.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for panel in (perplexity, divergence):
            panel.yaxis.set_major_formatter(FuncFormatter(_plain_number))
            panel.yaxis.set_minor_formatter(NullFormatter())
        for panel in rest:
            _recall_panel(panel, rows, lambda row: row.all_recall, "needles found")
        perplexity.legend(loc="best", frameon=False)
        figure.suptitle(f"{caption}; bars: 95 % intervals", fontsize=10)
        return figure


def recall_figure(rows: Sequence[CacheSummary], kinds: Sequence[str]) -> Figure:
    """Draw recall against the bytes held, a panel for each kind of needle."""
    with mpl.rc_context(STYLE):
        columns = min(3, len(kinds))
        lines = math.ceil(len(kinds) / columns)
        figure = Figure(figsize=(12.5 / 3 * columns, 3.6 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for kind, panel in zip(kinds, panels, strict=False):
            _recall_panel(panel, rows, partial(_recall_of, kind), f"{kind}: found")
        for panel in list(panels):  # what the last line has too many
            panel.remove()
        figure.axes[0].legend(loc="best", frameon=False)
        return figure


def place_figure(content: Mapping[str, Any], rows: Sequence[CacheSummary], kinds: Sequence[str]) -> Figure:
    """Draw where needles are found: a line for each cache, a column for each kind, length against depth."""
    with mpl.rc_context(STYLE):
        lengths, depths = (sorted(content["settings"][axis]) for axis in ("lengths", "depths"))
        width = max(1.3, 0.45 * len(lengths))
        height = max(1.0, 0.28 * len(depths))
        size = (1.3 + (width + 0.25) * len(kinds), 0.7 + (height + 0.2) * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(rows), len(kinds), squeeze=False, sharex=True, sharey=True)
        for line, row in zip(panels, rows, strict=True):
            for panel, kind in zip(line, kinds, strict=True):
                _heat_map(panel, recall_by_place(content, row.name, kind), lengths, depths)
            line[0].set_ylabel(f"{row.name}\n{row.quality.compression_factor:.1f}x\n\ndepth", fontsize=8)
        for panel, kind in zip(panels[0], kinds, strict=True):
            panel.set_title(kind, fontsize=9)
        for panel in panels[-1]:
            panel.set_xlabel("tokens", fontsize=8)
        return figure


def family(name: str) -> str:
    """Return which line of a plot a cache belongs to: what stands before an ``@``, or ``presets``, or itself."""
    return _PRESETS if name in PRESETS else name.partition("@")[0]


def _recall_of(kind: str, row: CacheSummary) -> Recall | None:
    return row.recall.get(kind)


def _recall_panel(
    panel: Axes, rows: Sequence[CacheSummary], recall: Callable[[CacheSummary], Recall | None], label: str
) -> None:
    def rate(row: CacheSummary) -> Interval | None:
        found = recall(row)
        return None if found is None else found.rate

    def held(row: CacheSummary) -> float:
        found = recall(row)
        return math.nan if found is None else found.held_bytes / found.dense_bytes

    _panel(panel, rows, rate, label, held=held)
    for plain in [found.rate for row in rows if row.name == PLAIN and (found := recall(row)) is not None]:
        panel.axhline(plain.mean, color=INK, linewidth=0.8, linestyle=":")
        place: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
            "xytext": (0, -9),
        }
        panel.annotate("plain cache", (0.02, plain.mean), fontsize=7, **place)
    panel.set_ylim(-0.03, 1.03)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))


def _held_part(row: CacheSummary) -> float:
    return 1 / row.quality.compression_factor


def _panel(
    panel: Axes,
    rows: Sequence[CacheSummary],
    value: _Value,
    label: str,
    *,
    held: Callable[[CacheSummary], float] = _held_part,
) -> None:
    families: dict[str, list[tuple[float, Interval, str]]] = {}
    for row in rows:
        at = value(row)
        if row.name != PLAIN and at is not None:
            families.setdefault(family(row.name), []).append((100 * held(row), at, row.name))
    for index, (name, points) in enumerate(families.items()):
        style = {"color": _COLORS[index % len(_COLORS)], "marker": _MARKERS[index % len(_MARKERS)]}
        _line(panel, name, sorted(points, key=lambda point: point[0]), style)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.15)
    panel.set_xlabel("bytes held, of a plain 16-bit cache")
    panel.set_ylabel(label)
    panel.grid(visible=True, color="#888888", alpha=0.25)


def _line(panel: Axes, name: str, points: Sequence[tuple[float, Interval, str]], style: Mapping[str, Any]) -> None:
    held, intervals, names = zip(*points, strict=True)
    means = [at.mean for at in intervals]
    # Rounding may put an end a hair beyond its mean; a single sample has no ends.
    low = [max(0.0, at.mean - at.low) if math.isfinite(at.low) else 0.0 for at in intervals]
    high = [max(0.0, at.high - at.mean) if math.isfinite(at.high) else 0.0 for at in intervals]
    line = "-" if name == _PRESETS else "--"
    bars: dict[str, Any] = {"yerr": [low, high], "capsize": 2, "elinewidth": 0.8}
    panel.errorbar(held, means, label=name, linewidth=1, markersize=5, linestyle=line, **bars, **style)
    if name == _PRESETS:
        for x, y, preset in zip(held, means, names, strict=True):
            panel.annotate(preset, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)


def _heat_map(
    panel: Axes, cells: Mapping[tuple[int, float], Recall], lengths: Sequence[int], depths: Sequence[float]
) -> None:
    rates = [
        [cells[length, depth].rate.mean if (length, depth) in cells else math.nan for length in lengths]
        for depth in depths
    ]
    panel.pcolormesh(rates, cmap=_RATES, vmin=0, vmax=1)
    for (length, depth), recall in cells.items():
        rate = recall.rate.mean
        color = "black" if _READABLE[0] < rate < _READABLE[1] else "white"
        place = (lengths.index(length) + 0.5, depths.index(depth) + 0.5)
        panel.text(*place, f"{recall.found}/{recall.asked}", ha="center", va="center", fontsize=7, color=color)
    panel.set_xticks([index + 0.5 for index in range(len(lengths))], [f"{length:,}" for length in lengths], fontsize=7)
    panel.set_yticks([index + 0.5 for index in range(len(depths))], [f"{depth:g}" for depth in depths], fontsize=7)
    panel.set_ylim(len(depths), 0)
    panel.tick_params(length=0)


def _plain_number(value: float, _position: int | None) -> str:
    return f"{value:g}"
