"""Put the results into the README and the docs, so that no number there is typed by hand.

Between ``<!-- table:quality -->`` and ``<!-- /table -->`` (or another name of `TABLES`, and any of them with a
result file's name as in ``table:speed speed_cuda``) this script writes the table of the result file.

python benchmarks/tables.py            write
python benchmarks/tables.py --check    fail if a table is not what the results say
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from nexusquant_cache.evaluation import fact_summaries, summaries
from nexusquant_cache.evaluation.presets import AGAIN
from nexusquant_cache.evaluation.summary import fact_kinds
from nexusquant_cache.presets import with_alias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from nexusquant_cache.evaluation import CacheSummary, FactSummary
    from nexusquant_cache.evaluation.intervals import Interval
    from nexusquant_cache.evaluation.summary import Recall

ROOT = Path(__file__).resolve().parent.parent
_MEBIBYTE = 2**20
_QUALITY = ("kept", "MiB held", "factor", "dPPL, %", "KL, nats", "top-1, %", "found", "found, asked later")
_BLOCK = re.compile(r"(<!-- table:(\w+)(?: (\w+))? -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def quality_table(content: dict[str, Any]) -> str:
    """Return quality and recall of every cache."""
    return markdown(("cache", *_QUALITY), (_quality_row(row) for row in summaries(content)))


def _quality_row(row: CacheSummary) -> tuple[str, ...]:
    variant, _, name = row.name.rpartition("@")
    names = {
        "predecessor": f"predecessor's recipe, bytes of `{name}`",
        "principal": f"`{name}`, principal axes",
        "again": f"`{name}`, read twice",
    }
    return (names.get(variant, _cache_name(row.name)), *_quality_cells(row))


def _cache_name(name: str) -> str:
    return "plain, 16 bit" if name == "plain" else f"`{name}`"


def _quality_cells(row: CacheSummary) -> tuple[str, ...]:
    quality = row.quality
    plain = row.name == "plain"
    return (
        f"{100 * row.kept_tokens / row.seen_tokens:.0f} %",
        f"{quality.held_bytes / _MEBIBYTE:.2f}",
        f"{quality.compression_factor:.1f}x",
        "0" if plain else _with_interval(quality.dppl_percent, "+.1f"),
        "0" if plain else _with_interval(quality.kl, ".3f"),
        "100" if plain else f"{100 * quality.top1.mean:.1f}",
        *_found_cells(row),
    )


def _found_cells(row: CacheSummary) -> tuple[str, str]:
    """Return the needles found: those asked for in the prompt, and those asked for in a later turn."""
    return (
        _found(part for kind, part in row.recall.items() if kind != "later"),
        _found(part for kind, part in row.recall.items() if kind == "later"),
    )


def _found(parts: Iterable[Recall]) -> str:
    given = list(parts)
    return f"{sum(part.found for part in given)} of {sum(part.asked for part in given)}" if given else ""


def _with_interval(value: Interval, spec: str) -> str:
    bounds = f"{value.low:{spec}} to {value.high:{spec}}"
    return f"{value.mean:{spec}} ({bounds})" if value.low == value.low else f"{value.mean:{spec}}"


def facts_table(content: dict[str, Any]) -> str:
    """Return what became of facts in every cache, by what is asked for and where, beside bytes and predictions."""
    predictions = {row.name: row for row in summaries(content)}
    facts = fact_summaries(content)
    keys = list(facts["plain"])
    head = ("cache", "factor", "dPPL, %", "KL, nats")
    rows = (
        (
            _FACTLESS if name == "absent" else _cache_name(name),
            *_brief_cells(predictions.get(name)),
            *(_fact_cell(groups.get(key)) for key in keys),
        )
        for name, groups in facts.items()
    )
    return markdown((*head, *(f"{what}, {_PLACES[place]}" for what, place in keys)), rows)


def fact_kinds_table(content: dict[str, Any]) -> str:
    """Return how many facts of each kind every cache loses, asked for in a later turn."""
    kinds = fact_kinds(content, "later")
    head = list(kinds["plain"])
    rows = (
        (
            _FACTLESS if name == "absent" else _cache_name(name),
            *(f"{groups[kind].lost} of {groups[kind].asked}" if kind in groups else "" for kind in head),
        )
        for name, groups in kinds.items()
    )
    return markdown(("lost", *head), rows)


_FACTLESS = "plain, facts absent"
_PLACES = {"prompt": "in the prompt", "later": "later"}


def _brief_cells(row: CacheSummary | None) -> tuple[str, ...]:
    if row is None:
        return ("",) * 3
    quality = row.quality
    return (
        f"{quality.compression_factor:.1f}x",
        "0" if row.name == "plain" else f"{quality.dppl_percent.mean:+.1f}",
        "0" if row.name == "plain" else f"{quality.kl.mean:.3f}",
    )


def _fact_cell(fact: FactSummary | None) -> str:
    if fact is None:
        return ""
    return f"{_with_interval(fact.against_plain, '+.2f')}; {fact.lost} lost, {fact.found} found of {fact.asked}"


def peers_table(content: dict[str, Any]) -> str:
    """Return quality and recall of every peer, and what a package's cache really holds if that is not what is shown."""
    head = ("cache", *_QUALITY, "MiB, else")
    rows = ((_cache_name(row.name), *_quality_cells(row), _else(row.name, content)) for row in summaries(content))
    return markdown(head, rows)


def _else(name: str, content: dict[str, Any]) -> str:
    """Return the bytes of a cache if counted otherwise: those really held, or those held in a 16-bit model."""
    given = content["holdings"].get(name)
    if given is None:
        return ""
    counts = {"really held": given["stored_bytes"], "in a 16-bit model": given["half_bytes"]}
    return ", ".join(f"{n / _MEBIBYTE:.2f} {what}" for what, n in counts.items() if n != given["held_bytes"])


def ablations_table(content: dict[str, Any]) -> str:
    """Return the quality and the recall of one changed choice after the other."""
    head = ("choice", "MiB held", "factor", "dPPL, %", "KL, nats", "top-1, %", *_QUALITY[-2:])
    rows = (
        (
            row.name,
            f"{row.quality.held_bytes / _MEBIBYTE:.2f}",
            f"{row.quality.compression_factor:.2f}x",
            f"{row.quality.dppl_percent.mean:+.1f}",
            _with_interval(row.quality.kl, ".4f"),
            f"{100 * row.quality.top1.mean:.1f}",
            *_found_cells(row),
        )
        for row in summaries(content)
        if row.name != "plain"
    )
    return markdown(head, rows)


def levels_table(content: dict[str, Any]) -> str:
    """Return the distortion of every level table tried; the best of a rate is the one in use, or nearly."""
    head = ("bits", "step", "offset", "unit", "distortion")
    rows = (
        [str(row["bits"]), str(row["step"]), str(row["offset"]), f"{row['unit']:.3e}", f"{row['distortion']:.5f}"]
        for row in content["rows"]
    )
    return markdown(head, rows)


def memory_table(content: dict[str, Any]) -> str:
    """Return the compression factor of every preset by prompt length and head dimension."""
    cells = {(r["preset"], r["head_dim"], r["tokens"]): r["compression_factor"] for r in content["rows"]}
    cases = sorted({(dim, tokens) for _, dim, tokens in cells})
    head = ("preset", *(f"{tokens:,} tokens, head_dim {dim}" for dim, tokens in cases))
    presets = dict.fromkeys(row["preset"] for row in content["rows"])
    return markdown(head, ((f"`{name}`", *(f"{cells[(name, *case)]:.1f}x" for case in cases)) for name in presets))


def presets_table(content: dict[str, Any]) -> str:
    """Return what every preset holds, loses and takes, from several result files."""
    held = {
        (row["preset"], row["tokens"]): row["compression_factor"] for row in content["rows"] if row["head_dim"] == _WIDE
    }
    measured = _result("facts_smollm2")
    lost, facts = {row.name: row.quality for row in summaries(measured)}, fact_summaries(measured)
    times = {row["cache"]: row["relative"] for row in _result("speed_cpu")["rows"]}
    rows = []
    for name in dict.fromkeys(row["preset"] for row in content["rows"]):
        factors = [f"{held[name, tokens]:.1f}x" for tokens in _SHOWN_LENGTHS]
        for measured_as, how in ((name, ""), (AGAIN + name, ", read twice")):
            if measured_as in lost:
                quality = lost[measured_as]
                shown = f"{quality.dppl_percent.mean:+.1f} %", f"{quality.kl.mean:.3f}"
                asked = [_lost_facts(facts.get(measured_as, {}), place) for place in _PLACES]
                rows.append((_both_names(name) + how, *factors, *shown, *asked, f"{times[name]:.2f}x"))
    lengths = (f"smaller, {tokens // 1024}k tokens" for tokens in _SHOWN_LENGTHS)
    places = (f"facts lost, asked {where}" for where in _PLACES.values())
    return markdown(("preset", *lengths, "perplexity", "KL, nats", *places, "time per token"), rows)


def _both_names(preset: str) -> str:
    """Return alias and name as the documents for newcomers show them."""
    return re.sub(r"[\w-]+", r"`\g<0>`", with_alias(preset))


_WIDE = 128
_SHOWN_LENGTHS = (4096, 32_768)


def _lost_facts(groups: dict[tuple[str, str], FactSummary], place: str) -> str:
    facts = [fact for (_, where), fact in groups.items() if where == place]
    return f"{sum(fact.lost for fact in facts)} of {sum(fact.asked for fact in facts)}" if facts else ""


def _result(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def fit_table(content: dict[str, Any]) -> str:
    """Return the GiB that every cache holds, by model and length; while it is read, if layers are compressed early."""
    cells = {(row["model"], row["tokens"], row["name"]): row for row in content["rows"]}
    names = dict.fromkeys(row["name"] for row in content["rows"])
    cases = dict.fromkeys((row["model"], row["tokens"]) for row in content["rows"])
    rows = (
        (model, f"{tokens:,}", *(_fit_cell(cells[model, tokens, name]) for name in names)) for model, tokens in cases
    )
    return markdown(("model", "tokens", *("plain" if name == "plain" else _both_names(name) for name in names)), rows)


def _fit_cell(row: dict[str, Any]) -> str:
    held = f"{row['held_bytes'] / 2**30:.2f}"
    return held if row["name"] == "plain" else f"{held} ({row['reading_bytes'] / 2**30:.2f})"


def speed_table(content: dict[str, Any]) -> str:
    """Return time per generated token, and speed of encoding."""
    where = content["environment"]
    head = (f"cache ({where['cpu']})", "ms per token", "times plain", "in CPU seconds", "encoded tokens per s")
    table = [
        (
            "plain" if row["cache"] == "plain" else f"`{row['cache']}`",
            f"{row['milliseconds']:.0f}",
            f"{row['relative']:.2f}x",
            f"{row['relative_cpu']:.2f}x",
            f"{row['encode_tokens_per_s']:,.0f}" if row["encode_tokens_per_s"] else "",
        )
        for row in content["rows"]
    ]
    return markdown(head, table)


def reading_table(content: dict[str, Any]) -> str:
    """Return what a prefill takes through each cache, the first step after it included in the ratios."""
    head = ("cache", "reading, s", "first step, s", "both, times plain", "in CPU seconds")
    rows = (
        (
            row["cache"],
            f"{row['read_seconds']:.1f}",
            f"{row['step_seconds']:.2f}",
            f"{row['relative_seconds']:.2f}x",
            f"{row['relative_cpu_seconds']:.2f}x",
        )
        for row in content["rows"]
    )
    return markdown(head, rows)


def step_profile_table(content: dict[str, Any]) -> str:
    """Return where the time of a step goes, for each layer."""
    head = ("cache", "step, ms", "attention, ms a layer", "update, ms a layer", "of both, compiled", "around it")
    rows = (
        (
            _cache_name(row["cache"]) if row["cache"] != "plain" else "plain",
            f"{row['step']:.0f}",
            f"{row['attention']:.2f}",
            f"{row['update']:.2f}",
            *((f"{row['compiled']:.2f}", f"{row['around']:.2f}") if "around" in row else ("", "")),
        )
        for row in content["rows"]
    )
    return markdown(head, rows)


def states_table(content: dict[str, Any]) -> str:
    """Return what states add to the calls around an attention, and what those take."""
    head = ("attention", "added, microseconds", "with states", "with plain tensors", "of that, attention")
    rows = (
        (
            row["case"],
            f"{row['microseconds']:.0f}",
            *(f"{row['calls'][name]:.0f}" if name in row["calls"] else "" for name in _STATES),
        )
        for row in content["rows"]
    )
    return markdown(head, rows)


_STATES = ("states", "plain", "plain_attention")


def instructions_table(content: dict[str, Any]) -> str:
    """Return instructions, registers and the modelled bound of every compiled kernel."""
    head = ("kernel", "sm", "instructions", "budget", "registers", "stack, bytes", "bound on an H200, modelled")
    rows = (
        (
            row["kernel"],
            str(row["capability"]),
            f"{row['instructions']:.1f}",
            f"{row['budget']:.1f}",
            str(row["registers"]),
            str(row["stack_bytes"]),
            f"{row['modelled_h200']['bound']:.1f}x" if row["modelled_h200"].get("bound") else "",
        )
        for row in content["rows"]
    )
    return markdown(head, rows)


def eviction_table(content: dict[str, Any]) -> str:
    """Return what each rule of eviction costs by itself, at one number of kept tokens after the other."""
    whats = (
        f"{x['what']} {'found' if x['what'] == 'numbers' else 'lost'}, "
        f"{'later' if x['place'] == 'later' else 'in the prompt'}"
        for x in content["rows"][0]["answers"]
    )
    changes = ("log probability of facts, later", "of numbers, in the prompt")
    head = ("kept", "rule", "KL, nats", *whats, *changes)
    rows = sorted(content["rows"], key=lambda row: -row["ratio"])
    return markdown(head, (_eviction_cells(row) for row in rows))


def _eviction_cells(row: dict[str, Any]) -> list[str]:
    means = {(x["what"], x["place"]): f"{x['log_prob']['mean']:+.2f}" for x in row["answers"]}
    counts = (f"{x['found' if x['what'] == 'numbers' else 'lost']} of {x['asked']}" for x in row["answers"])
    kept, moved = f"{100 * row['ratio']:.0f} %", f"{row['kl']['mean']:.3f}"
    return [kept, row["rule"], moved, *counts, means["facts", "later"], means["numbers", "prompt"]]


def chunks_table(content: dict[str, Any]) -> str:
    """Return what it costs to read a prompt in pieces."""
    cells = {(row["preset"], row["schedule"]): row for row in content["rows"]}
    schedules = dict.fromkeys(row["schedule"] for row in content["rows"])
    rows = (
        (
            f"`{preset}`",
            *(
                f"{cells[preset, schedule]['dppl_percent']['mean']:+.1f} / {cells[preset, schedule]['kl']['mean']:.4f}"
                for schedule in schedules
            ),
        )
        for preset in dict.fromkeys(row["preset"] for row in content["rows"])
    )
    return markdown(("dPPL, % / KL, nats", *schedules), rows)


def prefill_table(content: dict[str, Any]) -> str:
    """Return the peaks of every schedule by prompt length, in MiB: of the cache, and of all tensors."""
    cells = {(row["schedule"], row["tokens"]): row for row in content["rows"]}
    lengths = sorted({tokens for _, tokens in cells})
    head = ("schedule", *(f"{tokens:,} tokens" for tokens in lengths))
    schedules = dict.fromkeys(row["schedule"] for row in content["rows"])
    return markdown(
        head,
        (
            (
                name,
                *(
                    f"{cell['cache_peak_bytes'] / _MEBIBYTE:.0f} / {cell['peak_bytes'] / _MEBIBYTE:.0f}"
                    for cell in (cells[name, tokens] for tokens in lengths)
                ),
            )
            for name in schedules
        ),
    )


def long_answer_table(content: dict[str, Any]) -> str:
    """Return time and bytes of a long answer at its beginning, in its middle and at its end."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault(row["cache"], []).append(row)
    head = ("cache", "tokens seen", "kept", "MiB held", "bits per channel of new tokens", "ms per token", "times plain")
    lines = []
    for name, rows in groups.items():
        picked = sorted({0, len(rows) // 2, len(rows) - 1})
        for index in picked:
            row, plain = rows[index], groups["plain"][index]
            lines.append(
                (
                    "plain" if name == "plain" else f"`{name}`",
                    f"{row['seen_tokens']:,}",
                    f"{row['kept_tokens']:,}",
                    f"{row['held_bytes'] / _MEBIBYTE:.2f}" if row["held_bytes"] else "",
                    _new_bits(rows[0], row, content) if row["held_bytes"] and index else "",
                    f"{row['mean_ms']:.0f}",
                    f"{row['mean_ms'] / plain['mean_ms']:.2f}x",
                )
            )
    return markdown(head, lines)


def _new_bits(first: dict[str, Any], row: dict[str, Any], content: dict[str, Any]) -> str:
    grown = row["held_bytes"] - first["held_bytes"]
    channels = (row["seen_tokens"] - first["seen_tokens"]) * content["settings"]["channels_per_token"]
    return f"{8 * grown / channels:.2f}"


CACHES = {"nexusquant": "`NexusQuantCache`", "quanto": "quanto", "hqq": "hqq", "fp8": "fp8"}
# How verdicts are counted and shown; the rest of a verdict says more, in the file.
OTHERS = {"ok without eviction": "without eviction", "refuses": "refused", "raises": "raise", "wrong": "wrong"}


def compatibility_table(content: dict[str, Any]) -> str:
    """Return, for every mode and cache, with how many families it works."""
    possible = [row for row in content["rows"] if row["verdicts"]["plain"] == "ok"]
    rows = []
    for mode, title in content["modes"].items():
        verdicts = [row["verdicts"] for row in possible if row["mode"] == mode]
        counts = (_share([each[cache] for each in verdicts if cache in each]) for cache in CACHES)
        rows.append((f"`{mode}`: {title}", str(len(verdicts)), *counts))
    return markdown(("mode", "families", *CACHES.values()), rows)


def _share(verdicts: list[str]) -> str:
    if not verdicts:
        return "not run"
    works = sum(verdict in {"ok", "runs"} for verdict in verdicts)
    others = {word: sum(verdict.startswith(start) for verdict in verdicts) for start, word in OTHERS.items()}
    return ", ".join([str(works), *(f"{count} {word}" for word, count in others.items() if count)])


def families_table(content: dict[str, Any]) -> str:
    """Return the verdict on our cache for every family and mode."""
    verdicts = {(row["family"], row["mode"]): row["verdicts"] for row in content["rows"]}
    head = ("family", "compressed layers", *(f"`{mode}`" for mode in content["modes"]))
    rows = (
        (
            f"`{name}`: {family['what']}",
            f"{family['compressed_layers']} of {family['layers']}",
            *(_mark(verdicts[name, mode]) for mode in content["modes"]),
        )
        for name, family in content["families"].items()
    )
    return markdown(head, rows)


def _mark(verdicts: dict[str, str]) -> str:
    if verdicts["plain"] != "ok":
        return "n/a"
    short = {"ok": "ok", "ok without eviction": "kept"}
    return short.get(verdicts["nexusquant"], f"**{verdicts['nexusquant']}**")


def refused_table(content: dict[str, Any]) -> str:
    """Return what each cache runs on, and which families it refuses."""
    rows = []
    for cache, title in CACHES.items():
        state = content["backends"].get(cache, f"nexusquant_cache {content['environment']['nexusquant_cache']}")
        refused = [_families(content, cache, verdict) for verdict in ("refuses", "ok without")]
        rows.append((title, state, *(["not run"] * 2 if state.startswith("not run") else refused)))
    return markdown(("cache", "runs on", "families refused", "families refused with eviction"), rows)


def _families(content: dict[str, Any], cache: str, verdict: str) -> str:
    rows = (row for row in content["rows"] if row["verdicts"].get(cache, "").startswith(verdict))
    return ", ".join(dict.fromkeys(f"`{row['family']}`" for row in rows)) or "none"


SERVED = {
    "codes": "answered from the codes",
    "whole": "coded, and all tokens kept: attention cannot be seen in some layer",
    "nothing to compress": "nothing to compress: all layers are transformers' own",
    "differs": "**logits differ**",
    "raises": "**raises**",
    "refuses": "refused: an encoder-decoder model",
    "no cache": "the model takes no cache",
    "no such attention": "not tried: the model has no such attention",
    "plain raises": "not tried: the model fails with the plain cache",
    "not built": "not tried: not built small from its config alone",
}
EVICTING = {
    "agrees": "agrees with the plain cache under a mask that hides what was evicted",
    "runs": "runs; no such mask could be laid over the model",
    "evicts nothing": "evicts nothing",
    "refuses": "refused when the cache is made",
    "differs": "**logits differ**",
    "raises": "**raises**",
}


def sweep_table(content: dict[str, Any]) -> str:
    """Return how many model types are served in which way."""
    return _counted("keeping all, codes without loss", SERVED, "verdict", content)


def sweep_evicting_table(content: dict[str, Any]) -> str:
    """Return the same of eviction, for the model types that could be tried."""
    return _counted("evicting", EVICTING, "evicting", content)


def _counted(title: str, words: dict[str, str], key: str, content: dict[str, Any]) -> str:
    attentions = list(dict.fromkeys(row["attention"] for row in content["rows"]))
    found = [
        (row["attention"], row[key].partition(" by ")[0].partition(":")[0]) for row in content["rows"] if key in row
    ]
    lines = ((text, *(str(found.count((name, word))) for name in attentions)) for word, text in words.items())
    return markdown((title, *(f"`{name}`" for name in attentions)), lines)


def sweep_types_table(content: dict[str, Any]) -> str:
    """Return the model types that are not simply answered from the codes, each with its reason."""
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        kinds.setdefault(row["type"], {})[row["attention"]] = row
    attentions = list(dict.fromkeys(row["attention"] for row in content["rows"]))
    lines = (
        (f"`{name}`", *(_verdict(rows[attention]) for attention in attentions))
        for name, rows in kinds.items()
        if any(_is_notable(row) for row in rows.values())
    )
    return markdown(("model type", *(f"`{name}`" for name in attentions)), lines)


def _is_notable(row: dict[str, Any]) -> bool:
    is_plain = row["verdict"] in {
        "codes",
        "nothing to compress",
        "refuses",
        "no cache",
        "no such attention",
        "plain raises",
        "not built",
    }
    return not is_plain or row.get("evicting", "").startswith(("refuses", "differs", "raises"))


def _verdict(row: dict[str, Any]) -> str:
    parts = [
        row["verdict"],
        row.get("why", "") if row["verdict"] in {"differs", "raises"} else "",
        row.get("evicting", ""),
    ]
    return "; ".join(part.partition(": Unsupp")[0].replace("|", "/") for part in parts if part)


def hard_cases_table(content: dict[str, Any]) -> str:
    """Return how every cache stands what is hard for it; biased keys in the plain cache show what rounding does."""
    head = ("case", "cache", "factor", "dPPL, %", "KL, nats", "top-1, %", *_CODE_COLUMNS)
    groups = _by_case(content, short=False)
    return markdown(head, ((case, *_case_cells(cache, rows)) for (case, cache), rows in groups.items()))


def short_prompts_table(content: dict[str, Any]) -> str:
    """Return the same of short prompts, by their length."""
    head = ("tokens", "cache", "factor", "dPPL, %", "KL, nats", "top-1, %", *_CODE_COLUMNS)
    groups = _by_case(content, short=True)
    lines = ((case.removeprefix(_SHORT), *_case_cells(cache, rows)) for (case, cache), rows in groups.items())
    return markdown(head, lines)


_SHORT = "short "
_CODE_COLUMNS = ("largest code error", "layers with more bits", "warnings")


def _by_case(content: dict[str, Any], *, short: bool) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the rows of each case and cache, one for each window."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["quality"]:
        if row["case"].startswith(_SHORT) == short:
            groups.setdefault((row["case"], row["cache"]), []).append(row)
    return groups


def _case_cells(cache: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the means over windows, and of what the cache says about its codes the worst."""
    dense, held = (sum(row["footprint"][name] for row in rows) for name in ("dense_bytes", "held_bytes"))
    errors = [row["code_error"] for row in rows if row.get("code_error") is not None]
    nll = mean(row["nll"] - row["plain_nll"] for row in rows)
    return (
        cache if cache.startswith("predecessor") else _cache_name(cache),
        f"{dense / held:.1f}x",
        f"{100 * math.expm1(nll):+.1f}",
        f"{abs(round(mean(row['kl'] for row in rows), 4)):.4f}",  # of equal predictions it may be a rounding below 0
        f"{100 * mean(row['top1'] for row in rows):.1f}",
        f"{max(errors):.2f}" if errors else "",
        str(max(row["layers_with_more_bits"] for row in rows)) if errors else "",
        str(sum(len(row["warnings"]) for row in rows)),
    )


def lm_eval_table(content: dict[str, Any]) -> str:
    """Return the score of every task through every cache; of a continued text, its perplexity."""
    caches = list(content["caches"])
    groups: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in content["quality"]:
        groups.setdefault(row["name"], {}).setdefault(row["cache"], {})[row["index"]] = row
    rows = [
        (
            f"`{name}`",
            str(len(found[caches[0]])),
            f"{mean(row['prompt_tokens'] for row in found[caches[0]].values()):,.0f}",
            *(_lm_eval_cell(found.get(cache, {}), found[caches[0]]) for cache in caches),
        )
        for name, found in groups.items()
    ]
    factors = [_lm_eval_factor(content["quality"], cache) for cache in caches]
    head = ("task", "prompts", "tokens", *(f"`{name}`" for name in caches))
    return markdown(head, [*rows, ("times fewer bytes", "", "", *factors)])


def _lm_eval_cell(rows: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]]) -> str:
    if not rows:
        return "not asked"
    scores = [row["score"] for row in rows.values()]
    scored = sum(row.get("scored_tokens", 0) for row in rows.values())
    if scored:
        return f"perplexity {math.exp(-sum(scores) / scored):.2f}"
    changes = [row["score"] - plain[index]["score"] for index, row in rows.items()]
    counts = {"worse": sum(change < 0 for change in changes), "better": sum(change > 0 for change in changes)}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{mean(scores):.2f}" + (f" ({told})" if told else "")


def _lm_eval_factor(rows: list[dict[str, Any]], cache: str) -> str:
    """Return the compression factor of all prompts together."""
    held = [row for row in rows if row["cache"] == cache and "compression_factor" in row]
    if not held:
        return "1.0x"
    seen = sum(row["seen_tokens"] for row in held)
    return f"{seen / sum(row['seen_tokens'] / row['compression_factor'] for row in held):.1f}x"


def axes_save_table(content: dict[str, Any]) -> str:
    """Return the bits per channel that principal axes save, by side and rate."""
    head = ("side", "bits", "half the logarithm of the errors' ratio", "least to most of a head", "bits at equal error")
    rows = (
        (
            row["side"],
            f"{row['bits']:g}",
            f"{row['saved']:.2f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
            f"{row['equal_error']:.2f}",
        )
        for row in content["axes_save"]
    )
    return markdown(head, rows)


def reuse_table(content: dict[str, Any]) -> str:
    """Return the quality of a prompt with axes of its own, of another prompt, and with none."""
    names = content["settings"]["windows"]
    rows = (
        (
            f"`{row['preset']}`",
            names[row["prompt"]],
            row["axes"],
            f"{row['dppl_percent']:+.1f}",
            f"{row['kl']:.4f}",
            f"{100 * row['top1']:.1f}",
        )
        for row in content["reuse"]
    )
    return markdown(("preset", "prompt", "axes", "dPPL, %", "KL, nats", "top-1, %"), rows)


def at_rest_table(content: dict[str, Any]) -> str:
    """Return what each kind of tensor comes to in a file, relative to its packed form."""
    level = max(content["rows"][0]["streams"][0]["codes"]["zstd"], key=int)
    head = (
        "preset",
        "part",
        "KiB packed",
        "in the file",
        f"best without delta, zstd {level}",
        "best with delta",
        "ideal",
    )
    rows = []
    for row in content["rows"]:
        file = next(file for file in row["files"] if file["level"] == 3)
        for kind in row["streams"]:
            packed, packings = kind["packed_bytes"], kind["codes"]
            sizes = {
                has_delta: min(by[level] for name, by in packings.items() if name.startswith("delta") == has_delta)
                for has_delta in (False, True)
            }
            shown = (file["kinds"][kind["kind"]], *sizes.values(), min(kind["ideal"].values()))
            cells = (
                f"`{row['preset']}`",
                kind["kind"],
                f"{packed / 1024:,.1f}",
                *(f"{x / packed:.3f}" for x in shown),
            )
            rows.append(cells)
    return markdown(head, rows)


def at_rest_layers_table(content: dict[str, Any]) -> str:
    """Return how the words of each layer shrink, of the first preset."""
    row = content["rows"][0]
    kinds = [kind for kind in row["streams"] if "layers" in kind]
    level = max(kinds[0]["layers"][0]["zstd"], key=int)
    head = ("layer", *(f"{kind['kind']}, {what}" for kind in kinds for what in (f"zstd {level}", "ideal")))
    count = len(kinds[0]["layers"])
    shown = [*range(min(6, count)), *range(6, count, 6)]
    rows = (
        (str(index), *(f"{x:.3f}" for kind in kinds for x in _layer_sizes(kind["layers"][index], level)))
        for index in dict.fromkeys([*shown, count - 1])
    )
    return markdown(head, rows)


def _layer_sizes(layer: dict[str, Any], level: str) -> tuple[float, float]:
    return layer["zstd"][level], layer["ideal"]


def at_rest_files_table(content: dict[str, Any]) -> str:
    """Return bytes and times of the files, by preset and level."""
    head = ("preset", "level", "MiB", "of the packed form", "header, KiB", "factor", "s to write", "s to read")
    rows = []
    for row in content["rows"]:
        plain = row["files"][0]["file_bytes"]
        for file in row["files"]:
            size = file["file_bytes"]
            cells = (
                f"`{row['preset']}`",
                "none" if file["level"] is None else str(file["level"]),
                f"{size / _MEBIBYTE:.2f}",
                f"{size / plain:.3f}",
                f"{file['header_bytes'] / 1024:.0f}",
                f"{row['dense_bytes'] / size:.1f}x",
                f"{file['write_seconds']:.2f}",
                f"{file['read_seconds']:.2f}",
            )
            rows.append(cells)
    return markdown(head, rows)


def indices_table(content: dict[str, Any]) -> str:
    """Return bits per channel of the predecessor's int8 indices and of our codes."""
    names = list(content["indices"][0]["bits_per_channel"])
    rows = (
        (
            f"{row['side']}, {row['coder']}",
            f"{row['relative_error']:.4f}",
            *(f"{row['bits_per_channel'][name]:.2f}" for name in names),
        )
        for row in sorted(content["indices"], key=lambda row: row["side"])
    )
    return markdown(("indices", "relative squared error", *names), rows)


def prefix_store_table(content: dict[str, Any]) -> str:
    """Return the times of a text in a prefix store, in seconds, and its bytes."""
    columns = {
        "read": "read the text",
        "put": "put",
        "find": "find",
        "load": "load",
        "first_token_without": "first token without",
        "first_token": "first token with",
    }
    head = ("preset", "MB stored", "of the plain cache", *columns.values())
    rows = (
        (
            f"`{row['preset']}`",
            f"{row['stored_bytes'] / 1e6:.1f}",
            f"1/{row['dense_bytes'] / row['stored_bytes']:.1f}",
            *(f"{x:.3f}" if x < 1 else f"{x:.1f}" for x in (row["seconds"][name] for name in columns)),
        )
        for row in content["rows"]
    )
    return markdown(head, rows)


def prefix_store_finding_table(content: dict[str, Any]) -> str:
    """Return the time to find a prefix, in milliseconds, by the number of entries."""
    head = ("entries", "the longest matches", "only the shortest matches")
    rows = (
        (f"{row['entries']:,}", *(f"{1000 * row['seconds'][name]:.1f}" for name in ("first", "last")))
        for row in content["finding"]
    )
    return markdown(head, rows)


def serve_load_table(content: dict[str, Any]) -> str:
    """Return what clients of the server have seen, and what it held."""
    settings, result = content["settings"], content["result"]
    before, after = result["before"], result["after"]
    known = 100 * result["known_tokens"] / result["prompt_tokens"]
    rows = (
        ("clients, turns of each", f"{settings['clients']}, {settings['turns']} and 1"),
        ("answers heard to their end, left", f"{result['answers']}, {result['left']}"),
        ("told to come again (503)", f"{result['busy']}"),
        ("prompt tokens, of these known to a cache", f"{result['prompt_tokens']:,}, {known:.0f} %"),
        (
            "MB of idle caches allowed, in the end",
            f"{settings['idle_bytes'] / 1e6:.1f}, {after['idle_bytes'] / 1e6:.1f}",
        ),
        (
            "MB of the process after one answer, in the end",
            f"{before['process_bytes'] / 1e6:,.0f}, {after['process_bytes'] / 1e6:,.0f}",
        ),
    )
    return markdown(("what", "how much"), rows)


def offload_table(content: dict[str, Any]) -> str:
    """Return the bytes that cross the bus for each generated token, and those that stay on the device."""
    plain = content["rows"][0]
    head = ("cache", "MB in all", "MB fetched", "MB sent", "of the plain cache's", "MB on the device", "MB sent once")
    rows = (
        (
            "transformers, offloaded" if row is plain else f"`{row['cache']}`",
            f"{row['stored'] / 1e6:.2f}",
            f"{row['per_token']['fetched'] / 1e6:.3f}",
            f"{row['per_token']['sent'] / 1e6:.3f}",
            "1" if row is plain else f"1/{_moved(plain) / _moved(row):.0f}",
            f"{row['on_device'] / 1e6:.2f}",
            f"{row['prompt']['sent'] / 1e6:.1f}",
        )
        for row in content["rows"]
    )
    return markdown(head, rows)


def _moved(row: dict[str, Any]) -> float:
    return float(row["per_token"]["fetched"] + row["per_token"]["sent"])


TABLES: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "quality": (quality_table, "quality_smollm2"),
    "facts": (facts_table, "facts_smollm2"),
    "fact_kinds": (fact_kinds_table, "facts_smollm2"),
    "peers": (peers_table, "peers_smollm2"),
    "ablations": (ablations_table, "ablations"),
    "sweep": (sweep_table, "sweep"),
    "sweep_evicting": (sweep_evicting_table, "sweep"),
    "sweep_types": (sweep_types_table, "sweep"),
    "hard_cases": (hard_cases_table, "hard_cases"),
    "short_prompts": (short_prompts_table, "hard_cases"),
    "lm_eval": (lm_eval_table, "lm_eval_smollm2"),
    "axes_save": (axes_save_table, "transforms"),
    "reuse": (reuse_table, "transforms"),
    "levels": (levels_table, "levels"),
    "memory": (memory_table, "memory"),
    "fit": (fit_table, "fit"),
    "presets": (presets_table, "memory"),
    "speed": (speed_table, "speed_cpu"),
    "reading": (reading_table, "reading"),
    "step_profile": (step_profile_table, "step_profile"),
    "states": (states_table, "states"),
    "instructions": (instructions_table, "instructions"),
    "compatibility": (compatibility_table, "compatibility"),
    "families": (families_table, "compatibility"),
    "refused": (refused_table, "compatibility"),
    "prefill": (prefill_table, "prefill"),
    "eviction": (eviction_table, "eviction_smollm2"),
    "chunks": (chunks_table, "chunks"),
    "long_answer": (long_answer_table, "long_answer"),
    "at_rest": (at_rest_table, "at_rest"),
    "at_rest_layers": (at_rest_layers_table, "at_rest"),
    "at_rest_files": (at_rest_files_table, "at_rest"),
    "indices": (indices_table, "at_rest"),
    "offload": (offload_table, "offload"),
    "serve_load": (serve_load_table, "serve_load"),
    "prefix_store": (prefix_store_table, "prefix_store"),
    "prefix_store_finding": (prefix_store_finding_table, "prefix_store"),
}


def render(text: str, results: Path) -> str:
    """Return a document with its tables made from the result files.

    Raises:
        KeyError: If a table has an unknown name.
        FileNotFoundError: If a result file is missing.
    """

    def replace(match: re.Match[str]) -> str:
        make, default = TABLES[match[2]]
        file = results / f"{match[3] or default}.json"
        return match[1] + "\n" + make(json.loads(file.read_text(encoding="utf-8"))) + "\n" + match[5]

    return _BLOCK.sub(replace, text)


def stale(documents: Iterable[Path], results: Path) -> list[Path]:
    """Return the documents whose tables are not what the result files say."""
    texts = {path: path.read_text(encoding="utf-8") for path in documents}
    return [path for path, text in texts.items() if render(text, results) != text]


def documents() -> list[Path]:
    """Return every document that may hold tables."""
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.is_file()]


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if anything would change")
    given = parser.parse_args()
    results = ROOT / "benchmarks" / "results"
    changed = stale(documents(), results)
    for path in changed:
        if not given.check:
            path.write_text(render(path.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(f"{'stale' if given.check else 'written'}: {path.relative_to(ROOT)}")
    if given.check and changed:
        sys.exit(1)


if __name__ == "__main__":
    main()
