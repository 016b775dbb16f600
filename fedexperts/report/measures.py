"""What a report says about a run, as functions of its results.

MB is 10^6 bytes everywhere. Rows of the task "evaluate" measure the run and are no cost of its method.
"""

import re
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from math import isfinite
from operator import attrgetter
from statistics import fmean, median
from typing import Any

import numpy as np

from fedexperts.report.read import Evaluation, Holds, LedgerRow, OnRetained, Round, RunResults

MB = 1e6
SCORED_WHEN = {
    "after_aggregation": "After aggregation: each client with what the server then sends it and what it keeps to itself.",
    "before_aggregation": "Before aggregation: each client right after its local training, with what it is about to send and "
    "what it keeps to itself; of a client that did not train in that round the last scores count.",
}
LOWER_IS_BETTER = frozenset({"perplexity"})  # these are no shares either: shown as they are, not in %


@dataclass(frozen=True)
class Measure:
    """A number of a run, in the unit it is shown in; None where the run has none (yet)."""

    name: str
    unit: str
    of: Callable[[RunResults], float | None]
    task: str | None = None  # whose it is, if it is of one task
    kind: str = ""  # what it is, for programs, where `name` says more

    @property
    def label(self) -> str:
        """Name and unit, for the head of a column or axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


Place = Callable[[int], float]  # where a round lies on an axis


@dataclass(frozen=True)
class Axis:
    """What the progress of a run is told by."""

    name: str
    label: str  # of the axis of a figure
    cost: str  # what it takes to get somewhere, in `unit`
    unit: str
    of: Callable[[RunResults], Place | None]  # None: the run has no such axis
    note: str = ""


@dataclass(frozen=True)
class Held:
    """How many experts clients held, over all MoE layers of each."""

    mean: float
    least: int
    most: int


@dataclass(frozen=True)
class Spread:
    """How a quality lies over clients, from bad to good."""

    worst: float
    lower: float  # quartile
    median: float
    upper: float  # quartile
    best: float


@dataclass(frozen=True)
class Overlap:
    """How alike clients' experts are, as the mean over pairs; None where there is no such pair."""

    same_task: float | None
    other_task: float | None


@dataclass(frozen=True)
class Floor:
    """What a client's part in a round took beside the least that its sub-model can take, in MB, as means over all parts."""

    cost: str
    measured: float
    analytic: float


@dataclass(frozen=True)
class Failed:
    """A client left out of a round, and why."""

    round: int
    client: str
    task: str
    reason: str


@dataclass(frozen=True)
class Over:
    """A client whose measured peak was above the memory it has."""

    client: str
    peak_bytes: int
    memory_bytes: int


def rounds_asked(run: RunResults) -> int | None:
    """`federation.rounds` of the resolved run file; None when the file is not there or says nothing of it."""
    rounds = settings(run).get("federation", {}).get("rounds")
    return int(rounds) if isinstance(rounds, int) else None


def settings(run: RunResults) -> Mapping[str, Any]:
    """The resolved run file; empty when it is missing or half written."""
    try:
        return tomllib.loads(run.run_file)
    except tomllib.TOMLDecodeError:
        return {}


def rounds_done(run: RunResults) -> int:
    """The last round that was finished."""
    return max((row.round for row in run.rounds), default=0)


def finished(run: RunResults) -> bool:
    """Whether the run was evaluated after the last of its rounds; where nothing says how many it has, it is."""
    asked = rounds_asked(run)
    return asked is None or any(row.round >= asked for row in run.evaluations_of.get((None, None), ()))


def scored_on(runs: Sequence[RunResults]) -> str:
    """Which of the clients' examples were scored: test, or validation; both where runs differ."""
    return " and ".join(dict.fromkeys(settings(run).get("evaluation", {}).get("split", "test") for run in runs)) or "test"


def scored_when(runs: Sequence[RunResults]) -> str:
    """With which model clients were scored, in a sentence."""
    asked = dict.fromkeys(settings(run).get("evaluation", {}).get("score", "after_aggregation") for run in runs)
    return " ".join(SCORED_WHEN[each] for each in asked) or SCORED_WHEN["after_aggregation"]


def tasks(runs: Sequence[RunResults]) -> list[str]:
    """All tasks that were evaluated, in the order in which they first come."""
    return list(dict.fromkeys(task for run in runs for _, task in run.evaluations_of if task is not None))


def evaluated(run: RunResults, client: str | None, task: str | None) -> list[Evaluation]:
    """The evaluations of `client` on `task` (None: over all) that gave a number, by round."""
    rows = run.evaluations_of.get((client, task), ())
    return sorted((row for row in rows if row.value is not None and isfinite(row.value)), key=lambda row: row.round)


def last(run: RunResults, client: str | None, task: str | None) -> Evaluation | None:
    """The latest of `evaluated`."""
    rows = evaluated(run, client, task)
    return rows[-1] if rows else None


def metric(runs: Sequence[RunResults], task: str) -> str:
    """The main metric of `task`; empty when nothing was evaluated."""
    rows = (row for run in runs for row in run.evaluations_of.get((None, task), ()))
    return next((row.metric for row in rows if row.metric), "")


def unit(runs: Sequence[RunResults], task: str | None) -> str:
    """`%` for shares (accuracy, F1, ROUGE, …), nothing for a perplexity.

    The overall quality (task None) leaves out the tasks judged by perplexity, unless all are.
    """
    measured = [metric(runs, each) for each in ([task] if task is not None else tasks(runs))]
    return "" if measured and all(each in LOWER_IS_BETTER for each in measured) else "%"


def shown(value: float, unit: str) -> float:
    """`value` in `unit`: a share becomes a percentage."""
    return 100 * value if unit == "%" else value


def clients_of(run: RunResults, task: str) -> list[str]:
    """The clients that `task` was evaluated on."""
    return [client for client, evaluated in run.evaluations_of if evaluated == task and client is not None]


def client_quality(run: RunResults, client: str, when: int = -1) -> float | None:
    """The mean over the client's tasks of their main metric at its last evaluation, or with 0 its first, in the unit of all.

    As in the overall quality, tasks judged by perplexity are left out unless all are.
    """
    in_unit = unit([run], None)
    chosen = [task for task in tasks([run]) if unit([run], task) == in_unit]
    rows = [row[when] for row in (evaluated(run, client, task) for task in chosen) if row]
    return _mean([shown(row.value, in_unit) for row in rows if row.value is not None])


def clients_mean(run: RunResults, when: int = -1) -> float | None:
    """The mean of `client_quality` over the clients that were scored, each alike."""
    values = [client_quality(run, client, when) for client in walk_clients(run)]
    return _mean([value for value in values if value is not None])


def quality_of_clients(run: RunResults) -> dict[int, dict[str, float]]:
    """Evaluated round → client → the mean over its tasks there, in the unit of all; tasks chosen as in `client_quality`."""
    in_unit = unit([run], None)
    found: dict[int, dict[str, list[float]]] = {}
    for task in (task for task in tasks([run]) if unit([run], task) == in_unit):
        for client in walk_clients(run):
            for row in evaluated(run, client, task):
                if row.value is not None:
                    found.setdefault(row.round, {}).setdefault(client, []).append(shown(row.value, in_unit))
    return {round: {client: fmean(values) for client, values in found[round].items()} for round in sorted(found)}


def spread(values: Sequence[float], unit: str) -> Spread:
    """Quantiles of `values`, which are measured in `unit`: between two values as far as the quantile lies between them."""
    levels = (0.0, 0.25, 0.5, 0.75, 1.0) if unit == "%" else (1.0, 0.75, 0.5, 0.25, 0.0)
    return Spread(*(float(each) for each in np.quantile(values, levels)))


def spread_of(runs: Sequence[RunResults], which: str) -> Measure:
    """A field of `Spread` over a run's clients at the last evaluation."""
    in_unit = unit(runs, None)

    def of(run: RunResults) -> float | None:
        ends = [client_quality(run, client) for client in walk_clients(run)]
        values = [end for end in ends if end is not None]
        return float(attrgetter(which)(spread(values, in_unit))) if values else None

    return Measure({"worst": "worst client", "lower": "lower quartile of clients"}[which], in_unit, of)


def at_the_end(run: RunResults) -> dict[str, Evaluation]:
    """Client → how its model stood against the base after the last round."""
    rows = (row for row in run.evaluations if row.client is not None and (row.retained or row.drift))
    return {row.client: row for row in rows if row.client is not None}


def retained_tasks(runs: Sequence[RunResults]) -> list[str]:
    """The tasks that show what models retained, in the order in which they first come."""
    return list(dict.fromkeys(task for run in runs for row in run.evaluations for task in row.retained))


def base_on(run: RunResults, task: str) -> OnRetained | None:
    """What the untouched base scored on a retained task."""
    return next((row.retained[task] for row in run.evaluations_of.get((None, None), ()) if task in row.retained), None)


def retained_by_client(run: RunResults, task: str) -> dict[str, OnRetained]:
    """Client → what its model scored on a retained task at the end."""
    return {client: row.retained[task] for client, row in at_the_end(run).items() if task in row.retained}


def retained_metric(runs: Sequence[RunResults], task: str) -> str:
    """The metric of a retained task."""
    return next((row.retained[task].metric for run in runs for row in run.evaluations if task in row.retained), "")


def retained_unit(runs: Sequence[RunResults], task: str) -> str:
    """`%` for shares, nothing for a perplexity."""
    return "" if retained_metric(runs, task) in LOWER_IS_BETTER else "%"


def drift(run: RunResults) -> dict[str, list[float]]:
    """MoE block → how far its router drifted in each client's model, in 10^-3 nats."""
    rows = list(at_the_end(run).values())
    blocks = dict.fromkeys(block for row in rows for block in row.drift)
    return {block: [1000 * row.drift[block] for row in rows if block in row.drift] for block in blocks}


def drift_text(runs: Sequence[RunResults]) -> str:
    """On which text drift was measured, in words."""
    shared = [bool(settings(run).get("evaluation", {}).get("retained")) for run in runs]
    own = f"each client's own {scored_on(runs)} examples"
    return "the retained examples" if all(shared) else own if not any(shared) else f"the retained examples, or else {own}"


def block_labels(names: Sequence[str]) -> dict[str, str]:
    """`layer N` where the last number in the names tells the blocks apart, else their full names."""
    found = [re.findall(r"\d+", name) for name in names]
    short = [f"layer {numbers[-1]}" if numbers else name for name, numbers in zip(names, found, strict=True)]
    return dict(zip(names, short if len(set(short)) == len(names) else names, strict=True))


def counted(run: RunResults, client: str | None = None) -> list[LedgerRow]:
    """The rows that cost the method something: all but the evaluations; those of `client` where one is named."""
    rows = run.ledger if client is None else run.work_of.get(client, ())
    return [row for row in rows if row.task != "evaluate"]


def trained(run: RunResults) -> list[LedgerRow]:
    """The rows of the rounds themselves, without the stages before them."""
    return [row for row in run.ledger if row.task == "train"]


def down(rows: Sequence[LedgerRow]) -> int:
    """Bytes that went down to the clients of `rows`."""
    return sum(row.bytes_down for row in rows)


def up(rows: Sequence[LedgerRow]) -> int:
    """Bytes that came up from the clients of `rows`."""
    return sum(row.bytes_up for row in rows)


def carried(rows: Sequence[LedgerRow]) -> int:
    """Bytes down and up of all `rows`."""
    return down(rows) + up(rows)


def per_client_round(run: RunResults, of: Callable[[Sequence[LedgerRow]], int]) -> float | None:
    """`of` the training rounds' rows for each client's part in a round, on average; stages before the rounds apart."""
    rows = trained(run)
    return of(rows) / len(rows) if rows else None


def bytes_per_client_round(run: RunResults) -> float | None:
    """Bytes down and up that a client's part in a training round takes, on average."""
    return per_client_round(run, carried)


def bytes_before_rounds(run: RunResults) -> float | None:
    """Bytes down and up of all stages before the rounds for each client that took part in them; 0 where there are none."""
    rows = [row for row in counted(run) if row.task != "train"]
    return carried(rows) / max(len({row.client for row in rows}), 1) if run.ledger else None


def peaks(rows: Sequence[LedgerRow]) -> list[int]:
    """The measured peaks of the work that came to its end."""
    return [row.peak_bytes for row in rows if row.failed is None and row.peak_bytes > 0]


def largest_peak(run: RunResults) -> int | None:
    """The largest measured peak of any client."""
    return max(peaks(counted(run)), default=None)


def median_peak(run: RunResults) -> float | None:
    """The median over all clients' training rounds, stages before them apart."""
    measured = peaks(trained(run))
    return median(measured) if measured else None


def bytes_until(run: RunResults) -> Callable[[int], int]:
    """A function of a round: the bytes that all clients together have sent and got by its end."""
    rows = sorted(counted(run), key=lambda row: row.round)
    rounds = [row.round for row in rows]
    sums = [0, *accumulate(row.bytes_down + row.bytes_up for row in rows)]
    return lambda round: sums[bisect_right(rounds, round)]


def mb_until(run: RunResults) -> Place:
    """`bytes_until` in MB."""
    until = bytes_until(run)
    return lambda round: until(round) / MB


def has_clock(run: RunResults) -> bool:
    """Whether every round of the run has its virtual time."""
    return bool(run.rounds) and all(row.clock_seconds is not None for row in run.rounds)


def clock_until(run: RunResults) -> Place | None:
    """A function of a round: the virtual seconds of all stages and rounds by its end; None for a run without a clock."""
    if not has_clock(run):
        return None
    rows = sorted(run.rounds, key=lambda row: row.round)
    rounds = [row.round for row in rows]
    sums = [0.0, *accumulate(row.clock_seconds or 0.0 for row in rows)]
    return lambda round: sums[bisect_right(rounds, round)]


def virtual_seconds(run: RunResults) -> float | None:
    """The virtual time of the whole run; None without a clock."""
    until = clock_until(run)
    return until(rounds_done(run)) if until else None


def told(run: RunResults, name: str) -> list[Any]:
    """What the method told under `name`, of each client's part in a training round; empty where it told nothing."""
    return [row.metrics[name] for row in trained(run) if name in row.metrics]


def reached(run: RunResults) -> list[list[float]]:
    """For each layer the experts that backward reached in a step, of each client's part in a round."""
    return [list(layer) for layer in zip(*told(run, "reached"), strict=True)]


def history(run: RunResults) -> dict[str, list[tuple[int, Holds]]]:
    """For each client the rounds it trained in, and the experts it worked with in each."""
    found: dict[str, list[tuple[int, Holds]]] = {}
    for row in training(run):
        for client, holds in row.holds.items():
            found.setdefault(client, []).append((row.round, holds))
    return found


def work(run: RunResults) -> dict[str, list[tuple[int, Holds]]]:
    """For each client the rounds it trained in and what it sent was used, and the experts it trained.

    These are those that it sent where the log has them (a client may hold more than it trains), else those that it held.
    """
    found: dict[str, list[tuple[int, Holds]]] = {}
    for row in training(run):
        for client in (client for client in row.holds if client not in row.failed):
            found.setdefault(client, []).append((row.round, row.sends.get(client, row.holds[client])))
    return found


def training(run: RunResults) -> list[Round]:
    """The training rounds, in order."""
    return sorted((row for row in run.rounds if row.task == "train"), key=lambda row: row.round)


def alike(some: Holds, others: Holds) -> float:
    """Experts that both have, of those that either has, over all MoE layers: the Jaccard index."""
    one, other = ({(block, expert) for block, ids in each.items() for expert in ids} for each in (some, others))
    return len(one & other) / len(one | other)


def worked_with(run: RunResults, when: int = -1) -> dict[str, Holds]:
    """Client → the experts it trained the last time, or with 0 the first, where there were any; those of one task together."""
    found = {client: rounds[when][1] for client, rounds in work(run).items() if count(rounds[when][1])}
    home = {client.name: client.task for client in run.plan.clients}
    order = list(dict.fromkeys(home.values()))
    place = {client: (order.index(home[client]) if client in home else len(order)) for client in found}
    return {client: found[client] for client in sorted(found, key=lambda client: place[client])}


def overlap(run: RunResults, when: int = -1) -> Overlap:
    """`alike` over all pairs of clients, with the same main task and with others."""
    home = {client.name: client.task for client in run.plan.clients}
    pairs = list(combinations(worked_with(run, when).items(), 2))
    same, other = (
        [alike(a, b) for (one, a), (two, b) in pairs if (home.get(one) == home.get(two)) == wanted] for wanted in (True, False)
    )
    return Overlap(_mean(same), _mean(other))


def floors(run: RunResults) -> list[Floor]:
    """What clients' parts in training rounds took, beside the analytic floor, where the plan has what that is made of.

    Down: the weights of the experts a client held and all others that travel. Up: of those it sent. Memory: weights and
    optimiser state of what it held, and the larger of gradients and activations, since one comes as the other goes; none where
    backward reached only some of the experts.
    """
    held = {(row.round, client): each for row in training(run) for client, each in row.holds.items()}
    sent = held | {(row.round, client): each for row in training(run) for client, each in row.sends.items()}
    rows = [row for row in trained(run) if row.failed is None and (row.round, row.client) in held]
    if (patch := run.plan.patch) is None or not rows:
        return []
    down, up = ([patch.of(which[row.round, row.client]) for row in rows] for which in (held, sent))
    found = [_floor("down", [row.bytes_down for row in rows], down), _floor("up", [row.bytes_up for row in rows], up)]
    measured = [row.peak_bytes for row in rows]
    if (memory := run.plan.memory) is None or not all(measured) or told(run, "reached"):
        return found
    floor = [
        memory.of(held[row.round, row.client]) + max(memory.activation_bytes - gradients, 0)
        for row, gradients in zip(rows, down, strict=True)
    ]
    return [*found, _floor("peak memory", measured, floor)]


def count(holds: Holds) -> int:
    """Experts over all MoE layers."""
    return sum(len(experts) for experts in holds.values())


def held_first(run: RunResults) -> Held | None:
    """Over clients, what each held in the first round it trained in."""
    return _held([rounds[0][1] for rounds in history(run).values()])


def held_last(run: RunResults) -> Held | None:
    """Over clients, what each held in the last round it trained in."""
    return _held([rounds[-1][1] for rounds in history(run).values()])


def experts_of(run: RunResults) -> int:
    """All experts of the base model."""
    return sum(block.num_experts for block in run.plan.model.blocks.values())


def failures(run: RunResults) -> list[Failed]:
    """Every client's failure, once, whether the round or the ledger wrote it."""
    in_ledger = {(row.round, row.client, row.task): row.failed for row in run.ledger if row.failed is not None}
    in_rounds = {(row.round, client, row.task): reason for row in run.rounds for client, reason in row.failed.items()}
    merged = in_ledger | in_rounds
    return [Failed(*key, reason) for key, reason in sorted(merged.items())]


def over_memory(run: RunResults) -> list[Over]:
    """The clients whose largest measured peak was above their memory."""
    peak = peak_by_client(run)
    limited = ((client.name, peak.get(client.name, 0), client.memory_bytes) for client in run.plan.clients)
    return [Over(name, most, limit) for name, most, limit in limited if limit is not None and most > limit]


def peak_by_client(run: RunResults) -> dict[str, int]:
    """Each client's largest measured peak."""
    most = {client: max((row.peak_bytes for row in counted(run, client)), default=0) for client in run.work_of}
    return {client: peak for client, peak in most.items() if peak}


def measures(runs: Sequence[RunResults]) -> list[Measure]:
    """All that runs are compared by: quality of tasks, overall and over clients; how models stand against the base, where any
    run tells; what it cost, and its time where any has a clock.
    """
    mean = Measure("mean over clients", unit(runs, None), clients_mean)
    spread = [mean, spread_of(runs, "lower"), spread_of(runs, "worst")]
    by_client = spread if any(clients_mean(run) is not None for run in runs) else []
    return [*quality_measures(runs), *by_client, *against_base(runs), *COSTS, *times(runs), *choices(runs)]


def against_base(runs: Sequence[RunResults]) -> list[Measure]:
    """What clients' models retained, as the mean over clients, that minus the base's, and how far their routers drifted."""
    found = [make(runs, task) for task in retained_tasks(runs) for make in (retained, retained_minus_base)]
    return [*found, *([DRIFT] if any(map(drift, runs)) else [])]


def retained(runs: Sequence[RunResults], task: str) -> Measure:
    """The mean over clients on a retained task."""
    in_unit = retained_unit(runs, task)

    def of(run: RunResults) -> float | None:
        values = [each.value for each in retained_by_client(run, task).values()]
        return _mean([shown(value, in_unit) for value in values if value is not None])

    return Measure(f"retained: {task}", in_unit, of, task, "retained")


def base(runs: Sequence[RunResults], task: str) -> Measure:
    """What the untouched base scored on a retained task."""
    in_unit = retained_unit(runs, task)

    def of(run: RunResults) -> float | None:
        found = base_on(run, task)
        return None if found is None or found.value is None else shown(found.value, in_unit)

    return Measure(f"base: {task}", in_unit, of, task, "base")


def retained_minus_base(runs: Sequence[RunResults], task: str) -> Measure:
    """`retained` − `base` of the same run: below 0 where clients' models forgot (of a perplexity, above)."""
    after, before = retained(runs, task), base(runs, task)

    def of(run: RunResults) -> float | None:
        kept, known = after.of(run), before.of(run)
        return None if kept is None or known is None else kept - known

    return Measure(f"retained − base: {task}", after.unit, of, task, "retained − base")


def drift_layers(runs: Sequence[RunResults]) -> list[Measure]:
    """How far the routers of each layer drifted, as the mean over clients."""
    labels = block_labels(list(dict.fromkeys(block for run in runs for block in drift(run))))
    return [Measure(f"router drift, {label}", DRIFT.unit, _drift_in(block)) for block, label in labels.items()]


def choices(runs: Sequence[RunResults]) -> list[Measure]:
    """How few experts clients trained and sent, where any of the runs tells (HFedMoE)."""
    return [measure for measure in CHOICES if any(measure.of(run) is not None for run in runs)]


def times(runs: Sequence[RunResults]) -> list[Measure]:
    """The virtual time, where any of the runs has a clock."""
    return [TIME] if any(map(has_clock, runs)) else []


def quality_measures(runs: Sequence[RunResults]) -> list[Measure]:
    """The mean over tasks, then the main metric of each over all its clients: at the last evaluation."""
    return [quality(runs, task) for task in [None, *tasks(runs)]]


def by_seed(measure: Measure, runs: Sequence[RunResults]) -> dict[int, float]:
    """The measure of each run that has it."""
    values = ((run.plan.seed, measure.of(run)) for run in runs)
    return {seed: value for seed, value in values if value is not None}


def quality(runs: Sequence[RunResults], task: str | None) -> Measure:
    """The main metric of `task` (None: the mean over tasks) at the last evaluation, in the unit that it has in `runs`."""
    in_unit = unit(runs, task)

    def of(run: RunResults) -> float | None:
        row = last(run, None, task)
        return None if row is None or row.value is None else shown(row.value, in_unit)

    name = "overall" if task is None else task
    return Measure(name, in_unit, of, task, "quality")


def _drift_in(block: str) -> Callable[[RunResults], float | None]:
    return lambda run: _mean(drift(run).get(block, []))


def _floor(cost: str, measured: Sequence[int], analytic: Sequence[int]) -> Floor:
    return Floor(cost, fmean(measured) / MB, fmean(analytic) / MB)


def _in_mb(value: float | None) -> float | None:
    return None if value is None else value / MB


def _mean(numbers: Sequence[float]) -> float | None:
    return fmean(numbers) if numbers else None


def _held(holds: Sequence[Holds]) -> Held | None:
    counts = [count(each) for each in holds]
    return Held(fmean(counts), min(counts), max(counts)) if counts else None


def _number_held(when: Callable[[RunResults], Held | None], which: str) -> Callable[[RunResults], float | None]:
    """A field of `Held`."""

    def of(run: RunResults) -> float | None:
        held = when(run)
        return None if held is None else float(attrgetter(which)(held))

    return of


SENT_EACH = Measure("sent per client and round", "MB", lambda run: _in_mb(bytes_per_client_round(run)))
DOWN_EACH = Measure("down per client and round", "MB", lambda run: _in_mb(per_client_round(run, down)))
UP_EACH = Measure("up per client and round", "MB", lambda run: _in_mb(per_client_round(run, up)))
BEFORE = Measure("sent before the rounds per client", "MB", lambda run: _in_mb(bytes_before_rounds(run)))
SENT = Measure("sent in total", "MB", lambda run: _in_mb(carried(counted(run))))
PEAK = Measure("largest peak memory", "MB", lambda run: _in_mb(largest_peak(run)))
MEDIAN_PEAK = Measure("median peak memory", "MB", lambda run: _in_mb(median_peak(run)))
HELD = Measure("experts held", "", _number_held(held_last, "mean"))
FLOPS = Measure("FLOPs estimated", "10^12", lambda run: sum(row.flops_estimated for row in counted(run)) / 1e12)
SECONDS = Measure("client seconds", "s", lambda run: sum(row.seconds for row in counted(run)))
FAILURES = Measure("failures", "", lambda run: float(len(failures(run))))
REACHED = Measure("experts reached per layer and step", "", lambda run: fmean(map(fmean, reached(run))) if reached(run) else None)
QUALIFIED = Measure("experts that qualified per client and round", "", lambda run: _mean(told(run, "qualified")))
SENT_EXPERTS = Measure("experts sent per client and round", "", lambda run: _mean(told(run, "sent")))
CHOICES = (REACHED, QUALIFIED, SENT_EXPERTS)
TIME = Measure("virtual time", "s", virtual_seconds)
DRIFT = Measure("router drift", "10^-3 nats", lambda run: _mean([each for layer in drift(run).values() for each in layer]))
COSTS = (SENT_EACH, DOWN_EACH, UP_EACH, BEFORE, SENT, PEAK, MEDIAN_PEAK, HELD, FLOPS, SECONDS, FAILURES)
HELD_IN_FULL = tuple(
    Measure(f"experts held at {time}, {which}", "", _number_held(when, which))
    for time, when in (("first", held_first), ("last", held_last))
    for which in ("mean", "least", "most")
)
"""Over clients, the first and the last time each trained."""

BY_ROUNDS = Axis("rounds", "round", "rounds", "", lambda run: float)
BY_BYTES = Axis(
    "bytes",
    "MB sent so far (10^6 bytes)",
    "sent",
    "MB",
    mb_until,
    "Bytes: down and up, all clients together, evaluations apart.",
)
BY_TIME = Axis(
    "virtual time",
    "virtual time (s)",
    "virtual time",
    "s",
    clock_until,
    "Virtual time: each round as long as its slowest client would take on its device, evaluations apart.",
)
AXES = (BY_ROUNDS, BY_BYTES, BY_TIME)


def walk_clients(run: RunResults) -> Iterator[str]:
    """All clients by name: the planned ones, then any that only the ledger knows."""
    yield from dict.fromkeys([*(client.name for client in run.plan.clients), *run.work_of])
