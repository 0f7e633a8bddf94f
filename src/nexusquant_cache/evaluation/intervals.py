"""Confidence intervals for few samples, without scipy."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t with 1, 2, ... 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL = 1.960


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval; the bounds are NaN where one sample gives none."""

    mean: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> "Interval":
        """Return the interval of an increasing function of the quantity."""
        return Interval(function(self.mean), function(self.low), function(self.high))


def mean_interval(samples: Sequence[float]) -> Interval:
    """Return the mean of independent samples with its interval by Student's t.

    Raises:
        ValueError: If there are no samples.
    """
    mean = statistics.fmean(samples)
    if len(samples) == 1:
        return Interval(mean, math.nan, math.nan)
    freedom = len(samples) - 1
    quantile = _T[freedom - 1] if freedom <= len(_T) else _NORMAL
    half = quantile * statistics.stdev(samples) / math.sqrt(len(samples))
    return Interval(mean, mean - half, mean + half)


def wilson_interval(hits: int, trials: int) -> Interval:
    """Return the rate of hits with the score interval, which stays inside [0, 1] and is right near the ends.

    Raises:
        ValueError: If there were no trials, or more hits than trials.

    References:
        Wilson (1927), "Probable inference, the law of succession, and statistical inference", J. Am. Stat.
        Assoc. 22(158), 209-212.
    """
    if not 0 <= hits <= trials or trials == 0:
        msg = f"hits must be from 0 to the number of trials, and there must be trials; got {hits} of {trials}"
        raise ValueError(msg)
    rate, weight = hits / trials, _NORMAL**2 / trials
    center = (rate + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (rate * (1 - rate) + weight / 4)) / (1 + weight)
    return Interval(rate, max(0.0, center - half), min(1.0, center + half))
