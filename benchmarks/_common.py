"""What the benchmark scripts share: where results go, what ran them, and rows that survive an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import nexusquant_cache
from nexusquant_cache import NexusQuantCache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PretrainedConfig

    from nexusquant_cache import CacheConfig, EvictionPolicy

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"


def environment() -> dict[str, Any]:
    """Return hardware and versions, without anything that names a machine or its folders."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nexusquant_cache": nexusquant_cache.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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


def text_id(name: str, text: str) -> dict[str, str]:
    """Return what identifies a text: its name without folders, and its checksum."""
    return {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def factory_of(
    settings: CacheConfig, config: PretrainedConfig, policy: EvictionPolicy | None = None
) -> Callable[[], NexusQuantCache]:
    """Return a factory of caches with these settings."""
    return lambda: NexusQuantCache(settings, config=config, policy=policy)


def describe(settings: CacheConfig, policy: EvictionPolicy | None = None) -> dict[str, Any]:
    """Return the settings of a cache as they stand in a result file."""
    plain: dict[str, Any] = json.loads(
        json.dumps({**asdict(settings), "policy": repr(policy) if policy else "default"})
    )  # tuples become lists, as in the file
    return plain


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return a result file, empty if there is none yet."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content
