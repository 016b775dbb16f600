"""The tables of several runs side by side, within one setting."""

from collections.abc import Sequence
from dataclasses import replace

from fedexperts.errors import BadValue, nearest
from fedexperts.report import measures, paired, reference_lines, retention, scores, told_apart
from fedexperts.report.measures import Measure
from fedexperts.report.read import Groups, RunResults, all_runs
from fedexperts.report.stats import Interval
from fedexperts.report.table_format import NONE, Table, plus_minus, with_unit


def several(groups: Groups, baseline: str) -> tuple[Table, ...]:
    """All tables of several runs: the final one, the comparison of all measures, the differences and which of them are more than
    chance if there are several methods, and the comparison with the base model if that was measured.
    """
    versus = (*told_apart.tables(groups, baseline), differences(groups, baseline)) if len(groups) > 1 else ()
    return (final(groups), comparison(groups), *versus, *against_base(groups))


def final(groups: Groups) -> Table:
    """The table that is printed at the end of a run or comparison."""
    runs = all_runs(groups)
    columns = [
        *measures.quality_measures(runs),
        measures.SENT_EACH,
        measures.PEAK,
        measures.ASSIGNED,
        *measures.times(runs),
        measures.FAILURES,
    ]
    rows = [
        (label, *(plus_minus(measures.over_seeds(measure, members), measure.unit) for measure in columns))
        for label, members in groups.items()
    ]
    seeds = max(len(members) for members in groups.values())
    notes = [
        told_apart.words(groups),
        interval_note(groups) if seeds > 1 else "",
        scores.scored_note(runs),
        reference_lines.note(groups),
    ]
    table = Table("Results", ("method", *(measure.label for measure in columns)), tuple(rows), note=" ".join(filter(None, notes)))
    return table.above(reference_lines.rows(groups, columns))


def comparison(groups: Groups) -> Table:
    """All measures of each method: mean ± 95 % Student t interval over seeds, the mean alone for a single seed."""
    columns = all_measures(groups)
    return Table(
        "Comparison",
        ("method", "seeds", *(measure.label for measure in columns)),
        tuple(
            (label, str(len(runs)), *(plus_minus(measures.over_seeds(measure, runs), measure.unit) for measure in columns))
            for label, runs in groups.items()
        ),
        note=f"{interval_note(groups)} {scores.scored_note(all_runs(groups))} MB is 10^6 bytes. Sent: down and up together. "
        f"{reference_lines.note(groups)}".rstrip(),
    ).above(reference_lines.rows(groups, columns, NONE))


def differences(groups: Groups, baseline: str) -> Table:
    """Each method minus the baseline, paired over the seeds that both have, with its 95 % interval (see `paired.difference`)."""
    columns = all_measures(groups)
    rows = []
    for label, runs in groups.items():
        if label != baseline:
            every = [paired.difference(measure, runs, groups[baseline]) for measure in columns]
            each = [None if one is None else one.interval for one in every]
            shared = {run.plan.seed for run in runs} & {run.plan.seed for run in groups[baseline]}
            rows.append(
                (label, str(len(shared)), *(plus_minus(one, me.unit, sign="+") for one, me in zip(each, columns, strict=True)))
            )
    return Table(
        f"Difference from {baseline}",
        ("method", "shared seeds", *(measure.label for measure in columns)),
        tuple(rows),
        note=f"Paired over seeds: the mean of method − {baseline} in the same seed. ±: 95 % interval over the seeds; of a "
        "quality as in the tables above. Differences of percentages are in percentage points.",
    )


def baseline_of(groups: Groups, given: str | None = None) -> str:
    """The method that others are compared with: the given one, else the first federated one, else the first.

    Raises:
        BadValue: the given one is not among the methods.
    """
    if given is not None and given not in groups:
        raise BadValue(f"baseline {given!r} is not one of {', '.join(groups)}{nearest(given, groups)}; name one of those")
    federated = (label for label, runs in groups.items() if not any(run.plan.reference for run in runs))
    return given or next(federated, next(iter(groups)))


def against_base(groups: Groups) -> tuple[Table, ...]:
    """The tables of retained knowledge and router drift that have rows."""
    return tuple(table for table in (retained_compared(groups), drift_compared(groups)) if table.rows)


def retained_compared(groups: Groups) -> Table:
    """Scores of the base model and of each method on the retained examples, and their difference."""
    runs = all_runs(groups)
    tasks = retention.retained_tasks(runs)
    pairs = [(measures.retained(runs, task), measures.retained_minus_base(runs, task)) for task in tasks]
    base_scores = [measures.base(runs, task) for task in tasks]
    means = [_without_interval(measures.over_seeds(each, runs), each.unit) for each in base_scores]
    base = ("base model", *(cell for mean in means for cell in (mean, "")))
    rows = ((label, *(_cell(measure, members) for pair in pairs for measure in pair)) for label, members in groups.items())
    heads = (head for task in tasks for head in (with_unit(task, retention.retained_unit(runs, task)), f"{task} − base"))
    return Table(
        "Retained knowledge",
        ("method", *heads),
        (base, *rows) if tasks else (),
        note="On examples that no client trains on: the base model before the first round, and clients' models after the last, "
        f"as the mean over clients. {interval_note(groups)} Differences of percentages are in percentage points.",
    )


def drift_compared(groups: Groups) -> Table:
    """The router drift of each method, by layer."""
    runs = all_runs(groups)
    layers = measures.drift_layers(runs)
    columns = [*layers, measures.DRIFT]
    rows = ((label, *(_cell(measure, members) for measure in columns)) for label, members in groups.items())
    heads = (*(measure.name.removeprefix("router drift, ") for measure in layers), "all layers")
    return Table(
        "Router drift (10^-3 nats)",
        ("method", *heads),
        tuple(row for row in rows if set(row[1:]) != {NONE}) if layers else (),
        note=f"{retention.drift_note(runs)} Mean over clients. {interval_note(groups)}",
    )


def _cell(measure: Measure, runs: Sequence[RunResults]) -> str:
    return plus_minus(measures.over_seeds(measure, runs), measure.unit, sign="+" if measure.kind == "retained − base" else "")


def _without_interval(value: Interval | None, unit: str) -> str:
    """The mean alone: the base model is the same for every seed."""
    return plus_minus(value and replace(value, half=None), unit)


def all_measures(groups: Groups) -> list[Measure]:
    """`measures.measures` of the runs of all methods."""
    return measures.measures(all_runs(groups))


def interval_note(groups: Groups) -> str:
    """What ± means in a table."""
    most = max(len(runs) for runs in groups.values())
    if most < 2:
        return "One seed per method, so no intervals."
    return "±: 95 % Student t interval over seeds; a single seed has none."
