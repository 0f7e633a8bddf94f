"""Compile what the host code really launches, for a GPU that is not there; a program that `test_kernels_compile` runs.

The interpreter does not compile, and a list of specialisations says what somebody expected to be launched.  Here the
codec and attention run as they are, on the CPU, and each launch compiles its kernel for the arguments it was given and
writes nothing.
"""

import sys
from typing import Any

import torch
import triton
from feeding import feed
from integration.tiny import SMALL, random_states, tiny_llama
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nexusquant_cache import LeveragePolicy, NexusQuantCache
from nexusquant_cache.codec import impl
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.triton import attend as triton_attend
from nexusquant_cache.codec.triton import kernels_attend as attention
from nexusquant_cache.codec.triton import kernels_decode as dense
from nexusquant_cache.codec.triton import kernels_greatest, support
from nexusquant_cache.layer.compress import _Encoding
from nexusquant_cache.layer.parts import part_of


class Driver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return self.target


def launched(kernel: Any, grid: Any) -> Any:
    """Stand for a launch."""

    def compile_only(*arguments: Any, **options: Any) -> None:
        found = kernel.run(*arguments, grid=grid, warmup=True, **options)
        found = found.result() if hasattr(found, "result") else found
        print(kernel.__name__, len(found.asm["cubin"]))  # noqa: T201 - a program

    return compile_only


def main(capability: int) -> None:
    """Encode, decode and attend, with eviction and without, keys with their phase and without."""
    driver.set_active(Driver(capability))
    triton.JITFunction.__getitem__ = launched
    for module in (attention, dense):
        module.use_asm = lambda _device: True
    # Nothing is computed, so nothing can be compared.
    support.why_not = lambda *_: None
    impl.is_right = lambda *_: True
    _Encoding._code_error = lambda *_: 0.0
    torch.empty = torch.zeros  # nothing is written there, and policies refuse what is no number
    for config, options in (
        (tiny_llama(head_dim=64).config, {"keep_ratio": 0.6, "key_bits": 1.75, "value_bits": 2.625}),
        (None, {"keep_ratio": 1.0, "key_bits": 3, "value_bits": 2.25, "transform": "hadamard"}),
    ):
        cache = NexusQuantCache("quant", config=config, policy=LeveragePolicy(), impl="triton", **SMALL, **options)
        for index in range(2):
            feed(cache, *random_states((1, 2, 100, 64), 1, torch.bfloat16), index)
        cache.compress()
        layer = part_of(cache.layers[0], 0)
        layer.dense()
        softmax = Softmax(0.125, softcap=None if config else 30.0)
        assert (
            triton_attend.attend(torch.randn(1, 8, 1, 64, dtype=torch.bfloat16), layer.held(), None, softmax)
            is not None
        )
    queries, keys = torch.randn(1, 8, 50, 80, dtype=torch.bfloat16), torch.randn(1, 2, 100, 80, dtype=torch.bfloat16)
    kernels_greatest.greatest_attention(queries, keys, range(1, 100, 2), 64)


if __name__ == "__main__":
    main(int(sys.argv[1]))
