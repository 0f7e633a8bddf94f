"""The picture of what a cache holds: its numbers are the report's, its labels do not collide, its colours differ."""

import importlib.util
import itertools
import math

import numpy as np
import pytest
import torch
from feeding import feed
from integration.tiny import SMALL, kept_mask, random_states, tiny_config
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from transformers import Gemma3TextConfig

from nexusquant_cache import NexusQuantCache, UnsupportedError
from nexusquant_cache.pages.held import COLORS, held_figure

# How people without cones for long and for medium waves see linear RGB (Machado, Oliveira and Fernandes 2009, "A
# physiologically-based model for simulation of color vision deficiency", IEEE TVCG 15(6), table 1, severity 1).
SIGHT = {
    "usual": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
LAB_WHITE = np.array([0.9505, 1.0, 1.089])
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
PLAINLY_DIFFERENT = 15  # in CIELAB, where a distance of some two can just be seen side by side


def lab(color, sight):
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(SIGHT[sight] @ linear, 0, 1) / LAB_WHITE)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def compressed(batch=1, **options):
    cache = NexusQuantCache("balanced", config=tiny_config(), **(SMALL | options))
    for tokens in (300, 1):
        for layer in range(2):
            feed(cache, *random_states((batch, 2, tokens, 16), layer), layer)
    return cache


def mixed():
    config = Gemma3TextConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    cache = NexusQuantCache("balanced", config=config, **SMALL)
    for layer in range(2):
        feed(cache, *random_states((1, 2, 100, 16), layer, torch.bfloat16), layer)
    return cache


def drawn(figure):
    """Return the bytes that the bars stand for: by place and by kind."""
    panel = figure.axes[0]
    size = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[panel.get_ylabel()]
    bars = {}
    for container in panel.containers:
        for bar in container:
            place = bar.get_x() + bar.get_width() / 2
            bars[place, container.get_label()] = bar.get_height() * size
    return bars


def labels(figure):
    """Return all writing of a figure with its place in pixels."""
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle]
    for panel in [*figure.axes, *itertools.chain(*(panel.child_axes for panel in figure.axes))]:
        ticks = [*panel.get_xticklabels(), *panel.get_yticklabels()]
        texts += [*ticks, panel.xaxis.label, panel.yaxis.label, panel.title]
        legend = panel.get_legend()
        texts += [] if legend is None else legend.get_texts()
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]


class TestReport:
    @pytest.mark.parametrize(
        "make",
        [
            compressed,
            mixed,
            lambda: compressed(batch=2),
            lambda: compressed(min_tokens=1000),  # waits
            NexusQuantCache,
        ],
    )
    def test_the_bars_are_the_bytes_held(self, make):
        report = make().memory_report()
        bars = drawn(report.plot())
        assert math.isclose(sum(bars.values()), report.held_bytes, rel_tol=1e-9)
        for layer in report.layers:
            own = {kind: size for (place, kind), size in bars.items() if math.isclose(place, layer.layer_idx) and size}
            assert own == pytest.approx(dict(layer.bytes_by_kind))
            assert sum(layer.bytes_by_kind.values()) == layer.held_bytes
            assert set(layer.bytes_by_kind) <= set(COLORS)
        shared = sum(size for (_, kind), size in bars.items() if kind == "shared by all layers")
        assert shared == pytest.approx(report.shared_bytes)

    def test_the_kinds_of_a_small_case_by_hand(self):
        """100 float32 tokens of 2 heads x 16 channels, 2 sinks, 8 recent, half of the 90 between them kept."""
        cache = NexusQuantCache("quant", keep_ratio=0.5, key_bits=3, value_bits=2, transform="hadamard", **SMALL)
        feed(cache, *random_states((1, 2, 100, 16), 0), 0)
        assert cache.memory_report().layers[0].bytes_by_kind == {
            "tail": 100 * 2 * 32 * 4,
            "waiting queries": 64 * 4 * 16 * 4 + 100 * 2 * 4,  # and far attention
        }
        cache.compress()
        layer = cache.memory_report().layers[0]
        assert layer.bytes_by_kind == {
            "sinks": 2 * 2 * 32 * 4,
            "tail": 8 * 2 * 32 * 4,
            "codes": 45 * 2 * (6 + 4),
            "scales": 45 * 2 * 2,
            "positions": 2 * 12 + 2 * 8,  # a bitmap, and how many each head keeps
            "axes and means": 2 * 16 * 2 + 2 * 2 * 4,
        }
        assert sum(map(sum, layer.kept_by_head)) == 2 * 55

    def test_the_heads_are_those_of_the_cache(self):
        cache = compressed(batch=2)
        report = cache.memory_report()
        for layer in report.layers:
            assert torch.tensor(layer.kept_by_head).equal(kept_mask(cache, layer.layer_idx).sum(-1))
        shades = report.plot().axes[1].collections[0].get_array()
        expected = [[sum(row[head] for row in layer.kept_by_head) / 2 for layer in report.layers] for head in range(2)]
        assert shades.reshape(2, 2).tolist() == expected

    def test_layers_without_keys_and_heads_have_none(self):
        sliding, ours = mixed().memory_report().layers
        assert sliding.kept_by_head == ((7, 7),)
        assert sliding.bytes_by_kind == {"not compressed": sliding.held_bytes}
        assert len(ours.kept_by_head[0]) == 2

    @pytest.mark.parametrize(("ending", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
    def test_it_is_written_where_that_is_asked(self, ending, begin, tmp_path):
        path = tmp_path / f"held.{ending}"
        figure = compressed().memory_report().plot(str(path))
        assert path.read_bytes().startswith(begin)
        assert figure._repr_png_().startswith(b"\x89PNG")  # which notebooks ask for

    def test_an_ending_that_is_no_format(self, tmp_path):
        with pytest.raises(ValueError, match="is not supported"):
            compressed().memory_report().plot(tmp_path / "held.text")

    def test_without_matplotlib(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
        message = r'plot\(\) needs matplotlib: pip install "nexusquant-cache\[cli\]"'
        with pytest.raises(UnsupportedError, match=message):
            NexusQuantCache().memory_report().plot()


class TestFigure:
    @pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 3), (17, 9), (30, 3), (47, 32), (80, 8), (80, 64)])
    def test_no_label_covers_another(self, layers, heads):
        kinds = {kind: 10_000 * (index + 1) for index, kind in enumerate(COLORS) if kind != "shared"}
        kept = [[100.0 * (layer + head) for head in range(heads)] for layer in range(layers)]
        title = (
            "preset balanced, 123,456 tokens seen, 12,345 kept, 1.23 GiB (17.8x), compressed; attention was not seen"
        )
        figure = held_figure([kinds] * layers, kept, 30_000, f"{title}, so all tokens were kept (attention.enable)")
        found = labels(figure)
        assert len(found) > 10
        colliding = [(a, b) for (a, x), (b, y) in itertools.combinations(found, 2) if x.overlaps(y)]
        assert colliding == []
        width, height = figure.canvas.get_width_height()
        outside = [name for name, box in found if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
        assert outside == []

    @pytest.mark.parametrize("sight", SIGHT)
    def test_colours_differ(self, sight):
        near = {
            (a, b)
            for a, b in itertools.combinations(COLORS, 2)
            if np.linalg.norm(lab(COLORS[a], sight) - lab(COLORS[b], sight)) < PLAINLY_DIFFERENT
        }
        assert near == set()

    def test_heads_that_a_layer_lacks_are_left_empty(self):
        figure = held_figure([{"codes": 1}, {"codes": 2}, {}], [[5.0], [6.0, 7.0], []], 0, "title")
        shades = figure.axes[1].collections[0].get_array().reshape(2, 3)
        assert np.ma.filled(shades, -1).tolist() == [[5, 6, -1], [-1, 7, -1]]

    def test_without_any_heads_there_is_one_panel(self):
        assert len(held_figure([{"not compressed": 10}], [[]], 0, "title").axes) == 1
