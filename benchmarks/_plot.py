"""The plots of the benchmarks that measure no quality: the peak of a prefill, and a long answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from nexusquant_cache.pages.pictures import save_png

if TYPE_CHECKING:
    from pathlib import Path


def plot_prefill(content: dict[str, Any], path: Path) -> None:
    """Draw the peak of all tensors, and of the cache alone, against the prompt's length."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
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
    save_png(figure, path)


def plot_long_answer(content: dict[str, Any], path: Path) -> None:
    """Draw time per token against the tokens seen, and bytes held against a plain 16-bit cache."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
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
    save_png(figure, path)
