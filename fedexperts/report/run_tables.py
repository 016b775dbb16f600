"""The tables of a single run."""

from collections.abc import Mapping
from dataclasses import astuple
from statistics import fmean

from fedexperts.report import expert_sets, measures, reference_lines, resources, retention, run_cost_tables, scores
from fedexperts.report.read import RunResults
from fedexperts.report.stats import Interval, interval
from fedexperts.report.table_format import NONE, Table, count, megabytes, number, plus_minus, quality_value, with_unit

SPREAD = ("worst client", "lower quartile", "median client", "upper quartile", "best client")


def one_run(run: RunResults) -> tuple[Table, ...]:
    """All tables of a single run that have rows."""
    every = (
        quality,
        by_client,
        all_metrics,
        retained,
        drift,
        run_cost_tables.costs,
        run_cost_tables.floors,
        run_cost_tables.assigned_experts,
        run_cost_tables.overlap,
        run_cost_tables.trained_and_sent,
        run_cost_tables.reported_metrics,
        run_cost_tables.over_memory,
        run_cost_tables.failures,
        clients,
        lost_data,
        partition,
    )
    return tuple(table for table in (make(run) for make in every) if table.rows)


def quality(run: RunResults) -> Table:
    """The main metric of each task at the first and the last evaluation, and its spread over clients at the last."""
    rows = tuple(_quality_row(run, task) for task in scores.tasks([run]))
    overall = _first_and_last(run, None)
    lines = reference_lines.of_run(run)
    ends = [_first_and_last(line, None)[1] for line in lines.values()]
    total = ("overall", *overall, *ends, *[""] * 7, with_unit("mean over tasks", scores.unit([run], None)))
    return Table(
        "Quality",
        ("task", "first", "last", *lines, *SPREAD, "clients", "examples", "metric"),
        (*rows, total) if rows else (),
        note=f"First and last evaluation: {_evaluated_rounds(run)}. The value of a task is over the examples of all its clients. "
        f"{scores.scored_note([run])} {reference_lines.NOTE if lines else ''}".rstrip(),
        text_columns=(0, 10 + len(lines)),
        sums=1,
    )


def _quality_row(run: RunResults, task: str) -> tuple[str, ...]:
    unit = scores.unit([run], task)
    ends = (scores.last_evaluation(run, name, task) for name in scores.clients_of(run, task))
    values = [row.value for row in ends if row is not None and row.value is not None]
    spread = astuple(scores.spread(values, unit)) if values else (None,) * len(SPREAD)
    end = scores.last_evaluation(run, None, task)
    examples = count(end.examples) if end else NONE
    quantiles = (quality_value(value, unit) for value in spread)
    main = with_unit(scores.main_metric([run], task), unit)
    lines = (_first_and_last(line, task)[1] for line in reference_lines.of_run(run).values())
    return (task, *_first_and_last(run, task), *lines, *quantiles, str(len(values)), examples, main)


def _first_and_last(run: RunResults, task: str | None) -> tuple[str, str]:
    rows, unit = scores.evaluations(run, None, task), scores.unit([run], task)
    return (quality_value(rows[0].value, unit), quality_value(rows[-1].value, unit)) if rows else (NONE, NONE)


def _evaluated_rounds(run: RunResults) -> str:
    rounds = [row.round for row in run.evaluations]
    return f"after round {min(rounds)} and round {max(rounds)}" if rounds else "none yet"


def by_client(run: RunResults) -> Table:
    """The main metric of each client on each of its tasks at its first and last evaluation, and the mean over clients."""
    pairs = ((client, task) for client in run.client_names for task in scores.tasks([run]))
    rows = [row for client, task in pairs if (row := _client_row(run, client, task))]
    ends = [scores.clients_mean(run, when) for when in (0, -1)]
    unit = scores.unit([run], None)
    total = ("mean over clients", "", "", *(f"{end:.1f}" if end is not None and unit else number(end) for end in ends))
    return Table(
        "Quality of each client",
        ("client", "task", "examples", "first", "last", "metric"),
        (*rows, (*total, with_unit("equal weights", unit))) if rows else (),
        note=f"{scores.scored_note([run])} In the mean over clients, each client counts with the mean over its tasks.",
        text_columns=(0, 1, 5),
        sums=1,
    )


def _client_row(run: RunResults, client: str, task: str) -> tuple[str, ...] | None:
    rows, unit = scores.evaluations(run, client, task), scores.unit([run], task)
    if not rows:
        return None
    first, last = (quality_value(row.value, unit) for row in (rows[0], rows[-1]))
    return (client, task, count(rows[-1].examples), first, last, with_unit(scores.main_metric([run], task), unit))


def all_metrics(run: RunResults) -> Table:
    """Every metric of each task at its last evaluation."""
    rows = {task: scores.last_evaluation(run, None, task) for task in scores.tasks([run])}
    names = list(dict.fromkeys(name for row in rows.values() if row for name in row.metrics))
    return Table(
        "All metrics at the last evaluation",
        ("task", *(with_unit(name, "" if name in scores.LOWER_IS_BETTER else "%") for name in names)),
        tuple((task, *(_metric(row.metrics.get(name), name) for name in names)) for task, row in rows.items() if row),
    )


def _metric(value: float | None, name: str) -> str:
    return quality_value(value, "" if name in scores.LOWER_IS_BETTER else "%")


def retained(run: RunResults) -> Table:
    """Scores of the base model and of clients' models on the retained examples, and their difference with its interval."""
    rows = tuple(_retained_row(run, task) for task in retention.retained_tasks([run]))
    return Table(
        "Retained knowledge",
        ("task", "base", "mean over clients", "worst client", "best client", "difference", "clients", "examples", "metric"),
        rows,
        note="On examples that no client trains on: the base model before the first round, and each client's model (the server "
        "weights and its personal parts) after the last. Difference: the mean over clients minus the base, ± its 95 % Student t "
        "interval, paired over the examples; differences of percentages are in percentage points.",
        text_columns=(0, 8),
    )


def _retained_row(run: RunResults, task: str) -> tuple[str, ...]:
    unit, by_client = retention.retained_unit([run], task), retention.retained_by_client(run, task)
    means = measures.base([run], task).of(run), measures.retained([run], task).of(run)
    values = sorted((each.value for each in by_client.values() if each.value is not None), reverse=unit != "%")
    ends = [quality_value(value, unit) for value in (values[0], values[-1])] if values else [NONE, NONE]
    examples = next((each.examples for row in run.evaluations for name, each in row.retained.items() if name == task), None)
    base_and_mean = [f"{value:.1f}" if value is not None and unit else number(value) for value in means]
    difference = plus_minus(over_examples(run, task), unit, sign="+")
    metric = with_unit(retention.retained_metric([run], task), unit)
    return (task, *base_and_mean, *ends, difference, str(len(values)), count(examples), metric)


def over_examples(run: RunResults, task: str) -> Interval | None:
    """The mean over clients minus the base; its interval is over the examples, and None if these have no values of their own."""
    base, by_client = retention.base_score(run, task), list(retention.retained_by_client(run, task).values())
    if base and base.values and by_client and all(len(each.values) == len(base.values) for each in by_client):
        unit = retention.retained_unit([run], task)
        after = [fmean(each) for each in zip(*(each.values for each in by_client), strict=True)]
        return interval([scores.to_unit(one - other, unit) for one, other in zip(after, base.values, strict=True)])
    difference = measures.retained_minus_base([run], task).of(run)
    return None if difference is None else Interval(difference, None, 1)


def drift(run: RunResults) -> Table:
    """The drift of each layer's router from the base model's."""
    by_block = retention.drift(run)
    labels = retention.block_labels(list(by_block))
    every = [each for values in by_block.values() for each in values]
    rows = [(labels[block], *map(number, (fmean(each), min(each), max(each)))) for block, each in by_block.items()]
    return Table(
        "Router drift (10^-3 nats)",
        ("layer", "mean over clients", "least", "most"),
        (*rows, ("all layers", *map(number, (fmean(every), min(every), max(every))))) if every else (),
        note=retention.drift_note([run]),
        sums=1,
    )


def lost_data(run: RunResults) -> Table:
    """What the settings cut off each task's data."""
    columns = ("prompts cut", "their tokens lost", "answers cut", "references cut", "test in train", "majority")
    rows = [
        (row.task, count(row.examples), count(row.dropped), *(f"{100 * share:.0f}" for share in row.shares))
        for row in run.plan.lost
    ]
    return Table(
        "What of the data is lost",
        ("task", "training examples", "dropped", *(f"{name} (%)" for name in columns)),
        tuple(rows),
        note="Dropped: training and test examples that are too long, with data.too_long = drop. Then: prompts and answers of "
        "training that data.max_tokens cuts (a cut answer has no end), test references longer than evaluation.generate_tokens, "
        "test examples that are training examples, and the most frequent answer's share.",
    )


def clients(run: RunResults) -> Table:
    """Each client's data, memory, assigned experts and costs."""
    plans = {client.name: client for client in run.plan.clients}
    assigned, peak = expert_sets.assigned_by_client(run), resources.peak_by_client(run)
    rows = []
    for name in run.client_names:
        plan, ledger = plans.get(name), resources.cost_rows(run, name)
        counts = [expert_sets.num_experts(holds) for _, holds in assigned.get(name, [])]
        rows.append(
            (
                name,
                plan.task if plan else NONE,
                count(plan.examples) if plan else NONE,
                megabytes(plan.memory_bytes) if plan else NONE,
                megabytes(peak.get(name)),
                count(plan.experts_fit) if plan else NONE,
                count(counts[0]) if counts else NONE,
                count(counts[-1]) if counts else NONE,
                str(len(assigned.get(name, []))),
                megabytes(resources.bytes_down(ledger)),
                megabytes(resources.bytes_up(ledger)),
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
        note="Memory –: unlimited. Held: experts of all layers, in the first and the last round that the client trained in.",
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
        counts = [count(each[name]) if name in each else "" for name in names]
        rows.append((client.name, *counts, count(client.examples), count(client.validation), count(client.test)))
    return Table("Training examples of each client", ("client", *names, "training", "validation", "test"), tuple(rows))


def _tasks(tasks: Mapping[str, int], main: str, examples: int) -> Mapping[str, int]:
    """Examples by task; all of the main task if the plan does not list them."""
    return tasks or {main: examples}
