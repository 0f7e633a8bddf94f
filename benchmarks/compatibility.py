"""Which ways to generate work with which models: `NexusQuantCache` against transformers' own quantized caches.

python benchmarks/compatibility.py

The models and the ways to generate are those of the tests (`tests/integration`): tiny, random, every family.
Caches of transformers are run where they are installed: ``pip install optimum-quanto hqq``.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import RESULTS, ROOT
from rich.progress import track
from transformers import DynamicCache, QuantizedCache
from transformers.utils import logging as transformers_logging

from nexusquant_cache import NexusQuantCache, UnsupportedError
from nexusquant_cache.evaluation.results import environment, write_json
from nexusquant_cache.layer.layer import NexusQuantLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

sys.path.insert(0, str(ROOT / "tests"))
from integration.families import FAMILIES, build
from integration.modes import MODES, MOVED
from integration.tiny import SMALL, lossless_cache

TITLES = {
    "greedy": "greedy decoding",
    "sampling": "sampling with top_k",
    "several": "num_return_sequences",
    "beams": "beam search",
    "sampled_beams": "beam sampling",
    "prompt_lookup": "prompt lookup",
    "assisted": "assisted generation",
    "assisted_sampling": "assisted sampling",
    "early_exit": "drafts by the first layer",
    "chunked": "prefill_chunk_size",
    "two_turns": "second turn, whole text given",
    "continued": "later turns, new tokens given",
    "taken_back": "crop, then another message",
    "shared_prefix": "prefix read once, cache copied",
    "padded": "left-padded batch",
    "padded_beams": "left-padded batch, beam search",
    "streamed": "streaming from a thread",
    "embeds": "inputs_embeds",
}
PRESET = "balanced"
# Prompts are short: the newest tokens that stay exact are few, and groups fit the smallest head dimension.
GROUPS = {"residual_length": SMALL["residual_length"], "q_group_size": 8}
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "quanto": ("optimum-quanto", GROUPS),
    "hqq": ("hqq", GROUPS),
    "fp8": ("transformers", {}),
}


class Run:
    """One way to generate with one cache: what came out and how the cache was left, or the error."""

    def __init__(self, model: PreTrainedModel, mode: str, make: Callable[..., Any]) -> None:
        """Run it; ``make`` takes ``config`` and, for a padded batch, ``attention_mask``."""
        self.tokens: Tensor | None = None
        self.error: Exception | None = None
        self.cache: Any = None
        self.is_finite = True
        handle = model.register_forward_hook(self._look)
        try:
            self.tokens = MODES[mode](model, partial(self._make, make, model.config))
        except Exception as error:  # noqa: BLE001 - any error is a result
            self.error = error
        finally:
            handle.remove()

    def _make(self, make: Callable[..., Any], config: PretrainedConfig, attention_mask: Tensor | None = None) -> Any:
        self.cache = make(config=config, attention_mask=attention_mask)
        return self.cache

    def _look(self, _module: Any, _inputs: Any, outputs: Any) -> None:
        self.is_finite = self.is_finite and bool(torch.isfinite(outputs.logits).all())

    @property
    def seen(self) -> int:
        """Tokens that the cache says it has seen."""
        return int(self.cache.get_seq_length())

    def verdict(self, plain: Run, *, exact: bool) -> str:
        """Compare with the plain cache: the tokens if nothing was lost, else only what may not differ."""
        if self.error is not None:
            name = type(self.error).__name__
            return f"refuses {name}" if self.cache is None else f"raises {name}"
        assert self.tokens is not None
        assert plain.tokens is not None
        if self.tokens.shape != plain.tokens.shape or not self.is_finite:
            return "wrong output"
        if self.seen != plain.seen:
            return f"wrong length {self.seen} for {plain.seen}"
        if exact and not torch.equal(self.tokens, plain.tokens):
            return "wrong tokens"
        return "ok" if exact else "runs"


def plain_cache(config: PretrainedConfig, attention_mask: Tensor | None) -> DynamicCache:
    """Return transformers' plain cache."""
    del attention_mask
    return DynamicCache(config=config)


def lossless(config: PretrainedConfig, attention_mask: Tensor | None) -> Any:
    """Return our cache with a codec that loses nothing, so that tokens can be compared."""
    return lossless_cache(config, attention_mask=attention_mask)


def preset(config: PretrainedConfig, attention_mask: Tensor | None) -> NexusQuantCache:
    """Return our cache as it is used."""
    return NexusQuantCache(PRESET, config=config, attention_mask=attention_mask, **SMALL)


def quantized(backend: str, config: PretrainedConfig, attention_mask: Tensor | None) -> QuantizedCache:
    """Return a quantized cache of transformers."""
    del attention_mask
    return QuantizedCache(backend, config=config, **BACKENDS[backend][1])


def ours(model: PreTrainedModel, mode: str, plain: Run) -> str:
    """Return the verdict on our cache, which has to stand two runs."""
    exact = Run(model, mode, lossless).verdict(plain, exact=True)
    if exact != "ok":
        return exact
    used = Run(model, mode, preset)
    if used.cache is None and isinstance(used.error, UnsupportedError):
        return "ok without eviction"
    verdict = used.verdict(plain, exact=False)
    return "ok" if verdict == "runs" else verdict


def judge(name: str, mode: str, backends: list[str]) -> dict[str, str]:
    """Return the verdict on every cache; the worst one if it depends on the implementation of attention."""
    verdicts: dict[str, list[str]] = {}
    for attention in FAMILIES[name].attentions:
        model = build(name, attention)
        plain = Run(model, mode, plain_cache)
        if plain.error is not None:
            verdicts.setdefault("plain", []).append(f"raises {type(plain.error).__name__}")
            continue
        verdicts.setdefault("plain", []).append("ok")
        verdicts.setdefault("nexusquant", []).append(ours(model, mode, plain))
        for backend in backends:
            run = Run(model, mode, partial(quantized, backend))
            verdicts.setdefault(backend, []).append(run.verdict(plain, exact=False))
    return {cache: max(each, key=_badness) for cache, each in verdicts.items()}


def _badness(verdict: str) -> int:
    return ["ok", "runs", "refuses", "raises", "wrong"].index(verdict.partition(" ")[0])


def state_of(backend: str) -> str:
    """Return what a backend runs on, or why it cannot be run."""
    package = BACKENDS[backend][0]
    try:
        quantized(backend, build("llama", "eager").config, None)
    except (ImportError, ValueError) as error:  # older transformers have no fp8
        return f"not run: {str(error).splitlines()[0]}"
    return f"{package} {metadata.version(package)}"


def describe_family(name: str) -> dict[str, Any]:
    """Return what a family is, and how many of its layers are compressed."""
    family = FAMILIES[name]
    model = build(name, family.attentions[0])
    layers = NexusQuantCache("quant", config=model.config).layers
    return {
        "what": family.what,
        "model": type(model).__name__,
        "layers": len(layers),
        "compressed_layers": sum(isinstance(layer, NexusQuantLayer) for layer in layers),
        "attention": list(family.attentions),
    }


def refusal_of(mode: str) -> str:
    """Return how transformers refuses a mode that it has given up."""
    model = build("llama", "eager")
    try:
        MOVED[mode](model, partial(plain_cache, model.config, None))
    except ValueError as error:
        return f"raises {type(error).__name__}: {error}"
    return "runs"


def main() -> None:
    """Run everything and write ``results/compatibility.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="some families only")
    parser.add_argument("--output", type=Path, default=RESULTS / "compatibility.json", help="result file")
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    backends = {name: state_of(name) for name in BACKENDS}
    present = [name for name, state in backends.items() if not state.startswith("not run")]
    cases = list(product(given.families, MODES))
    rows = [
        {"family": name, "mode": mode, "verdicts": judge(name, mode, present)}
        for name, mode in track(cases, description="generating")
    ]
    content = {
        "environment": environment(),
        "backends": backends,
        "settings": {"preset": PRESET, "overrides": SMALL, "groups": GROUPS},
        "modes": {mode: TITLES[mode] for mode in MODES},
        "moved": {mode: refusal_of(mode) for mode in MOVED},
        "families": {name: describe_family(name) for name in given.families},
        "rows": rows,
    }
    write_json(given.output, content)
    for cache in ("plain", "nexusquant", *present):
        counts = Counter(row["verdicts"].get(cache, "not possible with a plain cache") for row in rows)
        print(f"{cache}: " + ", ".join(f"{count} x {verdict}" for verdict, count in counts.most_common()))


if __name__ == "__main__":
    main()
