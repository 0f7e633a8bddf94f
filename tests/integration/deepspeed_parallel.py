"""What each process of DeepSpeed's inference does; `test_engines.py` starts it, alone or with DeepSpeed's launcher.

Usage: ``deepspeed --num_accelerators 2 deepspeed_parallel.py MODEL_FOLDER RESULTS_FOLDER``
"""

import argparse
import os
from pathlib import Path

import deepspeed
import torch
from integration.tensor_parallel import CACHES, converse
from transformers import LlamaForCausalLM

from nexusquant_cache.codec.cpu import support


def main() -> None:
    """Take this process's part of the model and save what it says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--local_rank", type=int, default=0)  # from the launcher
    given = parser.parse_args()
    support.is_wanted = lambda _device: False  # plain torch, as in the tests: see conftest.py
    model = LlamaForCausalLM.from_pretrained(given.model).eval()
    parallel = {"tp_size": int(os.environ.get("WORLD_SIZE", "1"))}
    engine = deepspeed.init_inference(
        model, tensor_parallel=parallel, dtype=torch.float32, replace_with_kernel_inject=False
    )
    results = {name: converse(engine, make(model)) for name, make in CACHES.items()}
    torch.save(results, given.results / f"rank{given.local_rank}.pt")


if __name__ == "__main__":
    main()
