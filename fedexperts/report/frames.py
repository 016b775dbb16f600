"""The tables of `fedexperts.results`: what is in each of their columns, and the rows of a run.

docs/reference/results.md is made of these declarations: python -m fedexperts.report.frames > docs/reference/results.md
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fedexperts.report import progress
from fedexperts.report.expert_sets import trained_by_client
from fedexperts.report.read import Evaluation, LedgerRow, RunResults
from fedexperts.report.scores import scored_on

Rows = Iterator[tuple[Any, ...]]


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    dtype: Literal["str", "int64", "Int64", "float64", "bool"]  # of pandas; all but int64 and bool may have missing values
    unit: str
    meaning: str


@dataclass(frozen=True)
class Frame:
    """A table: its own columns, after those of `KEYS`, and its rows of one run."""

    about: str
    columns: tuple[Column, ...]
    rows: Callable[[RunResults], Rows]

    @property
    def all_columns(self) -> tuple[Column, ...]:
        return (*KEYS, *self.columns)


KEYS = (
    Column("setting", "str", "", "the run file, with the values that `--vary` gave it; empty for a single run"),
    Column("method", "str", "", "the method or variant, as reports call it"),
    Column("seed", "int64", "", "the seed of the run"),
)
"""The first columns of every table: they say which run a row is of."""

ROUND = Column("round", "int64", "", "0: before the first round")
CLIENT = Column("client", "str", "", "its name")
ALL_CLIENTS = Column("client", "str", "", "its name; missing: all clients together")
JOB = Column("task", "str", "", '"train", or a setup task of the method')
TASK = Column("task", "str", "", "of the data; missing: the mean over tasks of their main metric")
METRIC = Column("metric", "str", "", 'as in the guide, under `metric` of a source; "overall": the mean over tasks')
MAIN = Column("main", "bool", "", "whether it is the task's main metric")
EXAMPLES = Column("examples", "int64", "examples", "that were scored")
VALUE = Column("value", "float64", "share of 1", "of a perplexity: no share")
SECONDS = Column("seconds", "float64", "s", "measured")
CLOCK = Column("clock_seconds", "float64", "s", "virtual time; missing without `devices.profile`")
BYTES = (
    Column("bytes_down", "int64", "bytes", "from the server to clients"),
    Column("bytes_up", "int64", "bytes", "from clients to the server"),
)
TOKENS = Column("tokens", "int64", "tokens", "trained on, without padding")
FLOPS = Column("flops_estimated", "float64", "FLOPs", "of all matrix products, from shapes")
PEAK = Column("peak_bytes", "int64", "bytes", "largest sum of tensors alive in a training step, weights included")


def run_rows(run: RunResults) -> Rows:
    planned, done = progress.rounds_planned(run), progress.rounds_done(run)
    settled = (run.plan.reference, run.plan.model.name, run.plan.model.parameters, scored_on([run]))
    yield (str(run.folder), *settled, planned, done, progress.finished(run))


def client_rows(run: RunResults) -> Rows:
    for client in run.plan.clients:
        split = (client.examples, client.validation, client.test)
        yield (client.name, client.task, *split, client.memory_bytes, client.experts_fit)


def round_rows(run: RunResults) -> Rows:
    jobs: dict[tuple[int, str], list[LedgerRow]] = {}
    for entry in run.ledger:
        jobs.setdefault((entry.round, entry.task), []).append(entry)
    for row in run.rounds:
        costs = jobs.get((row.round, row.task), [])
        sums = (sum(each.bytes_down for each in costs), sum(each.bytes_up for each in costs), sum(each.tokens for each in costs))
        flops, peak = sum(each.flops_estimated for each in costs), max((each.peak_bytes for each in costs), default=0)
        counts = (len(row.clients), len(row.failed))
        yield (row.round, row.task, *counts, row.loss, row.seconds, row.clock_seconds, *sums, flops, peak)


def evaluation_rows(run: RunResults) -> Rows:
    return (row for line in run.evaluations for row in scores_of(line))


def reference_rows(run: RunResults) -> Rows:
    return ((line.line, *row) for line in run.reference_lines for row in scores_of(line))


def scores_of(line: Evaluation) -> list[tuple[Any, ...]]:
    """A row for each metric of an evaluation; none of a line about retained examples or drift."""
    if line.metric is None:
        return []
    metrics = {**line.metrics, line.metric: line.value} if line.metric not in line.metrics else line.metrics
    place = (line.round, line.client, line.task)
    return [(*place, metric, metric == line.metric, line.examples, value) for metric, value in metrics.items()]


def retained_rows(run: RunResults) -> Rows:
    for line in run.evaluations:
        for task, scored in line.retained.items():
            yield (line.round, line.client, task, scored.metric, scored.examples, scored.value)


def drift_rows(run: RunResults) -> Rows:
    return ((line.round, line.client, block, nats) for line in run.evaluations for block, nats in line.drift.items())


def ledger_rows(run: RunResults) -> Rows:
    for each in run.ledger:
        sent, cost = (each.bytes_down, each.bytes_up), (each.tokens, each.flops_estimated, each.peak_bytes)
        job, metrics = (each.round, each.client, each.task), json.dumps(dict(each.metrics)) if each.metrics else None
        yield (*job, *sent, each.seconds, each.clock_seconds, *cost, each.experts, each.loss, each.failed, metrics)


def expert_rows(run: RunResults) -> Rows:
    trained = {(client, round): experts for client, rounds in trained_by_client(run).items() for round, experts in rounds}
    for row in run.rounds:
        for client, holds in row.holds.items():
            of_update = trained.get((client, row.round), {}) if row.task == "train" else {}
            for block, experts in holds.items():
                uses = row.uses.get(client, {}).get(block, (None,) * len(experts))
                total, used = sum(filter(None, uses)), {*of_update.get(block, ())}
                for expert, tokens in zip(experts, uses, strict=True):
                    share = tokens / total if total and tokens is not None else None
                    yield (row.round, row.task, client, block, expert, expert in used, tokens, share)


def prediction_rows(run: RunResults) -> Rows:
    for each in run.predictions:
        question = (each.round, each.client, each.task, each.source, each.metric, each.prompt, each.reference)
        yield (*question, each.answer, each.score)


FRAMES = {
    "runs": Frame(
        "One row per run.",
        (
            Column("folder", "str", "", "its results folder"),
            Column("reference", "bool", "", "whether it is no federated method but a reference for them"),
            Column("model", "str", "", "the base model"),
            Column("parameters", "int64", "parameters", "of the base model"),
            Column("split", "str", "", 'the examples that are scored: "test" or "validation"'),
            Column("rounds_planned", "Int64", "rounds", "`federation.rounds`"),
            Column("rounds_done", "int64", "rounds", "the last one in the logs"),
            Column("finished", "bool", "", "whether it was evaluated after its last round, or stopped early"),
        ),
        run_rows,
    ),
    "clients": Frame(
        "One row per client of a run, as planned.",
        (
            CLIENT,
            Column("task", "str", "", "of most of its training examples"),
            Column("examples", "int64", "examples", "for training"),
            Column("validation", "int64", "examples", "for validation"),
            Column("test", "int64", "examples", "for tests"),
            Column("memory_bytes", "Int64", "bytes", "of its device; missing: unlimited"),
            Column("experts_fit", "Int64", "experts", "that fit its memory, over all layers; missing: unlimited"),
        ),
        client_rows,
    ),
    "rounds": Frame(
        "One row per round and setup task.",
        (
            ROUND,
            JOB,
            Column("clients", "int64", "clients", "that got a job"),
            Column("failed", "int64", "clients", "whose answer was not used"),
            Column("loss", "float64", "nats", "the mean training loss of the clients that answered"),
            SECONDS,
            CLOCK,
            *BYTES,
            TOKENS,
            FLOPS,
            PEAK,
        ),
        round_rows,
    ),
    "evaluations": Frame(
        "One row per round, client, task and metric: the scores of models. Tidy: `value` is the only number that is measured.",
        (ROUND, ALL_CLIENTS, TASK, METRIC, MAIN, EXAMPLES, VALUE),
        evaluation_rows,
    ),
    "reference_lines": Frame(
        "What answers that need no model score on the same examples.",
        (
            Column("line", "str", "", "the answer: constant, or a copy of the input"),
            ROUND,
            ALL_CLIENTS,
            TASK,
            METRIC,
            MAIN,
            EXAMPLES,
            VALUE,
        ),
        reference_rows,
    ),
    "retained": Frame(
        "Scores on `evaluation.retained`: of the base model before the first round, and of each client's model after the last.",
        (
            ROUND,
            Column("client", "str", "", "its name; missing: the base model"),
            Column("task", "str", "", "the source of retained examples"),
            METRIC,
            EXAMPLES,
            VALUE,
        ),
        retained_rows,
    ),
    "drift": Frame(
        "How far the routers of a client's model moved from the base model's (`evaluation.drift`).",
        (
            ROUND,
            CLIENT,
            Column("block", "str", "", "the MoE layer"),
            Column("drift", "float64", "nats", "mean over tokens of KL(base ‖ client) over all experts"),
        ),
        drift_rows,
    ),
    "ledger": Frame(
        "One row per job: what it sent and cost. Jobs with the task `evaluate` are measurements and not a cost of the method.",
        (
            ROUND,
            CLIENT,
            Column("task", "str", "", '"train", "evaluate", or a setup task of the method'),
            *BYTES,
            SECONDS,
            CLOCK,
            TOKENS,
            FLOPS,
            PEAK,
            Column("experts", "int64", "experts", "that the client was assigned, over all layers"),
            Column("loss", "float64", "nats", "mean over the client's training steps"),
            Column("failed", "str", "", "why the answer was not used; missing: it was"),
            Column("metrics", "str", "", "what the method reports of itself, as JSON"),
        ),
        ledger_rows,
    ),
    "experts": Frame(
        "One row per round, client, MoE layer and expert that the client was assigned: large for large runs.",
        (
            ROUND,
            JOB,
            CLIENT,
            Column("block", "str", "", "the MoE layer"),
            Column("expert", "int64", "", "its number in the layer, from 0"),
            Column("trained", "bool", "", "whether it is in an update that was used; of setup tasks: no"),
            Column("tokens", "Int64", "tokens", "that the router assigned to it in training; missing if not recorded"),
            Column("share", "float64", "share of 1", "of the tokens assigned in the layer; missing if not recorded"),
        ),
        expert_rows,
    ),
    "predictions": Frame(
        "One row per answer that was kept (`evaluation.predictions`).",
        (
            ROUND,
            CLIENT,
            Column("task", "str", "", "of the data"),
            Column("source", "str", "", "where the examples of the task come from"),
            Column("metric", "str", "", "the task's main one"),
            Column("prompt", "str", "", "without chat template; a long one without its middle"),
            Column("reference", "str", "", "the right answer"),
            Column("answer", "str", "", "generated, or the likeliest choice; missing: scored by perplexity"),
            Column("score", "float64", "share of 1", "of this example, by the metric; of a perplexity: no share"),
        ),
        prediction_rows,
    ),
}
"""The tables by name."""

HEAD = """# Results as data

`fedexperts.results(folder)` reads one run or all runs of a comparison as pandas DataFrames; `fedexperts results FOLDER` writes
them as CSV or Parquet files with the same columns. Every table has one row per observation and begins with the columns that say
which run it is of. Missing values are NaN, or `<NA>` in an Int64. This page is made of the declarations in
`fedexperts/report/frames.py`.

::: fedexperts.report.results.Results
"""


def reference_page() -> str:
    """docs/reference/results.md."""
    return "\n".join([HEAD, *(table_of(name, frame) for name, frame in FRAMES.items())])


def table_of(name: str, frame: Frame) -> str:
    """The columns of a table in Markdown, under its name."""
    head = [f"## `{name}`", "", frame.about, "", "| column | dtype | unit | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *map(line_of, frame.all_columns)]) + "\n"


def line_of(column: Column) -> str:
    return f"| `{column.name}` | {column.dtype} | {column.unit} | {column.meaning} |"


if __name__ == "__main__":
    print(reference_page(), end="")
