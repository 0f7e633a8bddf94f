"""The page about a saved cache: its numbers, the prompt coloured by what was kept, and that nothing on it is markup."""

import importlib.util
import re
from html.parser import HTMLParser

import pytest
import torch
from feeding import feed
from files import CONFIGS, GOLDEN, MAKERS, file_bytes, forged
from integration.tiny import SMALL, kept_mask, random_states, tiny_config
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner
from unit.evaluation_tiny import build_tokenizer

from nexusquant_cache import EvictionPolicy, FormatError, NexusQuantCache, OptionError, UnsupportedError
from nexusquant_cache.cli import app as app_module
from nexusquant_cache.cli.app import app
from nexusquant_cache.files import inspect_file, write_page
from nexusquant_cache.files.ids import TOKEN_IDS, packed_ids, unpacked_ids, with_token_ids
from nexusquant_cache.files.kept import KeptTokens, kept_tokens
from nexusquant_cache.files.prompt import LEVELS, level_of, text_html
from nexusquant_cache.files.reader import read_positions
from nexusquant_cache.files.rows import layer_rows

VOID = {"meta", "br", "path", "use", "rect", "image"}
TOKENIZER = build_tokenizer()


class Page(HTMLParser):
    """What a page shows: its tags, closed in their order, tables, spans of the prompt, and what would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.spans, self.fetched, self.tags = [], [], [], [], set()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.add(tag)
        self.fetched += [value for name, value in attrs if name in {"src", "href", "xlink:href", "srcset", "action"}]
        self.fetched += re.findall(r"url\(([^)]*)\)", given.get("style") or "")
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
        elif tag == "span" and "title" in given:
            self.spans.append([given["class"], given["title"], ""])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] == "span" and self.spans:
            self.spans[-1][2] += data
        if "style" not in self.open:
            self.text += data

    @property
    def shares(self):
        """Return the range of percents that is said of each position."""
        found = {}
        for _, title, _ in self.spans:
            places, _, percents = title.partition(": ")
            first, _, last = places.replace(",", "").partition("-")
            least, _, most = percents.removesuffix(" %").partition("-")
            for place in range(int(first), int(last or first) + 1):
                assert place not in found
                found[place] = (int(least), int(most or least))
        return found


def page_of(path, **options):
    target = path.with_suffix(".html")
    assert write_page(path, target, **options) == target
    return Page(target.read_text(encoding="utf-8"))


@pytest.fixture
def saved(tmp_path):
    """Save a cache of one of the kinds, and return its file and the cache as it is loaded."""

    def save(name):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(file_bytes(name))
        return path, NexusQuantCache.load(path, config=CONFIGS[name]())

    return save


class EvenPolicy(EvictionPolicy):
    """Wants the tokens at even positions."""

    def score(self, inputs):
        return (torch.arange(inputs.keys.shape[2]) % 2 == 0).float().expand(inputs.keys.shape[:3]).contiguous()


class TestKept:
    def check(self, meta, tensors, cache):
        """What the file says is what the cache keeps that was loaded from it."""
        layers = [index for index, layer in enumerate(cache.layers) if hasattr(layer, "state")]
        masks = [kept_mask(cache, index) for index in layers]
        for row in range(len(masks[0])):
            kept = kept_tokens(meta, tensors, row)
            assert kept.heads == sum(mask.shape[1] for mask in masks)
            assert kept.counts.equal(sum(mask[row].sum(0) for mask in masks))
            by_head = [tuple(mask[row].sum(1).tolist()) for mask in masks]
            assert [kept.by_head[index] for index in layers] == by_head

    @pytest.mark.parametrize("name", list(MAKERS))
    def test_it_is_what_the_loaded_cache_keeps(self, name, saved):
        path, cache = saved(name)
        promise, tensors = read_positions(path)
        assert {spec.kind for spec, _, _ in promise.tensors if spec.name in tensors} <= {"positions"}
        self.check(promise.meta, tensors, cache)

    @pytest.mark.parametrize(
        "path", sorted(GOLDEN.glob("version-*/*.safetensors")), ids=lambda path: f"{path.parent.name}-{path.stem}"
    )
    def test_and_so_in_files_of_every_version(self, path):
        promise, tensors = read_positions(path)
        config = CONFIGS[path.stem.partition("-")[0]]()
        self.check(promise.meta, tensors, NexusQuantCache.load(path, config=config))

    def test_a_small_case_by_hand(self, tmp_path):
        """Of 40 tokens, 2 sinks and 8 recent stay, and of the 30 between them those 15 at even positions."""
        cache = NexusQuantCache("quant", policy=EvenPolicy(), keep_ratio=0.5, **SMALL)
        for layer in range(2):
            feed(cache, *random_states((1, 2, 40, 16), layer), layer)
        cache.compress()
        cache.save(tmp_path / "cache.safetensors")
        page = page_of(tmp_path / "cache.safetensors")
        whole = {0, 1, *range(2, 32, 2), *range(32, 40)}
        assert page.shares == {place: (100, 100) if place in whole else (0, 0) for place in range(40)}
        numbers = page.tables[1]
        assert numbers[0][-3:] == ["bytes", "kept by head 0", "kept by head 1"]
        assert [row[-2:] for row in numbers[1:3]] == [["25", "25"], ["25", "25"]]

    def test_a_sliding_window_holds_the_newest(self, saved):
        path, _ = saved("mixed")
        promise, tensors = read_positions(path)
        assert kept_tokens(promise.meta, tensors, 0).by_head == ((29, 29), (40, 40))

    def test_positions_that_are_damaged(self, tmp_path):
        def change(_content, named):
            name, dtype, shape, data = named["layers.0.kept"]
            named[name] = name, dtype, shape, bytes([data[0] ^ 0x80, *data[1:]])

        path = tmp_path / "forged"
        path.write_bytes(forged(file_bytes("compressed", None), change))
        with pytest.raises(FormatError, match=r"layers.0"):
            read_positions(path)

    @pytest.mark.parametrize("row", [-1, 2])
    def test_a_row_that_is_not_there(self, row, saved):
        path, _ = saved("padded")
        with pytest.raises(OptionError, match=f"has 2 rows: row must be from 0 to 1, got {row}"):
            write_page(path, path.with_suffix(".html"), row=row)


class TestLevels:
    @pytest.mark.parametrize(
        ("count", "heads", "level"), [(0, 90, 0), (1, 90, 1), (9, 90, 1), (10, 90, 2), (81, 90, 9), (82, 90, LEVELS)]
    )
    def test_by_hand(self, count, heads, level):
        assert level_of(count, heads) == level

    def test_no_heads_keep_nothing(self):
        assert level_of(0, 0) == 0


class TestPage:
    @pytest.mark.parametrize("name", list(MAKERS))
    def test_it_needs_nothing_and_says_what_inspect_says(self, name, saved, tmp_path):
        path, cache = saved(name)
        outcome = CliRunner().invoke(app, ["inspect", str(path), "--html", str(tmp_path / "page.html")])
        assert outcome.exit_code == 0, outcome.output
        assert outcome.stdout.splitlines()[-1] == f"Page: {tmp_path / 'page.html'}"
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        page = Page(text)
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.fetched)
        assert not {"script", "link", "iframe", "img", "object"} & page.tags
        assert not re.findall(r"@import|https?://(?!www\.w3\.org/)", text)  # names of namespaces, which nobody opens
        shown = outcome.stdout.split()
        for cells in (cell for table in (page.tables[0], *page.tables[2:]) for row in table for cell in row):
            assert set(cells.split()) <= set(shown)
        summary = inspect_file(path)
        assert page.tables[-1][1:] == [
            *(
                [
                    kind.kind,
                    f"{kind.packed_bytes:,}",
                    f"{kind.stored_bytes:,}",
                    f"{kind.stored_bytes / kind.packed_bytes:.3f}" if kind.packed_bytes else "-",
                    ", ".join(kind.packings),
                ]
                for kind in summary.kinds
            ),
            ["header", "-", f"{summary.header_bytes:,}", "-", "JSON"],
        ]
        assert len(page.shares) == cache.get_seq_length()

    @pytest.mark.parametrize("name", list(MAKERS))
    def test_tokens_of_a_layer_add_up_to_what_it_keeps(self, name, saved):
        """Packed tokens are a mean over heads, as kept ones are everywhere."""
        path, cache = saved(name)
        ours = {layer.layer_idx: layer for layer in cache.memory_report().layers if layer.kind == "compressed"}
        rows = [row for row in layer_rows(inspect_file(path)) if row[1] == "compressed"]
        assert rows
        for layers, _, _, seen, exact, packed, _ in rows:
            layer = ours[int(layers.split("-")[0])]
            assert int(seen) == layer.seen_tokens
            assert int(exact) + int(packed) == pytest.approx(layer.kept_tokens, abs=1)

    @pytest.mark.parametrize("name", list(MAKERS))
    def test_the_bytes_are_those_of_the_file(self, name, saved):
        path, _ = saved(name)
        head, *rows = page_of(path).tables[1]
        end = head.index("bytes")
        names = [row[0] for row in rows]
        numbers = [[int(cell.replace(",", "") or 0) for cell in row[1 : end + 1]] for row in rows]
        assert numbers[-1][-1] == sum(kind.packed_bytes for kind in inspect_file(path).kinds)
        assert numbers[-1] == [sum(column) for column in zip(*numbers[:-1], strict=True)]
        assert names == ["0", "1", *(["shared"] if "shared" in names else []), "all"]
        assert all(sum(row[:-1]) == row[-1] for row in numbers[:2])

    def test_shares_are_those_of_the_loaded_cache(self, saved):
        path, cache = saved("padded")
        for row in range(2):
            masks = [kept_mask(cache, layer)[row] for layer in range(2)]
            share = 100 * torch.cat(masks).double().mean(0)
            shares = page_of(path, row=row).shares
            assert all(shares[place][0] - 0.5 <= share[place] <= shares[place][1] + 0.5 for place in shares)
            assert len(shares) == cache.get_seq_length()
            assert f"What was kept of the prompt of row {row} of 2" in page_of(path, row=row).text

    def test_an_empty_cache(self, tmp_path):
        for name, config in (("none", None), ("some", tiny_config())):
            NexusQuantCache("quant", config=config).save(tmp_path / name)
            assert page_of(tmp_path / name).shares == {}

    def test_nothing_that_a_file_says_is_markup(self, tmp_path):
        path = tmp_path / "<b>&name.safetensors"
        NexusQuantCache("quant").save(path, metadata={"<i>": "</table>\x1b\u202e<script>"})
        page = page_of(path)
        assert ["(<i>)", r"</table>\x1b\u202e<script>"] in page.tables[0]
        assert "<b>&name.safetensors" in page.text
        assert "script" not in page.tags

    def test_the_cache_itself_is_not_overwritten(self, saved):
        path, _ = saved("compressed")
        before = path.read_bytes()
        with pytest.raises(OptionError, match="is the saved cache itself"):
            write_page(path, path)
        assert path.read_bytes() == before

    def test_without_matplotlib(self, saved, monkeypatch):
        path, _ = saved("compressed")
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(UnsupportedError, match=r'needs matplotlib: pip install "nexusquant-cache\[cli\]"'):
            write_page(path, path.with_suffix(".html"))


PROMPT = "<script>alert('1 & 2')</script>\n  日本 🎉 \x1b[31m and &amp; more, to have it long enough: " + "words " * 12


def read_by(tmp_path, texts=(PROMPT,), *, name="cache.safetensors", **options):
    """Save a cache that has seen these texts, and return the file and the ids."""
    ids = torch.tensor([TOKENIZER(text)["input_ids"] for text in texts])
    cache = NexusQuantCache("balanced", config=tiny_config(), **SMALL)
    for layer in range(2):
        feed(cache, *random_states((*ids.shape[:1], 2, ids.shape[1], 16), layer), layer)
    cache.compress()
    cache.save(tmp_path / name, token_ids=ids, **options)
    return tmp_path / name, ids, cache


class TestPrompt:
    def test_it_is_shown_as_it_is_and_coloured_by_what_was_kept(self, tmp_path):
        path, _, cache = read_by(tmp_path, keep_token_ids=True)
        page = page_of(path, tokenizer=TOKENIZER)
        assert "".join(text for _, _, text in page.spans) == PROMPT.replace("\x1b", r"\x1b")
        assert "script" not in page.tags
        counts = torch.cat([kept_mask(cache, layer)[0] for layer in range(2)]).sum(0).tolist()
        said = page.shares
        assert len(said) == len(counts)
        for kind, title, _ in page.spans:
            places, _, percents = title.partition(": ")
            first, _, last = places.partition("-")
            inside = counts[int(first) : int(last or first) + 1]
            least, _, most = percents.removesuffix(" %").partition("-")
            assert (int(least), int(most or least)) == (round(25 * min(inside)), round(25 * max(inside)))
            low, high = (level_of(count, 4) for count in (min(inside), max(inside)))
            assert low <= int(kind[1:]) <= high
        assert len({kind for kind, _, _ in page.spans}) > 1

    def test_a_character_of_several_tokens_is_never_cut(self, tmp_path):
        path, _, _ = read_by(tmp_path, keep_token_ids=True)
        texts = [text for _, _, text in page_of(path, tokenizer=TOKENIZER).spans]
        assert "\ufffd" not in "".join(texts)
        assert any("日" in text for text in texts)

    def test_bytes_that_are_no_character(self):
        """They are shown as what they are decoded to, and the text goes on behind them."""
        ids = TOKENIZER("ab 日")["input_ids"][:-1] + TOKENIZER("cd" * 10)["input_ids"]
        kept = KeptTokens((), torch.ones(len(ids), dtype=torch.int64), 1)
        page = Page(text_html(ids, TOKENIZER, kept))
        assert "".join(text for _, _, text in page.spans) == TOKENIZER.decode(ids)
        assert len(page.shares) == len(ids)

    def test_a_tokenizer_that_drops_the_first_space(self):
        """As those of Llama 2 do; only the first word of the text loses its space."""
        core = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581b": 1, "c": 2}, unk_token="c"))  # noqa: S106 - no password
        core.decoder = decoders.Metaspace()
        kept = KeptTokens((), torch.tensor([1, 0, 1, 0]), 1)
        page = Page(text_html([0, 1, 2, 1], PreTrainedTokenizerFast(tokenizer_object=core), kept))
        assert [text for _, _, text in page.spans] == ["a", " b", "c", " b"]

    def test_a_row_of_a_batch(self, tmp_path):
        texts = ("x" * 60 + "first", "y" * 59 + "second")
        path, ids, _ = read_by(tmp_path, texts, keep_token_ids=True)
        for row, text in enumerate(texts):
            for options in ({}, {"token_ids": ids}):
                page = page_of(path, tokenizer=TOKENIZER, row=row, **options)
                assert "".join(span[2] for span in page.spans) == text

    def test_a_long_prompt_is_a_small_page(self):
        """Where each token differs from the next, and where they are alike."""
        ids = TOKENIZER("word " * 6400)["input_ids"]
        counts = torch.arange(len(ids)) * 37 % 91
        differing = text_html(ids, TOKENIZER, KeptTokens((), counts, 90))
        assert len(ids) == 32_000
        assert len(differing) < 2_000_000
        alike = text_html(ids, TOKENIZER, KeptTokens((), torch.full_like(counts, 45), 90))
        assert len(Page(alike).spans) == 32_000 / 500
        assert "".join(span[2] for span in Page(alike).spans) == "word " * 6400

    def test_token_ids_that_the_file_does_not_hold(self, tmp_path):
        path, ids, _ = read_by(tmp_path)
        with pytest.raises(OptionError, match="does not hold the token ids of its prompt"):
            page_of(path, tokenizer=TOKENIZER)
        page = page_of(path, tokenizer=TOKENIZER, token_ids=ids[0].tolist())
        assert "".join(text for _, _, text in page.spans).startswith("<script>")
        for wrong in (ids[:, :-1], ids.flip(1)):
            with pytest.raises(FormatError, match=r"is of another prompt than these token_ids of shape \[1, \d+\]"):
                page_of(path, tokenizer=TOKENIZER, token_ids=wrong)
        with pytest.raises(OptionError, match="for which a tokenizer is needed"):
            page_of(path, token_ids=ids)

    def test_a_tokenizer_that_does_not_know_them(self, tmp_path):
        path, ids, _ = read_by(tmp_path, name="other")
        NexusQuantCache.load(path, config=tiny_config()).save(path, token_ids=ids + 300, keep_token_ids=True)
        message = r"token ids from \d+ to \d+, and the tokenizer knows 256: give the tokenizer of the model"
        with pytest.raises(OptionError, match=message):
            page_of(path, tokenizer=TOKENIZER)


class TestKeptIds:
    def test_they_come_back(self, tmp_path):
        path, ids, _ = read_by(tmp_path, keep_token_ids=True, metadata={"title": "one"})
        meta = inspect_file(path).meta
        assert unpacked_ids(meta.user[TOKEN_IDS], ids.shape[1]).equal(ids)
        assert meta.user["title"] == "one"
        assert NexusQuantCache.load(path, config=tiny_config(), token_ids=ids).get_seq_length() == ids.shape[1]

    def test_only_if_that_is_asked(self, tmp_path):
        path, _, _ = read_by(tmp_path)
        assert inspect_file(path).meta.user == {}

    def test_inspect_says_that_they_are_there(self, tmp_path):
        path, _, _ = read_by(tmp_path, keep_token_ids=True)
        shown = CliRunner().invoke(app, ["inspect", str(path)]).stdout
        assert "with its token ids" in " ".join(shown.split())
        assert TOKEN_IDS not in shown

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "keeps the token_ids that save is given"),
            ({"token_ids": [1, 2]}, r"token_ids are \[1, 2\], the cache has seen \[1, 0\]"),
            ({"token_ids": torch.zeros(1, 0, dtype=torch.int64), "metadata": {TOKEN_IDS: ""}}, "choose another name"),
            ({"token_ids": torch.zeros(1, 0, 1, dtype=torch.int64)}, "token_ids must be integers"),
        ],
    )
    def test_what_cannot_be_kept(self, options, message, tmp_path):
        with pytest.raises(OptionError, match=message):
            NexusQuantCache("quant").save(tmp_path / "cache", keep_token_ids=True, **options)
        assert not (tmp_path / "cache").exists()

    def test_their_name_is_kept_free(self, tmp_path):
        with pytest.raises(OptionError, match="choose another name"):
            NexusQuantCache("quant").save(tmp_path / "cache", metadata={TOKEN_IDS: "mine"})

    def test_there_is_an_end(self):
        ids = torch.randint(1 << 30, (300_000,), generator=torch.Generator().manual_seed(0))
        with pytest.raises(OptionError, match=r"would take 1,\d{3},\d{3} bytes.*write_page"):
            with_token_ids(None, ids)

    def test_ids_of_a_prompt_that_is_more_than_ids(self, tmp_path):
        cache, ids, image = NexusQuantCache("quant"), torch.arange(97, 101)[None], {"pixel_values": torch.ones(3)}
        cache.update(torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), 0)
        cache.save(tmp_path / "cache", token_ids=ids, besides=image)
        given = {"tokenizer": TOKENIZER, "token_ids": ids}
        page = page_of(tmp_path / "cache", besides=image, **given)
        assert "".join(text for _, _, text in page.spans) == TOKENIZER.decode(ids[0])
        with pytest.raises(FormatError, match="besides= as for save"):
            page_of(tmp_path / "cache", **given)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("???", "cannot be read"),
            ("YWJj", "cannot be read"),
            (packed_ids(torch.arange(5)), "are not those of 1 rows of 4 tokens"),
        ],
    )
    def test_texts_that_hold_none(self, text, message):
        with pytest.raises(FormatError, match=message):
            unpacked_ids(text, 4)


class TestCommand:
    def run(self, *arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def test_with_a_tokenizer(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(app_module, "load_tokenizer", lambda name: asked.append(name) or TOKENIZER)
        path, _, _ = read_by(tmp_path, keep_token_ids=True)
        for name in ("a/folder", "SmolLM2-135M-Instruct"):
            outcome = self.run("inspect", path, "--html", tmp_path / "page.html", "--tokenizer", name)
            assert outcome.exit_code == 0, outcome.output
        assert asked == ["a/folder", None]
        assert "alert('1 & 2')" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text

    def test_a_tokenizer_from_a_folder(self, tmp_path):
        TOKENIZER.save_pretrained(tmp_path / "model")
        path, _, _ = read_by(tmp_path, keep_token_ids=True)
        outcome = self.run("inspect", path, "--html", tmp_path / "page.html", "--tokenizer", tmp_path / "model")
        assert outcome.exit_code == 0, outcome.output
        assert "alert('1 & 2')" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text

    def test_what_cannot_be_done(self, tmp_path):
        path, _, _ = read_by(tmp_path)
        (tmp_path / "empty").mkdir()
        page = tmp_path / "page.html"
        for arguments, message in (
            ((path, "--tokenizer", "x"), "--tokenizer and --row are for a page: give --html PAGE, too"),
            ((path, "--row", 1), "give --html PAGE, too"),
            ((tmp_path, "--html", page), "is a folder: give one of its files"),
            ((path, "--html", tmp_path / "no" / "page"), "it must be a file in a folder that exists"),
            ((path, "--html", path), "is the saved cache itself"),
            ((path, "--html", page, "--row", 1), "has 1 row: row must be from 0 to 0, got 1"),
            ((path, "--html", page, "--tokenizer", tmp_path / "empty"), "cannot load the tokenizer of"),
            ((path, "--html", page, "--tokenizer", tmp_path / "none"), "there is no such folder"),
        ):
            outcome = self.run("inspect", *arguments)
            assert outcome.exit_code == 2
            assert message in outcome.stderr
            assert not page.exists()
