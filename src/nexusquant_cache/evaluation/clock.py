"""The clock of all timings."""

import time

import torch


def now() -> float:
    """Return the time in seconds once the GPU, if there is one, has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
