"""What each process of a two-process run does; `test_devices.py` starts it with torchrun.

Usage: ``torchrun --nproc-per-node 2 tensor_parallel.py MODEL_FOLDER RESULTS_FOLDER``
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from integration.tiny import SMALL, generate, kept_mask, kept_positions, lossless_cache, prompt
from torch import Tensor
from transformers import LlamaForCausalLM

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.codec.cpu import support
from nexusquant_cache.policy import KeyNormPolicy, ScoreInputs

# Four key heads: two for each process.
OPTIONS: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}


class MeanOverHeadsPolicy(KeyNormPolicy):
    """Looks at all heads that it is given, which are not all that the model has."""

    def score(self, inputs: ScoreInputs) -> Tensor:
        """Return the same scores for each head."""
        scores = super().score(inputs)
        return scores.mean(1, keepdim=True).expand_as(scores)


CACHES: dict[str, Callable[[LlamaForCausalLM], NexusQuantCache]] = {
    "balanced": lambda model: NexusQuantCache("balanced", config=model.config, policy=KeyNormPolicy(), **SMALL),
    "lossless": lambda model: lossless_cache(model.config, keep_ratio=0.4, policy=KeyNormPolicy()),
    "one budget": lambda model: lossless_cache(model.config, keep_ratio=0.4),
    "over heads": lambda model: lossless_cache(model.config, keep_ratio=0.4, policy=MeanOverHeadsPolicy()),
}


def converse(model: LlamaForCausalLM, cache: NexusQuantCache) -> dict[str, Any]:
    """Generate in two turns and return the text, and what each layer keeps of it."""
    text = generate(model, prompt(60, 2), cache, 16)
    text = generate(model, torch.cat([text, prompt(30, 2, seed=1)], -1), cache, 16)
    body = cache.layers[0].state.body
    assert body is not None
    return {
        "text": text,
        "positions": [kept_positions(cache, index) for index in range(2)],
        "kept": [kept_mask(cache, index).sum((1, 2)) for index in range(2)],
        "codes": [side.words.stored().clone() for side in (body.keys, body.values)],
    }


def main(model_folder: str, results_folder: str) -> None:
    """Load one half of the model and save what it says."""
    from transformers.distributed import DistributedConfig  # noqa: PLC0415 - only where processes are started

    support.is_wanted = lambda _device: False  # plain torch, as in the tests: see conftest.py
    model = LlamaForCausalLM.from_pretrained(model_folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    results = {name: converse(model, make(model)) for name, make in CACHES.items()}
    torch.save(results, Path(results_folder) / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
