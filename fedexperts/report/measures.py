"""The numbers that runs are compared by, each with its unit, and their means over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean

from fedexperts.report import axes, client_metrics, expert_sets, resources, retention, scores
from fedexperts.report.expert_sets import ExpertCounts
from fedexperts.report.read import RunResults
from fedexperts.report.resources import MB
from fedexperts.report.stats import Interval, interval, mean_or_none


@dataclass(frozen=True)
class Measure:
    """A number of a run, in the unit in which it is shown; None if the run does not have it (yet)."""

    name: str
    unit: str
    of: Callable[[RunResults], float | None]
    task: str | None = None  # if it is about a single task
    kind: str = ""  # its name in CSV files, where that is without the task

    @property
    def label(self) -> str:
        """Name and unit, for a column or an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


def measures(runs: Sequence[RunResults]) -> list[Measure]:
    """All measures for comparing `runs`: quality overall, of each task and over clients, retained knowledge and router drift if
    any run has them, costs, virtual time if any run has a clock, and what methods report.
    """
    return [
        *qualities(runs),
        *against_base(runs),
        *COSTS,
        *times(runs),
        *expert_measures(runs),
        *method_metrics(runs),
    ]


def qualities(runs: Sequence[RunResults]) -> list[Measure]:
    """At the last evaluation: quality overall, of each task and over clients."""
    mean = Measure("mean over clients", scores.unit(runs, None), scores.clients_mean)
    spread = [mean, spread_of(runs, "lower"), spread_of(runs, "worst")]
    return [*quality_measures(runs), *(spread if any(scores.clients_mean(run) is not None for run in runs) else [])]


def against_base(runs: Sequence[RunResults]) -> list[Measure]:
    """Retained knowledge as the mean over clients, its difference from the base model, and router drift."""
    by_task = [make(runs, task) for task in retention.retained_tasks(runs) for make in (retained, retained_minus_base)]
    return [*by_task, *([DRIFT] if any(map(retention.drift, runs)) else [])]


def retained(runs: Sequence[RunResults], task: str) -> Measure:
    """The mean score of clients' models on a retained task."""
    in_unit = retention.retained_unit(runs, task)

    def of(run: RunResults) -> float | None:
        values = [each.value for each in retention.retained_by_client(run, task).values()]
        return mean_or_none([scores.to_unit(value, in_unit) for value in values if value is not None])

    return Measure(f"retained: {task}", in_unit, of, task, "retained")


def base(runs: Sequence[RunResults], task: str) -> Measure:
    """The score of the base model on a retained task."""
    in_unit = retention.retained_unit(runs, task)

    def of(run: RunResults) -> float | None:
        score = retention.base_score(run, task)
        return None if score is None or score.value is None else scores.to_unit(score.value, in_unit)

    return Measure(f"base: {task}", in_unit, of, task, "base")


def retained_minus_base(runs: Sequence[RunResults], task: str) -> Measure:
    """`retained` − `base` in the same run: negative if clients' models forgot (positive for a perplexity)."""
    after, before = retained(runs, task), base(runs, task)

    def of(run: RunResults) -> float | None:
        end, start = after.of(run), before.of(run)
        return None if end is None or start is None else end - start

    return Measure(f"retained − base: {task}", after.unit, of, task, "retained − base")


def drift_layers(runs: Sequence[RunResults]) -> list[Measure]:
    """The router drift of each layer, as the mean over clients."""
    labels = retention.block_labels(list(dict.fromkeys(block for run in runs for block in retention.drift(run))))
    return [Measure(f"router drift, {label}", DRIFT.unit, _drift_in(block)) for block, label in labels.items()]


def expert_measures(runs: Sequence[RunResults]) -> list[Measure]:
    """How many experts backward reached and clients sent, each if any run has it."""
    return [measure for measure in (REACHED, SENT_EXPERTS) if any(measure.of(run) is not None for run in runs)]


def method_metrics(runs: Sequence[RunResults]) -> list[Measure]:
    """The metrics that methods report, each as the mean over clients and training rounds."""
    names = dict.fromkeys(name for run in runs for name in client_metrics.of_method(run))
    return [Measure(f"metric: {name}", "", _mean_metric(name)) for name in names]


def times(runs: Sequence[RunResults]) -> list[Measure]:
    """The virtual time, if any of the runs has a clock."""
    return [TIME] if any(map(axes.has_clock, runs)) else []


def quality_measures(runs: Sequence[RunResults]) -> list[Measure]:
    """At the last evaluation: the mean over tasks, then the main metric of each task over all its clients."""
    return [quality(runs, task) for task in [None, *scores.tasks(runs)]]


def spread_of(runs: Sequence[RunResults], which: str) -> Measure:
    """A field of `Spread` over the clients of a run at the last evaluation."""
    in_unit = scores.unit(runs, None)

    def of(run: RunResults) -> float | None:
        ends = [scores.client_quality(run, client) for client in run.client_names]
        values = [end for end in ends if end is not None]
        return float(attrgetter(which)(scores.spread(values, in_unit))) if values else None

    return Measure({"worst": "worst client", "lower": "lower quartile of clients"}[which], in_unit, of)


def quality(runs: Sequence[RunResults], task: str | None) -> Measure:
    """The main metric of `task` (None: the mean over tasks) at the last evaluation, in its unit in `runs`."""
    in_unit = scores.unit(runs, task)

    def of(run: RunResults) -> float | None:
        row = scores.last_evaluation(run, None, task)
        return None if row is None or row.value is None else scores.to_unit(row.value, in_unit)

    name = "overall" if task is None else task
    return Measure(name, in_unit, of, task, "quality")


def by_seed(measure: Measure, runs: Sequence[RunResults]) -> dict[int, float]:
    """Seed → the measure, of each run that has it."""
    values = ((run.plan.seed, measure.of(run)) for run in runs)
    return {seed: value for seed, value in values if value is not None}


def over_seeds(measure: Measure, runs: Sequence[RunResults]) -> Interval | None:
    """The mean over the runs that have the measure; None if none has it."""
    values = list(by_seed(measure, runs).values())
    return interval(values) if values else None


def _drift_in(block: str) -> Callable[[RunResults], float | None]:
    return lambda run: mean_or_none(retention.drift(run).get(block, []))


def _mean_metric(name: str) -> Callable[[RunResults], float | None]:
    return lambda run: mean_or_none(client_metrics.of_method(run).get(name, []))


def _in_mb(value: float | None) -> float | None:
    return None if value is None else value / MB


def _assigned(when: Callable[[RunResults], ExpertCounts | None], which: str) -> Callable[[RunResults], float | None]:
    """A field of `ExpertCounts`."""

    def of(run: RunResults) -> float | None:
        counts = when(run)
        return None if counts is None else float(attrgetter(which)(counts))

    return of


SENT_EACH = Measure("sent per client and round", "MB", lambda run: _in_mb(resources.bytes_per_client_round(run)))
DOWN_EACH = Measure("down per client and round", "MB", lambda run: _in_mb(resources.per_client_round(run, resources.bytes_down)))
UP_EACH = Measure("up per client and round", "MB", lambda run: _in_mb(resources.per_client_round(run, resources.bytes_up)))
BEFORE = Measure("sent before the rounds per client", "MB", lambda run: _in_mb(resources.bytes_before_rounds(run)))
SENT = Measure("sent in total", "MB", lambda run: _in_mb(resources.bytes_both_ways(resources.cost_rows(run))))
PEAK = Measure("largest peak memory", "MB", lambda run: _in_mb(resources.largest_peak(run)))
MEDIAN_PEAK = Measure("median peak memory", "MB", lambda run: _in_mb(resources.median_peak(run)))
ASSIGNED = Measure("experts held", "", _assigned(expert_sets.assigned_last, "mean"))
FLOPS = Measure("FLOPs estimated", "10^12", lambda run: sum(row.flops_estimated for row in resources.cost_rows(run)) / 1e12)
SECONDS = Measure("client seconds", "s", lambda run: sum(row.seconds for row in resources.cost_rows(run)))
FAILURES = Measure("failures", "", lambda run: float(len(resources.failures(run))))
REACHED = Measure(
    "experts reached per layer and step",
    "",
    lambda run: mean_or_none([fmean(each) for each in client_metrics.reached(run).values()]),
)
SENT_EXPERTS = Measure("experts sent per client and round", "", lambda run: mean_or_none(expert_sets.num_sent(run)))
TIME = Measure("virtual time", "s", axes.virtual_seconds)
DRIFT = Measure(
    "router drift", "10^-3 nats", lambda run: mean_or_none([each for layer in retention.drift(run).values() for each in layer])
)
COSTS = (SENT_EACH, DOWN_EACH, UP_EACH, BEFORE, SENT, PEAK, MEDIAN_PEAK, ASSIGNED, FLOPS, SECONDS, FAILURES)
ASSIGNED_IN_FULL = tuple(
    Measure(f"experts held at {time}, {which}", "", _assigned(when, which))
    for time, when in (("first", expert_sets.assigned_first), ("last", expert_sets.assigned_last))
    for which in ("mean", "least", "most")
)
"""Over clients, in the first and the last round that each trained in."""
