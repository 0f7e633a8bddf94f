"""What principal axes are worth, and whether those of one prompt serve another.

python benchmarks/transforms.py --text frankenstein.txt moby_dick.txt

- ``axes_save``: bits per channel that principal axes save at equal error.  Keys (without rotary phase and mean) and
  values of a prompt are coded with both rotations at the same rate.  Where an error is smaller by a factor, the other
  rotation would need half its binary logarithm more bits, if each bit halved an error, as in theory.  Of the real
  codes a bit does a little less; ``equal_error`` goes by what one more bit does to the error of the Hadamard rotation.
  Means are over layers, heads and two texts.  `NexusQuantCache` chooses between the rotations by two such numbers.
- ``reuse``: a prompt coded with axes of its own, with those of a part of the first text, or with a Hadamard rotation:
  for another text like the first (the second, or another part of it) and for a program.

Writes ``benchmarks/results/transforms.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _codes import UNCHECKED
from _common import RESULTS, preset_argument, python_sources, read_texts, shown_steps

from nexusquant_cache import PRESETS, CacheConfig, NexusQuantCache
from nexusquant_cache.cache.rotary import rotary_phases
from nexusquant_cache.codec.e8 import E8Codec, TransformRule
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.evaluation import Candidate, LoadedModel, load_model
from nexusquant_cache.evaluation.caches import fill_and_compress
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.quality import Continuation, PlainRun, measure_quality, run_plain
from nexusquant_cache.evaluation.results import environment, text_id, write_json
from nexusquant_cache.evaluation.steps import Step
from nexusquant_cache.evaluation.texts import token_windows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from nexusquant_cache.evaluation.steps import Report
    from nexusquant_cache.layer.tokens import LayerTransforms

SINKS = 4
FIT, LIKE, UNLIKE = "first text", "like it", "code"


@dataclass(frozen=True)
class Prompts:
    """The prompts read: one to fit to, one of the same kind, one of another."""

    runs: Mapping[str, PlainRun]
    texts: Mapping[str, str]

    @classmethod
    def read(cls, loaded: LoadedModel, texts: Mapping[str, str], given: argparse.Namespace, report: Report) -> Prompts:
        """Cut a window for each, and let the model read it."""
        first, *others = texts
        code = python_sources()
        length = given.prefix + given.continuation + 1

        def window(name: str, text: str, count: int, index: int) -> Continuation:
            cut = token_windows(loaded.tokenizer, text, length=length, count=count, name=name)
            return Continuation.split(name, cut[index], given.continuation)

        # two windows of the first text, so that one of them is free where it is the only one
        like = window(others[0], texts[others[0]], 1, 0) if others else window(first, texts[first], 2, 1)
        windows = {FIT: window(first, texts[first], 2, 0), LIKE: like, UNLIKE: window("code", code, 1, 0)}
        runs = {}
        for done, (name, text) in enumerate(windows.items()):
            report(Step("reading", done, len(windows), name))
            runs[name] = run_plain(loaded.model, text)
        return cls(runs, {**texts, "code": code})


def saved_bits(vectors: Float[Tensor, "b h n d"], bits: float, *, center: bool) -> Float[Tensor, "2 b h"]:
    """Return what principal axes save in each head, and what one more bit saves, by the errors of real codes."""

    def error(transform: TransformRule, rate: float) -> Float[Tensor, "b h"]:
        codec = E8Codec(CodeLayout.flat(vectors.shape[-1], rate), center=center, transform=transform)
        return coding_error(vectors, codec)

    hadamard, others = error("hadamard", bits), (error("principal", bits), error("hadamard", bits + 1))
    return torch.stack([0.5 * (hadamard / other).log2() for other in others])


def coding_error(vectors: Float[Tensor, "b h n d"], codec: E8Codec) -> Float[Tensor, "b h"]:
    """Return the mean squared error of each head when it is coded with what was fitted to it."""
    transform = codec.fit(vectors)
    decoded = codec.decode(codec.encode(vectors, transform), transform)
    return (vectors.float() - decoded).double().square().mean((-1, -2))


def axes_save(loaded: LoadedModel, prompts: Prompts, rates: Sequence[float], report: Report) -> list[dict[str, Any]]:
    """Return means of `saved_bits` for each side and rate over layers and heads of both prose texts, and extremes."""
    sides: dict[str, list[Tensor]] = {"keys": [], "values": []}
    for name in (FIT, LIKE):
        for keys, values in coded_vectors(loaded, prompts.runs[name]):
            sides["keys"].append(keys)
            sides["values"].append(values)
    rows = []
    for done, (side, bits) in enumerate((side, bits) for side in sides for bits in rates):
        report(Step("coding", done, len(sides) * len(rates), f"{side} at {bits:g} bits"))
        measured = torch.stack([saved_bits(vectors, bits, center=side == "keys") for vectors in sides[side]], 1)
        saved, per_bit = measured
        rows.append(
            {
                "side": side,
                "bits": bits,
                "saved": float(saved.mean()),
                "least": float(saved.min()),
                "most": float(saved.max()),
                "equal_error": float(saved.mean() / per_bit.mean()),
            }
        )
    return rows


def coded_vectors(loaded: LoadedModel, run: PlainRun) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each layer's keys, without their rotary phase, and values; sinks are left out."""
    cache = run.prefilled.cache
    tokens = cache.get_seq_length()
    layers: list[Any] = cache.layers
    for layer, phase in zip(layers, rotary_phases(loaded.model.config, tokens), strict=True):
        keys, values = (x[:, :, SINKS:] for x in (layer.keys, layer.values))
        positions = torch.arange(SINKS, tokens, device=keys.device)
        yield keys if phase is None else phase.rotate(keys, positions, inverse=True), values


def reuse(loaded: LoadedModel, prompts: Prompts, presets: Sequence[str], report: Report) -> list[dict[str, Any]]:
    """Return the quality of the other prompts with axes of their own, of the first text, and without axes."""
    rows = []
    for done, preset in enumerate(presets):
        settings = replace(PRESETS[preset], transform="principal", most_code_error=UNCHECKED)
        fitted = fitted_to(loaded, settings, prompts.runs[FIT])
        ways = {
            "its own": _candidate(loaded, settings),
            "those of the first text": _candidate(loaded, settings, fitted),
            "none: Hadamard rotation": _candidate(loaded, replace(settings, transform="hadamard")),
        }
        report(Step("reusing", done, len(presets), preset))
        for prompt in (LIKE, UNLIKE):
            for axes, candidate in ways.items():
                row = measure_quality(loaded, prompts.runs[prompt], candidate)
                shown = {**asdict(row), "dppl_percent": row.dppl_percent}
                rows.append({"preset": preset, "prompt": prompt, "axes": axes, **shown})
    return rows


def fitted_to(loaded: LoadedModel, settings: CacheConfig, run: PlainRun) -> tuple[LayerTransforms | None, ...]:
    """Return what a cache has fitted to a prompt."""
    cache = fill_and_compress(loaded, _candidate(loaded, settings), run.prefilled).cache
    assert isinstance(cache, NexusQuantCache)
    return cache.transforms


def _candidate(
    loaded: LoadedModel, settings: CacheConfig, transforms: tuple[LayerTransforms | None, ...] | None = None
) -> Candidate:
    config = loaded.model.config
    return Candidate("", lambda: NexusQuantCache(settings, config=config, transforms=transforms))


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 texts; the first two are used")
    parser.add_argument("--prefix", type=int, default=2048, help="tokens in the cache")
    parser.add_argument("--continuation", type=int, default=128, help="tokens predicted after them")
    parser.add_argument("--bits", type=float, nargs="+", default=[1.0, 1.5, 2.0, 2.5, 3.0], help="bits per channel")
    parser.add_argument(
        "--presets",
        nargs="*",
        type=preset_argument,
        choices=PRESETS,
        default=["balanced", "quant"],
        help="presets that reuse",
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "transforms.json", help="result file")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measure and write the result file."""
    given = arguments()
    loaded = load_model()
    with shown_steps() as report:
        prompts = Prompts.read(loaded, read_texts(given.text), given, report)
        content = {
            "environment": environment(),
            "settings": {
                "model": loaded.name,
                "texts": [text_id(name, text) for name, text in prompts.texts.items()],
                "windows": {name: run.text.name for name, run in prompts.runs.items()},
                "prefix": given.prefix,
                "continuation": given.continuation,
            },
            "presets": {name: describe(PRESETS[name]) for name in given.presets},
            "axes_save": axes_save(loaded, prompts, given.bits, report),
            "reuse": reuse(loaded, prompts, given.presets, report),
        }
    write_json(given.output, content)
    for row in content["axes_save"]:
        print(
            f"{row['side']:>6} at {row['bits']:g} bits: {row['saved']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
            end="",
        )
        print(f", {row['equal_error']:.2f} at equal error")


if __name__ == "__main__":
    main()
