"""The target quality of a setting, and the cost of getting near it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedexperts.report import axes, measures, scores
from fedexperts.report.axes import Axis
from fedexperts.report.read import Groups, RunResults, all_runs
from fedexperts.report.stats import Interval, interval

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
    ends = [(first_round(run, task, goal, share), axis.of(run)) for run in runs]
    reached = [place(round) for round, place in ends if round is not None and place is not None]
    return interval(reached) if reached else None
