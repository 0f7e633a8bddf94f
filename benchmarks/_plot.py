"""The plots: quality against bytes held, the peak of a prefill, and a long answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from _summary import CacheSummary, summaries

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nexusquant_cache.evaluation import Interval

_PREDECESSOR = "predecessor@"
_STYLES: dict[str, dict[str, Any]] = {
    "presets": {"color": "#0b6e4f", "marker": "o", "linestyle": "-"},
    "predecessor's recipe, same bytes": {"color": "#b5530a", "marker": "s", "linestyle": "--"},
}


def plot_quality(content: dict[str, Any], path: Path) -> None:
    """Draw perplexity, divergence and recall against the bytes held, with 95 % intervals."""
    rows = [row for row in summaries(content) if row.name != "plain"]
    if not rows:
        return
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.2), layout="constrained")
    panels: list[tuple[str, Callable[[CacheSummary], Interval | None], str]] = [
        ("change of perplexity, %", lambda row: row.quality.dppl_percent, "symlog"),
        ("KL(plain || cache), nats", lambda row: row.quality.kl, "log"),
        ("needles found", lambda row: row.recall, "linear"),
    ]
    for panel, (label, value, scale) in zip(axes, panels, strict=True):
        _panel(panel, rows, label, value)
        panel.set_yscale(scale, **({"linthresh": 1} if scale == "symlog" else {}))
        if scale == "log":
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    axes[2].set_ylim(-0.03, 1.03)
    axes[0].legend(loc="best", frameon=False)
    settings = content["settings"]
    figure.suptitle(
        f"{settings['model']}, {rows[0].quality.texts} texts of {settings['prefix']:,} tokens, "
        f"{rows[0].asked} needles; bars: 95 % intervals",
        fontsize=10,
    )
    _save(figure, path)


def _panel(panel: Axes, rows: list[CacheSummary], label: str, value: Callable[[CacheSummary], Interval | None]) -> None:
    for (family, style), old in zip(_STYLES.items(), (False, True), strict=True):
        mine = [(row, value(row)) for row in rows if row.name.startswith(_PREDECESSOR) == old]
        points = sorted(
            ((100 * row.quality.held_bytes / _dense(row), at, row.name) for row, at in mine if at is not None),
            key=lambda point: point[0],
        )
        if not points:
            continue
        held, intervals, names = zip(*points, strict=True)
        means = [at.mean for at in intervals]
        # rounding may put an end a hair beyond its mean
        bars = [[max(0, at.mean - at.low) for at in intervals], [max(0, at.high - at.mean) for at in intervals]]
        panel.errorbar(
            held, means, yerr=bars, label=family, capsize=2, elinewidth=0.8, linewidth=1, markersize=5, **style
        )
        if not old:
            for x, y, name in zip(held, means, names, strict=True):
                panel.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.15)
    panel.set_xlabel("bytes held, of a plain 16-bit cache")
    panel.set_ylabel(label)
    panel.grid(visible=True, alpha=0.3)


def _dense(row: CacheSummary) -> float:
    return row.quality.held_bytes * row.quality.compression_factor


def plot_prefill(content: dict[str, Any], path: Path) -> None:
    """Draw the peak of all tensors, and of the cache alone, against the prompt's length."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for panel, key, title in zip(axes, ("cache_peak_bytes", "peak_bytes"), ("the cache", "all tensors"), strict=True):
        for schedule in dict.fromkeys(row["schedule"] for row in content["rows"]):
            rows = [row for row in content["rows"] if row["schedule"] == schedule]
            style = "--" if schedule.startswith("plain") else "-"
            mebibytes = [row[key] / 2**20 for row in rows]
            panel.plot([row["tokens"] for row in rows], mebibytes, style, marker="o", markersize=4, label=schedule)
        panel.set_title(f"peak of {title}", fontsize=10)
        panel.set_xlabel("tokens of the prompt")
        panel.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("MiB")
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_long_answer(content: dict[str, Any], path: Path) -> None:
    """Draw time per token against the tokens seen, and bytes held against a plain 16-bit cache."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(row["cache"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["cache"] == name]
        seen = [row["seen_tokens"] for row in rows]
        axes[0].plot(seen, [row["mean_ms"] for row in rows], marker="o", markersize=3, label=name)
        if name != "plain":
            held = [row["held_bytes"] / 2**20 for row in rows]
            axes[1].plot(seen, held, marker="o", markersize=3, label=name)
    axes[0].set_ylabel("ms per token")
    axes[1].set_ylabel("MiB held")
    for panel in axes:
        panel.set_xlabel("tokens seen")
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
        panel.legend(frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
