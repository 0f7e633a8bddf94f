"""Texts to measure on, and windows of tokens cut from them."""

import importlib
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nexusquant_cache.evaluation.errors import EvaluationError


def python_topics() -> str:
    """Return the help topics of the running Python, several hundred kilobytes of English prose.

    Raises:
        EvaluationError: If this Python comes without its help topics.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        msg = "this Python comes without its help topics (pydoc_data); give a text file instead"
        raise EvaluationError(msg) from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read_text(path: str | Path, name: str | None = None) -> str:
    """Return the text of a UTF-8 file.

    Args:
        path: The file.
        name: What to call it in an error; by default by its path.

    Raises:
        EvaluationError: If there is no such file, it cannot be read, is not UTF-8, or is empty.
    """
    path = Path(path)
    name = name or str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        msg = f"no such text file: {name}"
        raise EvaluationError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{name} is not UTF-8 text (byte {error.start}); convert it first"
        raise EvaluationError(msg) from error
    except OSError as error:
        msg = f"cannot read {name}: {error.strerror or error}"
        raise EvaluationError(msg) from error
    if not text.strip():
        msg = f"{name} is empty"
        raise EvaluationError(msg)
    return text


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Int[Tensor, "1 n"]:
    """Return the tokens of a text alone, without special tokens."""
    # verbose=False: a text longer than the model's context is no mistake here, we cut windows from it
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([ids], dtype=torch.long)


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, *, length: int, count: int, name: str = "text"
) -> list[Int[Tensor, "1 n"]]:
    """Cut windows from a text: apart from each other, spread evenly, the first not at the very beginning.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The text.
        length: Tokens per window.
        count: Number of windows.
        name: What to call the text in an error.

    Raises:
        EvaluationError: If the text is too short for that.
    """
    ids = tokenize(tokenizer, text)
    total = ids.shape[1]
    if total < length * count:
        windows = f"{count} windows of {length} tokens" if count > 1 else f"a window of {length} tokens"
        msg = f"{name} is too short: it has {total} tokens, {windows} need {length * count}"
        raise EvaluationError(msg)
    part = total // count
    starts = (index * part + (part - length) // 2 for index in range(count))
    return [ids[:, start : start + length] for start in starts]
