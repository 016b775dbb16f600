"""The tables of a single run about costs, experts and failures."""

from collections.abc import Sequence
from statistics import fmean, median

from fedexperts.report import analytic_floors, client_metrics, expert_sets, resources
from fedexperts.report.read import LedgerRow, RunResults
from fedexperts.report.table_format import NONE, Table, count, megabytes, number


def costs(run: RunResults) -> Table:
    """The costs of each kind of job, their total without evaluations, and the costs of evaluations."""
    by_task = {task: [row for row in run.ledger if row.task == task] for task in dict.fromkeys(row.task for row in run.ledger)}
    rows = [_cost_row(task, rows) for task, rows in by_task.items() if task != "evaluate"]
    if rows:
        rows.append(_cost_row("total", resources.cost_rows(run)))
    if "evaluate" in by_task:
        rows.append(_cost_row("evaluate (not in the total)", by_task["evaluate"]))
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
        sums=len(rows) - len([task for task in by_task if task != "evaluate"]),
    )


def _cost_row(work: str, rows: Sequence[LedgerRow]) -> tuple[str, ...]:
    measured = resources.peaks(rows)
    return (
        work,
        count(len(rows)),
        megabytes(resources.bytes_down(rows)),
        megabytes(resources.bytes_up(rows)),
        number(sum(row.seconds for row in rows)),
        count(sum(row.tokens for row in rows)),
        megabytes(median(measured) if measured else None),
        megabytes(max(measured, default=None)),
        number(sum(row.flops_estimated for row in rows) / 1e12),
        count(sum(row.failed is not None for row in rows)),
    )


def floors(run: RunResults) -> Table:
    """Measured bytes and memory beside their analytic minimum, and FLOPs beside their analytic maximum."""
    rows = [(f"{each.cost} (MB)", number(each.measured), number(each.analytic), "floor") for each in analytic_floors.floors(run)]
    ratios = [number(each.measured / each.analytic) if each.analytic else NONE for each in analytic_floors.floors(run)]
    most, parts = run.plan.round_flops_estimated, [row for row in resources.training_rows(run) if row.failed is None]
    if most and parts:
        estimated = fmean(row.flops_estimated for row in parts)
        rows.append(("FLOPs estimated (10^9)", number(estimated / 1e9), number(most / 1e9), "ceiling"))
        ratios.append(number(estimated / most))
    return Table(
        "A client's round against the analytic floor",
        ("cost", "in this run", "analytic", "bound", "ratio"),
        tuple((*row, ratio) for row, ratio in zip(rows, ratios, strict=True)),
        note="Means over clients and training rounds. Floor of down and up: the weights of the experts that the client held or "
        "sent, and all dense weights that are sent, without ids, names and metadata; a method that sends fewer weights is below "
        "it. Floor of memory: weights and optimizer state of the experts that the client held, and the larger of gradients and "
        "activations, for examples of the maximum length; shorter ones can take less. Ceiling of FLOPs: the whole model on "
        "examples of the maximum length.",
        text_columns=(0, 3),
    )


def overlap(run: RunResults) -> Table:
    """The overlap of two clients' experts in the first and the last round that each trained in."""
    overlaps = {"first round of each client": expert_sets.overlap(run, 0), "last round of each client": expert_sets.overlap(run)}
    return Table(
        "Overlap of the experts that two clients trained",
        ("when", "same main task", "different tasks"),
        tuple(
            (when, *(NONE if value is None else f"{value:.2f}" for value in (each.same_task, each.other_task)))
            for when, each in overlaps.items()
            if each != expert_sets.Overlap(None, None)
        ),
        note="Jaccard index of the experts that two clients trained, over all layers, as the mean over pairs of clients: 1 if "
        "they are the same, 0 if the two share none.",
    )


def assigned_experts(run: RunResults) -> Table:
    """How many experts clients were assigned, over all layers, in the first and the last round that each trained in."""
    counts = {
        "first round of each client": expert_sets.assigned_first(run),
        "last round of each client": expert_sets.assigned_last(run),
    }
    return Table(
        f"Experts held by a client, of {expert_sets.total_experts(run)}",
        ("when", "mean", "least", "most"),
        tuple((when, f"{each.mean:.1f}", count(each.least), count(each.most)) for when, each in counts.items() if each),
    )


def trained_and_sent(run: RunResults) -> Table:
    """How many experts backward reached in each layer, and how many clients sent, if that differs from what they held."""
    blocks = run.plan.model.blocks
    counts: dict[str, tuple[int, Sequence[float]]] = {
        **{f"reached in {name}": (blocks[name].num_experts, each) for name, each in client_metrics.reached(run).items()},
        "sent": (expert_sets.total_experts(run), expert_sets.num_sent(run)),
    }
    return Table(
        "Experts that clients trained and sent",
        ("experts", "of", "mean", "least", "most"),
        tuple((name, count(total), *_mean_least_most(each)) for name, (total, each) in counts.items() if each),
        note="Per client and round. Reached: by backward in a step, as the mean over the client's steps.",
    )


def reported_metrics(run: RunResults) -> Table:
    """The metrics of the method that clients reported with their updates."""
    return Table(
        "Metrics that the method reports",
        ("metric", "mean", "least", "most"),
        tuple((name, *map(number, (fmean(each), min(each), max(each)))) for name, each in client_metrics.of_method(run).items()),
        note="Per client and training round, under the names that the method gives them.",
    )


def _mean_least_most(values: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{value:.1f}" for value in (fmean(values), min(values), max(values)))


def over_memory(run: RunResults) -> Table:
    """The clients whose measured peak exceeded their memory."""
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
            for row in resources.over_memory(run)
        ),
    )


def failures(run: RunResults) -> Table:
    """The clients that failed, in which round, and why."""
    return Table(
        "Failures",
        ("round", "client", "work", "reason"),
        tuple((str(row.round), row.client, row.task, row.reason) for row in resources.failures(run)),
        text_columns=(1, 2, 3),
    )
