"""Time of calls on a GPU: CUDA graphs and events, medians; on a CPU the wall clock, for a look at the mechanics."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SECONDS = 0.25  # of replays
_LEAST, _MOST = 15, 300


@dataclass(frozen=True)
class Timing:
    """Time of one call.

    Attributes:
        milliseconds: The median; within a CUDA graph if the calls could be captured.
        tenth: As fast as the fastest tenth.
        ninetieth: As slow as the slowest tenth.
        launched_milliseconds: The same, launched one by one from Python, which may be slower than the GPU.
        repeats: How often all calls were repeated.
        not_captured: Why the calls could not be captured; None if they were.
    """

    milliseconds: float
    tenth: float
    ninetieth: float
    launched_milliseconds: float
    repeats: int
    not_captured: str | None = None


def copies_for(nbytes: int, device: torch.device) -> int:
    """Return how many copies of what a call reads are needed so that none is still in the L2 cache when it is read."""
    if device.type != "cuda":
        return 1
    return 3 * torch.cuda.get_device_properties(device).L2_cache_size // max(nbytes, 1) + 1


def free_memory() -> int:
    """Return the bytes that can still be allocated."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def time_calls(calls: Sequence[Callable[[], object]], device: torch.device) -> Timing:
    """Return the time of one of several calls that do the same to other data, taken in turn."""
    if device.type != "cuda":
        return _on_cpu(calls)

    def launch() -> None:
        for call in calls:
            call()

    launch()  # compiles
    launched = _replays(launch)
    try:
        graph = _captured(launch)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return _timing(launched, launched, len(calls), str(error).partition("\n")[0])
    return _timing(_replays(graph.replay), launched, len(calls), None)


def _captured(launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


def _replays(replay: Callable[[], None]) -> list[float]:
    """Return the milliseconds of each of many repetitions."""
    (first,) = _events(replay, 1)
    (first,) = _events(replay, 1)
    return _events(replay, min(max(int(1000 * _SECONDS / max(first, 1e-3)), _LEAST), _MOST))


def _events(replay: Callable[[], None], repeats: int) -> list[float]:
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def _on_cpu(calls: Sequence[Callable[[], object]]) -> Timing:
    start = time.perf_counter()
    for call in calls:
        call()
    spent = [1000 * (time.perf_counter() - start)]
    return _timing(spent, spent, len(calls), "no GPU")


def _timing(taken: list[float], launched: list[float], calls: int, not_captured: str | None) -> Timing:
    ordered = sorted(taken)
    return Timing(
        milliseconds=statistics.median(ordered) / calls,
        tenth=ordered[len(ordered) // 10] / calls,
        ninetieth=ordered[-1 - len(ordered) // 10] / calls,
        launched_milliseconds=statistics.median(launched) / calls,
        repeats=len(ordered),
        not_captured=not_captured,
    )
