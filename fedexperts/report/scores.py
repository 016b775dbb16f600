"""How good models are: the evaluations of tasks and clients, and how a quality is spread over clients."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

import numpy as np

from fedexperts.report import progress
from fedexperts.report.read import Evaluation, RunResults
from fedexperts.report.stats import mean_or_none

SCORED_WHEN = {
    "after_aggregation": "After aggregation: each client with what the server then sends it and what it keeps to itself.",
    "before_aggregation": "Before aggregation: each client right after its local training, with what it is about to send and "
    "what it keeps to itself; of a client that did not train in that round the last scores count.",
}


LOWER_IS_BETTER = frozenset({"perplexity"})  # these are no shares either: shown as they are, not in %


@dataclass(frozen=True)
class Spread:
    """How a quality lies over clients, from bad to good."""

    worst: float
    lower: float  # quartile
    median: float
    upper: float  # quartile
    best: float


def scored_on(runs: Sequence[RunResults]) -> str:
    """Which of the clients' examples were scored: test, or validation; both where runs differ."""
    return (
        " and ".join(dict.fromkeys(progress.settings(run).get("evaluation", {}).get("split", "test") for run in runs)) or "test"
    )


def scored_when(runs: Sequence[RunResults]) -> str:
    """With which model clients were scored, in a sentence."""
    asked = dict.fromkeys(progress.settings(run).get("evaluation", {}).get("score", "after_aggregation") for run in runs)
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
    return mean_or_none([shown(row.value, in_unit) for row in rows if row.value is not None])


def clients_mean(run: RunResults, when: int = -1) -> float | None:
    """The mean of `client_quality` over the clients that were scored, each alike."""
    values = [client_quality(run, client, when) for client in run.client_names]
    return mean_or_none([value for value in values if value is not None])


def quality_of_clients(run: RunResults) -> dict[int, dict[str, float]]:
    """Evaluated round → client → the mean over its tasks there, in the unit of all; tasks chosen as in `client_quality`."""
    in_unit = unit([run], None)
    found: dict[int, dict[str, list[float]]] = {}
    for task in (task for task in tasks([run]) if unit([run], task) == in_unit):
        for client in run.client_names:
            for row in evaluated(run, client, task):
                if row.value is not None:
                    found.setdefault(row.round, {}).setdefault(client, []).append(shown(row.value, in_unit))
    return {round: {client: fmean(values) for client, values in found[round].items()} for round in sorted(found)}


def spread(values: Sequence[float], unit: str) -> Spread:
    """Quantiles of `values`, which are measured in `unit`: between two values as far as the quantile lies between them."""
    levels = (0.0, 0.25, 0.5, 0.75, 1.0) if unit == "%" else (1.0, 0.75, 0.5, 0.25, 0.0)
    return Spread(*(float(each) for each in np.quantile(values, levels)))


def scored_note(runs: Sequence[RunResults]) -> str:
    """Which examples a quality is of, and of which model."""
    return f"Scored on the clients' {scored_on(runs)} examples. {scored_when(runs)}"
