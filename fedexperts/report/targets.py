"""The target quality of a setting, and the cost of getting near it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedexperts.report import axes, measures, scores
from fedexperts.report.axes import Axis
from fedexperts.report.read import Groups, RunResults, all_runs
from fedexperts.report.stats import Interval, Ratio, interval, ratio

SHARES = (0.9, 0.99)  # of the target quality


@dataclass(frozen=True)
class Target:
    """The best final quality of a federated method in a setting, as the mean over its seeds."""

    method: str
    value: float  # in `unit`
    unit: str

    def reached(self, value: float, share: float) -> bool:
        """Whether `value` is at least `share` of the target or, for a perplexity, the target at least `share` of `value`."""
        return value >= share * self.value if self.unit == "%" else share * value <= self.value


def target(groups: Groups, task: str | None) -> Target | None:
    """The target of `task` (None: overall), which reference methods do not set; None if no federated method scored above 0."""
    measure = measures.quality(all_runs(groups), task)
    ends = {
        label: fmean(values)
        for label, runs in groups.items()
        if not any(run.plan.reference for run in runs) and (values := measures.by_seed(measure, runs).values())
    }
    best = (max if measure.unit == "%" else min)(ends, key=lambda label: ends[label], default=None)
    return Target(best, ends[best], measure.unit) if best and ends[best] else None


def first_round(run: RunResults, task: str | None, goal: Target, share: float) -> int | None:
    """The first evaluated round in which the run reaches `share` of `goal`; None if it never does."""
    values = {row.round: row.value for row in scores.evaluations(run, None, task) if row.value is not None}
    return next((round for round, value in values.items() if goal.reached(scores.to_unit(value, goal.unit), share)), None)


def cost_to_target(
    runs: Sequence[RunResults], task: str | None, goal: Target, share: float, axis: Axis = axes.BY_ROUNDS
) -> Interval | None:
    """The position of the `first_round` on `axis`, over the seeds that reach the target and have the axis; None if none does."""
    costs = (_cost(run, task, goal, share, axis) for run in runs)
    reached = [cost for cost in costs if cost is not None]
    return interval(reached) if reached else None


@dataclass(frozen=True)
class Against:
    """The cost of a method to reach a share of a target, as a multiple of the baseline's; and how many seeds do."""

    ratio: Ratio | None  # over the seeds in which both did, after a cost above 0
    both: int
    only_method: int
    only_baseline: int
    neither: int


def against(
    runs: Sequence[RunResults],
    baseline: Sequence[RunResults],
    task: str | None,
    goal: Target,
    share: float,
    axis: Axis = axes.BY_ROUNDS,
) -> Against:
    """The ratio of the costs to `share` of `goal` on `axis`, paired over the seeds that both methods ran.

    A run that never gets there has no cost; it is counted, and the ratio is over the other seeds.
    """
    costs = [{run.plan.seed: _cost(run, task, goal, share, axis) for run in each} for each in (runs, baseline)]
    pairs = [(costs[0][seed], costs[1][seed]) for seed in sorted(costs[0].keys() & costs[1].keys())]
    return Against(
        ratio([(one, other) for one, other in pairs if one and other]),
        sum(one is not None and other is not None for one, other in pairs),
        sum(one is not None and other is None for one, other in pairs),
        sum(one is None and other is not None for one, other in pairs),
        sum(one is None and other is None for one, other in pairs),
    )


def _cost(run: RunResults, task: str | None, goal: Target, share: float, axis: Axis) -> float | None:
    """The position of the `first_round` on `axis`; None if the run never gets there, or lacks the axis."""
    round, place = first_round(run, task, goal, share), axis.of(run)
    return None if round is None or place is None else place(round)
