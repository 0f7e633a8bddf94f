"""What is hard for a compressed cache: keys with a constant bias, programs, many languages, and short prompts.

python benchmarks/hard_cases.py --text frankenstein.txt
python benchmarks/hard_cases.py --caches quant predecessor --biases 100

Every case is a prompt and the tokens after it, predicted through each cache and through the plain one.

- ``english``: the texts given.
- ``key bias N``: the same prompts in a model that Qwen's keys stand for.  Their bias is up to a hundred times as large
  as everything else, in channels that hardly turn.  One vector added to *all* keys of a head changes each logit of a
  query by the same amount, and so nothing that softmax returns: the model says what it said, but a cache has other keys
  to code.  We add N times the root mean square of a layer's keys to both channels of the pair that turns slowest, after
  the rotation, where Qwen adds before it: once the rotary phase is removed, ours is not quite constant, so it is the
  harder case.  The plain cache with the same bias is measured too; its divergence is what rounding does.
- ``code``: two modules of the running Python, as texts.
- ``multilingual``: Sphinx's messages in ten languages, or a file.
- ``short N``: prompts of N tokens, cut from the first text.

``predecessor`` is its recipe at 2 bits without eviction: a Hadamard rotation, keys with their mean and their rotary
phase, and no look at what coding does to attention.  ``predecessor, probed`` has that look (``most_code_error``).

Writes ``benchmarks/results/hard_cases.json``; every row is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _codes import UNCHECKED
from _common import RESULTS, python_sources, read_texts, shown_steps, translated_messages
from transformers import DynamicCache

from nexusquant_cache import PRESETS, CacheConfig, NexusQuantCache
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.evaluation import Candidate, load_model, read_text
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.quality import Continuation, measure_quality, run_plain
from nexusquant_cache.evaluation.results import Results, environment, fingerprint, model_id, text_id
from nexusquant_cache.evaluation.steps import Step
from nexusquant_cache.evaluation.texts import token_windows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from transformers import PretrainedConfig

    from nexusquant_cache.codec.base import VectorCodec
    from nexusquant_cache.evaluation import LoadedModel
    from nexusquant_cache.evaluation.quality import PlainRun

PLAIN_BIASED = "plain"
PREDECESSOR = replace(
    PRESETS["quant"],
    key_bits=2,
    value_bits=2,
    center_keys=False,
    remove_rope=False,
    transform="hadamard",
    most_code_error=UNCHECKED,
)
SETTINGS: dict[str, CacheConfig] = {
    **{name: PRESETS[name] for name in ("quant", "balanced", "max")},
    "predecessor": PREDECESSOR,
    "predecessor, probed": replace(PREDECESSOR, most_code_error=PRESETS["quant"].most_code_error),
}


class BiasedKeys(DynamicCache):
    """Adds one vector to every key of a layer before the cache gets it; stands in front of a cache's class.

    The channels are those of the slowest pair of a rotary embedding that pairs channel ``i`` with ``i + pairs``.

    Args:
        size: What is added to each of the two channels, in units of the root mean square of the first keys.
        *args: Passed on to the cache.
        **options: Likewise.
    """

    def __init__(self, size: float, *args: Any, **options: Any) -> None:
        """Make an empty cache."""
        self._size = size
        self._biases: dict[int, Tensor] = {}
        super().__init__(*args, **options)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Store biased keys, and return them."""
        bias = self._biases.setdefault(layer_idx, self._size * slowest_pair(key_states))
        return super().update(key_states + bias, value_states, layer_idx, *args, **options)


class BiasedNexusQuantCache(BiasedKeys, NexusQuantCache):
    """Our cache, given biased keys."""


def slowest_pair(keys: Tensor) -> Tensor:
    """Return the root mean square of keys in the two channels that turn slowest, and 0 in the others."""
    head_dim = keys.shape[-1]
    vector = keys.new_zeros(head_dim)
    vector[[head_dim // 2 - 1, head_dim - 1]] = keys.square().mean().sqrt()
    return vector


@dataclass(frozen=True)
class Case:
    """A prompt, what follows it, and what is added to its keys."""

    name: str
    text: Continuation
    bias: float = 0.0

    @property
    def task(self) -> str:
        """What rows of this prompt are called."""
        return f"{self.name}: {self.text.name}"

    def candidates(self, config: PretrainedConfig) -> dict[str, Candidate]:
        """Return the caches to measure; of keys that are biased, the plain one too."""
        found = {name: self._candidate(name, settings, config) for name, settings in SETTINGS.items()}
        if not self.bias:
            return found
        return {PLAIN_BIASED: Candidate(PLAIN_BIASED, lambda: BiasedKeys(self.bias)), **found}

    def _candidate(self, name: str, settings: CacheConfig, config: PretrainedConfig) -> Candidate:
        def empty() -> NexusQuantCache:
            if not self.bias:
                return NexusQuantCache(settings, config=config)
            return BiasedNexusQuantCache(self.bias, settings, config=config)

        return Candidate(name, empty, settings=describe(settings))


def measure(loaded: LoadedModel, plain: PlainRun, candidate: Candidate) -> dict[str, Any]:
    """Return quality, what the cache says about its codes, and the warnings it gave."""
    made: list[Any] = []

    def remembered() -> Any:
        made.append(candidate.factory())
        return made[-1]

    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        row = measure_quality(loaded, plain, replace(candidate, factory=remembered))
    shown = {**asdict(row), "dppl_percent": row.dppl_percent, "warnings": [str(each.message) for each in given]}
    (cache,) = made
    return {**shown, **codes_of(cache)} if isinstance(cache, NexusQuantCache) else shown


def _has_more_bits(codec: VectorCodec, asked: VectorCodec) -> bool:
    """Tell whether a codec got a bit more because attention would have suffered; short texts get half of one anyway."""
    assert isinstance(codec, E8Codec)
    assert isinstance(asked, E8Codec)
    return codec.layout.bits_per_channel >= asked.layout.bits_per_channel + 1


def codes_of(cache: NexusQuantCache) -> dict[str, Any]:
    """Return the largest error of the layers' codes, None if nothing was coded, and how many layers got more bits."""
    errors = [layer.code_error for layer in cache.memory_report().layers if layer.code_error is not None]
    fitted = [layer for layer in cache.transforms if layer is not None]
    # Keys get one with values; they may have more for another reason, in the place of axes.
    more = sum(_has_more_bits(layer.codecs[1], layer.asked[1]) for layer in fitted)
    return {"code_error": max(errors, default=None), "layers_with_more_bits": more}


class Material:
    """The prompts, cut from the texts.

    Args:
        loaded: The model, whose tokenizer cuts.
        given: The command line.
    """

    def __init__(self, loaded: LoadedModel, given: argparse.Namespace) -> None:
        """Read the texts."""
        self._loaded = loaded
        self._given = given
        self.english = read_texts(given.text)
        self.others = {
            "code": python_sources(),
            "multilingual": read_text(given.multilingual) if given.multilingual else translated_messages(),
        }

    def cases(self) -> Iterator[Case]:
        """Yield every case; those with the same prompt stand side by side."""
        for name, text in self.english.items():
            for window in self._windows(name, text, self._given.prefix):
                yield Case("english", window)
                for size in self._given.biases:
                    yield Case(f"key bias {size:g}", window, size)
        for kind, text in self.others.items():
            for window in self._windows(kind, text, self._given.prefix):
                yield Case(kind, window)
        name, text = next(iter(self.english.items()))
        for tokens in self._given.short:
            for window in self._windows(name, text, tokens):
                yield Case(f"short {tokens}", window)

    def _windows(self, name: str, text: str, prefix: int) -> Iterator[Continuation]:
        length = prefix + self._given.continuation + 1
        windows = token_windows(self._loaded.tokenizer, text, length=length, count=self._given.windows, name=name)
        for index, window in enumerate(windows):
            yield Continuation.split(f"{name} {index + 1}", window, self._given.continuation)

    def identity(self) -> list[dict[str, str]]:
        """Return what the result file says about the texts."""
        return [text_id(name, text) for name, text in {**self.english, **self.others}.items()]


class Work:
    """Measures the rows that are missing.

    Args:
        loaded: The model.
        material: The prompts.
        given: The command line.
    """

    def __init__(self, loaded: LoadedModel, material: Material, given: argparse.Namespace) -> None:
        """Take over the rows of an earlier run."""
        self._loaded = loaded
        self._cases = {case.task: case for case in material.cases()}
        names = given.caches or [PLAIN_BIASED, *SETTINGS]
        config = loaded.model.config
        self._candidates = {
            task: {name: each for name, each in case.candidates(config).items() if name in names}
            for task, case in self._cases.items()
        }
        model = model_id(loaded)
        wanted = {
            task: {
                name: fingerprint(model, asdict(self._cases[task]), each.settings) for name, each in candidates.items()
            }
            for task, candidates in self._candidates.items()
        }
        head = _head(material, given, model)
        self.results = Results(given.output, head, {"quality": wanted, "needles": {}}, fresh=given.fresh)

    def run(self, report: Any) -> None:
        """Measure; a prompt is read once for all cases that have it."""
        plain: PlainRun | None = None
        total, done = self.results.count_missing(), 0
        for task, case in self._cases.items():
            for name in self.results.missing("quality", task):
                report(Step("measuring", done, total, f"{task}: {name}"))
                if plain is None or plain.text is not case.text:
                    plain = run_plain(self._loaded.model, case.text)
                row = measure(self._loaded, plain, self._candidates[task][name])
                self.results.add("quality", task, name, {"case": case.name, "bias": case.bias, **row})
                done += 1
        self.results.write()


def _head(material: Material, given: argparse.Namespace, model: Mapping[str, str]) -> dict[str, Any]:
    options = ("windows", "prefix", "continuation", "biases", "short")
    settings = {"model": model["name"], "dtype": model["dtype"], "checksum": model["checksum"]}
    return {
        "environment": environment(),
        "settings": {**settings, "texts": material.identity(), **{name: vars(given)[name] for name in options}},
        "caches": {name: describe(each) for name, each in SETTINGS.items()},
    }


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 texts; Python's help topics by default")
    parser.add_argument("--multilingual", type=Path, help="a text in many languages; Sphinx's messages by default")
    parser.add_argument("--windows", type=int, default=1, help="windows of each text and case")
    parser.add_argument("--prefix", type=int, default=2048, help="tokens in the cache")
    parser.add_argument("--continuation", type=int, default=128, help="tokens predicted after them")
    parser.add_argument("--biases", type=float, nargs="*", default=[30.0, 100.0], help="sizes of the keys' bias")
    parser.add_argument("--short", type=int, nargs="*", default=[100, 200, 300, 500, 1000], help="short prompts")
    parser.add_argument("--caches", nargs="*", choices=(PLAIN_BIASED, *SETTINGS), help="only these; all by default")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "hard_cases.json", help="result file")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing and write the result file."""
    given = arguments()
    loaded = load_model()
    work = Work(loaded, Material(loaded, given), given)
    with shown_steps() as report, torch.no_grad():
        work.run(report)


if __name__ == "__main__":
    main()
