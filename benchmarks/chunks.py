"""What it costs to read a prompt in pieces, which attend to codes, or with ``post_prefill`` to exact tokens.

python benchmarks/chunks.py --text frankenstein.txt moby_dick.txt pride_and_prejudice.txt wikitext2_raw_test.txt

SmolLM2-135M-Instruct reads windows of texts through caches, in one piece or in several, and predicts what follows. Its
predictions are compared with those of the plain cache. Writes ``benchmarks/results/chunks.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import RESULTS, preset_argument, read_texts, shown_steps

from nexusquant_cache import PRESETS, NexusQuantCache
from nexusquant_cache.evaluation import load_model
from nexusquant_cache.evaluation.intervals import mean_interval
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.quality import Continuation, predict, run_plain
from nexusquant_cache.evaluation.results import environment, text_id, write_json
from nexusquant_cache.evaluation.steps import Step
from nexusquant_cache.evaluation.texts import token_windows
from nexusquant_cache.releases import CACHE

if TYPE_CHECKING:
    from nexusquant_cache.evaluation import LoadedModel

CHUNK = 512
PREDICTIONS = 256
SCHEDULES: dict[str, tuple[str, int | None]] = {
    "in one piece": ("during_prefill", None),
    f"pieces of {CHUNK}": ("during_prefill", CHUNK),
    f"pieces of {CHUNK}, post_prefill": ("post_prefill", CHUNK),
}


@torch.no_grad()
def read(loaded: LoadedModel, text: Continuation, preset: str, schedule: str) -> torch.Tensor:
    """Return the log probabilities of the continuation behind a prompt that was read so."""
    when, chunk = SCHEDULES[schedule]
    cache = NexusQuantCache(preset, config=loaded.model.config, when=when)  # type: ignore[arg-type]
    for part in text.prefix_ids.split(chunk or text.prefix_ids.shape[1], 1):
        loaded.model(input_ids=part, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    cache.compress()
    return predict(loaded.model, text.next_ids, cache)


def main() -> None:
    """Measure and write ``results/chunks.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="texts")
    parser.add_argument("--windows", type=int, default=4, help="windows, in all")
    parser.add_argument("--prefix", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument(
        "--presets", nargs="+", type=preset_argument, default=["quant", "balanced", "max"], choices=list(PRESETS)
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "chunks.json", help="result file")
    given = parser.parse_args()
    loaded, texts = load_model(), read_texts(given.text)
    each = max(given.windows // len(texts), 1)
    length = given.prefix + PREDICTIONS + 1
    windows = [
        (name, window)
        for name, text in texts.items()
        for window in token_windows(loaded.tokenizer, text, length=length, count=each, name=name)
    ]
    cases = [(preset, schedule) for preset in given.presets for schedule in SCHEDULES]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in cases}
    with shown_steps() as report:
        for number, (name, window) in enumerate(windows):
            text = Continuation.split(name, window, PREDICTIONS)
            plain = run_plain(loaded.model, text)
            targets = text.next_ids[0, 1:, None]
            for place, case in enumerate(cases):
                done = number * len(cases) + place
                report(Step("reading", done, len(windows) * len(cases), f"{case[0]}, {case[1]}"))
                ours = read(loaded, text, *case)
                kl = (plain.log_probs.exp() * (plain.log_probs - ours)).sum(-1).mean()
                change = plain.log_probs.gather(1, targets).mean() - ours.gather(1, targets).mean()
                found[case].append((float(kl), 100 * float(change.expm1())))
    rows: list[dict[str, Any]] = [
        {
            "preset": preset,
            "schedule": schedule,
            "kl": asdict(mean_interval([kl for kl, _ in values])),
            "dppl_percent": asdict(mean_interval([change for _, change in values])),
        }
        for (preset, schedule), values in found.items()
    ]
    content = {
        "environment": environment(),
        "settings": {"model": loaded.name, "windows": len(windows), "prefix": given.prefix, "chunk": CHUNK},
        "texts": [text_id(name, text) for name, text in texts.items()],
        "presets": {name: describe(PRESETS[name]) for name in given.presets},
        "rows": rows,
    }
    write_json(given.output, content)
    for row in rows:
        moved = f"KL {row['kl']['mean']:.4f}, {row['dppl_percent']['mean']:+.2f} %"
        print(f"{row['preset']:>10} {row['schedule']:>30}: {moved}")


if __name__ == "__main__":
    main()
