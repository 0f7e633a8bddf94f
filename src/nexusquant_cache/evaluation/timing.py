"""Time per generated token against the plain cache, in one run."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from nexusquant_cache.evaluation.caches import PLAIN, Prefilled, Progress, fill
from nexusquant_cache.evaluation.clock import now
from nexusquant_cache.releases import CACHE


@dataclass(frozen=True)
class StepTime:
    """Time of a generation step.

    Attributes:
        milliseconds: Per token; the median of the rounds.
        relative: Times the plain cache's; the median of the ratios within each round, which a load that
            changes from round to round does not touch.
        relative_cpu: The same of the seconds that all threads of this process spent on CPUs, which another process
            does not touch much.
        rounds: Milliseconds per token of each round.
    """

    milliseconds: float
    relative: float
    relative_cpu: float
    rounds: tuple[float, ...]


@torch.no_grad()
def time_steps(  # noqa: PLR0913 - all but three have defaults
    model: PreTrainedModel,
    plain: Prefilled,
    compressed: Mapping[str, Cache],
    *,
    rounds: int = 3,
    steps: int = 16,
    progress: Progress | None = None,
) -> dict[str, StepTime]:
    """Time generation steps of several caches in turn, the plain one always among them.

    All caches start from the same tokens and take single steps in turn, in alternating order, so that all meet
    the same load of the machine.  The first step is not counted.  With 16 steps a round includes one encoding of
    tokens that leave the exact tail (`CacheConfig.flush_length`).

    Args:
        model: A causal language model of transformers.
        plain: The prompt; not changed.
        compressed: The caches to time, by name, which hold the prompt; they are filled.
        rounds: Rounds.
        steps: Steps per round.
        progress: Called after every step of all caches with the steps done and the total.

    Returns:
        The times by name; the plain cache's under ``"plain"``.
    """
    caches = {PLAIN: fill(DynamicCache, plain), **compressed}
    tokens = {name: torch.zeros(1, 1, dtype=torch.long, device=model.device) for name in caches}
    spent: dict[str, list[float]] = {name: [] for name in caches}
    spent_on_cpus: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(rounds * steps + 1):
        for name in caches if turn % 2 == 0 else reversed(caches):
            start, cpu = now(), time.process_time()
            logits = model(input_ids=tokens[name], **{CACHE: caches[name]}, use_cache=True).logits
            tokens[name] = logits[:, -1].argmax(-1, keepdim=True)
            spent[name].append(1000 * (now() - start))
            spent_on_cpus[name].append(time.process_time() - cpu)
        if progress is not None:
            progress(turn, rounds * steps)
    times, cpu_times = (
        {name: _round_means(taken[1:], steps) for name, taken in each.items()} for each in (spent, spent_on_cpus)
    )
    return {
        name: StepTime(
            milliseconds=statistics.median(taken),
            relative=_median_ratio(taken, times[PLAIN]),
            relative_cpu=_median_ratio(cpu_times[name], cpu_times[PLAIN]),
            rounds=tuple(taken),
        )
        for name, taken in times.items()
    }


def _median_ratio(taken: list[float], plain: list[float]) -> float:
    # The clock of processor time is coarse on some systems: by it a round may take none.
    ratios = [a / b for a, b in zip(taken, plain, strict=True) if b]
    return statistics.median(ratios) if ratios else math.nan


def _round_means(taken: list[float], steps: int) -> list[float]:
    return [statistics.fmean(taken[start : start + steps]) for start in range(0, len(taken), steps)]
