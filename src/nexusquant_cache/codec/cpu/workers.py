"""Threads that share the work of compiled functions, which hold no lock of the interpreter."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

Work = Callable[[int, int], object]


def workers_for(tasks: int) -> int:
    """Return how many threads shall share so many tasks: none has few, and there are no more than torch uses."""
    return max(min(torch.get_num_threads(), tasks // _LEAST_TASKS), 1)


_LEAST_TASKS = 8  # chunks of tokens; fewer take less time than a thread to begin


def share(work: Work, workers: int) -> None:
    """Do work in several threads, this one among them.

    They are threads of Python's: numba has pools of its own, but the only one that is there on all platforms must not
    be used by two callers at once.

    Args:
        work: Does a part of it, given the number of the part and how many there are.
        workers: How many threads.
    """
    others = [_pool(workers).submit(work, worker, workers) for worker in range(1, workers)]
    try:
        work(0, workers)
    finally:
        for other in others:
            other.result()


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="nexusquant_cache")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
