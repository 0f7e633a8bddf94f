"""Other ways to hold a KV cache in fewer bytes, measured in the same run as our presets, on SmolLM2-135M.

python benchmarks/peers.py --text frankenstein.txt moby_dick.txt

A peer whose package is missing is left out, with a line that says what to install (``nox -s peers`` installs all).
Every row is written as soon as it is measured; run again to go on after an interruption, or for more peers: rows that
are not asked for stay in the file, and a run without ``--peers`` shows all of them.

What is compared, and by whose bytes:

* ``presets`` and ``predecessor``: see ``quality.py``.
* ``nexusquant-kv``: the package's presets, applied when the prompt has been read, evicted tokens masked.  It packs
  nothing; tables and plots show what its codes would take, the file's ``holdings`` what it really holds.
* ``quanto``, ``hqq``, ``fp8``: transformers' `QuantizedCache`.  ``holdings`` says what it would hold in a 16-bit model.
* ``turboquant``: a scalar quantizer after a rotation; ``turboquant+mean`` also has what we do to keys before coding
  (mean and rotary phase removed); ``turboquant+snapkv`` evicts until it holds the bytes of a preset.
* ``snapkv``, ``expected``, ``knorm``: eviction alone, kept tokens in 16 bit, each head its own.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _codes import UNCHECKED, ExactCache, ScalarCache, candidate_of, dense_bytes, head_dim_of, held_bytes, ratio_for
from _common import IMAGES, RESULTS, add_measuring, measuring, read_texts, shown_steps
from _packages import NexusQuantKv, PeerReport, nexusquant_kv_candidate, quantized_candidate
from quality import PREDECESSOR, principal
from quality import candidates as presets_and_predecessor

from nexusquant_cache import PRESETS, CacheConfig, NexusQuantCache
from nexusquant_cache.evaluation import (
    Candidate,
    EvaluationOptions,
    LoadedModel,
    evaluate,
    load_model,
    preset_candidates,
    summaries,
)
from nexusquant_cache.evaluation.caches import update
from nexusquant_cache.evaluation.plots import quality_figure
from nexusquant_cache.evaluation.report import measured_on
from nexusquant_cache.evaluation.results import read_json, write_json
from nexusquant_cache.pages.pictures import save_png
from nexusquant_cache.policy import (
    EvictionPolicy,
    ExpectedAttentionPolicy,
    KeyNormPolicy,
    ValueAware,
    WindowAttentionPolicy,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeAlias

    from matplotlib.figure import Figure
    from transformers import PretrainedConfig

    Make: TypeAlias = Callable[[LoadedModel, int], Sequence[Candidate]]
    """Makes the caches of a peer for a model; those that shall hold certain bytes need the number of tokens."""

RATES = (1, 2, 3, 4)
FACTORS = (2, 4, 6, 10, 17)
EVICTING = ("high", "asym", "balanced", "max")
SNAPKV = WindowAttentionPolicy(observation_window=32, aggregate="mean", pool=7)
# Codes as they come: keys with their mean and their rotary phase.  No peer looks whether its codes are good enough.
SCALAR = CacheConfig(residual_length=32, center_keys=False, remove_rope=False, most_code_error=UNCHECKED)
# The phase is taken off and put back; the expected attention has to know it.
EXACT = CacheConfig(residual_length=32, center_keys=False, most_code_error=UNCHECKED)
NEXUSQUANT_KV = {
    "high": NexusQuantKv(3, 2, 0.35),
    "asym": NexusQuantKv(3, 2, 0.6),
    "balanced": NexusQuantKv(2, 2, 0.6),
    "max": NexusQuantKv(2, 2, 0.8),
}
PACKAGES = {"nexusquant-kv": "nexusquant-kv", "quanto": "optimum-quanto", "hqq": "hqq", "fp8": "transformers"}


def predecessors(loaded: LoadedModel, tokens: int) -> list[Candidate]:
    """Return our own implementation of the predecessor's recipe, at the bytes of each preset."""
    both = presets_and_predecessor(loaded.model.config, tokens)
    return [candidate for candidate in both if candidate.name.startswith(PREDECESSOR)]


def nexusquant_kv(loaded: LoadedModel, tokens: int) -> list[Candidate]:
    """Return the presets of nexusquant-kv."""
    del tokens
    config = loaded.model.config
    return [nexusquant_kv_candidate(f"nexusquant-kv@{name}", each, config) for name, each in NEXUSQUANT_KV.items()]


def quantized(backend: str, options: Mapping[str, Mapping[str, int]]) -> Make:
    """Return what returns transformers' quantized caches of a backend, each with its options."""

    def make(loaded: LoadedModel, tokens: int) -> list[Candidate]:
        del tokens
        config, package = loaded.model.config, PACKAGES[backend]
        return [quantized_candidate(name, package, backend, config, **given) for name, given in options.items()]

    return make


def scalar(name: str, settings: CacheConfig) -> Make:
    """Return what returns scalar codes of every rate, without eviction."""

    def make(loaded: LoadedModel, tokens: int) -> list[Candidate]:
        del tokens
        return [
            candidate_of(
                f"{name}@{bits}bit",
                ScalarCache,
                replace(settings, key_bits=bits, value_bits=bits),
                loaded.model.config,
            )
            for bits in RATES
        ]

    return make


def scalar_and_eviction(loaded: LoadedModel, tokens: int) -> list[Candidate]:
    """Return scalar codes of 2 bits with SnapKV's eviction, at the bytes of the presets that evict."""
    config = loaded.model.config
    found = []
    for name in EVICTING:
        target = held_bytes(NexusQuantCache, PRESETS[name], config, tokens)
        settings = replace(SCALAR, keep_ratio=ratio_for(ScalarCache, SCALAR, target, config, tokens))
        found.append(candidate_of(f"turboquant+snapkv@{name}", ScalarCache, settings, config, SNAPKV))
    return found


def evicting(name: str, policy: EvictionPolicy) -> Make:
    """Return what returns a policy alone, at every factor."""

    def make(loaded: LoadedModel, tokens: int) -> list[Candidate]:
        config = loaded.model.config
        ratios = {
            factor: ratio_for(ExactCache, EXACT, dense_bytes(config, tokens) / factor, config, tokens)
            for factor in FACTORS
        }
        return [
            candidate_of(f"{name}@{factor}x", ExactCache, replace(EXACT, keep_ratio=ratio), config, policy)
            for factor, ratio in ratios.items()
        ]

    return make


PEERS: dict[str, Make] = {
    "presets": lambda loaded, _tokens: preset_candidates(loaded),
    "again": lambda loaded, _tokens: preset_candidates(loaded, read_again=True)[len(PRESETS) :],
    "principal": lambda loaded, _tokens: [principal(name, loaded.model.config) for name in EVICTING],
    "predecessor": predecessors,
    "nexusquant-kv": nexusquant_kv,
    "quanto": quantized("quanto", {f"quanto@{bits}bit": {"nbits": bits} for bits in (2, 4)}),
    # Not along axis 1, as transformers advises: of most lengths of prompt, hqq then cannot read its own codes.
    "hqq": quantized("hqq", {f"hqq@{bits}bit": {"nbits": bits} for bits in RATES}),
    "fp8": quantized("fp8", {"fp8": {}}),
    "turboquant": scalar("turboquant", SCALAR),
    "turboquant+mean": scalar("turboquant+mean", replace(SCALAR, center_keys=True, remove_rope=True)),
    "turboquant+snapkv": scalar_and_eviction,
    "snapkv": evicting("snapkv", SNAPKV),
    "expected": evicting("expected", ValueAware(ExpectedAttentionPolicy(pool=1))),
    "knorm": evicting("knorm", KeyNormPolicy()),
}


def is_installed(peer: str) -> bool:
    """Tell whether a peer can be measured; say what to install if it cannot."""
    if peer not in PACKAGES:
        return True
    try:
        metadata.version(PACKAGES[peer])
    except metadata.PackageNotFoundError:
        print(f"{peer}: left out, for want of its package: pip install {PACKAGES[peer]}", file=sys.stderr)
        return False
    return True


def holdings(loaded: LoadedModel, candidates: Sequence[Candidate], tokens: int) -> dict[str, dict[str, int]]:
    """Return what the caches of other packages hold, from random keys and values: it does not depend on them."""
    found = {}
    for candidate in candidates:
        if "package" in candidate.settings:
            report = fill_with_noise(candidate, loaded, tokens).memory_report()
            assert isinstance(report, PeerReport)
            found[candidate.name] = asdict(report)
    return found


@torch.no_grad()
def fill_with_noise(candidate: Candidate, loaded: LoadedModel, tokens: int) -> Any:
    """Return a cache of a candidate that holds so many random tokens."""
    config: PretrainedConfig = loaded.model.config
    cache = candidate.factory()
    for index in range(config.num_hidden_layers):
        keys, values = torch.randn(2, 1, config.num_key_value_heads, tokens, head_dim_of(config))
        update(cache, keys, values, index)
    if candidate.prepare is not None:
        candidate.prepare(cache, loaded, torch.zeros(1, tokens, dtype=torch.long))
    return cache


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="only these; all by default")
    defaults = EvaluationOptions(windows=2, continuation=128, lengths=(1024,), kinds=("single",), facts=0)
    add_measuring(parser, RESULTS / "peers_smollm2.json", defaults)
    parser.add_argument("--plot", type=Path, default=IMAGES / "peers_vs_bytes.png", help="image file")
    parser.add_argument("--plot-only", action="store_true", help="draw the plot from the result file and stop")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, write the result file, draw the plot."""
    given = arguments()
    if not given.plot_only:
        run(given)
    content = read_json(given.output)
    rows = summaries(content)
    figure = quality_figure(rows, measured_on(content, rows))
    tell_apart(figure)
    leave_out_bars(figure)
    save_png(figure, given.plot)


def tell_apart(figure: Figure) -> None:
    """Empty the markers of lines that share colour and marker with an earlier one, for there are many."""
    for panel in figure.axes:
        known = set()
        for bars in panel.containers:
            line = bars.lines[0]
            style = (line.get_color(), line.get_marker())
            if style in known:
                line.set_markerfacecolor("white")
            known.add(style)
    figure.axes[0].legend(loc="lower left", frameon=False, fontsize=7)


def leave_out_bars(figure: Figure) -> None:
    """Hide the intervals, which the table has: of a dozen lines they would hide the lines."""
    for panel in figure.axes:
        for bars in panel.containers:
            _, caps, stems = bars.lines
            for part in (*caps, *stems):
                part.set_visible(False)
    figure.axes[0].set_ylim(-5, 1000)
    figure.axes[1].set_ylim(1e-3, 3)
    if (title := figure.get_suptitle()) and ";" in title:
        figure.suptitle(title.partition(";")[0], fontsize=10)


def run(given: argparse.Namespace) -> None:
    """Measure what is missing, and what other packages hold."""
    options = measuring(given)
    wanted = [peer for peer in given.peers if is_installed(peer)]
    with shown_steps() as report:
        loaded = load_model()
        caches = [candidate for peer in wanted for candidate in PEERS[peer](loaded, given.prefix)]
        texts = read_texts(given.text)
        content = evaluate(loaded, caches, texts, options, output=given.output, fresh=given.fresh, report=report)
        write_json(given.output, {**content, "holdings": holdings(loaded, caches, given.prefix)})


if __name__ == "__main__":
    main()
