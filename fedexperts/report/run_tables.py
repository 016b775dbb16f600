"""The tables of a single run."""

from collections.abc import Mapping
from dataclasses import astuple
from statistics import fmean

from fedexperts.report import expert_sets, measures, resources, retention, run_cost_tables, scores
from fedexperts.report.read import RunResults
from fedexperts.report.stats import Interval, interval
from fedexperts.report.table_format import NONE, Table, megabytes, number, pm, quality_value, whole, with_unit

SPREAD = ("worst client", "lower quartile", "median client", "upper quartile", "best client")


def one_run(run: RunResults) -> tuple[Table, ...]:
    """All tables of a single run, those without rows left out."""
    quality_of = (quality, by_client, all_metrics, retained, drift)
    every = (
        *quality_of,
        run_cost_tables.costs,
        run_cost_tables.floors,
        run_cost_tables.held,
        run_cost_tables.overlap,
        run_cost_tables.chosen,
        run_cost_tables.over_memory,
        run_cost_tables.failures,
        clients,
        partition,
    )
    return tuple(table for table in (make(run) for make in every) if table.rows)


def quality(run: RunResults) -> Table:
    """Each task's main metric at the first and the last evaluation, and how its clients lie at the last."""
    rows = tuple(_quality_row(run, task) for task in scores.tasks([run]))
    overall = _first_and_last(run, None)
    total = ("overall", *overall, *[""] * 7, with_unit("mean over tasks", scores.unit([run], None)))
    return Table(
        "Quality",
        ("task", "first", "last", *SPREAD, "clients", "examples", "metric"),
        (*rows, total) if rows else (),
        note=f"First and last evaluation: {_evaluated_rounds(run)}. A task's value is over the examples of all its clients. "
        f"{scores.scored_note([run])}",
        text_columns=(0, 10),
        sums=1,
    )


def _quality_row(run: RunResults, task: str) -> tuple[str, ...]:
    unit = scores.unit([run], task)
    names = scores.clients_of(run, task)
    ends = [row for row in (scores.last(run, name, task) for name in names) if row is not None and row.value is not None]
    values = [row.value for row in ends if row.value is not None]
    spread = astuple(scores.spread(values, unit)) if values else (None,) * len(SPREAD)
    end = scores.last(run, None, task)
    examples = whole(end.examples) if end else NONE
    shown = (quality_value(value, unit) for value in spread)
    main = with_unit(scores.metric([run], task), unit)
    return (task, *_first_and_last(run, task), *shown, str(len(values)), examples, main)


def _first_and_last(run: RunResults, task: str | None) -> tuple[str, str]:
    rows, unit = scores.evaluated(run, None, task), scores.unit([run], task)
    return (quality_value(rows[0].value, unit), quality_value(rows[-1].value, unit)) if rows else (NONE, NONE)


def _evaluated_rounds(run: RunResults) -> str:
    rounds = [row.round for row in run.evaluations]
    return f"after round {min(rounds)} and round {max(rounds)}" if rounds else "none yet"


def by_client(run: RunResults) -> Table:
    """Each client's main metric on each of its tasks, at its first and its last evaluation, and the mean over clients."""
    rows = [_client_row(run, client, task) for client in run.client_names for task in scores.tasks([run])]
    ends = [scores.clients_mean(run, when) for when in (0, -1)]
    unit = scores.unit([run], None)
    total = ("mean over clients", "", "", *(f"{end:.1f}" if end is not None and unit else number(end) for end in ends))
    found = [row for row in rows if row]
    return Table(
        "Quality of each client",
        ("client", "task", "examples", "first", "last", "metric"),
        (*found, (*total, with_unit("each client alike", unit))) if found else (),
        note=f"{scores.scored_note([run])} In the mean each client counts as its mean over its tasks.",
        text_columns=(0, 1, 5),
        sums=1,
    )


def _client_row(run: RunResults, client: str, task: str) -> tuple[str, ...] | None:
    rows, unit = scores.evaluated(run, client, task), scores.unit([run], task)
    if not rows:
        return None
    first, last = (quality_value(row.value, unit) for row in (rows[0], rows[-1]))
    return (client, task, whole(rows[-1].examples), first, last, with_unit(scores.metric([run], task), unit))


def all_metrics(run: RunResults) -> Table:
    """Every metric of each task at its last evaluation."""
    rows = {task: scores.last(run, None, task) for task in scores.tasks([run])}
    names = list(dict.fromkeys(name for row in rows.values() if row for name in row.metrics))
    return Table(
        "All metrics at the last evaluation",
        ("task", *(with_unit(name, "" if name in scores.LOWER_IS_BETTER else "%") for name in names)),
        tuple((task, *(_metric(row.metrics.get(name), name) for name in names)) for task, row in rows.items() if row),
    )


def _metric(value: float | None, name: str) -> str:
    return quality_value(value, "" if name in scores.LOWER_IS_BETTER else "%")


def retained(run: RunResults) -> Table:
    """What the base knew and what clients' models still know, and the difference, with its interval over the examples."""
    rows = tuple(_retained_row(run, task) for task in retention.retained_tasks([run]))
    return Table(
        "Retained knowledge",
        ("task", "base", "mean over clients", "worst client", "best client", "difference", "clients", "examples", "metric"),
        rows,
        note="On examples that nobody trains on: the untouched base before the first round, and after the last each client's "
        "model, which is what the server then sends it and what it keeps to itself. Difference: the mean over clients minus the "
        "base, ± its 95 % Student t interval over the examples, paired; of percentages in percentage points.",
        text_columns=(0, 8),
    )


def _retained_row(run: RunResults, task: str) -> tuple[str, ...]:
    unit, found = retention.retained_unit([run], task), retention.retained_by_client(run, task)
    known, mean = measures.base([run], task).of(run), measures.retained([run], task).of(run)
    values = sorted((each.value for each in found.values() if each.value is not None), reverse=unit != "%")
    ends = [quality_value(value, unit) for value in (values[0], values[-1])] if values else [NONE, NONE]
    examples = next((each.examples for row in run.evaluations for name, each in row.retained.items() if name == task), None)
    shown = [f"{value:.1f}" if value is not None and unit else number(value) for value in (known, mean)]
    differs = pm(over_examples(run, task), unit, sign="+")
    metric = with_unit(retention.retained_metric([run], task), unit)
    return (task, *shown, *ends, differs, str(len(values)), whole(examples), metric)


def over_examples(run: RunResults, task: str) -> Interval | None:
    """The mean over clients minus the base, with its interval over examples; without one where examples have no values."""
    known, found = retention.base_on(run, task), list(retention.retained_by_client(run, task).values())
    if known is not None and known.values and found:
        unit = retention.retained_unit([run], task)
        after = [fmean(each) for each in zip(*(each.values for each in found), strict=True)]
        return interval([scores.shown(one - other, unit) for one, other in zip(after, known.values, strict=True)])
    difference = measures.retained_minus_base([run], task).of(run)
    return None if difference is None else Interval(difference, None, 1)


def drift(run: RunResults) -> Table:
    """How far the routers of each layer are from the base's."""
    found = retention.drift(run)
    labels = retention.block_labels(list(found))
    every = [each for values in found.values() for each in values]
    rows = [(labels[block], *map(number, (fmean(each), min(each), max(each)))) for block, each in found.items()]
    return Table(
        "Router drift (10^-3 nats)",
        ("layer", "mean over clients", "least", "most"),
        (*rows, ("all layers", *map(number, (fmean(every), min(every), max(every))))) if every else (),
        note=retention.drift_note([run]),
        sums=1,
    )


def clients(run: RunResults) -> Table:
    """What each client has, held and took."""
    plans = {client.name: client for client in run.plan.clients}
    history, peak = expert_sets.history(run), resources.peak_by_client(run)
    rows = []
    for name in run.client_names:
        plan, work = plans.get(name), resources.counted(run, name)
        counts = [expert_sets.count(holds) for _, holds in history.get(name, [])]
        rows.append(
            (
                name,
                plan.task if plan else NONE,
                whole(plan.examples) if plan else NONE,
                megabytes(plan.memory_bytes) if plan else NONE,
                megabytes(peak.get(name)),
                whole(plan.experts_fit) if plan else NONE,
                whole(counts[0]) if counts else NONE,
                whole(counts[-1]) if counts else NONE,
                str(len(history.get(name, []))),
                megabytes(resources.down(work)),
                megabytes(resources.up(work)),
            )
        )
    return Table(
        "Clients",
        (
            "client",
            "task",
            "training examples",
            "memory (MB)",
            "largest peak (MB)",
            "experts that fit",
            "held first",
            "held last",
            "rounds",
            "down (MB)",
            "up (MB)",
        ),
        tuple(rows),
        note="No memory given (–) means as much as it takes.",
        text_columns=(0, 1),
    )


def partition(run: RunResults) -> Table:
    """Training examples of each task at each client."""
    names = list(
        dict.fromkeys(task for client in run.plan.clients for task in _tasks(client.tasks, client.task, client.examples))
    )
    rows = []
    for client in run.plan.clients:
        each = _tasks(client.tasks, client.task, client.examples)
        counts = [whole(each[name]) if name in each else "" for name in names]
        rows.append((client.name, *counts, whole(client.examples), whole(client.validation), whole(client.test)))
    return Table("Training examples of each client", ("client", *names, "training", "validation", "test"), tuple(rows))


def _tasks(tasks: Mapping[str, int], main: str, examples: int) -> Mapping[str, int]:
    """Examples by task; all of them the main task's where the plan does not say more."""
    return tasks or {main: examples}
