"""All numbers of a comparison as one CSV file."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from itertools import product

from fedexperts.report import (
    axes,
    comparison_tables,
    measures,
    paired,
    reference_lines,
    scores,
    settings_tables,
    target_ratios,
    targets,
    told_apart,
)
from fedexperts.report.read import Groups, Settings, all_runs
from fedexperts.report.stats import Interval
from fedexperts.report.told_apart import Pair

VALUE = ("setting", "method", "measure", "task", "unit", "seeds", "of_seeds", "mean", "low", "high")
AGAINST = (
    "baseline",
    "shared_seeds",
    "difference",
    "difference_low",
    "difference_high",
    "p_value",
    "p_value_corrected",
    "could_have_seen",
)


def to_csv(settings: Settings, baseline: str) -> str:
    """The measures in each setting, which qualities are told apart, the targets and the costs to reach them overall and for each
    task, also as multiples of the baseline's, and the variations.
    """
    present = {name: settings_tables.with_runs(groups) for name, groups in settings.items()}
    lines = (line for name, groups in present.items() for line in csv_lines(groups, baseline, name))
    apart = (line for name, groups in present.items() for line in _csv_told_apart(name, groups, baseline))
    target_lines = (line for name, groups in present.items() for line in _csv_targets(name, groups))
    ratio_lines = (line for name, groups in present.items() for line in _csv_ratios(name, groups, baseline))
    return csv_text([*lines, *apart, *target_lines, *ratio_lines, *_csv_variations(settings)])


def _csv_told_apart(name: str, groups: Groups, baseline: str) -> Iterator[tuple[str, ...]]:
    """A line for each row of the tables of `told_apart`."""
    for pair in [*told_apart.overall(groups), *told_apart.by_task(groups, baseline)] if len(groups) > 1 else ():
        value = ("", "", "", "", "")
        yield (name, pair.one, "difference in quality", pair.measure.task or "", pair.measure.unit, *value, *_csv_pair(pair))


def _csv_pair(pair: Pair) -> tuple[str, ...]:
    numbers = (pair.difference.p, pair.p, pair.difference.detectable)
    return (pair.other, *_csv_cells(pair.difference.interval), *("" if each is None else repr(each) for each in numbers))


def _csv_ratios(name: str, groups: Groups, baseline: str) -> Iterator[tuple[str, ...]]:
    """A line for each ratio of costs to the target that has a value: `seeds` reach it with both methods, of all that both ran."""
    for task in [None, *scores.tasks(all_runs(groups))]:
        for method, share, by_axis in target_ratios.ratios(groups, baseline, task):
            for axis, each in by_axis.items():
                measure = f"{axes.AXES[axis].cost} to {settings_tables.percent(share)} of target, ratio"
                counts = (str(each.both), str(each.both + each.only_method + each.only_baseline + each.neither))
                value = each.ratio and (each.ratio.mean, each.ratio.low, each.ratio.high)
                cells = ("" if number is None else repr(number) for number in value or (None, None, None))
                yield (name, method, measure, task or "", "", *counts, *cells, baseline)


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
            found = None if label == baseline else paired.difference(measure, runs, groups.get(baseline, ()))
            difference, against = (None, "") if found is None else (found.interval, baseline)
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
    head = (*VALUE, *AGAINST)
    writer.writerows([head, *([*line, *[""] * (len(head) - len(line))] for line in lines)])
    return text.getvalue()


def _csv_cells(value: Interval | None) -> Iterator[str]:
    """The columns seeds, mean, low, high; empty if there is no value."""
    if value is None:
        return iter(("", "", "", ""))
    low_high = ("", "") if value.half is None else (repr(value.mean - value.half), repr(value.mean + value.half))
    return iter((str(value.n), repr(value.mean), *low_high))
