"""The target quality of a setting, and what a run takes to get near it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedexperts.report import axes, measures, scores
from fedexperts.report.axes import Axis
from fedexperts.report.read import Groups, RunResults, all_runs
from fedexperts.report.stats import Interval, interval

SHARES = (0.9, 0.99)  # of the target, whose first rounds are told


@dataclass(frozen=True)
class Target:
    """The best quality that a federated method ends with in a setting, as the mean over its seeds."""

    method: str
    value: float  # in `unit`
    unit: str

    def reached(self, value: float, share: float) -> bool:
        """Whether `value` is `share` of the target; a perplexity is, when the target is `share` of it."""
        return value >= share * self.value if self.unit == "%" else share * value <= self.value


def target(groups: Groups, task: str | None) -> Target | None:
    """The target of `task` (None: overall); None where no federated method got anywhere. References set none."""
    measure = measures.quality(all_runs(groups), task)
    ends = {
        label: fmean(values)
        for label, runs in groups.items()
        if not any(run.plan.reference for run in runs) and (values := measures.by_seed(measure, runs).values())
    }
    best = (max if measure.unit == "%" else min)(ends, key=lambda label: ends[label], default=None)
    return Target(best, ends[best], measure.unit) if best and ends[best] else None


def first_round(run: RunResults, task: str | None, goal: Target, share: float) -> int | None:
    """The first evaluated round at which the run reaches `share` of `goal`; None where it never does."""
    values = {row.round: row.value for row in scores.evaluated(run, None, task) if row.value is not None}
    return next((round for round, value in values.items() if goal.reached(scores.shown(value, goal.unit), share)), None)


def taken_to(
    runs: Sequence[RunResults], task: str | None, goal: Target, share: float, axis: Axis = axes.BY_ROUNDS
) -> Interval | None:
    """Where on `axis` the `first_round` lies, over the seeds that get there and have the axis; None where none does."""
    found = [(first_round(run, task, goal, share), axis.of(run)) for run in runs]
    reached = [place(round) for round, place in found if round is not None and place is not None]
    return interval(reached) if reached else None
