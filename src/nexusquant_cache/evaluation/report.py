"""The report: one HTML page that needs nothing else, and its pictures as PNG files."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nexusquant_cache.evaluation.caches import PLAIN
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.intervals import Interval
from nexusquant_cache.evaluation.kinds import KINDS
from nexusquant_cache.evaluation.summary import LOST, CacheSummary, FactSummary, Recall, fact_summaries, summaries
from nexusquant_cache.pages.elements import details, figure, page, table, why_no_pictures

_MEBIBYTE = 2**20
_PAGE = "report.html"
_LEAD = "Every cache against the plain one, and against the bytes it really holds."
_MEANINGS = {
    "kept": "Part of the seen tokens that are still in the cache; the others were evicted.",
    "MiB held, factor": (
        "Bytes of all tensors that the cache holds once the prompt is compressed (codes, scales, means, positions, "
        "exact tokens, unused room), and how many times less that is than a plain cache in 16 bit. A plain cache is "
        "counted in 16 bit, whatever the model runs in."
    ),
    "dPPL, %": (
        "Change of the perplexity of the text's continuation when the model reads it through the cache instead of "
        "the plain one. 0 is no change, above 0 is worse. Texts weigh the same (geometric mean)."
    ),
    "KL, nats": (
        "Kullback-Leibler divergence KL(plain || cache) of the predicted next token, averaged over the continuation. 0 "
        "is the same prediction. It sees changes that the perplexity averages away."
    ),
    "top-1, %": "How often the most likely next token is the plain cache's.",
    "single": "Needles found: one made-up number hidden in a real text; the question repeats its words.",
    "multikey": "Three facts of the same form about three places; one is asked for, and another's does not count.",
    "two_part": "One sentence with two numbers; both are asked for, so a longer span has to survive as a whole.",
    "paraphrase": "The question shares no word but a name with the hidden fact.",
    "later": "The text is read and compressed first; the question comes in a later turn; nothing can prepare for it.",
    "facts": (
        "Facts in ordinary words hidden in a text, and passages of the text itself, asked for at the end of the prompt "
        "or in a later turn, when the text has been compressed. Given: the mean log probability of the true answer's "
        f"tokens against the plain cache's, in nats per token; lost: more than {LOST} below it; found: a greedy answer "
        "with the same beginning contains it. Absent: plain without the facts, which shows what can be guessed."
    ),
    "seconds": "Mean time to prepare and compress the cache, on the machine below, whatever else it was doing.",
    "intervals": (
        "95 % confidence intervals, in small print: over texts by Student's t, of recall by Wilson's score. Windows "
        "of one book are not quite independent, so take them as lower bounds. Compare recall with the plain cache's: "
        "what it does not find is no loss of the others."
    ),
}


def check_plots() -> None:
    """Make sure that pictures can be drawn.

    Raises:
        EvaluationError: If matplotlib is missing.
    """
    missing = why_no_pictures("the report")
    if missing:
        raise EvaluationError(missing)


def write_report(content: Mapping[str, Any], folder: Path) -> Path:
    """Write the report of results: ``report.html``, which needs no other file, and its pictures as PNG files.

    Args:
        content: What `evaluate` returned, or `read_json` of its file.
        folder: Where to; made if it is not there.

    Returns:
        The page.

    Raises:
        EvaluationError: If matplotlib is missing, or there are no results.
    """
    check_plots()
    rows = summaries(content)
    if not rows:
        msg = "there are no results to report yet"
        raise EvaluationError(msg)
    from nexusquant_cache.evaluation.plots import pictures  # noqa: PLC0415 - matplotlib is optional
    from nexusquant_cache.pages.pictures import save_png, svg_of  # noqa: PLC0415 - as above

    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for picture in pictures(content, rows, measured_on(content, rows)):
        save_png(picture.figure, folder / f"{picture.name}.png")
        figures.append(figure(svg_of(picture.figure, picture.name), picture.caption))
    path = folder / _PAGE
    path.write_text(_page(content, rows, figures), encoding="utf-8")
    return path


def measured_on(content: Mapping[str, Any], rows: Sequence[CacheSummary]) -> str:
    """Return on what results were measured, in a line."""
    settings = content["settings"]
    recall = rows[0].all_recall
    needles = f", {recall.asked} needles" if recall else ""
    return f"{settings['model']}, {rows[0].quality.texts} texts of {settings['prefix']:,} tokens{needles}"


def _page(content: Mapping[str, Any], rows: Sequence[CacheSummary], figures: Iterable[str]) -> str:
    title = f"KV caches of {content['settings']['model']}"
    kinds = list(rows[0].recall)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(measured_on(content, rows))}. {_LEAD}</p>',
        "<h2>Results</h2>",
        _quality_table(rows),
        *([_recall_table(rows, kinds)] if kinds else []),
        *_fact_tables(content),
        *figures,
        "<h2>What each number means</h2>",
        _meanings([*kinds, *(["facts"] if content.get("facts") else [])]),
        *_lost_part(content),
        "<h2>Settings</h2>",
        _words_table(content["settings"]),
        *(details(f"cache {name}", _words_table(given)) for name, given in content["caches"].items()),
        "<h2>Environment</h2>",
        _words_table(content["environment"]),
    ]
    return page(title, parts)


def _quality_table(rows: Sequence[CacheSummary]) -> str:
    head = ("cache", "kept", "MiB held", "factor", "dPPL, %", "KL, nats", "top-1, %", "seconds")
    return table(head, (_quality_cells(row) for row in rows))


def _quality_cells(row: CacheSummary) -> list[str]:
    quality = row.quality
    plain = row.name == PLAIN
    return [
        f"<strong>{escape(row.name)}</strong>",
        f"{100 * row.kept_tokens / row.seen_tokens:.0f} %",
        f"{quality.held_bytes / _MEBIBYTE:.2f}",
        f"{quality.compression_factor:.1f}x",
        "0" if plain else _with_interval(quality.dppl_percent, "+.1f"),
        "0" if plain else _with_interval(quality.kl, ".4f"),
        "100" if plain else _with_interval(quality.top1.map(lambda part: 100 * part), ".1f"),
        _with_interval(row.compress_seconds, ".2f") if row.compress_seconds else "",
    ]


def _recall_table(rows: Sequence[CacheSummary], kinds: Sequence[str]) -> str:
    lines = (
        [
            f"<strong>{escape(row.name)}</strong>",
            *(_recall_cell(row.recall.get(kind)) for kind in kinds),
            _recall_cell(row.all_recall),
        ]
        for row in rows
    )
    return table(("needles found", *kinds, "all"), lines)


def _with_interval(value: Interval, spec: str) -> str:
    mean = f"{value.mean:{spec}}"
    return f"{mean}<small>{value.low:{spec}} to {value.high:{spec}}</small>" if math.isfinite(value.low) else mean


def _recall_cell(recall: Recall | None) -> str:
    if recall is None:
        return ""
    rate = recall.rate
    return f"{recall.found} of {recall.asked}<small>{100 * rate.low:.0f} to {100 * rate.high:.0f} %</small>"


def _fact_tables(content: Mapping[str, Any]) -> list[str]:
    facts = fact_summaries(content)
    if not facts:
        return []
    keys = list(facts[PLAIN])
    head = ("facts", *(f"{what}, {place}" for what, place in keys))
    lines = (
        [f"<strong>{escape(name)}</strong>", *(_fact_cell(groups.get(key)) for key in keys)]
        for name, groups in facts.items()
    )
    return [table(head, lines)]


def _fact_cell(fact: FactSummary | None) -> str:
    if fact is None:
        return ""
    return f"{_with_interval(fact.against_plain, '+.2f')}<br>of {fact.asked}: {fact.lost} lost, {fact.found} found"


def _meanings(kinds: Sequence[str]) -> str:
    left_out = {*KINDS, "facts"} - set(kinds)
    entries = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _MEANINGS.items() if k not in left_out)
    return f"<dl>{''.join(entries)}</dl>"


def _lost_part(content: Mapping[str, Any]) -> list[str]:
    """Return the answers that missed their needle, to be looked at: a number cut short says more than a miss."""
    lost = [row for row in content["needles"] if not row["found"]]
    if not lost:
        return []
    lines = (
        [escape(text) for text in (row["cache"], row["task"], ", ".join(row["expected"]), row["answer"])]
        for row in lost
    )
    answers = table(("cache", "needle", "expected", "answer"), lines, words=True)
    return ["<h2>Needles lost</h2>", details(f"{len(lost)} answers", answers)]


def _words_table(given: Mapping[str, Any]) -> str:
    lines = ([escape(str(key)), f"<code>{escape(_shown(value))}</code>"] for key, value in given.items())
    return table(("", ""), lines, words=True) if given else '<p class="soft">No settings given.</p>'


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
