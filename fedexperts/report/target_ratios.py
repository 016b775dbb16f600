"""The cost of each method to reach the target, as a multiple of the baseline's: paired ratios with their intervals."""

from collections.abc import Iterator
from dataclasses import replace

from fedexperts.report import axes, targets
from fedexperts.report.axes import Axis
from fedexperts.report.read import Groups, Settings, all_runs
from fedexperts.report.stats import Ratio
from fedexperts.report.table_format import NONE, Table, number
from fedexperts.report.targets import Against


def tables(settings: Settings, baseline: str) -> tuple[Table, ...]:
    """A table for each setting that has a target, the baseline and another method."""
    each = {name: table(groups, baseline) for name, groups in settings.items()}
    return tuple(replace(one, title=f"{name}: {one.title}" if name else one.title) for name, one in each.items() if one.rows)


def table(groups: Groups, baseline: str) -> Table:
    """The ratios on each axis for each share of the overall target, and how many seeds get there."""
    used = measured_axes(groups)
    rows = []
    for method, share, by_axis in ratios(groups, baseline, None):
        counts = by_axis[used[0].name]
        counted = (counts.both, counts.only_method, counts.only_baseline, counts.neither)
        rows.append((method, f"{100 * share:.0f} %", *(cell(by_axis[axis.name].ratio) for axis in used), *map(str, counted)))
    return Table(
        f"Cost to the target relative to {baseline}",
        ("method", "of the target", *(axis.cost for axis in used), "both reach it", "only it", f"only {baseline}", "neither"),
        tuple(rows),
        note=f"Geometric mean of the ratios method / {baseline} in the same seed, with the 95 % Student t interval of their "
        "logarithms. Below 1: cheaper; with 1 in the interval, the two are not told apart. The ratio is over the seeds in which "
        "both reach the target. The last columns count these and the others, which it leaves out: if these are many, it flatters "
        "the method that fails more often.",
        text_columns=(0, 1),
    )


def ratios(groups: Groups, baseline: str, task: str | None) -> Iterator[tuple[str, float, dict[str, Against]]]:
    """(method, share, axis → its ratio), for each method but the baseline; none without a target."""
    goal = targets.target(groups, task)
    if goal is None or not groups.get(baseline):
        return
    for method, runs in groups.items():
        for share in targets.SHARES if runs and method != baseline else ():
            yield (
                method,
                share,
                {axis.name: targets.against(runs, groups[baseline], task, goal, share, axis) for axis in measured_axes(groups)},
            )


def measured_axes(groups: Groups) -> list[Axis]:
    """The axes for which all runs have data."""
    return [axis for axis in axes.AXES.values() if all(axis.of(run) for run in all_runs(groups))]


def cell(ratio: Ratio | None) -> str:
    """`mean (low–high)`, or the mean alone for a single seed."""
    if ratio is None:
        return NONE
    ends = "" if ratio.low is None or ratio.high is None else f" ({number(ratio.low)}–{number(ratio.high)})"
    return f"{number(ratio.mean)}{ends}"
