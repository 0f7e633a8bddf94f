"""Threads that share the work of compiled functions, which hold no lock of the interpreter."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

Work = Callable[[int, int], object]


def share(work: Work) -> None:
    """Do work in as many threads as torch uses, this one among them.

    They are threads of Python's: of numba's own pools, what is there on all platforms must not be used by two callers
    at once.

    Args:
        work: Does a part of it, given the number of the part and how many there are.
    """
    workers = torch.get_num_threads()
    others = [_pool(workers).submit(work, worker, workers) for worker in range(1, workers)]
    try:
        work(0, workers)
    finally:
        for other in others:
            other.result()


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="nexusquant_cache")
