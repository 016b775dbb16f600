"""Means over seeds and how sure one can be of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % interval; None where one value cannot give one."""

    mean: float
    half: float | None
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Mean ± t(0.975, n − 1) · s / √n: the two-sided 95 % Student t interval of a mean.

    s is the sample standard deviation (divided by n − 1); the n values are taken as independent draws from a normal.
    """
    n = len(values)
    half = float(stdtrit(n - 1, 0.975)) * stdev(values) / sqrt(n) if n > 1 else None
    return Interval(fmean(values), half, n)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """`interval` of the differences values[seed] − baseline[seed] over the seeds both have; None when they share none.

    Pairing takes out what a seed does to both alike (its data, its clients), so it is narrower than two intervals apart.
    """
    shared = sorted(values.keys() & baseline.keys())
    return interval([values[seed] - baseline[seed] for seed in shared]) if shared else None


def mean_or_none(numbers: Sequence[float]) -> float | None:
    """The mean; None of no numbers."""
    return fmean(numbers) if numbers else None
