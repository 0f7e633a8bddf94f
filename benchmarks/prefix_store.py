"""What a prefix store saves: the time to the first token of a question about a text, with the text in the store.

python benchmarks/prefix_store.py

For each preset, and a text that SmolLM2-135M-Instruct reads: the time to read it, to put its cache into a store, to
find it and to load it; and the time from the question to the first token of an answer, with the text in the store, and
without, where the model reads the text with the question, and compresses after that token.

``finding`` is the time of `PrefixStore.longest_prefix` by the number of entries.  The store then holds caches of one
layer with one head of 8 channels, each of another length, so that there are as many lengths to try as entries.  The
longest is a prefix of the prompt, and is tried ``first``, or only the shortest is, and is tried ``last``.

Every time is the median of several rounds, on a disk that has the files in memory.
Writes ``benchmarks/results/prefix_store.json``.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from _common import RESULTS, read_texts, shown_steps

from nexusquant_cache import PRESETS, NexusQuantCache, PrefixStore
from nexusquant_cache.evaluation import LoadedModel, load_model
from nexusquant_cache.evaluation.clock import now
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.results import environment, text_id, write_json
from nexusquant_cache.evaluation.steps import Step
from nexusquant_cache.evaluation.texts import token_windows, tokenize
from nexusquant_cache.releases import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from nexusquant_cache.evaluation.steps import Report

CHUNK = 512  # tokens read at once
QUESTION = "\n\nQuestion: What is the text about, and for whom was it written?\nAnswer:"
SHORTEST = 16  # tokens of the shortest fake entry


def read(loaded: LoadedModel, cache: NexusQuantCache, ids: Tensor) -> int:
    """Let the model read tokens into a cache; return the token that it says next."""
    logits = torch.empty(0)
    for chunk in ids.to(loaded.model.device).split(CHUNK, dim=1):
        output = loaded.model(input_ids=chunk, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        logits = output.logits
    return int(logits[0, -1].argmax())


def timed(function: Callable[[], Any], times: list[float]) -> Any:
    """Call a function, note its seconds, and return what it returns."""
    start = now()
    result = function()
    times.append(now() - start)
    return result


def measure(loaded: LoadedModel, preset: str, ids: Tensor, rounds: int, report: Report) -> dict[str, Any]:
    """Return the bytes and the times of a preset."""
    config, device = loaded.model.config, loaded.model.device
    whole = torch.cat([ids, tokenize(loaded.tokenizer, QUESTION)], dim=1)
    names = ("read", "put", "find", "load", "first_token", "first_token_without")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        store = PrefixStore(folder)
        for done in range(rounds):
            report(Step("questions", done, rounds, preset))
            cache = NexusQuantCache(preset, config=config)
            timed(partial(read, loaded, cache, ids), seconds["read"])
            cache.compress()
            entry = timed(partial(store.put, cache, ids), seconds["put"])
            match = timed(partial(store.longest_prefix, whole, config=config, preset=preset), seconds["find"])
            timed(partial(store.load, match, device=device), seconds["load"])
            timed(partial(_answer, loaded, store, whole, preset), seconds["first_token"])
            fresh = NexusQuantCache(preset, config=config)
            timed(partial(read, loaded, fresh, whole), seconds["first_token_without"])
    memory = cache.memory_report()
    return {
        "preset": preset,
        "dense_bytes": memory.dense_bytes,
        "held_bytes": memory.held_bytes,
        "stored_bytes": entry.nbytes,
        "seconds": {name: median(times) for name, times in seconds.items()},
        "rounds": seconds,
    }


def _answer(loaded: LoadedModel, store: PrefixStore, whole: Tensor, preset: str) -> int:
    found = store.get(whole, config=loaded.model.config, preset=preset, device=loaded.model.device)
    assert found is not None
    cache, known = found
    return read(loaded, cache, whole[:, known:])


def finding(ids: Tensor, counts: Sequence[int], rounds: int, report: Report) -> list[dict[str, Any]]:
    """Return rows of the time to find a prefix of a prompt, by the number of entries."""
    rows = []
    for count in counts:
        lengths = torch.linspace(SHORTEST, ids.shape[1], count).long().tolist()
        seconds: dict[str, list[float]] = {"first": [], "last": []}
        with tempfile.TemporaryDirectory() as folder:
            store = PrefixStore(folder)
            for done, length in enumerate(lengths):
                report(Step("entries to find", done, count))
                store.put(_small_cache(length), _ends_otherwise(ids[0, :length]) if done else ids[0, :length], level=1)
            prompts = {"first": torch.cat([_ends_otherwise(ids[0]), ids[0, -1:]]), "last": ids[0]}
            for name, prompt in prompts.items():
                for _ in range(rounds):
                    match = timed(partial(store.longest_prefix, prompt), seconds[name])
                    assert match.n_tokens == lengths[-1 if name == "first" else 0]
        rows.append(
            {"entries": count, "seconds": {name: median(times) for name, times in seconds.items()}, "rounds": seconds}
        )
    return rows


def _small_cache(tokens: int) -> NexusQuantCache:
    cache = NexusQuantCache("quant")
    cache.update(*torch.randn(2, 1, 1, tokens, 8), 0)
    return cache


def _ends_otherwise(ids: Tensor) -> Tensor:
    return torch.cat([ids[:-1], ids[-1:] + 1])


@torch.no_grad()
def main() -> None:
    """Measure and write ``results/prefix_store.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 text; the first one is used")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["quant", "balanced"], help="presets")
    parser.add_argument("--entries", type=int, nargs="+", default=[10, 100, 1000], help="entries to find one among")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS / "prefix_store.json", help="result file")
    given = parser.parse_args()
    if max(given.entries) > given.tokens - SHORTEST:
        parser.error(f"{max(given.entries)} entries of other lengths each need more tokens than {given.tokens}")

    torch.manual_seed(0)
    loaded = load_model()
    name, text = next(iter(read_texts(given.text).items()))
    (ids,) = token_windows(loaded.tokenizer, text, length=given.tokens, count=1, name=name)
    with shown_steps() as report:
        rows = [measure(loaded, preset, ids, given.rounds, report) for preset in given.presets]
        content = {
            "environment": environment(),
            "settings": {
                "model": loaded.name,
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "text": text_id(name, text),
                "tokens": given.tokens,
                "question_tokens": tokenize(loaded.tokenizer, QUESTION).shape[1],
                "rounds": given.rounds,
            },
            "presets": {preset: describe(PRESETS[preset]) for preset in given.presets},
            "rows": rows,
            "finding": finding(ids, given.entries, given.rounds, report),
        }
    write_json(given.output, content)
    for row in rows:
        times = ", ".join(f"{name} {1000 * seconds:,.1f}" for name, seconds in row["seconds"].items())
        print(f"{row['preset']}: {row['stored_bytes']:,} bytes stored; ms: {times}")
    for row in content["finding"]:
        times = ", ".join(f"{name} {1000 * seconds:,.1f}" for name, seconds in row["seconds"].items())
        print(f"{row['entries']:>5} entries; ms to find: {times}")


if __name__ == "__main__":
    main()
