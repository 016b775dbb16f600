"""Tables of one run and of several: once as values, then as Markdown, for the terminal, as CSV."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from html import escape
from io import StringIO
from statistics import fmean, median

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from fedexperts.errors import BadValue, nearest
from fedexperts.report import measures as m
from fedexperts.report.read import LedgerRow, RunResults
from fedexperts.report.stats import Interval, interval, paired

SPREAD = ("worst client", "lower quartile", "median client", "upper quartile", "best client")
NONE = "–"  # in a cell: there is no such number (yet)
Groups = Mapping[str, Sequence[RunResults]]  # method → its runs, one of each seed


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: tuple[int, ...] = (0,)  # set to the left; all others are numbers
    sums: int = 0  # rows at the end that sum up those before them

    def transposed(self) -> "Table":
        """Rows as columns: for a narrow page and many numbers."""
        head, *body = zip(self.columns, *self.rows, strict=True)
        return replace(self, columns=head, rows=tuple(body), text_columns=(0,), sums=0)


def number(value: float | None) -> str:
    """Three to four digits that matter, with thousands apart."""
    if value is None:
        return NONE
    size = abs(value)
    return f"{value:,.2f}" if 0 < size < 10 else f"{value:,.1f}" if size < 1000 else f"{value:,.0f}"


def whole(value: float | None) -> str:
    """A count: without decimals where it has none."""
    return NONE if value is None else f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def megabytes(value: float | None) -> str:
    """Bytes in units of 10^6."""
    return NONE if value is None else number(value / m.MB)


def quality_value(value: float | None, unit: str) -> str:
    """A quality in its unit, with one decimal for a percentage."""
    if value is None:
        return NONE
    return f"{m.shown(value, unit):.1f}" if unit == "%" else number(value)


def quality(run: RunResults) -> Table:
    """Each task's main metric at the first and the last evaluation, and how its clients lie at the last."""
    rows = tuple(_quality_row(run, task) for task in m.tasks([run]))
    overall = _first_and_last(run, None)
    total = ("overall", *overall, *[""] * 7, with_unit("mean over tasks", m.unit([run], None)))
    return Table(
        "Quality",
        ("task", "first", "last", *SPREAD, "clients", "examples", "metric"),
        (*rows, total) if rows else (),
        note=f"First and last evaluation: {_evaluated_rounds(run)}. A task's value is over the examples of all its clients. "
        f"{scored_note([run])}",
        text_columns=(0, 10),
        sums=1,
    )


def by_client(run: RunResults) -> Table:
    """Each client's main metric on each of its tasks, at its first and its last evaluation, and the mean over clients."""
    rows = [_client_row(run, client, task) for client in m.walk_clients(run) for task in m.tasks([run])]
    ends = [m.clients_mean(run, when) for when in (0, -1)]
    unit = m.unit([run], None)
    total = ("mean over clients", "", "", *(f"{end:.1f}" if end is not None and unit else number(end) for end in ends))
    found = [row for row in rows if row]
    return Table(
        "Quality of each client",
        ("client", "task", "examples", "first", "last", "metric"),
        (*found, (*total, with_unit("each client alike", unit))) if found else (),
        note=f"{scored_note([run])} In the mean each client counts as its mean over its tasks.",
        text_columns=(0, 1, 5),
        sums=1,
    )


def _client_row(run: RunResults, client: str, task: str) -> tuple[str, ...] | None:
    rows, unit = m.evaluated(run, client, task), m.unit([run], task)
    if not rows:
        return None
    first, last = (quality_value(row.value, unit) for row in (rows[0], rows[-1]))
    return (client, task, whole(rows[-1].examples), first, last, with_unit(m.metric([run], task), unit))


def retained(run: RunResults) -> Table:
    """What the base knew and what clients' models still know, and the difference, with its interval over the examples."""
    rows = tuple(_retained_row(run, task) for task in m.retained_tasks([run]))
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
    unit, found = m.retained_unit([run], task), m.retained_by_client(run, task)
    known, mean = m.base([run], task).of(run), m.retained([run], task).of(run)
    values = sorted((each.value for each in found.values() if each.value is not None), reverse=unit != "%")
    ends = [quality_value(value, unit) for value in (values[0], values[-1])] if values else [NONE, NONE]
    examples = next((each.examples for row in run.evaluations for name, each in row.retained.items() if name == task), None)
    shown = [f"{value:.1f}" if value is not None and unit else number(value) for value in (known, mean)]
    differs = pm(over_examples(run, task), unit, sign="+")
    metric = with_unit(m.retained_metric([run], task), unit)
    return (task, *shown, *ends, differs, str(len(values)), whole(examples), metric)


def over_examples(run: RunResults, task: str) -> Interval | None:
    """The mean over clients minus the base, with its interval over examples; without one where examples have no values."""
    known, found = m.base_on(run, task), list(m.retained_by_client(run, task).values())
    if known is not None and known.values and found:
        unit = m.retained_unit([run], task)
        after = [fmean(each) for each in zip(*(each.values for each in found), strict=True)]
        return interval([m.shown(one - other, unit) for one, other in zip(after, known.values, strict=True)])
    difference = m.retained_minus_base([run], task).of(run)
    return None if difference is None else Interval(difference, None, 1)


def drift(run: RunResults) -> Table:
    """How far the routers of each layer are from the base's."""
    found = m.drift(run)
    labels = m.block_labels(list(found))
    every = [each for values in found.values() for each in values]
    rows = [(labels[block], *map(number, (fmean(each), min(each), max(each)))) for block, each in found.items()]
    return Table(
        "Router drift (10^-3 nats)",
        ("layer", "mean over clients", "least", "most"),
        (*rows, ("all layers", *map(number, (fmean(every), min(every), max(every))))) if every else (),
        note=drift_note([run]),
        sums=1,
    )


def drift_note(runs: Sequence[RunResults]) -> str:
    """What router drift is, and on which text it was measured."""
    return (
        "KL(the untouched base's routing ‖ that of a client's model after the last round), over all experts before top-k, as "
        f"the mean over the tokens of {m.drift_text(runs)}. 0: nothing changed. Each router sees its own model's hidden states. "
        "A model with fewer experts is held against the base with the same ones."
    )


def retained_compared(groups: Groups) -> Table:
    """The base and each method on the retained examples, and their difference."""
    runs = all_runs(groups)
    tasks = m.retained_tasks(runs)
    pairs = [(m.retained(runs, task), m.retained_minus_base(runs, task)) for task in tasks]
    known = [m.base(runs, task) for task in tasks]
    base = ("untouched base", *(cell for each in known for cell in (pm(_alike(over_seeds(each, runs)), each.unit), "")))
    rows = ((label, *(_cell(measure, members) for pair in pairs for measure in pair)) for label, members in groups.items())
    heads = (head for task in tasks for head in (with_unit(task, m.retained_unit(runs, task)), f"{task} − base"))
    return Table(
        "Retained knowledge",
        ("method", *heads),
        (base, *rows) if tasks else (),
        note="On examples that nobody trains on: the base before the first round, and clients' models after the last, as the "
        f"mean over clients. {interval_note(groups)} Differences of percentages are in percentage points.",
    )


def drift_compared(groups: Groups) -> Table:
    """How far each method's routers drifted, by layer."""
    runs = all_runs(groups)
    layers = m.drift_layers(runs)
    found = [*layers, m.DRIFT]
    rows = ((label, *(_cell(measure, members) for measure in found)) for label, members in groups.items())
    heads = (*(measure.name.removeprefix("router drift, ") for measure in layers), "all layers")
    return Table(
        "Router drift (10^-3 nats)",
        ("method", *heads),
        tuple(row for row in rows if set(row[1:]) != {NONE}) if layers else (),
        note=f"{drift_note(runs)} The mean over clients. {interval_note(groups)}",
    )


def _cell(measure: m.Measure, runs: Sequence[RunResults]) -> str:
    return pm(over_seeds(measure, runs), measure.unit, sign="+" if measure.kind == "retained − base" else "")


def _alike(value: Interval | None) -> Interval | None:
    """Without its interval: the base is the same model whatever the seed."""
    return None if value is None else replace(value, half=None)


def all_metrics(run: RunResults) -> Table:
    """Every metric of each task at its last evaluation."""
    rows = {task: m.last(run, None, task) for task in m.tasks([run])}
    names = list(dict.fromkeys(name for row in rows.values() if row for name in row.metrics))
    return Table(
        "All metrics at the last evaluation",
        ("task", *(with_unit(name, "" if name in m.LOWER_IS_BETTER else "%") for name in names)),
        tuple((task, *(_metric(row.metrics.get(name), name) for name in names)) for task, row in rows.items() if row),
    )


def costs(run: RunResults) -> Table:
    """What each kind of work took, all that counts as the method's, and beside it the evaluations."""
    work = {task: [row for row in run.ledger if row.task == task] for task in dict.fromkeys(row.task for row in run.ledger)}
    rows = [_cost_row(task, rows) for task, rows in work.items() if task != "evaluate"]
    if rows:
        rows.append(_cost_row("total", m.counted(run)))
    if "evaluate" in work:
        rows.append(_cost_row("evaluate (not in the total)", work["evaluate"]))
    return Table(
        "Costs of all clients together",
        (
            "work",
            "times",
            "down (MB)",
            "up (MB)",
            "client seconds",
            "tokens",
            "median peak (MB)",
            "largest peak (MB)",
            "FLOPs estimated (10^12)",
            "failed",
        ),
        tuple(rows),
        note="MB is 10^6 bytes. Bytes, seconds, tokens and peaks are measured; FLOPs are estimated from shapes and tokens.",
        sums=len(rows) - len([task for task in work if task != "evaluate"]),
    )


def floors(run: RunResults) -> Table:
    """Measured bytes and memory beside what they can be at the least, and FLOPs beside what they can be at the most."""
    rows = [(f"{each.cost} (MB)", number(each.measured), number(each.analytic), "floor") for each in m.floors(run)]
    ratios = [number(each.measured / each.analytic) if each.analytic else NONE for each in m.floors(run)]
    most, parts = run.plan.round_flops_estimated, [row for row in m.trained(run) if row.failed is None]
    if most and parts:
        estimated = fmean(row.flops_estimated for row in parts)
        rows.append(("FLOPs estimated (10^9)", number(estimated / 1e9), number(most / 1e9), "ceiling"))
        ratios.append(number(estimated / most))
    return Table(
        "A client's round against the analytic floor",
        ("cost", "in this run", "analytic", "which is a", "ratio"),
        tuple((*row, ratio) for row, ratio in zip(rows, ratios, strict=True)),
        note="Means over all clients' parts in training rounds. The floor of down and up: the weights of the experts that the "
        "client held, or sent, and all others that travel, without ids, names and numbers beside them; a method that sends fewer "
        "is below it. Of memory: weights and optimiser state of what the client held, and the larger of gradients and "
        "activations, for the longest examples allowed; shorter ones can take less. The ceiling of FLOPs: the whole model on the "
        "longest examples.",
        text_columns=(0, 3),
    )


def overlap(run: RunResults) -> Table:
    """How alike the experts of two clients are, the first and the last time they trained."""
    found = {"first round of each client": m.overlap(run, 0), "last round of each client": m.overlap(run)}
    return Table(
        "Overlap of the experts that two clients trained",
        ("when", "same main task", "different tasks"),
        tuple(
            (when, *(NONE if value is None else f"{value:.2f}" for value in (each.same_task, each.other_task)))
            for when, each in found.items()
            if each != m.Overlap(None, None)
        ),
        note="Experts that both trained, of those that either did, over all layers, as the mean over pairs of clients: 1 where "
        "they are the same, 0 where they share none.",
    )


def held(run: RunResults) -> Table:
    """How many experts clients held, over all layers, the first and the last time each trained."""
    found = {"first round of each client": m.held_first(run), "last round of each client": m.held_last(run)}
    return Table(
        f"Experts held by a client, of {m.experts_of(run)}",
        ("when", "mean", "least", "most"),
        tuple((when, f"{held.mean:.1f}", whole(held.least), whole(held.most)) for when, held in found.items() if held),
    )


def chosen(run: RunResults) -> Table:
    """How many experts backward reached in each layer, and how many qualified and were sent; no rows where nothing is told."""
    layers = run.plan.model.blocks
    found = {
        **{
            f"reached in {name}": (block.num_experts, each)
            for (name, block), each in zip(layers.items(), m.reached(run), strict=False)
        },
        "qualified": (m.experts_of(run), m.told(run, "qualified")),
        "sent": (m.experts_of(run), m.told(run, "sent")),
    }
    return Table(
        "Experts that clients trained and sent",
        ("experts", "of", "mean", "least", "most"),
        tuple(
            (name, whole(number), f"{fmean(each):.1f}", f"{min(each):.1f}", f"{max(each):.1f}")
            for name, (number, each) in found.items()
            if each
        ),
        note="Of each client and round. Reached: by backward in a step, the mean over its steps. Qualified: used "
        "above the floor. Sent: those of them that were trained.",
    )


def over_memory(run: RunResults) -> Table:
    """The clients whose measured peak was above their memory."""
    return Table(
        "Clients over their memory",
        ("client", "largest peak (MB)", "memory (MB)", "over by (%)"),
        tuple(
            (
                row.client,
                megabytes(row.peak_bytes),
                megabytes(row.memory_bytes),
                number(100 * (row.peak_bytes / row.memory_bytes - 1)) if row.memory_bytes else NONE,
            )
            for row in m.over_memory(run)
        ),
    )


def failures(run: RunResults) -> Table:
    """Who was left out of which round, and why."""
    return Table(
        "Failures",
        ("round", "client", "work", "reason"),
        tuple((str(row.round), row.client, row.task, row.reason) for row in m.failures(run)),
        text_columns=(1, 2, 3),
    )


def clients(run: RunResults) -> Table:
    """What each client has, held and took."""
    plans = {client.name: client for client in run.plan.clients}
    history, peak = m.history(run), m.peak_by_client(run)
    rows = []
    for name in m.walk_clients(run):
        plan, work = plans.get(name), m.counted(run, name)
        counts = [m.count(holds) for _, holds in history.get(name, [])]
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
                megabytes(m.down(work)),
                megabytes(m.up(work)),
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


def one_run(run: RunResults) -> tuple[Table, ...]:
    """All tables of a single run, those without rows left out."""
    quality_of = (quality, by_client, all_metrics, retained, drift)
    every = (*quality_of, costs, floors, held, overlap, chosen, over_memory, failures, clients, partition)
    return tuple(table for table in (make(run) for make in every) if table.rows)


def several(groups: Groups, baseline: str) -> tuple[Table, ...]:
    """All tables of several runs: the final one, the whole comparison, the differences where there are any to take, and how
    models stand against the base where that was measured.
    """
    versus = (differences(groups, baseline),) if len(groups) > 1 else ()
    return (final(groups), comparison(groups), *versus, *against_base(groups))


def against_base(groups: Groups) -> tuple[Table, ...]:
    """What was retained, and how far routers drifted; those without rows left out."""
    return tuple(table for table in (retained_compared(groups), drift_compared(groups)) if table.rows)


def comparison(groups: Groups) -> Table:
    """Methods against quality and costs: mean ± 95 % Student t interval over seeds, the mean alone for a single seed."""
    found = _measures(groups)
    return Table(
        "Comparison",
        ("method", "seeds", *(measure.label for measure in found)),
        tuple(
            (label, str(len(runs)), *(pm(over_seeds(measure, runs), measure.unit) for measure in found))
            for label, runs in groups.items()
        ),
        note=f"{interval_note(groups)} {scored_note(all_runs(groups))} MB is 10^6 bytes, sent: down and up together.",
    )


def differences(groups: Groups, baseline: str) -> Table:
    """Each method minus the baseline, paired over the seeds both have, with its 95 % Student t interval."""
    found = _measures(groups)
    rows = []
    for label, runs in groups.items():
        if label != baseline:
            each = [_paired(measure, runs, groups[baseline]) for measure in found]
            shared = {run.plan.seed for run in runs} & {run.plan.seed for run in groups[baseline]}
            rows.append((label, str(len(shared)), *(pm(one, me.unit, sign="+") for one, me in zip(each, found, strict=True))))
    return Table(
        f"Difference from {baseline}",
        ("method", "shared seeds", *(measure.label for measure in found)),
        tuple(rows),
        note=f"Paired over seeds: the mean of method − {baseline} in the same seed. {interval_note(groups)} "
        "Differences of percentages are in percentage points.",
    )


def baseline_of(groups: Groups, given: str | None = None) -> str:
    """The method others are compared with: the given one, else fedavg, else the first.

    Raises:
        BadValue: the given one is not among the methods.
    """
    if given is not None and given not in groups:
        raise BadValue(f"baseline {given!r} is not one of {', '.join(groups)}{nearest(given, groups)}; name one of those")
    return given or ("fedavg" if "fedavg" in groups else next(iter(groups)))


def final(groups: Groups) -> Table:
    """The table a run or comparison ends with."""
    runs = all_runs(groups)
    found = [*m.quality_measures(runs), m.SENT_EACH, m.PEAK, m.HELD, *m.times(runs), m.FAILURES]
    rows = [(label, *(pm(over_seeds(measure, members), measure.unit) for measure in found)) for label, members in groups.items()]
    seeds = max(len(members) for members in groups.values())
    note = f"{interval_note(groups)} {scored_note(runs)}" if seeds > 1 else scored_note(runs)
    return Table("Results", ("method", *(measure.label for measure in found)), tuple(rows), note=note)


def pm(value: Interval | None, unit: str, sign: str = "") -> str:
    """`mean ± half`, or the mean alone where one seed gives no interval; `sign="+"` shows a plus too."""
    if value is None:
        return NONE
    digits = 1 if unit == "%" or abs(value.mean) >= 10 or value.mean == 0 else 2
    count = not unit and not value.half and value.mean.is_integer()
    digits = 0 if count or abs(value.mean) >= 1000 else digits
    half = "" if value.half is None else f" ± {value.half:,.{digits}f}" if value.half else " ± 0"
    return f"{value.mean:{sign},.{digits}f}{half}"


def to_markdown(table: Table) -> str:
    """A GitHub Markdown table under its title."""
    marks = ["---" if index in table.text_columns else "---:" for index in range(len(table.columns))]
    lines = [f"### {_markdown(table.title)}", "", _line(table.columns), f"| {' | '.join(marks)} |", *map(_line, table.rows)]
    return "\n".join([*lines, *(["", _markdown(table.note)] if table.note else [])]) + "\n"


def to_rich(table: Table) -> RichTable:
    """For the terminal; nothing in a cell is taken as markup or as a control sequence."""
    shown = RichTable(title=_plain(table.title), caption=_plain(table.note) if table.note else None, box=box.SIMPLE_HEAD)
    for index, column in enumerate(table.columns):
        shown.add_column(_plain(column), justify="left" if index in table.text_columns else "right")
    for row in table.rows:
        shown.add_row(*map(_plain, row))
    return shown


def width(table: Table) -> int:
    """Characters a line of `to_rich` takes without breaking a cell; heads may break between their words."""
    heads = [max(head.split(), key=len, default="") for head in table.columns]
    return sum(max(map(len, cells)) + 2 for cells in zip(heads, *table.rows, strict=True)) + 2


def csv_lines(groups: Groups, baseline: str, setting: str = "") -> Iterator[tuple[str, ...]]:
    """For each method and measure the mean and interval over seeds, and the paired difference from the baseline.

    In the columns of `csv_text`.
    """
    for label, runs in groups.items():
        for measure in [*_measures(groups), *m.HELD_IN_FULL, *m.drift_layers(all_runs(groups))]:
            versus = None if label == baseline else _paired(measure, runs, groups.get(baseline, ()))
            shared, *difference = _csv_cells(versus)
            against = "" if versus is None else baseline
            name = measure.kind or measure.name
            cells = csv_line(setting, label, name, measure.task, measure.unit, over_seeds(measure, runs), len(runs))
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


def cells_csv(table: Table) -> str:
    """The cells of `table` as they are shown, without the commas between thousands; empty where there is none."""
    text = StringIO()
    cells = ([_bare(cell) for cell in row] for row in table.rows)
    csv.writer(text, lineterminator="\n").writerows([table.columns, *cells])
    return text.getvalue()


def _bare(cell: str) -> str:
    """A number as programs read it; other text as it is."""
    bare = cell.replace(",", "")
    try:
        float(bare)
    except ValueError:
        return "" if cell == NONE else cell
    return bare


def _csv_cells(value: Interval | None) -> Iterator[str]:
    """How many, mean, low, high; empty where there is none."""
    if value is None:
        return iter(("", "", "", ""))
    low_high = ("", "") if value.half is None else (repr(value.mean - value.half), repr(value.mean + value.half))
    return iter((str(value.n), repr(value.mean), *low_high))


def all_runs(groups: Groups) -> list[RunResults]:
    """The runs of all methods."""
    return [run for runs in groups.values() for run in runs]


def _measures(groups: Groups) -> list[m.Measure]:
    return m.measures(all_runs(groups))


def over_seeds(measure: m.Measure, runs: Sequence[RunResults]) -> Interval | None:
    """The mean over the runs that have the measure; None when none has."""
    values = list(m.by_seed(measure, runs).values())
    return interval(values) if values else None


def _paired(measure: m.Measure, runs: Sequence[RunResults], baseline: Sequence[RunResults]) -> Interval | None:
    return paired(m.by_seed(measure, runs), m.by_seed(measure, baseline))


def scored_note(runs: Sequence[RunResults]) -> str:
    """Which examples a quality is of, and of which model."""
    return f"Scored on the clients' {m.scored_on(runs)} examples. {m.scored_when(runs)}"


def interval_note(groups: Groups) -> str:
    """What ± is."""
    most = max(len(runs) for runs in groups.values())
    if most < 2:
        return "One seed each, so no intervals."
    return "± is the 95 % Student t interval over seeds; a single seed shows none."


def _quality_row(run: RunResults, task: str) -> tuple[str, ...]:
    unit = m.unit([run], task)
    names = m.clients_of(run, task)
    ends = [row for row in (m.last(run, name, task) for name in names) if row is not None and row.value is not None]
    values = [row.value for row in ends if row.value is not None]
    spread = astuple(m.spread(values, unit)) if values else (None,) * len(SPREAD)
    end = m.last(run, None, task)
    examples = whole(end.examples) if end else NONE
    shown = (quality_value(value, unit) for value in spread)
    main = with_unit(m.metric([run], task), unit)
    return (task, *_first_and_last(run, task), *shown, str(len(values)), examples, main)


def with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def _first_and_last(run: RunResults, task: str | None) -> tuple[str, str]:
    rows, unit = m.evaluated(run, None, task), m.unit([run], task)
    return (quality_value(rows[0].value, unit), quality_value(rows[-1].value, unit)) if rows else (NONE, NONE)


def _evaluated_rounds(run: RunResults) -> str:
    rounds = [row.round for row in run.evaluations]
    return f"after round {min(rounds)} and round {max(rounds)}" if rounds else "none yet"


def _metric(value: float | None, name: str) -> str:
    return quality_value(value, "" if name in m.LOWER_IS_BETTER else "%")


def _cost_row(work: str, rows: Sequence[LedgerRow]) -> tuple[str, ...]:
    measured = m.peaks(rows)
    return (
        work,
        whole(len(rows)),
        megabytes(m.down(rows)),
        megabytes(m.up(rows)),
        number(sum(row.seconds for row in rows)),
        whole(sum(row.tokens for row in rows)),
        megabytes(median(measured) if measured else None),
        megabytes(max(measured, default=None)),
        number(sum(row.flops_estimated for row in rows) / 1e12),
        whole(sum(row.failed is not None for row in rows)),
    )


def _tasks(tasks: Mapping[str, int], main: str, examples: int) -> Mapping[str, int]:
    """Examples by task; all of them the main task's where the plan does not say more."""
    return tasks or {main: examples}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown, cells))} |"


def _markdown(text: str) -> str:
    """`text` on one line, without a character that Markdown or HTML would take as its own."""
    safe = escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{char}" if char in "\\`*_[]|~" else char for char in safe)


def _plain(text: str) -> Text:
    return Text("".join(char if char.isprintable() else "�" for char in text))
