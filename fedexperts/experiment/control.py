"""The course of a run: its score on the clients' validation examples, the best checkpoint, and when it stops early.

Test examples decide nothing: if they are what is scored, the validation examples are scored beside them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedexperts.config import RunConfig, StopSettings
from fedexperts.core.evaluation import Scores

VALIDATION = "validation"
"""The metric of evaluations with the scores on validation examples, and the key of log lines with their mean."""


def needs_validation(config: RunConfig) -> bool:
    """Whether clients are scored on validation examples in addition to test examples."""
    chooses = config.federation.stop.given or config.checkpoint.best
    return bool(config.federation.undo) or (chooses and config.evaluation.split == "test")


def overall(scores: Scores) -> dict[str, Any]:
    """The mean over tasks of their main metric, and whether less is better (perplexity)."""
    falling = all(scores.metric(task) == "perplexity" for task in scores.tasks)
    return {"value": scores.overall(), "falling": falling}


def signed(score: Mapping[str, Any]) -> float:
    """The value of `score` as a number of which more is better."""
    value = score["value"]
    if value is None or not math.isfinite(value):
        return -math.inf
    return float(-value if score["falling"] else value)


def history(out: Path) -> list[dict[str, Any]]:
    """The validation scores in evals.jsonl, each with its round, in their order."""
    path = out / "evals.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    return [{"round": line["round"], **line[VALIDATION]} for line in lines if line.get(VALIDATION)]


def reason_to_stop(scores: Sequence[Mapping[str, Any]], stop: StopSettings) -> str | None:
    """Why a run with these validation scores stops before its last round; None: it goes on.

    The score before the first round counts, but no run stops there.
    """
    if not scores or not stop.given or not scores[-1]["round"]:
        return None
    last, values = scores[-1], [signed(score) for score in scores]
    if stop.target is not None and values[-1] >= signed({**last, "value": stop.target}):
        return (
            f"round {last['round']} reached {last['value']:.4g} on validation examples (federation.stop.target = {stop.target:g})"
        )
    best, since = -math.inf, 0
    for value in values:
        best, since = (value, 0) if value > best + stop.min_delta or best == -math.inf else (best, since + 1)
    if stop.patience is not None and since >= stop.patience:
        return f"{since} evaluations without a better score on validation examples (federation.stop.patience = {stop.patience})"
    return None
