"""Pictures of `gpu.py`'s results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from nexusquant_cache.pages.pictures import save_png

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

_GIB = 2**30


def plot_all(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what was measured; return the files."""
    drawn = []
    steps = [row for row in content["end_to_end"] if row["what"] == "steps"]
    codes = [row for row in content["attention"] if row["what"] == "codes" and row["preset"] == "balanced"]
    for name, rows, draw in (
        ("gpu_attention", codes, _attention),
        ("gpu_end_to_end", steps, _end_to_end),
        ("gpu_capacity", content["capacity"], _capacity),
    ):
        if rows:
            path = folder / f"{name}.png"
            save_png(draw(rows, content["environment"]["device"]), path)
            drawn.append(path)
    return drawn


def _attention(rows: Sequence[Mapping[str, Any]], device: str) -> Figure:
    """Draw times SDPA against the context: a panel for each kind of keys, a line for each batch."""
    kinds = list(dict.fromkeys(row["keys"] for row in rows))
    figure = Figure(figsize=(4 * len(kinds) + 1, 4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        of_kind = [row for row in rows if row["keys"] == kind]
        for batch, head_dim in sorted({(row["batch"], row["head_dim"]) for row in of_kind}):
            line = sorted(
                (row for row in of_kind if (row["batch"], row["head_dim"]) == (batch, head_dim)),
                key=lambda row: row["context"],
            )
            style = {"marker": "o" if head_dim == 128 else "s", "linestyle": "-" if head_dim == 128 else "--"}
            ratios = [row["ratio"] for row in line]
            panel.plot([row["context"] for row in line], ratios, label=f"{batch} rows, d={head_dim}", **style)
        panel.axhline(1, color="#7f7f7f", linewidth=0.8, linestyle=":")
        panel.set_title(f"keys {kind}", fontsize=10)
        _context_axis(panel)
    panels[0].set_ylabel("times faster than SDPA in float16")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"decode attention at balanced's rates, {device}", fontsize=10)
    return figure


def _context_axis(panel: Axes) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("tokens that attention reads")
    panel.grid(visible=True, alpha=0.3)


def _end_to_end(rows: Sequence[Mapping[str, Any]], device: str) -> Figure:
    """Draw time per token and peak memory of generation, a group of bars for each shape."""
    shapes = list(dict.fromkeys((row["batch"], row["context"]) for row in rows))
    figure = Figure(figsize=(5.5 * 2, 1.2 + 0.28 * len(rows)), layout="constrained")
    times, peaks = figure.subplots(1, 2, sharey=True)
    labels, places, place = [], [], 0
    for shape in shapes:
        for row in (row for row in rows if (row["batch"], row["context"]) == shape):
            color = "#7f7f7f" if row["cache"].endswith("Cache") else "#009e73" if row["on_codes"] else "#56b4e9"
            times.barh(place, row["milliseconds"], color=color)
            peaks.barh(place, row["peak_beside_weights"] / _GIB, color=color)
            codes = ", on codes" if row["on_codes"] else ""
            labels.append(f"{row['batch']} x {row['context']:,}: {row['cache']}{codes}")
            places.append(place)
            place -= 1
        place -= 1
    times.set_yticks(places, labels, fontsize=8)
    times.set_xlabel("ms per token")
    peaks.set_xlabel("GiB at the peak, beside the weights")
    for panel in (times, peaks):
        panel.grid(visible=True, axis="x", alpha=0.3)
    figure.suptitle(f"generation with a model shaped like Llama 3 8B, {device}", fontsize=10)
    return figure


def _capacity(rows: Sequence[Mapping[str, Any]], device: str) -> Figure:
    """Draw how many tokens fit."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    panel = figure.subplots()
    bars = panel.barh([row["cache"] for row in rows], [row["tokens"] / 1e6 for row in rows], color="#0072b2")
    panel.bar_label(bars, [f"{row['tokens'] / 1e6:.2f}" for row in rows], fontsize=8, padding=3)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_xlabel(f"million tokens beside a 16-bit 8B model on {device}, computed")
    panel.grid(visible=True, axis="x", alpha=0.3)
    return figure
