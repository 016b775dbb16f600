"""All numbers of a comparison as one CSV file."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from itertools import product

from fedexperts.report import axes, comparison_tables, measures, scores, settings_tables, targets
from fedexperts.report.read import Groups, Settings, all_runs
from fedexperts.report.stats import Interval


def to_csv(settings: Settings, baseline: str) -> str:
    """The measures in each setting; its targets and what it takes to them, for each task too; the variations over them."""
    within = (line for name, groups in settings.items() for line in csv_lines(settings_tables.there(groups), baseline, name))
    targets = (line for name, groups in settings.items() for line in _csv_targets(name, settings_tables.there(groups)))
    return csv_text([*within, *targets, *_csv_variations(settings)])


def _csv_targets(name: str, groups: Groups) -> Iterator[tuple[str, ...]]:
    for task in [None, *scores.tasks(all_runs(groups))]:
        goal = targets.target(groups, task)
        if goal is not None:
            yield csv_line(name, goal.method, "target", task, goal.unit, Interval(goal.value, None, len(groups[goal.method])))
            for axis, share in product(
                (axis for axis in axes.AXES.values() if settings_tables.has_axis(groups, axis)), targets.SHARES
            ):
                for method, runs in groups.items():
                    found = targets.taken_to(runs, task, goal, share, axis)
                    measure = f"{axis.cost} to {settings_tables.percent(share)} of target"
                    yield csv_line(name, method, measure, task, axis.unit, found, len(runs))


def _csv_variations(settings: Settings) -> Iterator[tuple[str, ...]]:
    for task in [None, *settings_tables.tasks(settings)]:
        for method in settings_tables.methods(settings):
            found = settings_tables.variation_of(settings, method, task)
            if found is not None:
                yield ("", method, "variation over settings", task or "", "", "", "", repr(found))


def csv_lines(groups: Groups, baseline: str, setting: str = "") -> Iterator[tuple[str, ...]]:
    """For each method and measure the mean and interval over seeds, and the paired difference from the baseline.

    In the columns of `csv_text`.
    """
    for label, runs in groups.items():
        for measure in [
            *comparison_tables.all_measures(groups),
            *measures.HELD_IN_FULL,
            *measures.drift_layers(all_runs(groups)),
        ]:
            versus = None if label == baseline else measures.over_shared_seeds(measure, runs, groups.get(baseline, ()))
            shared, *difference = _csv_cells(versus)
            against = "" if versus is None else baseline
            name = measure.kind or measure.name
            cells = csv_line(setting, label, name, measure.task, measure.unit, measures.over_seeds(measure, runs), len(runs))
            yield (*cells, against, shared, *difference)


def csv_line(
    setting: str, method: str, measure: str, task: str | None, unit: str, value: Interval | None, of_seeds: int | None = None
) -> tuple[str, ...]:
    """The columns of a line that hold one value; `of_seeds` as many as it has, where it is not given."""
    seeds, *mean = _csv_cells(value)
    return (setting, method, measure, task or "", unit, seeds, seeds if of_seeds is None else str(of_seeds), *mean)


def csv_text(lines: Iterable[Sequence[str]]) -> str:
    """`seeds` have the value, `of_seeds` could; empty columns at the end of a line may be left out."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    value = ("setting", "method", "measure", "task", "unit", "seeds", "of_seeds", "mean", "low", "high")
    head = (*value, "baseline", "shared_seeds", "difference", "difference_low", "difference_high")
    writer.writerows([head, *([*line, *[""] * (len(head) - len(line))] for line in lines)])
    return text.getvalue()


def _csv_cells(value: Interval | None) -> Iterator[str]:
    """How many, mean, low, high; empty where there is none."""
    if value is None:
        return iter(("", "", "", ""))
    low_high = ("", "") if value.half is None else (repr(value.mean - value.half), repr(value.mean + value.half))
    return iter((str(value.n), repr(value.mean), *low_high))
