import importlib.util
import re
from html.parser import HTMLParser

import pytest

from nexusquant_cache.evaluation import KINDS, EvaluationError, summaries, write_report
from nexusquant_cache.evaluation.plots import family, place_figure, quality_figure, recall_figure
from nexusquant_cache.pages.pictures import svg_of

CACHES = {"plain": 1.0, "quant": 5.0, "max": 20.0, "rival@2bit": 6.0, "other": 8.0}
LENGTHS, DEPTHS = (1000, 2000), (0.1, 0.5, 0.9)


def held(factor):
    return {"seen_tokens": 2000, "kept_tokens": 1000, "held_bytes": round(2**21 / factor), "dense_bytes": 2**21}


def quality(cache, factor, window):
    loss = 0.0 if cache == "plain" else 0.004 * factor * (1 + window)
    seconds = None if cache == "plain" else 1.25
    return {
        "task": f"text {window}",
        "cache": cache,
        "text": f"text {window}",
        "nll": 3 + loss,
        "plain_nll": 3.0,
        "kl": loss / 10,
        "top1": 1 - loss,
        "footprint": held(factor),
        "compress_seconds": seconds,
    }


def needle(cache, factor, kind, length, depth):
    found = cache == "plain" or factor * depth < 6
    return {
        "task": f"{kind}: text, {length} tokens, depth {depth}",
        "cache": cache,
        "kind": kind,
        "length": length,
        "depth": depth,
        "expected": ["123456"],
        "answer": "It is 123456." if found else "<b>It & is 12345</b>",
        "found": found,
        "footprint": held(factor),
        "compress_seconds": None,
    }


@pytest.fixture(scope="module")
def content():
    return {
        "environment": {"device": "an <old> machine", "torch": "9.9"},
        "settings": {
            "model": "a model",
            "texts": [{"name": "text", "sha256": "abc"}],
            "prefix": 2000,
            "lengths": list(LENGTHS),
            "depths": list(DEPTHS),
        },
        "caches": {name: {"bits": factor} for name, factor in CACHES.items() if name != "plain"},
        "quality": [quality(name, factor, window) for window in range(3) for name, factor in CACHES.items()],
        "needles": [
            needle(name, factor, kind, length, depth)
            for kind in KINDS
            for length in LENGTHS
            for depth in DEPTHS
            for name, factor in CACHES.items()
        ],
    }


@pytest.fixture(scope="module")
def rows(content):
    return summaries(content)


@pytest.fixture(scope="module")
def folder(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new"
    write_report(content, path)
    return path


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects what a browser would fetch, all ids, and the cells of all tables."""

    def __init__(self, page):
        super().__init__()
        self.links, self.ids, self.open, self.tables = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
        self.links += [value for name, value in attrs if name in {"src", "href", "xlink:href"}]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


class TestPage:
    def test_needs_nothing_else(self, page):
        reader = Reader(page)
        assert all(link.startswith("#") for link in reader.links)
        assert "<script" not in page
        assert "@import" not in page
        assert re.findall(r"url\((?!#)", page) == []

    def test_is_well_formed_and_ids_are_unique(self, page):
        reader = Reader(page)
        assert reader.open == []
        assert len(reader.ids) == len(set(reader.ids)) > 0
        assert {link[1:] for link in reader.links} <= set(reader.ids)
        assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(reader.ids)

    def test_the_tables_have_every_number(self, page):
        quality, recall = Reader(page).tables[:2]
        head, *lines = quality
        assert head == ["cache", "kept", "MiB held", "factor", "dPPL, %", "KL, nats", "top-1, %", "seconds"]
        assert [line[0] for line in lines] == list(CACHES)
        plain, quant = lines[:2]
        assert plain[1:] == ["50 %", "2.00", "1.0x", "0", "0", "100", ""]
        assert quant[2:4] == ["0.40", "5.0x"]
        assert quant[4].startswith("+4.1")  # three texts at .02, .04 and .06 nats
        assert quant[5].startswith("0.0040")
        assert quant[7] == "1.251.25 to 1.25"
        head, *lines = recall
        assert head == ["needles found", *KINDS, "all"]
        assert lines[0][1:] == ["6 of 661 to 100 %"] * 5 + ["30 of 3089 to 100 %"]
        assert lines[2][1:] == ["2 of 610 to 70 %"] * 5 + ["10 of 3019 to 51 %"]

    def test_names_settings_environment_and_meanings(self, page):
        for shown in ("a model", "abc", "an &lt;old&gt; machine", "9.9", "cache rival@2bit", "Kullback-Leibler"):
            assert shown in page
        assert "<old>" not in page

    def test_lost_needles_are_shown_as_text(self, page, content):
        lost = sum(not row["found"] for row in content["needles"])
        assert f"{lost} answers" in page
        assert page.count("&lt;b&gt;It &amp; is 12345&lt;/b&gt;") == lost

    def test_pictures_take_the_colour_of_the_page(self, page):
        assert page.count("<svg") == 3
        assert "currentColor" in page
        assert "prefers-color-scheme: dark" in page

    def test_pictures_are_files_too(self, folder):
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["quality_vs_bytes.png", "recall_by_place.png", "recall_vs_bytes.png", "report.html"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))

    def test_the_same_results_give_the_same_page(self, content, tmp_path):
        content = {**content, "needles": content["needles"][: len(CACHES)]}
        pages = [write_report(content, tmp_path / name).read_text(encoding="utf-8") for name in "ab"]
        assert pages[0] == pages[1]

    def test_a_kind_that_a_cache_was_not_asked_stays_empty(self, content, tmp_path):
        asked = [row for row in content["needles"] if row["kind"] == "single" or row["cache"] != "max"]
        page = write_report({**content, "needles": asked[: 4 * len(CACHES)] + asked[-4:]}, tmp_path)
        recall = Reader(page.read_text(encoding="utf-8")).tables[1]
        assert recall[3][0] == "max"
        assert recall[3][1] != ""
        assert recall[3][2:-1] == [""] * (len(recall[0]) - 3)

    def test_without_needles(self, content, tmp_path):
        page = write_report({**content, "needles": []}, tmp_path).read_text(encoding="utf-8")
        assert page.count("<svg") == 1
        assert "needles found" not in page
        assert "Needles lost" not in page
        assert [path.name for path in tmp_path.glob("*.png")] == ["quality_vs_bytes.png"]

    def test_nothing_to_report(self, content, tmp_path):
        with pytest.raises(EvaluationError, match="no results to report"):
            write_report({**content, "quality": []}, tmp_path)

    def test_without_matplotlib(self, content, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(EvaluationError, match=r'matplotlib: pip install "nexusquant-cache\[cli\]"'):
            write_report(content, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def lines_of(panel):
    """Return the points of a panel by label, without those of the bars."""
    return {box.get_label(): box.lines[0].get_xydata().tolist() for box in panel.containers}


class TestPictures:
    def test_families(self):
        assert [family(name) for name in ("quant", "rival@2bit", "other")] == ["presets", "rival", "other"]

    def test_points_are_bytes_and_means(self, rows):
        perplexity, divergence, recall = quality_figure(rows, "caption").axes
        assert list(lines_of(perplexity)) == ["presets", "rival", "other"]
        by_name = {row.name: row for row in rows}
        expected = [[5, by_name["max"].quality.kl.mean], [20, by_name["quant"].quality.kl.mean]]
        assert lines_of(divergence)["presets"] == [pytest.approx(point, rel=1e-3) for point in expected]
        assert lines_of(recall)["other"] == [pytest.approx([12.5, 2 / 3], rel=1e-3)]

    def test_one_text_has_no_bars(self, content):
        once = [row for row in content["quality"] if row["task"] == "text 0"]
        panel = quality_figure(summaries({**content, "quality": once}), "caption").axes[1]
        (bars,) = panel.containers[0].lines[2]
        assert all(low[1] == high[1] for low, high in bars.get_segments())

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    def test_a_panel_for_each_kind(self, rows, count):
        labels = [panel.get_ylabel() for panel in recall_figure(rows, KINDS[:count]).axes]
        assert labels == [f"{kind}: found" for kind in KINDS[:count]]

    def test_a_heat_map_shows_the_rates(self, content, rows):
        figure = place_figure(content, rows, KINDS)
        assert len(figure.axes) == len(CACHES) * len(KINDS)
        of_max = figure.axes[2 * len(KINDS)]
        assert of_max.collections[0].get_array().tolist() == [[1, 1], [0, 0], [0, 0]]
        assert [text.get_text() for text in of_max.texts] == ["1/1", "0/1", "0/1"] * 2
        last = figure.axes[-len(KINDS)]
        assert [tick.get_text() for tick in last.get_xticklabels()] == ["1,000", "2,000"]
        assert [tick.get_text() for tick in last.get_yticklabels()] == ["0.1", "0.5", "0.9"]
        assert last.yaxis.get_inverted()

    def test_an_unfinished_grid_has_holes(self, content, rows):
        cut = {
            **content,
            "needles": [row for row in content["needles"] if (row["length"], row["depth"]) != (2000, 0.1)],
        }
        cells = place_figure(cut, rows, KINDS[:1]).axes[0].collections[0].get_array()
        assert cells.mask.tolist() == [[False, True], [False, False], [False, False]]

    def test_names_inside_a_picture_are_its_own(self, rows):
        drawn = svg_of(quality_figure(rows, "caption"), "one")
        assert drawn.startswith("<svg")
        assert set(re.findall(r'\bid="([^-"]+)-', drawn)) == {"one"}
