"""The tables of a single run about costs, experts and failures."""

from collections.abc import Sequence
from statistics import fmean, median

from fedexperts.report import analytic_floors, expert_sets, resources
from fedexperts.report.read import LedgerRow, RunResults
from fedexperts.report.table_format import NONE, Table, megabytes, number, whole


def costs(run: RunResults) -> Table:
    """What each kind of work took, all that counts as the method's, and beside it the evaluations."""
    work = {task: [row for row in run.ledger if row.task == task] for task in dict.fromkeys(row.task for row in run.ledger)}
    rows = [_cost_row(task, rows) for task, rows in work.items() if task != "evaluate"]
    if rows:
        rows.append(_cost_row("total", resources.counted(run)))
    if "evaluate" in work:
        rows.append(_cost_row("evaluate (not in the total)", work["evaluate"]))
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
        sums=len(rows) - len([task for task in work if task != "evaluate"]),
    )


def _cost_row(work: str, rows: Sequence[LedgerRow]) -> tuple[str, ...]:
    measured = resources.peaks(rows)
    return (
        work,
        whole(len(rows)),
        megabytes(resources.down(rows)),
        megabytes(resources.up(rows)),
        number(sum(row.seconds for row in rows)),
        whole(sum(row.tokens for row in rows)),
        megabytes(median(measured) if measured else None),
        megabytes(max(measured, default=None)),
        number(sum(row.flops_estimated for row in rows) / 1e12),
        whole(sum(row.failed is not None for row in rows)),
    )


def floors(run: RunResults) -> Table:
    """Measured bytes and memory beside what they can be at the least, and FLOPs beside what they can be at the most."""
    rows = [(f"{each.cost} (MB)", number(each.measured), number(each.analytic), "floor") for each in analytic_floors.floors(run)]
    ratios = [number(each.measured / each.analytic) if each.analytic else NONE for each in analytic_floors.floors(run)]
    most, parts = run.plan.round_flops_estimated, [row for row in resources.trained(run) if row.failed is None]
    if most and parts:
        estimated = fmean(row.flops_estimated for row in parts)
        rows.append(("FLOPs estimated (10^9)", number(estimated / 1e9), number(most / 1e9), "ceiling"))
        ratios.append(number(estimated / most))
    return Table(
        "A client's round against the analytic floor",
        ("cost", "in this run", "analytic", "which is a", "ratio"),
        tuple((*row, ratio) for row, ratio in zip(rows, ratios, strict=True)),
        note="Means over all clients' parts in training rounds. The floor of down and up: the weights of the experts that the "
        "client held, or sent, and all others that travel, without ids, names and numbers beside them; a method that sends fewer "
        "is below it. Of memory: weights and optimiser state of what the client held, and the larger of gradients and "
        "activations, for the longest examples allowed; shorter ones can take less. The ceiling of FLOPs: the whole model on the "
        "longest examples.",
        text_columns=(0, 3),
    )


def overlap(run: RunResults) -> Table:
    """How alike the experts of two clients are, the first and the last time they trained."""
    found = {"first round of each client": expert_sets.overlap(run, 0), "last round of each client": expert_sets.overlap(run)}
    return Table(
        "Overlap of the experts that two clients trained",
        ("when", "same main task", "different tasks"),
        tuple(
            (when, *(NONE if value is None else f"{value:.2f}" for value in (each.same_task, each.other_task)))
            for when, each in found.items()
            if each != expert_sets.Overlap(None, None)
        ),
        note="Experts that both trained, of those that either did, over all layers, as the mean over pairs of clients: 1 where "
        "they are the same, 0 where they share none.",
    )


def held(run: RunResults) -> Table:
    """How many experts clients held, over all layers, the first and the last time each trained."""
    found = {"first round of each client": expert_sets.held_first(run), "last round of each client": expert_sets.held_last(run)}
    return Table(
        f"Experts held by a client, of {expert_sets.experts_of(run)}",
        ("when", "mean", "least", "most"),
        tuple((when, f"{held.mean:.1f}", whole(held.least), whole(held.most)) for when, held in found.items() if held),
    )


def chosen(run: RunResults) -> Table:
    """How many experts backward reached in each layer, and how many qualified and were sent; no rows where nothing is told."""
    layers = run.plan.model.blocks
    found = {
        **{
            f"reached in {name}": (block.num_experts, each)
            for (name, block), each in zip(layers.items(), expert_sets.reached(run), strict=False)
        },
        "qualified": (expert_sets.experts_of(run), expert_sets.told(run, "qualified")),
        "sent": (expert_sets.experts_of(run), expert_sets.told(run, "sent")),
    }
    return Table(
        "Experts that clients trained and sent",
        ("experts", "of", "mean", "least", "most"),
        tuple(
            (name, whole(number), f"{fmean(each):.1f}", f"{min(each):.1f}", f"{max(each):.1f}")
            for name, (number, each) in found.items()
            if each
        ),
        note="Of each client and round. Reached: by backward in a step, the mean over its steps. Qualified: used "
        "above the floor. Sent: those of them that were trained.",
    )


def over_memory(run: RunResults) -> Table:
    """The clients whose measured peak was above their memory."""
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
    """Who was left out of which round, and why."""
    return Table(
        "Failures",
        ("round", "client", "work", "reason"),
        tuple((str(row.round), row.client, row.task, row.reason) for row in resources.failures(run)),
        text_columns=(1, 2, 3),
    )
