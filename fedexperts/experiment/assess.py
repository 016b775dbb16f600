"""Evaluations of a run: what is written of them, and what is required."""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

from fedexperts.core import evaluation
from fedexperts.core.ledger import Ledger
from fedexperts.errors import BadRun
from fedexperts.experiment import control
from fedexperts.experiment.pooled import evaluate_clients
from fedexperts.experiment.predictions import keep_predictions
from fedexperts.experiment.progress import Progress
from fedexperts.experiment.reference_lines import overall_line, score_lines
from fedexperts.experiment.runtime import devices_of, encoder_for, task_for
from fedexperts.experiment.setup import Prepared
from fedexperts.io.manifest import append
from fedexperts.moe.device import on_device
from fedexperts.types import Engine, Server

SCORED = {"scores", "predictions", control.VALIDATION}
"""Metrics of evaluations that are merged over clients, or have a log of their own."""


def reported_scores(ledger: Ledger) -> dict[str, evaluation.Scores]:
    """The scores that clients reported with their updates, if they are scored before aggregation."""
    reported = {entry.client: entry.metrics["scores"] for entry in ledger.entries if "scores" in entry.metrics}
    return {client: evaluation.Scores.from_json(scores) for client, scores in reported.items()}


def assess_base(prepared: Prepared, out: Path) -> None:
    """Scores the base model on the retained examples and appends a line to evals.jsonl."""
    settings, examples = prepared.config.evaluation, prepared.retained.examples
    size = (settings.generate_tokens, settings.batch_size)
    model = on_device(prepared.base.model, devices_of(prepared.config)[0])
    retained = evaluation.by_example(model, examples, encoder_for(prepared), *size)
    append(out / "evals.jsonl", [against_base(0, None, {"retained": retained})])


def assess(
    prepared: Prepared,
    server: Server,
    engine: Engine,
    ledger: Ledger,
    out: Path,
    progress: Progress,
    reported: Mapping[str, evaluation.Scores],
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> Mapping[str, Any]:
    """Appends to evals.jsonl each client's scores on its examples of `evaluation.split`, and those of all clients together.

    After the last round also compares each client's model with the base model. reported: the scores of clients that are scored
    before aggregation; the others count with their last scores. known: client → metrics of these weights, if already evaluated.

    Returns the overall score on validation examples, or, if those are not scored, on test examples.
    """
    server, task = replace(server, task="evaluate", clients=prepared.server.clients), task_for(prepared)
    metrics: dict[str, Mapping[str, Any]] = {}
    if task.evaluates(server.round):
        metrics = evaluate_clients(prepared, server, engine, ledger, progress) if known is None else dict(known)
        ledger.predictions |= {client: each["predictions"] for client, each in metrics.items() if "predictions" in each}
        require_answers(server, ledger)
    evaluated = {client: each["scores"] for client, each in metrics.items() if "scores" in each}
    scores = {client: evaluation.Scores.from_json(each) for client, each in evaluated.items()} | dict(reported)
    latest = {**last_scores(out), **scores} if task.scores_after_training else scores
    together = evaluation.merge(latest[client] for client in server.clients if client in latest)
    with_sums = task.scores_after_training  # read by `last_scores` in later rounds, also after a resume
    own = [line for client in server.clients if client in scores for line in score_lines(scores[client], client, with_sums)]
    whole = dict(overall_line(together))
    held_out = [evaluation.Scores.from_json(each["validation"]) for each in metrics.values() if "validation" in each]
    validation = control.overall(evaluation.merge(held_out) if held_out else together)
    if held_out or prepared.config.evaluation.split == "validation":
        whole[control.VALIDATION] = validation
        course = [*control.history(out), {"round": server.round, **validation}]
        whole["stopped"] = control.reason_to_stop(course, prepared.config.federation.stop)
    lines = [{"round": server.round, **line} for line in [*own, *score_lines(together, None), whole]]
    comparisons = [against_base(server.round, client, each) for client, each in metrics.items() if each.keys() - SCORED]
    append(out / "evals.jsonl", [*lines, *comparisons])
    append(out / "ledger.jsonl", [entry.as_json() for entry in ledger.entries])
    keep_predictions(prepared, server.round, ledger, out)
    progress.failed(server, failures(ledger))
    progress.scored(server, together)
    ledger.clear()
    return validation


def against_base(round: int, client: str | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A log line with the retained scores and the routers' drift of a client's model (None: of the base model).

    It has no value, so that readers that do not know it ignore it.
    """
    count = sum(task["examples"] for task in metrics.get("retained", {}).values())
    line = {"round": round, "client": client, "task": None, "examples": count, "metric": None, "value": None}
    return {**line, **{name: each for name, each in metrics.items() if name not in SCORED}}


def last_scores(out: Path) -> dict[str, evaluation.Scores]:
    """Each client's latest scores in evals.jsonl."""
    by_client: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, (out / "evals.jsonl").read_text().splitlines() if (out / "evals.jsonl").exists() else ()):
        if line["client"] is not None and "sums" in line:
            by_client.setdefault(line["client"], {})[line["task"]] = with_nan(line["sums"])
    return {client: evaluation.Scores.from_json(tasks) for client, tasks in by_client.items()}


def with_nan(sums: Any) -> Any:
    """The sums of a log line, with NaN where JSON has null."""
    if isinstance(sums, dict):
        return {key: with_nan(value) for key, value in sums.items()}
    return nan if sums is None else sums


def require_answers(server: Server, ledger: Ledger, fewest: int = 1) -> None:
    """Raises BadRun if clients failed and fewer than `fewest` answered."""
    failed, total = failures(ledger), len(ledger.entries)
    if failed and total - len(failed) < fewest:
        client, reason = next(iter(failed.items()))
        number = f"all {total}" if len(failed) == total else f"{len(failed)} of {total}"
        quorum = f", and federation.min_clients = {fewest} must answer" if fewest > 1 else ""
        raise BadRun(
            f"round {server.round}: {number} clients failed, {client} because {reason}{quorum}; "
            "earlier rounds are saved: correct the cause and continue (`run` with --resume; `compare`: the same command), "
            "or, if you must change settings or data, start a new run with another --out"
        )


def failures(ledger: Ledger) -> dict[str, str]:
    """Client → why it was left out of the current round."""
    return {entry.client: entry.failed for entry in ledger.entries if entry.failed}
