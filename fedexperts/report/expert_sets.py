"""Which experts clients worked with, trained and sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from fedexperts.report.read import Holds, Round, RunResults
from fedexperts.report.stats import mean_or_none


@dataclass(frozen=True)
class ExpertCounts:
    """How many experts clients were assigned, each over all MoE layers."""

    mean: float
    least: int
    most: int


@dataclass(frozen=True)
class Overlap:
    """The Jaccard index of two clients' experts, as the mean over pairs of clients; None if there is no such pair."""

    same_task: float | None
    other_task: float | None


def assigned_by_client(run: RunResults) -> dict[str, list[tuple[int, Holds]]]:
    """Client → the training rounds it took part in, each with the experts it was assigned."""
    rounds: dict[str, list[tuple[int, Holds]]] = {}
    for row in training_rounds(run):
        for client, holds in row.holds.items():
            rounds.setdefault(client, []).append((row.round, holds))
    return rounds


def trained_by_client(run: RunResults) -> dict[str, list[tuple[int, Holds]]]:
    """Client → the training rounds in which its update was used, each with the experts it trained.

    These are the experts it sent if the log lists them (a client may train only some of its assigned experts), else those it was
    assigned.
    """
    rounds: dict[str, list[tuple[int, Holds]]] = {}
    for row in training_rounds(run):
        for client in (client for client in row.holds if client not in row.failed):
            rounds.setdefault(client, []).append((row.round, row.sends.get(client, row.holds[client])))
    return rounds


def num_sent(run: RunResults) -> list[int]:
    """The number of experts in each update that was used; empty if every client always sent the experts it was assigned."""
    if not any(row.sends for row in training_rounds(run)):
        return []
    return [num_experts(experts) for rounds in trained_by_client(run).values() for _, experts in rounds]


def training_rounds(run: RunResults) -> list[Round]:
    """The training rounds, in order."""
    return sorted((row for row in run.rounds if row.task == "train"), key=lambda row: row.round)


def jaccard(some: Holds, others: Holds) -> float:
    """The Jaccard index of two sets of experts, over all MoE layers: |both| / |either|."""
    one, other = ({(block, expert) for block, ids in each.items() for expert in ids} for each in (some, others))
    return len(one & other) / len(one | other)


def trained_experts(run: RunResults, when: int = -1) -> dict[str, Holds]:
    """Client → the experts it trained in its last round (`when` −1) or first (0), if any; clients of one task are adjacent."""
    experts = {client: rounds[when][1] for client, rounds in trained_by_client(run).items() if num_experts(rounds[when][1])}
    home = {client.name: client.task for client in run.plan.clients}
    order = list(dict.fromkeys(home.values()))
    place = {client: (order.index(home[client]) if client in home else len(order)) for client in experts}
    return {client: experts[client] for client in sorted(experts, key=lambda client: place[client])}


def overlap(run: RunResults, when: int = -1) -> Overlap:
    """The mean `jaccard` over pairs of clients with the same main task, and over pairs with different ones."""
    home = {client.name: client.task for client in run.plan.clients}
    pairs = list(combinations(trained_experts(run, when).items(), 2))
    same, other = (
        [jaccard(a, b) for (one, a), (two, b) in pairs if (home.get(one) == home.get(two)) == wanted] for wanted in (True, False)
    )
    return Overlap(mean_or_none(same), mean_or_none(other))


def num_experts(holds: Holds) -> int:
    """The number of experts over all MoE layers."""
    return sum(len(experts) for experts in holds.values())


def assigned_first(run: RunResults) -> ExpertCounts | None:
    """Over clients, the number of experts assigned in the first round that each trained in."""
    return _counts([rounds[0][1] for rounds in assigned_by_client(run).values()])


def assigned_last(run: RunResults) -> ExpertCounts | None:
    """Over clients, the number of experts assigned in the last round that each trained in."""
    return _counts([rounds[-1][1] for rounds in assigned_by_client(run).values()])


def _counts(holds: Sequence[Holds]) -> ExpertCounts | None:
    counts = [num_experts(each) for each in holds]
    return ExpertCounts(fmean(counts), min(counts), max(counts)) if counts else None


def total_experts(run: RunResults) -> int:
    """The number of experts of the base model, over all MoE layers."""
    return sum(block.num_experts for block in run.plan.model.blocks.values())
