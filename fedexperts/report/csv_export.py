"""All numbers of a comparison as one CSV file."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from itertools import product

from fedexperts.report import axes, comparison_tables, measures, reference_lines, scores, settings_tables, targets
from fedexperts.report.read import Groups, Settings, all_runs
from fedexperts.report.stats import Interval


def to_csv(settings: Settings, baseline: str) -> str:
    """The measures in each setting, the targets and the costs to reach them overall and for each task, and the variations."""
    lines = (line for name, groups in settings.items() for line in csv_lines(settings_tables.with_runs(groups), baseline, name))
    target_lines = (line for name, groups in settings.items() for line in _csv_targets(name, settings_tables.with_runs(groups)))
    return csv_text([*lines, *target_lines, *_csv_variations(settings)])


def _csv_targets(name: str, groups: Groups) -> Iterator[tuple[str, ...]]:
    for task in [None, *scores.tasks(all_runs(groups))]:
        goal = targets.target(groups, task)
        if goal is not None:
            yield csv_line(name, goal.method, "target", task, goal.unit, Interval(goal.value, None, len(groups[goal.method])))
            for axis, share in product(
                (axis for axis in axes.AXES.values() if settings_tables.has_axis(groups, axis)), targets.SHARES
            ):
                for method, runs in groups.items():
                    cost = targets.cost_to_target(runs, task, goal, share, axis)
                    measure = f"{axis.cost} to {settings_tables.percent(share)} of target"
                    yield csv_line(name, method, measure, task, axis.unit, cost, len(runs))


def _csv_variations(settings: Settings) -> Iterator[tuple[str, ...]]:
    for task in [None, *settings_tables.tasks(settings)]:
        for method in settings_tables.methods(settings):
            value = settings_tables.variation_of(settings, method, task)
            if value is not None:
                yield ("", method, "variation over settings", task or "", "", "", "", repr(value))


def csv_lines(groups: Groups, baseline: str, setting: str = "") -> Iterator[tuple[str, ...]]:
    """A line for each method and measure: mean and interval over seeds, and paired difference from the baseline."""
    for label, runs in groups.items():
        for measure in [
            *comparison_tables.all_measures(groups),
            *measures.ASSIGNED_IN_FULL,
            *measures.drift_layers(all_runs(groups)),
        ]:
            difference = None if label == baseline else measures.over_shared_seeds(measure, runs, groups.get(baseline, ()))
            against = "" if difference is None else baseline
            name = measure.kind or measure.name
            cells = csv_line(setting, label, name, measure.task, measure.unit, measures.over_seeds(measure, runs), len(runs))
            yield (*cells, against, *_csv_cells(difference))
    for label, runs in reference_lines.of_groups(groups).items():
        for measure in measures.qualities(all_runs(groups)):
            if value := measures.over_seeds(measure, runs):
                yield csv_line(setting, label, measure.kind or measure.name, measure.task, measure.unit, value, len(runs))


def csv_line(
    setting: str, method: str, measure: str, task: str | None, unit: str, value: Interval | None, of_seeds: int | None = None
) -> tuple[str, ...]:
    """The first columns of a line, which hold one value; `of_seeds` defaults to the number of seeds that have the value."""
    seeds, *mean = _csv_cells(value)
    return (setting, method, measure, task or "", unit, seeds, seeds if of_seeds is None else str(of_seeds), *mean)


def csv_text(lines: Iterable[Sequence[str]]) -> str:
    """The CSV file: `seeds` have the value, of the `of_seeds` that were run; shorter lines are filled with empty columns."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    value = ("setting", "method", "measure", "task", "unit", "seeds", "of_seeds", "mean", "low", "high")
    head = (*value, "baseline", "shared_seeds", "difference", "difference_low", "difference_high")
    writer.writerows([head, *([*line, *[""] * (len(head) - len(line))] for line in lines)])
    return text.getvalue()


def _csv_cells(value: Interval | None) -> Iterator[str]:
    """The columns seeds, mean, low, high; empty if there is no value."""
    if value is None:
        return iter(("", "", "", ""))
    low_high = ("", "") if value.half is None else (repr(value.mean - value.half), repr(value.mean + value.half))
    return iter((str(value.n), repr(value.mean), *low_high))
