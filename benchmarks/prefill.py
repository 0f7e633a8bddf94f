"""Peak memory of a prefill against the prompt's length, for both schedules: a random model, mechanics only.

python benchmarks/prefill.py
"""

from __future__ import annotations

import argparse
import weakref
from pathlib import Path
from typing import Any

import torch
from _common import IMAGES, RANDOM_LLAMA, RESULTS, random_llama
from _plot import plot_prefill
from rich.progress import track
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, LlamaForCausalLM

from nexusquant_cache import PRESETS, NexusQuantCache
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.results import environment, write_json
from nexusquant_cache.releases import CACHE

PRESET = "balanced"
CHUNK = 512
SCHEDULES: dict[str, tuple[str | None, int | None]] = {
    "plain cache": (None, None),
    "post_prefill": ("post_prefill", None),
    "during_prefill": ("during_prefill", None),
    f"plain cache, chunks of {CHUNK}": (None, CHUNK),
    f"during_prefill, chunks of {CHUNK}": ("during_prefill", CHUNK),
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are still alive, activations included."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return tree_map_only(torch.Tensor, self._note, func(*args, **(kwargs or {})))

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 - the only stable name of a storage
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)
        return tensor

    def _freed(self, key: int) -> None:
        self.now -= self._known.pop(key)


@torch.no_grad()
def measure(model: LlamaForCausalLM, schedule: str, tokens: int) -> dict[str, Any]:
    """Prefill one prompt and generate one token; return the peaks."""
    when, chunk = SCHEDULES[schedule]
    cache = DynamicCache() if when is None else NexusQuantCache(PRESET, config=model.config, when=when)
    ids = torch.randint(0, RANDOM_LLAMA["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}  # noqa: SLF001
    with LiveBytes() as live:
        live._known |= dict.fromkeys(weights, 0)  # noqa: SLF001 - known, and not counted
        for part in ids.split(chunk or tokens, dim=1):
            model(input_ids=part, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        model(input_ids=ids[:, -1:], **{CACHE: cache}, use_cache=True)
    dense = (
        2
        * RANDOM_LLAMA["num_hidden_layers"]
        * RANDOM_LLAMA["num_key_value_heads"]
        * RANDOM_LLAMA["head_dim"]
        * tokens
        * 4
    )
    report = None if when is None else cache.memory_report()
    return {
        "schedule": schedule,
        "tokens": tokens,
        "peak_bytes": live.peak,
        "cache_peak_bytes": dense if report is None else report.peak_bytes,
        "held_bytes": dense if report is None else report.held_bytes,
        "exact_bytes": dense,
    }


def main() -> None:
    """Measure and write ``results/prefill.json`` and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="prompt lengths")
    parser.add_argument("--output", type=Path, default=RESULTS / "prefill.json", help="result file")
    given = parser.parse_args()
    model = random_llama()
    cases = [(schedule, tokens) for tokens in given.tokens for schedule in SCHEDULES]
    rows = [measure(model, *case) for case in track(cases, description="prefilling")]
    content = {
        "environment": environment(),
        "settings": RANDOM_LLAMA
        | {"dtype": "float32", "preset": PRESET, "attention": model.config._attn_implementation},  # noqa: SLF001
        "presets": {PRESET: describe(PRESETS[PRESET])},
        "rows": rows,
    }
    write_json(given.output, content)
    plot_prefill(content, IMAGES / "prefill_peak.png")
    for row in rows:
        print(
            f"{row['schedule']:>30} {row['tokens']:>7,} tokens: all tensors {row['peak_bytes'] / 2**20:8.1f} MiB, "
            f"cache {row['cache_peak_bytes'] / 2**20:8.1f} MiB"
        )


if __name__ == "__main__":
    main()
