"""Clients' models compared with the base model: the knowledge they retained, and the drift of their routers."""

import re
from collections.abc import Sequence

from fedexperts.report import progress, scores
from fedexperts.report.read import Evaluation, OnRetained, RunResults


def final_by_client(run: RunResults) -> dict[str, Evaluation]:
    """Client → the comparison of its model with the base model after the last round."""
    rows = (row for row in run.evaluations if row.client is not None and (row.retained or row.drift))
    return {row.client: row for row in rows if row.client is not None}


def retained_tasks(runs: Sequence[RunResults]) -> list[str]:
    """The tasks that measure retained knowledge, in the order in which they first come."""
    return list(dict.fromkeys(task for run in runs for row in run.evaluations for task in row.retained))


def base_score(run: RunResults, task: str) -> OnRetained | None:
    """The score of the base model on a retained task."""
    return next((row.retained[task] for row in run.evaluations_of.get((None, None), ()) if task in row.retained), None)


def retained_by_client(run: RunResults, task: str) -> dict[str, OnRetained]:
    """Client → the score of its model on a retained task after the last round."""
    return {client: row.retained[task] for client, row in final_by_client(run).items() if task in row.retained}


def retained_metric(runs: Sequence[RunResults], task: str) -> str:
    """The metric of a retained task."""
    return next((row.retained[task].metric for run in runs for row in run.evaluations if task in row.retained), "")


def retained_unit(runs: Sequence[RunResults], task: str) -> str:
    """`%` for shares, empty for a perplexity."""
    return "" if retained_metric(runs, task) in scores.LOWER_IS_BETTER else "%"


def drift(run: RunResults) -> dict[str, list[float]]:
    """MoE block → the drift of its router in each client's model, in 10^-3 nats."""
    rows = list(final_by_client(run).values())
    blocks = dict.fromkeys(block for row in rows for block in row.drift)
    return {block: [1000 * row.drift[block] for row in rows if block in row.drift] for block in blocks}


def drift_text(runs: Sequence[RunResults]) -> str:
    """The text on which drift was measured, in words."""
    shared = [bool(progress.settings(run).get("evaluation", {}).get("retained")) for run in runs]
    own = f"each client's own {scores.scored_on(runs)} examples"
    return "the retained examples" if all(shared) else own if not any(shared) else f"the retained examples, or else {own}"


def block_labels(names: Sequence[str]) -> dict[str, str]:
    """Block → `layer N` if the last numbers in the names are all different, else its full name."""
    numbers = [re.findall(r"\d+", name) for name in names]
    short = [f"layer {each[-1]}" if each else name for name, each in zip(names, numbers, strict=True)]
    return dict(zip(names, short if len(set(short)) == len(names) else names, strict=True))


def drift_note(runs: Sequence[RunResults]) -> str:
    """The definition of router drift, and the text on which it was measured."""
    return (
        "KL(routing of the base model ‖ routing of a client's model after the last round), over all experts before top-k, as the "
        f"mean over the tokens of {drift_text(runs)}; 0 means no change. Each router sees its own model's hidden states. "
        "A model with fewer experts is compared with the base model restricted to the same experts."
    )
