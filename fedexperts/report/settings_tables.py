"""The tables of several settings: each method's quality in each, its variation over them, and its cost to reach the target."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from fedexperts.report import (
    axes,
    comparison_tables,
    expert_sets,
    measures,
    reference_lines,
    scores,
    target_ratios,
    targets,
    told_apart,
)
from fedexperts.report.axes import Axis
from fedexperts.report.expert_sets import ExpertCounts
from fedexperts.report.read import Groups, RunResults, Settings, all_runs, by_label
from fedexperts.report.table_format import NONE, Table, count, number, plus_minus, with_unit
from fedexperts.report.targets import Target


def all_tables(settings: Settings, baseline: str) -> tuple[Table, ...]:
    """All tables of several settings that have rows: those over all settings, then those within each."""
    within = [table for name in settings for table in of_setting(settings, name, baseline)]
    ends = (*to_target(settings), *target_ratios.tables(settings, baseline))
    every = [overall(settings), *by_task(settings), *ends, assigned_experts(settings), *within]
    return tuple(table for table in every if table.rows)


def overall(settings: Settings) -> Table:
    """Each method's overall quality in each setting, and its coefficient of variation over them, overall and by task."""
    overall_and_tasks = [None, *tasks(settings)]
    rows = (
        (method, *_qualities(settings, method, None), *(_variation(settings, method, task) for task in overall_and_tasks))
        for method in methods(settings)
    )
    variations = [""] * len(overall_and_tasks)
    return Table(
        "Over the settings: overall quality",
        ("method", *_heads(settings, None), *(f"variation, {'overall' if task is None else task}" for task in overall_and_tasks)),
        tuple(rows),
        note=f"{told_apart_in_each(settings)} {_note(settings)} Variation: the coefficient of variation, over the settings, of "
        "the means over seeds: sample standard deviation (divided by n − 1) over mean; lower is more stable.".lstrip(),
    ).above([(*row, *variations) for row in _reference_rows(settings, None)])


def by_task(settings: Settings) -> Iterator[Table]:
    """For each task, the quality of each method in each setting."""
    for task in tasks(settings):
        rows = ((method, *_qualities(settings, method, task)) for method in methods(settings))
        table = Table(f"Over the settings: {task}", ("method", *_heads(settings, task)), tuple(rows), note=_note(settings))
        yield table.above(_reference_rows(settings, task))


def _reference_rows(settings: Settings, task: str | None) -> list[tuple[str, ...]]:
    """A row for each reference line, with what it scores in each setting."""
    lines = {name: reference_lines.of_groups(groups) for name, groups in settings.items()}
    labels = dict.fromkeys(label for each in lines.values() for label in each)
    quality = {name: measures.quality(all_runs(groups), task) for name, groups in settings.items()}
    return [
        (
            label,
            *(
                plus_minus(measures.over_seeds(quality[name], lines[name].get(label, ())), quality[name].unit)
                for name in settings
            ),
        )
        for label in labels
    ]


def to_target(settings: Settings) -> tuple[Table, ...]:
    """The rounds, bytes and virtual time that each method needs to reach `SHARES` of the overall target of each setting."""
    every = (_to_target(settings, axis) for axis in axes.AXES.values())
    return tuple(table for table in every if table.rows)


def _to_target(settings: Settings, axis: Axis) -> Table:
    """The costs on one axis; without rows if no run has it."""
    goals = {name: goal for name, groups in settings.items() if (goal := targets.target(groups, None)) and has_axis(groups, axis)}
    cells = [(name, goal, share) for name, goal in goals.items() for share in targets.SHARES]
    rows = (
        (method, *(_cost_to_target(settings[name][method], goal, share, axis) for name, goal, share in cells))
        for method in methods(settings)
    )
    values = "; ".join(f"{name} {_target_value(goal)} ({goal.method})".lstrip() for name, goal in goals.items())
    cost = with_unit(axis.cost, axis.unit)
    return Table(
        f"{cost[0].upper()}{cost[1:]} to 90 % and 99 % of the target",
        ("method", *(f"{name}, {percent(share)}".removeprefix(", ") for name, _, share in cells)),
        tuple(rows) if cells else (),
        note="Up to the first evaluated round in which the overall quality of a run reaches that share of the target: the mean "
        "over the seeds that reach it, and how many do. The target is the best final overall quality, as a mean over seeds, of "
        f"the federated methods (reference methods do not set it): {values}. A perplexity reaches a share when the target is at "
        f"least that share of it. {axis.note}".rstrip(),
    )


def assigned_experts(settings: Settings) -> Table:
    """How many experts clients were assigned in the first and the last round that each trained in."""
    times = {"first": expert_sets.assigned_first, "last": expert_sets.assigned_last}
    rows = (
        (method, *(_expert_counts(groups[method], when) for groups in settings.values() for when in times.values()))
        for method in methods(settings)
    )
    runs = [run for groups in settings.values() for run in all_runs(groups)]
    return Table(
        f"Experts held by a client, of {' or '.join(dict.fromkeys(str(expert_sets.total_experts(run)) for run in runs))}",
        ("method", *(f"{name}, {time}" for name in settings for time in times)),
        tuple(row for row in rows if set(row[1:]) != {NONE}),
        note="In the first and the last round that each client trained in: mean over clients and seeds (least–most).",
    )


def of_setting(settings: Settings, name: str, baseline: str) -> list[Table]:
    """The comparison within a setting, and the differences from the baseline if that was run there."""
    groups = with_runs(settings[name])
    differ = [comparison_tables.differences(groups, baseline)] if baseline in groups and len(groups) > 1 else []
    versus = [*told_apart.tables(groups, baseline), *differ]
    tables = [comparison_tables.comparison(groups), *versus, *comparison_tables.against_base(groups)]
    return [replace(table, title=f"{name}: {table.title}") for table in tables]


def with_runs(groups: Groups) -> Groups:
    """The methods that have runs."""
    return {method: runs for method, runs in groups.items() if runs}


def variation(values: Sequence[float]) -> float | None:
    """The coefficient of variation: sample standard deviation (divided by n − 1) over mean; None for fewer than two values."""
    return stdev(values) / fmean(values) if len(values) > 1 and fmean(values) else None


def seed_means(settings: Settings, method: str, task: str | None) -> dict[str, float]:
    """Setting → the method's quality as the mean over seeds, in the settings that have it."""
    ends = {
        name: measures.over_seeds(measures.quality(all_runs(groups), task), groups[method]) for name, groups in settings.items()
    }
    return {name: each.mean for name, each in ends.items() if each is not None}


def tasks(settings: Settings) -> list[str]:
    """The tasks of all settings."""
    return scores.tasks([run for groups in settings.values() for run in all_runs(groups)])


def methods(settings: Settings) -> list[str]:
    """The methods, which are the same in all settings."""
    return list(next(iter(settings.values())))


def variation_of(settings: Settings, method: str, task: str | None) -> float | None:
    """`variation` of the quality over the settings; None if the settings have different units."""
    units = {
        scores.unit(all_runs(groups), task)
        for groups in settings.values()
        if task is None or task in scores.tasks(all_runs(groups))
    }
    return variation(list(seed_means(settings, method, task).values())) if len(units) == 1 else None


def _variation(settings: Settings, method: str, task: str | None) -> str:
    """`variation_of` as a cell, with the number of settings if the method lacks some that have the task."""
    value = variation_of(settings, method, task)
    own = len(seed_means(settings, method, task))
    most = max(len(seed_means(settings, other, task)) for other in methods(settings))
    return NONE if value is None else f"{value:.4f}" + (f" ({own} of {most})" if own < most else "")


def _qualities(settings: Settings, method: str, task: str | None) -> Iterator[str]:
    for groups in settings.values():
        measure = measures.quality(all_runs(groups), task)
        yield plus_minus(measures.over_seeds(measure, groups[method]), measure.unit)


def _heads(settings: Settings, task: str | None) -> Iterator[str]:
    return (with_unit(name, scores.unit(all_runs(groups), task)) for name, groups in settings.items())


def _target_value(goal: Target) -> str:
    return f"{goal.value:.1f} %" if goal.unit else number(goal.value)


def _cost_to_target(runs: Sequence[RunResults], goal: Target, share: float, axis: Axis) -> str:
    cost = targets.cost_to_target(runs, None, goal, share, axis)
    form = number if axis.unit else count
    reached = f"{form(cost.mean)} ({cost.n}" if cost else f"{NONE} (0"
    return f"{reached} of {len(runs)})" if any(map(axis.of, runs)) else NONE


def has_axis(groups: Groups, axis: Axis) -> bool:
    """Whether any run has the data for `axis`."""
    return any(axis.of(run) for run in all_runs(groups))


def _expert_counts(runs: Sequence[RunResults], when: Callable[[RunResults], ExpertCounts | None]) -> str:
    counts = [each for run in runs if (each := when(run))]
    if not counts:
        return NONE
    least, most = min(each.least for each in counts), max(each.most for each in counts)
    return f"{fmean(each.mean for each in counts):.1f} ({least}–{most})"


def percent(share: float) -> str:
    """0.9 as `90 %`."""
    return f"{100 * share:.0f} %"


def told_apart_in_each(settings: Settings) -> str:
    """Of each setting, which methods are told apart in it, in words."""
    each = {name: told_apart.words(with_runs(groups)) for name, groups in settings.items()}
    return " ".join(f"{name}: {words}" for name, words in each.items() if words)


def _note(settings: Settings) -> str:
    """What ± means, and what was scored."""
    every = by_label(settings)
    lines = next(filter(None, map(reference_lines.note, settings.values())), "")
    return f"{comparison_tables.interval_note(every)} {scores.scored_note(all_runs(every))} {lines}".rstrip()
