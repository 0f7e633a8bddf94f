"""What the benchmark scripts share: where results go, texts, a bar, and a random model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from nexusquant_cache.cli.progress import progress_bars
from nexusquant_cache.evaluation import python_topics, read_text

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


def random_llama() -> LlamaForCausalLM:
    """Return a model with random weights, always the same."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**RANDOM_LLAMA)).eval()


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Return texts by the names of their files; Python's help topics if there is no file."""
    return {path.name: read_text(path) for path in paths} or {"Python's help topics": python_topics()}


def shown_steps() -> AbstractContextManager[Report]:
    """Show how far an evaluation is."""
    return progress_bars(Console(stderr=True))
