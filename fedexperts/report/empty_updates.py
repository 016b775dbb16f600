"""Updates without a single expert, from clients that were assigned experts: their training of experts was discarded."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedexperts.report import expert_sets
from fedexperts.report.expert_sets import num_experts
from fedexperts.report.read import Groups, RunResults


@dataclass(frozen=True)
class EmptyUpdates:
    """How many of the updates that were used contain no expert, and how many clients and rounds they come from."""

    updates: int
    of_updates: int
    clients: int
    rounds: int
    of_rounds: int


def count(runs: Sequence[RunResults]) -> EmptyUpdates:
    """Over the training rounds of `runs`; clients of the same name count once, rounds of different runs separately."""
    rounds = [row for run in runs for row in expert_sets.training_rounds(run)]
    used = [
        {client for client, experts in row.holds.items() if num_experts(experts) and client not in row.failed} for row in rounds
    ]
    empty = [
        {client for client in clients if client in row.sends and not num_experts(row.sends[client])}
        for row, clients in zip(rounds, used, strict=True)
    ]
    return EmptyUpdates(
        updates=sum(map(len, empty)),
        of_updates=sum(map(len, used)),
        clients=len(set().union(*empty)),
        rounds=sum(map(bool, empty)),
        of_rounds=len(rounds),
    )


def warning(groups: Groups) -> str:
    """A sentence that names the methods with empty updates and their share; empty if there are none."""
    counts = {label: count(runs) for label, runs in groups.items()}
    affected = "; ".join(f"{label} {_in_words(each)}" for label, each in counts.items() if each.updates)
    return (
        f"Warning: clients sent no expert at all, so their training of experts did not reach the server: {affected}."
        if affected
        else ""
    )


def _in_words(empty: EmptyUpdates) -> str:
    share = 100 * empty.updates / empty.of_updates
    clients = "1 client" if empty.clients == 1 else f"{empty.clients} clients"
    return (
        f"in {empty.updates} of {empty.of_updates} updates ({share:.3g} %), from {clients} in {empty.rounds} of "
        f"{empty.of_rounds} rounds"
    )
