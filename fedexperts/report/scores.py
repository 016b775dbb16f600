"""Scores of models: the evaluations of tasks and clients, and the spread of a quality over clients."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

import numpy as np

from fedexperts.report import progress
from fedexperts.report.read import Evaluation, RunResults
from fedexperts.report.stats import mean_or_none

SCORED_WHEN = {
    "after_aggregation": "After aggregation: each client's model with the new server weights and its personal parts.",
    "before_aggregation": "Before aggregation: each client's model right after its local training; a client that did not train "
    "in that round keeps its last scores.",
}


LOWER_IS_BETTER = frozenset({"perplexity"})  # all other metrics are shares, shown in %


@dataclass(frozen=True)
class Spread:
    """Quantiles of a quality over clients, from the worst to the best."""

    worst: float
    lower: float  # quartile
    median: float
    upper: float  # quartile
    best: float


def scored_on(runs: Sequence[RunResults]) -> str:
    """The split of the clients' examples that was scored, test or validation; both if runs differ."""
    return (
        " and ".join(dict.fromkeys(progress.settings(run).get("evaluation", {}).get("split", "test") for run in runs)) or "test"
    )


def scored_when(runs: Sequence[RunResults]) -> str:
    """Which model of each client was scored, in a sentence."""
    moments = dict.fromkeys(progress.settings(run).get("evaluation", {}).get("score", "after_aggregation") for run in runs)
    return " ".join(SCORED_WHEN[each] for each in moments) or SCORED_WHEN["after_aggregation"]


def tasks(runs: Sequence[RunResults]) -> list[str]:
    """All tasks that were evaluated, in the order in which they first come."""
    return list(dict.fromkeys(task for run in runs for _, task in run.evaluations_of if task is not None))


def evaluations(run: RunResults, client: str | None, task: str | None) -> list[Evaluation]:
    """The evaluations of `client` on `task` (None: over all) with a finite value, by round."""
    rows = run.evaluations_of.get((client, task), ())
    return sorted((row for row in rows if row.value is not None and isfinite(row.value)), key=lambda row: row.round)


def last_evaluation(run: RunResults, client: str | None, task: str | None) -> Evaluation | None:
    """The latest of `evaluations`."""
    rows = evaluations(run, client, task)
    return rows[-1] if rows else None


def main_metric(runs: Sequence[RunResults], task: str) -> str:
    """The main metric of `task`; empty if it was not evaluated."""
    rows = (row for run in runs for row in run.evaluations_of.get((None, task), ()))
    return next((row.metric for row in rows if row.metric), "")


def unit(runs: Sequence[RunResults], task: str | None) -> str:
    """`%` for shares (accuracy, F1, ROUGE, …), empty for a perplexity.

    The overall quality (task None) leaves out the tasks scored by perplexity, unless all are.
    """
    measured = [main_metric(runs, each) for each in ([task] if task is not None else tasks(runs))]
    return "" if measured and all(each in LOWER_IS_BETTER for each in measured) else "%"


def to_unit(value: float, unit: str) -> float:
    """`value` in `unit`: a share becomes a percentage."""
    return 100 * value if unit == "%" else value


def clients_of(run: RunResults, task: str) -> list[str]:
    """The clients on which `task` was evaluated."""
    return [client for client, each in run.evaluations_of if each == task and client is not None]


def client_quality(run: RunResults, client: str, when: int = -1) -> float | None:
    """The mean of the main metrics of the client's tasks at its last evaluation (`when` −1) or first (0), in the overall unit.

    As in the overall quality, tasks scored by perplexity are left out unless all are.
    """
    in_unit = unit([run], None)
    by_task = (evaluations(run, client, task) for task in tasks([run]) if unit([run], task) == in_unit)
    rows = [rows[when] for rows in by_task if rows]
    return mean_or_none([to_unit(row.value, in_unit) for row in rows if row.value is not None])


def clients_mean(run: RunResults, when: int = -1) -> float | None:
    """The mean of `client_quality` over the clients that were scored, all with the same weight."""
    values = [client_quality(run, client, when) for client in run.client_names]
    return mean_or_none([value for value in values if value is not None])


def quality_of_clients(run: RunResults) -> dict[int, dict[str, float]]:
    """Evaluated round → client → its quality in that round, as in `client_quality`."""
    in_unit = unit([run], None)
    scores: dict[int, dict[str, list[float]]] = {}
    for task in (task for task in tasks([run]) if unit([run], task) == in_unit):
        for client in run.client_names:
            for row in evaluations(run, client, task):
                if row.value is not None:
                    scores.setdefault(row.round, {}).setdefault(client, []).append(to_unit(row.value, in_unit))
    return {round: {client: fmean(values) for client, values in scores[round].items()} for round in sorted(scores)}


def spread(values: Sequence[float], unit: str) -> Spread:
    """The quantiles of `values`, which are in `unit`, linearly interpolated."""
    levels = (0.0, 0.25, 0.5, 0.75, 1.0) if unit == "%" else (1.0, 0.75, 0.5, 0.25, 0.0)
    return Spread(*(float(each) for each in np.quantile(values, levels)))


def scored_note(runs: Sequence[RunResults]) -> str:
    """Which examples were scored, and with which model of each client."""
    return f"Scored on the clients' {scored_on(runs)} examples. {scored_when(runs)}"
