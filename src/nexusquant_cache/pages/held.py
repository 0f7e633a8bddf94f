"""The picture of what a cache holds: bytes by layer and kind, and kept tokens by layer and head; needs matplotlib."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nexusquant_cache.pages.pictures import INK, STYLE, ShownFigure

# From the bottom of a bar to its top.  Colours that people who confuse red and green can tell apart (Okabe and Ito
# 2008, "Color universal design"), and greys.
COLORS = {
    "codes": "#0072b2",
    "scales": "#56b4e9",
    "axes and means": "#009e73",
    "positions": "#f0e442",
    "sinks": "#e69f00",
    "tail": "#d55e00",
    "waiting queries": "#cc79a7",
    "not compressed": "#585858",
    "to undo": "#d8d8d8",
    "shared": INK,
}
"""Kinds of what a cache holds, each with its colour."""

_TICKS = 16  # on the axis of the layers, at most
_LONG = 105  # characters of a line of the title
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
_FEW = 8  # ticks on the axis of the heads, at most


def held_figure(
    layers: Sequence[Mapping[str, int]], kept: Sequence[Sequence[float]], shared: int, title: str
) -> Figure:
    """Draw what a cache holds.

    Args:
        layers: Bytes of each layer, by kind (`COLORS`).
        kept: Tokens that each head of each layer keeps; no heads for layers that have none.
        shared: Bytes that all layers share.
        title: What is written above.
    """
    with mpl.rc_context(STYLE):
        has_heads = any(kept)
        figure = ShownFigure(figsize=(10, 5.6 if has_heads else 3.6), layout="constrained")
        panels = figure.subplots(2 if has_heads else 1, 1, squeeze=False, height_ratios=(2, 1)[: 1 + has_heads])
        place = _bars(panels[0, 0], layers, shared)
        for panel in panels.flat:
            _layer_axis(panel, len(layers), place)
        if has_heads:
            _heads(figure, panels[1, 0], kept)
        panels[-1, 0].set_xlabel("layer")
        figure.suptitle(textwrap.fill(title, _LONG), fontsize=10)
        return figure


def _bars(panel: Axes, layers: Sequence[Mapping[str, int]], shared: int) -> float | None:
    """Draw a bar for each layer, and one for what they share; return the place of that one, if there is one."""
    size, unit = _unit(max([*(sum(layer.values()) for layer in layers), shared], default=0))
    place = len(layers) + max(0.5, len(layers) / 40) if shared else None
    bottom = [0.0] * len(layers)
    for kind, color in COLORS.items():
        heights = [layer.get(kind, 0) / size for layer in layers]
        if any(heights):
            panel.bar(range(len(layers)), heights, 0.85, bottom, color=color, label=kind)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    if place is not None:
        panel.bar([place], [shared / size], 0.85, color=COLORS["shared"], label="shared by all layers")
    panel.set_ylabel(unit)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.grid(visible=True, axis="y", color="#888888", alpha=0.25)
    panel.set_axisbelow(True)
    if panel.containers:
        handles, labels = panel.get_legend_handles_labels()
        panel.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return place


def _layer_axis(panel: Axes, layers: int, shared: float | None) -> None:
    panel.set_xticks(range(0, layers, max(1, math.ceil(layers / _TICKS))))
    panel.set_xlim(-0.75, (layers - 0.25) if shared is None else shared + 0.75)


def _heads(figure: Figure, panel: Axes, kept: Sequence[Sequence[float]]) -> None:
    most = max(map(len, kept))
    cells = [[tokens[head] if head < len(tokens) else math.nan for tokens in kept] for head in range(most)]
    edges = [index - 0.5 for index in range(len(kept) + 1)], [index - 0.5 for index in range(most + 1)]
    known = [tokens for row in kept for tokens in row]
    shades = panel.pcolormesh(*edges, cells, cmap="cividis", vmin=0, vmax=max(*known, 1))
    panel.set_ylim(most - 0.5, -0.5)
    panel.set_ylabel("KV head")
    panel.set_yticks(range(0, most, math.ceil(most / _FEW)))
    bar = figure.colorbar(shades, cax=panel.inset_axes((1.015, 0, 0.015, 1)), label="kept tokens")
    bar.locator = MaxNLocator(4, integer=True)
    bar.formatter = FuncFormatter(lambda tokens, _: f"{tokens:,.0f}")
    bar.update_ticks()


def _unit(most: int) -> tuple[int, str]:
    return next(((size, unit) for size, unit in _UNITS if most >= size), _UNITS[-1])
