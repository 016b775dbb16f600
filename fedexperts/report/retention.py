"""How clients' models stand against the untouched base: the knowledge they retained, and the drift of their routers."""

import re
from collections.abc import Sequence

from fedexperts.report import progress, scores
from fedexperts.report.read import Evaluation, OnRetained, RunResults


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
    return "" if retained_metric(runs, task) in scores.LOWER_IS_BETTER else "%"


def drift(run: RunResults) -> dict[str, list[float]]:
    """MoE block → how far its router drifted in each client's model, in 10^-3 nats."""
    rows = list(at_the_end(run).values())
    blocks = dict.fromkeys(block for row in rows for block in row.drift)
    return {block: [1000 * row.drift[block] for row in rows if block in row.drift] for block in blocks}


def drift_text(runs: Sequence[RunResults]) -> str:
    """On which text drift was measured, in words."""
    shared = [bool(progress.settings(run).get("evaluation", {}).get("retained")) for run in runs]
    own = f"each client's own {scores.scored_on(runs)} examples"
    return "the retained examples" if all(shared) else own if not any(shared) else f"the retained examples, or else {own}"


def block_labels(names: Sequence[str]) -> dict[str, str]:
    """`layer N` where the last number in the names tells the blocks apart, else their full names."""
    found = [re.findall(r"\d+", name) for name in names]
    short = [f"layer {numbers[-1]}" if numbers else name for name, numbers in zip(names, found, strict=True)]
    return dict(zip(names, short if len(set(short)) == len(names) else names, strict=True))


def drift_note(runs: Sequence[RunResults]) -> str:
    """What router drift is, and on which text it was measured."""
    return (
        "KL(the untouched base's routing ‖ that of a client's model after the last round), over all experts before top-k, as "
        f"the mean over the tokens of {drift_text(runs)}. 0: nothing changed. Each router sees its own model's hidden states. "
        "A model with fewer experts is held against the base with the same ones."
    )
