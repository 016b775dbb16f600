"""Several settings side by side: how good each method is in each, how steady it is over them, how soon it gets near the best."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean, stdev

from fedexperts.report import measures as m
from fedexperts.report.read import RunResults
from fedexperts.report.stats import Interval, interval
from fedexperts.report.tables import (
    NONE,
    Groups,
    Table,
    against_base,
    all_runs,
    comparison,
    csv_line,
    csv_lines,
    csv_text,
    differences,
    interval_note,
    number,
    over_seeds,
    pm,
    scored_note,
    whole,
    with_unit,
)

Settings = Mapping[str, Groups]  # setting → method → its runs; all settings name the same methods, some without runs
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
    measure = m.quality(all_runs(groups), task)
    ends = {
        label: fmean(values)
        for label, runs in groups.items()
        if not any(run.plan.reference for run in runs) and (values := m.by_seed(measure, runs).values())
    }
    best = (max if measure.unit == "%" else min)(ends, key=lambda label: ends[label], default=None)
    return Target(best, ends[best], measure.unit) if best and ends[best] else None


def first_round(run: RunResults, task: str | None, goal: Target, share: float) -> int | None:
    """The first evaluated round at which the run reaches `share` of `goal`; None where it never does."""
    values = {row.round: row.value for row in m.evaluated(run, None, task) if row.value is not None}
    return next((round for round, value in values.items() if goal.reached(m.shown(value, goal.unit), share)), None)


def taken_to(
    runs: Sequence[RunResults], task: str | None, goal: Target, share: float, axis: m.Axis = m.BY_ROUNDS
) -> Interval | None:
    """Where on `axis` the `first_round` lies, over the seeds that get there and have the axis; None where none does."""
    found = [(first_round(run, task, goal, share), axis.of(run)) for run in runs]
    reached = [place(round) for round, place in found if round is not None and place is not None]
    return interval(reached) if reached else None


def variation(values: Sequence[float]) -> float | None:
    """The coefficient of variation: the sample standard deviation (divided by n − 1) over the mean; None below two values."""
    return stdev(values) / fmean(values) if len(values) > 1 and fmean(values) else None


def seed_means(settings: Settings, method: str, task: str | None) -> dict[str, float]:
    """Setting → the mean over seeds of the method's quality there, in the settings that have it."""
    ends = {name: over_seeds(m.quality(all_runs(groups), task), groups[method]) for name, groups in settings.items()}
    return {name: each.mean for name, each in ends.items() if each is not None}


def tasks(settings: Settings) -> list[str]:
    """The tasks of all settings."""
    return m.tasks([run for groups in settings.values() for run in all_runs(groups)])


def methods(settings: Settings) -> list[str]:
    """The methods, which all settings name alike."""
    return list(next(iter(settings.values())))


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
    every = (_to_target(settings, axis) for axis in m.AXES)
    return tuple(table for table in every if table.rows)


def _to_target(settings: Settings, axis: m.Axis) -> Table:
    """On one axis; without rows where no run has it."""
    goals = {name: goal for name, groups in settings.items() if (goal := target(groups, None)) and _has(groups, axis)}
    asked = [(name, goal, share) for name, goal in goals.items() for share in SHARES]
    rows = (
        (method, *(_taken(settings[name][method], goal, share, axis) for name, goal, share in asked))
        for method in methods(settings)
    )
    told = "; ".join(f"{name} {_shown(goal)} ({goal.method})".lstrip() for name, goal in goals.items())
    cost = with_unit(axis.cost, axis.unit)
    return Table(
        f"{cost[0].upper()}{cost[1:]} to 90 % and 99 % of the target",
        ("method", *(f"{name}, {_percent(share)}".removeprefix(", ") for name, _, share in asked)),
        tuple(rows) if asked else (),
        note="Up to the first evaluated round in which a run's overall quality is that share of the target: the mean over the "
        "seeds that get there, and how many do. The target is the best final overall quality, as a mean over seeds, of the "
        f"federated methods (local and centralized training set none): {told}. A perplexity is there when the target is that "
        f"share of it. {axis.note}".rstrip(),
    )


def _has(groups: Groups, axis: m.Axis) -> bool:
    return any(axis.of(run) for run in all_runs(groups))


def held(settings: Settings) -> Table:
    """The experts that clients held the first and the last time each trained."""
    times = {"first": m.held_first, "last": m.held_last}
    rows = (
        (method, *(_held(groups[method], when) for groups in settings.values() for when in times.values()))
        for method in methods(settings)
    )
    runs = [run for groups in settings.values() for run in all_runs(groups)]
    return Table(
        f"Experts held by a client, of {' or '.join(dict.fromkeys(str(m.experts_of(run)) for run in runs))}",
        ("method", *(f"{name}, {time}" for name in settings for time in times)),
        tuple(row for row in rows if set(row[1:]) != {NONE}),
        note="The first and the last time each client trained: the mean over clients and seeds, and the least and most of any.",
    )


def all_tables(settings: Settings, baseline: str) -> tuple[Table, ...]:
    """All tables of several settings, those without rows left out: over them, then within each."""
    within = [table for name in settings for table in of_setting(settings, name, baseline)]
    every = [overall(settings), *by_task(settings), *to_target(settings), held(settings), *within]
    return tuple(table for table in every if table.rows)


def of_setting(settings: Settings, name: str, baseline: str) -> list[Table]:
    """The comparison within a setting, and the differences from the baseline where that was run there."""
    groups = there(settings[name])
    versus = [differences(groups, baseline)] if baseline in groups and len(groups) > 1 else []
    tables = [comparison(groups), *versus, *against_base(groups)]
    return [replace(table, title=f"{name}: {table.title}") for table in tables]


def there(groups: Groups) -> Groups:
    """The methods that have runs."""
    return {method: runs for method, runs in groups.items() if runs}


def to_csv(settings: Settings, baseline: str) -> str:
    """The measures in each setting; its targets and what it takes to them, for each task too; the variations over them."""
    within = (line for name, groups in settings.items() for line in csv_lines(there(groups), baseline, name))
    targets = (line for name, groups in settings.items() for line in _csv_targets(name, there(groups)))
    return csv_text([*within, *targets, *_csv_variations(settings)])


def _csv_targets(name: str, groups: Groups) -> Iterator[tuple[str, ...]]:
    for task in [None, *m.tasks(all_runs(groups))]:
        goal = target(groups, task)
        if goal is not None:
            yield csv_line(name, goal.method, "target", task, goal.unit, Interval(goal.value, None, len(groups[goal.method])))
            for axis, share in product((axis for axis in m.AXES if _has(groups, axis)), SHARES):
                for method, runs in groups.items():
                    found = taken_to(runs, task, goal, share, axis)
                    measure = f"{axis.cost} to {_percent(share)} of target"
                    yield csv_line(name, method, measure, task, axis.unit, found, len(runs))


def _csv_variations(settings: Settings) -> Iterator[tuple[str, ...]]:
    for task in [None, *tasks(settings)]:
        for method in methods(settings):
            found = _variation_of(settings, method, task)
            if found is not None:
                yield ("", method, "variation over settings", task or "", "", "", "", repr(found))


def _variation_of(settings: Settings, method: str, task: str | None) -> float | None:
    """`variation` over the settings; None where their qualities are not in one unit."""
    units = {m.unit(all_runs(groups), task) for groups in settings.values() if task is None or task in m.tasks(all_runs(groups))}
    return variation(list(seed_means(settings, method, task).values())) if len(units) == 1 else None


def _variation(settings: Settings, method: str, task: str | None) -> str:
    """It, and of how many settings where not of all that have the task."""
    found = _variation_of(settings, method, task)
    own = len(seed_means(settings, method, task))
    most = max(len(seed_means(settings, other, task)) for other in methods(settings))
    return NONE if found is None else f"{found:.4f}" + (f" ({own} of {most})" if own < most else "")


def _qualities(settings: Settings, method: str, task: str | None) -> Iterator[str]:
    for groups in settings.values():
        measure = m.quality(all_runs(groups), task)
        yield pm(over_seeds(measure, groups[method]), measure.unit)


def _heads(settings: Settings, task: str | None) -> Iterator[str]:
    return (with_unit(name, m.unit(all_runs(groups), task)) for name, groups in settings.items())


def _shown(goal: Target) -> str:
    return f"{goal.value:.1f} %" if goal.unit else number(goal.value)


def _taken(runs: Sequence[RunResults], goal: Target, share: float, axis: m.Axis) -> str:
    found = taken_to(runs, None, goal, share, axis)
    shown = number if axis.unit else whole
    reached = f"{shown(found.mean)} ({found.n}" if found else f"{NONE} (0"
    return f"{reached} of {len(runs)})" if any(map(axis.of, runs)) else NONE


def _held(runs: Sequence[RunResults], when: Callable[[RunResults], m.Held | None]) -> str:
    found = [held for run in runs if (held := when(run))]
    if not found:
        return NONE
    mean, least, most = fmean(held.mean for held in found), min(held.least for held in found), max(held.most for held in found)
    return f"{mean:.1f} ({least}–{most})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _note(settings: Settings) -> str:
    """What ± is over the settings, and what was scored."""
    every = {f"{name}: {method}": runs for name, groups in settings.items() for method, runs in groups.items()}
    return f"{interval_note(every)} {scored_note(all_runs(every))}"
