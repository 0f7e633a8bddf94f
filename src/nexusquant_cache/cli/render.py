"""Results as text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from nexusquant_cache.evaluation.bench import BenchResult
from nexusquant_cache.evaluation.caches import PLAIN
from nexusquant_cache.evaluation.demo import DemoResult, DemoRow
from nexusquant_cache.evaluation.fit import Fit
from nexusquant_cache.evaluation.intervals import Interval
from nexusquant_cache.evaluation.summary import CacheSummary, FactSummary, fact_summaries, summaries

_MEBIBYTE = 2**20
_GIBIBYTE = 2**30
_NONE = "-"
_ANSWER_WIDTH = 76
_COLUMNS = ("cache", "seen", "kept", "MiB", "factor", "dPPL %", "KL", "top-1 %", "needle", "ms/token", "x plain")


def demo_renderables(result: DemoResult) -> Iterator[RenderableType]:
    """Yield the demo's table, the answers if it asked for the fact, and what to make of it."""
    yield Text(f"{result.model} read {result.rows[0].footprint.seen_tokens:,} tokens of {result.text}.")
    yield _table(result.rows)
    yield Text(
        "MiB: all tensors the cache holds once the text is read; plain counted in 16 bit. dPPL, KL (nats), "
        f"top-1: against plain, on the next {result.options.predictions} tokens of the text.",
        style="dim",
    )
    if any(row.needle for row in result.rows):
        yield Text(f"\nHidden fact: {result.needle.sentences[0]}\nQuestion:    {result.needle.question}")
        yield _answers(result.rows)
    yield Text(f"\n{_verdict(result.rows)}", style="bold")


def _verdict(rows: tuple[DemoRow, ...]) -> str:
    """Return in a sentence or two what the demo has shown."""
    plain, *presets = rows
    found = [row for row in presets if row.needle is None or row.needle.found]
    shown = ""
    if plain.needle is not None:
        if not plain.needle.found:
            shown = "the model misses the fact even with the plain cache, so answers compare nothing. "
            found = presets
        else:
            lost = [row.name for row in presets if row not in found]
            shown = f"{len(found)} of {len(presets)} presets find the fact"
            shown += f"; lost by {', '.join(lost)}. " if lost else ". "
    if not found:
        return f"Verdict: {shown.rstrip()}"
    best = max(found, key=lambda row: row.footprint.compression_factor)
    shown += f"{best.name}: {best.footprint.compression_factor:.1f}x smaller"
    shown += f", perplexity {_signed(best.quality.dppl_percent)} %"
    shown += f", {best.time.relative:.2f}x the time per token" if best.time is not None else ""
    return f"Verdict: {shown}."


def evaluation_renderables(content: Mapping[str, Any], page: Path) -> Iterator[RenderableType]:
    """Yield the evaluation's tables, and where the report is."""
    rows = summaries(content)
    yield Text(f"{content['settings']['model']}, {rows[0].quality.texts} texts; 95 % intervals in brackets.")
    table = _empty_table(("cache", "kept", "MiB", "factor", "dPPL %", "KL", "top-1 %", "s"))
    for row in rows:
        table.add_row(*_quality_cells(row))
    yield table
    kinds = list(rows[0].recall)
    if kinds:
        yield Text("Needles found, by kind:")
        table = _empty_table(("cache", *kinds))
        for row in rows:
            table.add_row(row.name, *(f"{found.found} of {found.asked}" for found in row.recall.values()))
        yield table
    facts = fact_summaries(content)
    if facts:
        yield Text("Facts: nats per token against plain, answers lost, answers found; q: questions:")
        keys = list(facts[PLAIN])
        asked = (facts[PLAIN][key].asked for key in keys)
        table = _empty_table(
            ("cache", *(f"{what}, {place}, {q} q" for (what, place), q in zip(keys, asked, strict=True)))
        )
        for name, groups in facts.items():
            table.add_row(name, *(_fact_cell(groups.get(key)) for key in keys))
        yield table
    yield Text(f"Report: {page}")


def bench_renderables(result: BenchResult) -> Iterator[RenderableType]:
    """Yield the table of times, and what was left out."""
    yield Text(f"{result.model} in {result.dtype} read {result.options.tokens:,} tokens of {result.text}.")
    table = _empty_table(("cache", "MiB", "factor", "ms/token", "x plain", "x CPU", "s to compress"))
    for row in result.rows:
        held = row.footprint
        table.add_row(
            row.name,
            f"{held.held_bytes / _MEBIBYTE:.2f}" if held else _NONE,
            f"{held.compression_factor:.1f}x" if held else _NONE,
            f"{row.time.milliseconds:.1f}",
            f"{row.time.relative:.2f}x",
            f"{row.time.relative_cpu:.2f}x",
            f"{row.compress_seconds:.2f}" if row.compress_seconds is not None else _NONE,
        )
    yield table
    yield Text(
        f"Medians of {result.options.rounds} rounds of {result.options.steps} tokens, all caches in turn. x CPU: "
        "processor time of all threads. MiB: all tensors held once the text is read; plain counted in 16 bit.",
        style="dim",
    )
    for name, why in result.left_out.items():
        yield Text(f"Left out: {name}: {why}", style="dim")


def fit_renderables(name: str, tokens: int, batch: int, rows: Sequence[Fit]) -> Iterator[RenderableType]:
    """Yield the table of bytes."""
    prompts = f"{batch} prompts" if batch > 1 else "a prompt"
    yield Text(f"The cache of {name} with {prompts} of {tokens:,} tokens, in 16 bit; the weights come besides.")
    table = _empty_table(("cache", "GiB", "factor", "GiB while reading"))
    for row in rows:
        table.add_row(
            row.name,
            f"{row.held_bytes / _GIBIBYTE:.3f}",
            f"{rows[0].held_bytes / row.held_bytes:.1f}x",
            f"{row.reading_bytes / _GIBIBYTE:.3f}",
        )
    yield table


def _quality_cells(row: CacheSummary) -> Iterator[str]:
    quality = row.quality
    plain = row.name == PLAIN
    yield row.name
    yield f"{100 * row.kept_tokens / row.seen_tokens:.0f} %"
    yield f"{quality.held_bytes / _MEBIBYTE:.2f}"
    yield f"{quality.compression_factor:.1f}x"
    yield "0" if plain else _with_interval(quality.dppl_percent, "+.1f")
    yield "0" if plain else _with_interval(quality.kl, ".3f")
    yield "100" if plain else f"{100 * quality.top1.mean:.1f}"
    yield f"{row.compress_seconds.mean:.2f}" if row.compress_seconds else _NONE


def _fact_cell(fact: FactSummary | None) -> str:
    if fact is None:
        return _NONE
    return f"{fact.against_plain.mean:+.2f} {fact.lost:>3} {fact.found:>3}"


def _with_interval(value: Interval, spec: str) -> str:
    mean = f"{value.mean:{spec}}"
    return f"{mean} ({value.low:{spec}}, {value.high:{spec}})" if math.isfinite(value.low) else mean


def _table(rows: tuple[DemoRow, ...]) -> Table:
    table = _empty_table(_COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _empty_table(columns: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in {"cache", "needle"} else "right", no_wrap=True)
    return table


def _cells(row: DemoRow) -> Iterator[RenderableType]:
    quality, held = row.quality, row.footprint
    yield row.name
    yield f"{held.seen_tokens:,}"
    yield f"{held.kept_tokens:,}"
    yield f"{held.held_bytes / _MEBIBYTE:.2f}"
    yield f"{held.compression_factor:.1f}x"
    yield _signed(quality.dppl_percent)
    yield f"{quality.kl:.4f}"
    yield f"{100 * quality.top1:.1f}"
    if row.needle is None:
        yield _NONE
    else:
        yield Text("found", style="green") if row.needle.found else Text("lost", style="red")
    yield f"{row.time.milliseconds:.0f}" if row.time else _NONE
    yield f"{row.time.relative:.2f}x" if row.time else _NONE


def _signed(percent: float) -> str:
    return f"{percent:+.1f}" if math.isfinite(percent) else str(percent)


def _answers(rows: tuple[DemoRow, ...]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for row in rows:
        if row.needle is not None:
            answer = Text(" ".join(row.needle.answer.split()))
            answer.truncate(_ANSWER_WIDTH, overflow="ellipsis")
            table.add_row(row.name, answer)
    return table
