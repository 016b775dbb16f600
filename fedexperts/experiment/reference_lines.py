"""Scores as lines of a results folder, and those of a run's reference lines."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from fedexperts.core.evaluation import Scores, merge
from fedexperts.core.reference_lines import NAMES, reference_lines
from fedexperts.data.tokens import text_ids
from fedexperts.experiment.runtime import task_for
from fedexperts.experiment.setup import Prepared


def lines_of(prepared: Prepared) -> Iterator[Mapping[str, Any]]:
    """The content of reference_lines.jsonl: what a constant answer and a copy of the input score, as lines of evals.jsonl whose
    `line` names them; none for data that clients bring themselves, which the server does not see.
    """
    if prepared.config.data.own:
        return
    tokenizer, most, task = prepared.base.tokenizer, prepared.config.evaluation.generate_tokens, task_for(prepared)

    def shorten(text: str) -> str:
        return str(tokenizer.decode(text_ids(tokenizer, [text])[0][:most])).strip()

    splits = {client: prepared.clients[client] for client in prepared.clients}
    by_client = {client: reference_lines(split.train, task.scored_examples(split), shorten) for client, split in splits.items()}
    rising = {name for name, metric in prepared.clients.metrics().items() if metric != "perplexity"}
    for name in NAMES:
        of_clients = {client: scores[name] for client, scores in by_client.items()}
        together = merge(of_clients.values())
        own = (line for client, scores in of_clients.items() for line in score_lines(scores, client))
        complete = rising and together.tasks.keys() == rising  # else the mean over tasks would be over other tasks than a model's
        for line in [*own, *score_lines(together, None), *([overall_line(together)] if complete else [])]:
            yield {"line": name, "round": 0, **line}


def score_lines(scores: Scores, client: str | None, with_sums: bool = False) -> Iterator[Mapping[str, Any]]:
    for task, metrics in scores.by_task().items():
        columns = {"metric": scores.metric(task), "value": scores.main(task), "metrics": metrics}
        if with_sums:
            columns["sums"] = asdict(scores.tasks[task])
        yield {"client": client, "task": task, "examples": scores.tasks[task].examples, **columns}


def overall_line(scores: Scores) -> Mapping[str, Any]:
    """The line of all tasks together."""
    count = sum(part.examples for part in scores.tasks.values())
    return {"client": None, "task": None, "examples": count, "metric": "overall", "value": scores.overall()}
