"""Means over seeds and their confidence intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values and the half width of its 95 % confidence interval, which is None for a single value."""

    mean: float
    half: float | None
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Mean ± t(0.975, n − 1) · s / √n: the two-sided 95 % Student t interval of a mean.

    s is the sample standard deviation (divided by n − 1); the n values are assumed to be independent and normally distributed.
    """
    n = len(values)
    half = float(stdtrit(n - 1, 0.975)) * stdev(values) / sqrt(n) if n > 1 else None
    return Interval(fmean(values), half, n)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """`interval` of the differences values[seed] − baseline[seed] over the seeds that both have; None if there are none.

    Pairing removes the effect of a seed on both (its data, its clients), so the interval is narrower than that of unpaired means.
    """
    shared = sorted(values.keys() & baseline.keys())
    return interval([values[seed] - baseline[seed] for seed in shared]) if shared else None


def mean_or_none(numbers: Sequence[float]) -> float | None:
    """The mean of `numbers`; None if there are none."""
    return fmean(numbers) if numbers else None
