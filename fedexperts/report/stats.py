"""Means over seeds, paired differences over seeds and test examples, and what such differences can show."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log, sqrt
from statistics import fmean, stdev, variance

import numpy as np
from jaxtyping import Float
from scipy.special import nctdtrinc, stdtr, stdtrit

LEVEL = 0.95  # of intervals; 1 − LEVEL is the share of differences found by chance that tests allow
POWER = 0.8
DRAWS = 1000  # of a bootstrap: its standard error is off by about 2 %


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values and the half width of its 95 % confidence interval, which is None for a single value."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its standard error.

    error: None if there is nothing to estimate it from; 0 if no difference was ever another one. over: "seeds", "clients" (of a
    single seed) or "seeds and examples".
    """

    mean: float
    error: float | None
    freedom: float  # degrees of freedom of Student's t
    n: int  # seeds
    over: str = "seeds"

    @property
    def interval(self) -> Interval:
        """Mean ± t(0.975, freedom) · error."""
        half = None if self.error is None else float(stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.error
        return Interval(self.mean, half, self.n)

    @property
    def p(self) -> float | None:
        """The two-sided p value of Student's t test of no difference; None without a standard error above 0."""
        return 2 * float(stdtr(self.freedom, -abs(self.mean) / self.error)) if self.error else None

    @property
    def detectable(self) -> float | None:
        """The true difference that the test would find in 80 % of repetitions with this error, at p < 0.05 without correction.

        The noncentrality δ at which P(T > t(0.975, freedom)) = 0.8, times the error; T has the noncentral t distribution.
        """
        if not self.error:
            return None
        return float(nctdtrinc(self.freedom, 1 - POWER, stdtrit(self.freedom, (1 + LEVEL) / 2))) * self.error


@dataclass(frozen=True)
class Paired:
    """A paired difference in one seed: of the score of an example, or of the means over `weight` examples of a client."""

    seed: int
    task: str
    unit: Hashable  # the example, which other seeds may have too, or the client
    difference: float
    weight: float = 1.0


def interval(values: Sequence[float]) -> Interval:
    """Mean ± t(0.975, n − 1) · s / √n: the two-sided 95 % Student t interval of a mean.

    s is the sample standard deviation (divided by n − 1); the n values are assumed to be independent and normally distributed.
    """
    n = len(values)
    half = float(stdtrit(n - 1, 0.975)) * stdev(values) / sqrt(n) if n > 1 else None
    return Interval(fmean(values), half, n)


def over_seeds(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """The mean of values[seed] − baseline[seed] over the seeds that both have, with the error s / √n; None if there are none.

    Pairing removes the effect of a seed on both (its data, its clients), so the error is smaller than that of unpaired means.
    """
    each = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    error = stdev(each) / sqrt(len(each)) if len(each) > 1 else None
    return Difference(fmean(each), error, len(each) - 1, len(each)) if each else None


def over_clients(differences: Sequence[Paired]) -> Difference | None:
    """The mean difference of a single seed, with an error over its clients; None if a task has fewer than two of them.

    It says how the result would vary with other clients and examples, and nothing of other seeds.
    """
    clients = _least_units(differences)
    if clients < 2:
        return None
    error = float(np.std(bootstrap(differences), ddof=1))
    return Difference(_mean(differences), error, clients - 1, 1, "clients")


def over_seeds_and_examples(differences: Sequence[Paired]) -> Difference | None:
    """The mean difference with an error over seeds and over test examples; None for fewer than two seeds, or examples of a task.

    With the means D_s of S seeds, Var(mean) = E[s² / S] + the mean covariance of two seeds, where s² is the sample variance of
    the D_s. Seeds are independent but for the examples that they share, so the covariance is that over examples: of a bootstrap
    that draws an example with its differences in all seeds. It is near 0 where each seed has examples of its own, and never
    taken as negative. Degrees of freedom: Welch and Satterthwaite.
    """
    seeds = len({each.seed for each in differences})
    examples = _least_units(differences)
    if seeds < 2 or examples < 2:
        return None
    of_seeds = variance([_mean(each) for each in _by(differences, lambda each: each.seed).values()]) / seeds
    drawn = bootstrap(differences)
    covariances = np.var(drawn.sum(1), ddof=1) - np.var(drawn, axis=0, ddof=1).sum()
    of_examples = max(float(covariances) / (seeds * (seeds - 1)), 0.0)
    total = of_seeds + of_examples
    spread = of_seeds**2 / (seeds - 1) + of_examples**2 / (examples - 1)
    freedom = total**2 / spread if spread else seeds - 1
    return Difference(_mean(differences), sqrt(total), freedom, seeds, "seeds and examples")


def bootstrap(differences: Sequence[Paired]) -> Float[np.ndarray, "draws seeds"]:
    """The means of the seeds in DRAWS samples of the units of each task.

    Of the n units of a task a sample has n − 1, drawn with replacement, so that the variance of a mean is s² / n without bias
    (Rao and Wu, "Resampling Inference with Complex Survey Data", JASA 1988). A seed of whose units it has none keeps its own
    mean. The samples depend on nothing but the numbers of units.
    """
    seeds = sorted({each.seed for each in differences})
    total, tasks = np.zeros((DRAWS, len(seeds))), np.zeros(len(seeds))
    for number, rows in enumerate(_by(differences, lambda each: each.task).values()):
        places = {unit: place for place, unit in enumerate(dict.fromkeys(each.unit for each in rows))}
        sums, weights = np.zeros((2, len(places), len(seeds)))
        for each in rows:
            at = places[each.unit], seeds.index(each.seed)
            sums[at] += each.weight * each.difference
            weights[at] += each.weight
        drawn, there = _samples(len(places), number), weights.sum(0) > 0
        weight = drawn @ weights
        own = sums.sum(0) / np.where(there, weights.sum(0), 1)
        total += np.where(weight > 0, drawn @ sums / np.where(weight > 0, weight, 1), own)
        tasks += there
    return total / tasks


def holm(values: Sequence[float | None]) -> list[float | None]:
    """The p values of a family of tests, corrected for their number (Holm, Scand. J. Statist. 1979); None stays None.

    Those of k tests, from the smallest, are multiplied by k, k − 1, …, 1; none is smaller than one before it, or above 1.
    """
    tested = sorted((p, index) for index, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True)
class Ratio:
    """A geometric mean of `n` paired ratios and the ends of its 95 % interval, which are None for a single one."""

    mean: float
    low: float | None
    high: float | None
    n: int


def ratio(pairs: Sequence[tuple[float, float]]) -> Ratio | None:
    """The ratios one / other: `interval` of their logarithms, taken back; None without pairs. All numbers are above 0."""
    if not pairs:
        return None
    logs = interval([log(one / other) for one, other in pairs])
    low, high = (None, None) if logs.half is None else (exp(logs.mean - logs.half), exp(min(logs.mean + logs.half, 700.0)))
    return Ratio(exp(logs.mean), low, high, logs.n)


def mean_or_none(numbers: Sequence[float]) -> float | None:
    """The mean of `numbers`; None if there are none."""
    return fmean(numbers) if numbers else None


def _mean(differences: Sequence[Paired]) -> float:
    """The mean over seeds of the mean over tasks of the weighted mean difference."""
    by_seed = _by(differences, lambda each: each.seed).values()
    return fmean(fmean(_weighted(task) for task in _by(seed, lambda each: each.task).values()) for seed in by_seed)


def _weighted(differences: Sequence[Paired]) -> float:
    return sum(each.weight * each.difference for each in differences) / sum(each.weight for each in differences)


def _least_units(differences: Sequence[Paired]) -> int:
    """The number of different units of the task that has fewest; 0 without differences."""
    return min((len({row.unit for row in rows}) for rows in _by(differences, lambda each: each.task).values()), default=0)


def _by(differences: Sequence[Paired], key: Callable[[Paired], Hashable]) -> dict[Hashable, list[Paired]]:
    groups: dict[Hashable, list[Paired]] = {}
    for each in differences:
        groups.setdefault(key(each), []).append(each)
    return groups


@lru_cache(maxsize=16)
def _samples(units: int, task: int) -> Float[np.ndarray, "draws units"]:
    """How often each of DRAWS samples contains each of the units of the `task`th task."""
    generator = np.random.default_rng([units, task])
    return generator.multinomial(units - 1, np.full(units, 1 / units), size=DRAWS).astype(np.float32)
