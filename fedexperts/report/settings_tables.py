"""The tables over several settings: how good each method is in each, how much it varies, how soon it gets near the best."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from fedexperts.report import axes, comparison_tables, expert_sets, measures, scores, targets
from fedexperts.report.axes import Axis
from fedexperts.report.expert_sets import Held
from fedexperts.report.read import Groups, RunResults, Settings, all_runs
from fedexperts.report.table_format import NONE, Table, number, pm, whole, with_unit
from fedexperts.report.targets import Target


def all_tables(settings: Settings, baseline: str) -> tuple[Table, ...]:
    """All tables of several settings, those without rows left out: over them, then within each."""
    within = [table for name in settings for table in of_setting(settings, name, baseline)]
    every = [overall(settings), *by_task(settings), *to_target(settings), held(settings), *within]
    return tuple(table for table in every if table.rows)


def overall(settings: Settings) -> Table:
    """Each method's overall quality in each setting, and its coefficient of variation over them, overall and by task."""
    varied = [None, *tasks(settings)]
    rows = (
        (method, *_qualities(settings, method, None), *(_variation(settings, method, task) for task in varied))
        for method in methods(settings)
    )
    return Table(
        "Over the settings: overall quality",
        ("method", *_heads(settings, None), *(f"variation, {'overall' if task is None else task}" for task in varied)),
        tuple(rows),
        note=f"{_note(settings)} Variation: the coefficient of variation of the seeds' means over the settings, as the sample "
        "standard deviation (divided by n − 1) over the mean; less is steadier.",
    )


def by_task(settings: Settings) -> Iterator[Table]:
    """For each task, each method's quality in each setting."""
    for task in tasks(settings):
        rows = ((method, *_qualities(settings, method, task)) for method in methods(settings))
        yield Table(f"Over the settings: {task}", ("method", *_heads(settings, task)), tuple(rows), note=_note(settings))


def to_target(settings: Settings) -> tuple[Table, ...]:
    """What each method takes to the `SHARES` of the overall target of each setting: rounds, bytes and virtual time."""
    every = (_to_target(settings, axis) for axis in axes.AXES.values())
    return tuple(table for table in every if table.rows)


def _to_target(settings: Settings, axis: Axis) -> Table:
    """On one axis; without rows where no run has it."""
    goals = {name: goal for name, groups in settings.items() if (goal := targets.target(groups, None)) and has_axis(groups, axis)}
    asked = [(name, goal, share) for name, goal in goals.items() for share in targets.SHARES]
    rows = (
        (method, *(_taken(settings[name][method], goal, share, axis) for name, goal, share in asked))
        for method in methods(settings)
    )
    told = "; ".join(f"{name} {_shown(goal)} ({goal.method})".lstrip() for name, goal in goals.items())
    cost = with_unit(axis.cost, axis.unit)
    return Table(
        f"{cost[0].upper()}{cost[1:]} to 90 % and 99 % of the target",
        ("method", *(f"{name}, {percent(share)}".removeprefix(", ") for name, _, share in asked)),
        tuple(rows) if asked else (),
        note="Up to the first evaluated round in which a run's overall quality is that share of the target: the mean over the "
        "seeds that get there, and how many do. The target is the best final overall quality, as a mean over seeds, of the "
        f"federated methods (local and centralized training set none): {told}. A perplexity is there when the target is that "
        f"share of it. {axis.note}".rstrip(),
    )


def held(settings: Settings) -> Table:
    """The experts that clients held the first and the last time each trained."""
    times = {"first": expert_sets.held_first, "last": expert_sets.held_last}
    rows = (
        (method, *(_held(groups[method], when) for groups in settings.values() for when in times.values()))
        for method in methods(settings)
    )
    runs = [run for groups in settings.values() for run in all_runs(groups)]
    return Table(
        f"Experts held by a client, of {' or '.join(dict.fromkeys(str(expert_sets.experts_of(run)) for run in runs))}",
        ("method", *(f"{name}, {time}" for name in settings for time in times)),
        tuple(row for row in rows if set(row[1:]) != {NONE}),
        note="The first and the last time each client trained: the mean over clients and seeds, and the least and most of any.",
    )


def of_setting(settings: Settings, name: str, baseline: str) -> list[Table]:
    """The comparison within a setting, and the differences from the baseline where that was run there."""
    groups = there(settings[name])
    versus = [comparison_tables.differences(groups, baseline)] if baseline in groups and len(groups) > 1 else []
    tables = [comparison_tables.comparison(groups), *versus, *comparison_tables.against_base(groups)]
    return [replace(table, title=f"{name}: {table.title}") for table in tables]


def there(groups: Groups) -> Groups:
    """The methods that have runs."""
    return {method: runs for method, runs in groups.items() if runs}


def variation(values: Sequence[float]) -> float | None:
    """The coefficient of variation: the sample standard deviation (divided by n − 1) over the mean; None below two values."""
    return stdev(values) / fmean(values) if len(values) > 1 and fmean(values) else None


def seed_means(settings: Settings, method: str, task: str | None) -> dict[str, float]:
    """Setting → the mean over seeds of the method's quality there, in the settings that have it."""
    ends = {
        name: measures.over_seeds(measures.quality(all_runs(groups), task), groups[method]) for name, groups in settings.items()
    }
    return {name: each.mean for name, each in ends.items() if each is not None}


def tasks(settings: Settings) -> list[str]:
    """The tasks of all settings."""
    return scores.tasks([run for groups in settings.values() for run in all_runs(groups)])


def methods(settings: Settings) -> list[str]:
    """The methods, which all settings name alike."""
    return list(next(iter(settings.values())))


def variation_of(settings: Settings, method: str, task: str | None) -> float | None:
    """`variation` over the settings; None where their qualities are not in one unit."""
    units = {
        scores.unit(all_runs(groups), task)
        for groups in settings.values()
        if task is None or task in scores.tasks(all_runs(groups))
    }
    return variation(list(seed_means(settings, method, task).values())) if len(units) == 1 else None


def _variation(settings: Settings, method: str, task: str | None) -> str:
    """It, and of how many settings where not of all that have the task."""
    found = variation_of(settings, method, task)
    own = len(seed_means(settings, method, task))
    most = max(len(seed_means(settings, other, task)) for other in methods(settings))
    return NONE if found is None else f"{found:.4f}" + (f" ({own} of {most})" if own < most else "")


def _qualities(settings: Settings, method: str, task: str | None) -> Iterator[str]:
    for groups in settings.values():
        measure = measures.quality(all_runs(groups), task)
        yield pm(measures.over_seeds(measure, groups[method]), measure.unit)


def _heads(settings: Settings, task: str | None) -> Iterator[str]:
    return (with_unit(name, scores.unit(all_runs(groups), task)) for name, groups in settings.items())


def _shown(goal: Target) -> str:
    return f"{goal.value:.1f} %" if goal.unit else number(goal.value)


def _taken(runs: Sequence[RunResults], goal: Target, share: float, axis: Axis) -> str:
    found = targets.taken_to(runs, None, goal, share, axis)
    shown = number if axis.unit else whole
    reached = f"{shown(found.mean)} ({found.n}" if found else f"{NONE} (0"
    return f"{reached} of {len(runs)})" if any(map(axis.of, runs)) else NONE


def has_axis(groups: Groups, axis: Axis) -> bool:
    return any(axis.of(run) for run in all_runs(groups))


def _held(runs: Sequence[RunResults], when: Callable[[RunResults], Held | None]) -> str:
    found = [held for run in runs if (held := when(run))]
    if not found:
        return NONE
    mean, least, most = fmean(held.mean for held in found), min(held.least for held in found), max(held.most for held in found)
    return f"{mean:.1f} ({least}–{most})"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _note(settings: Settings) -> str:
    """What ± is over the settings, and what was scored."""
    every = {f"{name}: {method}": runs for name, groups in settings.items() for method, runs in groups.items()}
    return f"{comparison_tables.interval_note(every)} {scores.scored_note(all_runs(every))}"
