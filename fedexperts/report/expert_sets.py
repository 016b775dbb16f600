"""Which experts clients worked with, trained and sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from fedexperts.report import resources
from fedexperts.report.read import Holds, Round, RunResults
from fedexperts.report.stats import mean_or_none


@dataclass(frozen=True)
class Held:
    """How many experts clients held, over all MoE layers of each."""

    mean: float
    least: int
    most: int


@dataclass(frozen=True)
class Overlap:
    """How alike clients' experts are, as the mean over pairs; None where there is no such pair."""

    same_task: float | None
    other_task: float | None


def told(run: RunResults, name: str) -> list[Any]:
    """What the method told under `name`, of each client's part in a training round; empty where it told nothing."""
    return [row.metrics[name] for row in resources.trained(run) if name in row.metrics]


def reached(run: RunResults) -> list[list[float]]:
    """For each layer the experts that backward reached in a step, of each client's part in a round."""
    return [list(layer) for layer in zip(*told(run, "reached"), strict=True)]


def history(run: RunResults) -> dict[str, list[tuple[int, Holds]]]:
    """For each client the rounds it trained in, and the experts it worked with in each."""
    found: dict[str, list[tuple[int, Holds]]] = {}
    for row in training(run):
        for client, holds in row.holds.items():
            found.setdefault(client, []).append((row.round, holds))
    return found


def work(run: RunResults) -> dict[str, list[tuple[int, Holds]]]:
    """For each client the rounds it trained in and what it sent was used, and the experts it trained.

    These are those that it sent where the log has them (a client may hold more than it trains), else those that it held.
    """
    found: dict[str, list[tuple[int, Holds]]] = {}
    for row in training(run):
        for client in (client for client in row.holds if client not in row.failed):
            found.setdefault(client, []).append((row.round, row.sends.get(client, row.holds[client])))
    return found


def training(run: RunResults) -> list[Round]:
    """The training rounds, in order."""
    return sorted((row for row in run.rounds if row.task == "train"), key=lambda row: row.round)


def alike(some: Holds, others: Holds) -> float:
    """Experts that both have, of those that either has, over all MoE layers: the Jaccard index."""
    one, other = ({(block, expert) for block, ids in each.items() for expert in ids} for each in (some, others))
    return len(one & other) / len(one | other)


def worked_with(run: RunResults, when: int = -1) -> dict[str, Holds]:
    """Client → the experts it trained the last time, or with 0 the first, where there were any; those of one task together."""
    found = {client: rounds[when][1] for client, rounds in work(run).items() if count(rounds[when][1])}
    home = {client.name: client.task for client in run.plan.clients}
    order = list(dict.fromkeys(home.values()))
    place = {client: (order.index(home[client]) if client in home else len(order)) for client in found}
    return {client: found[client] for client in sorted(found, key=lambda client: place[client])}


def overlap(run: RunResults, when: int = -1) -> Overlap:
    """`alike` over all pairs of clients, with the same main task and with others."""
    home = {client.name: client.task for client in run.plan.clients}
    pairs = list(combinations(worked_with(run, when).items(), 2))
    same, other = (
        [alike(a, b) for (one, a), (two, b) in pairs if (home.get(one) == home.get(two)) == wanted] for wanted in (True, False)
    )
    return Overlap(mean_or_none(same), mean_or_none(other))


def count(holds: Holds) -> int:
    """Experts over all MoE layers."""
    return sum(len(experts) for experts in holds.values())


def held_first(run: RunResults) -> Held | None:
    """Over clients, what each held in the first round it trained in."""
    return _held([rounds[0][1] for rounds in history(run).values()])


def held_last(run: RunResults) -> Held | None:
    """Over clients, what each held in the last round it trained in."""
    return _held([rounds[-1][1] for rounds in history(run).values()])


def _held(holds: Sequence[Holds]) -> Held | None:
    counts = [count(each) for each in holds]
    return Held(fmean(counts), min(counts), max(counts)) if counts else None


def experts_of(run: RunResults) -> int:
    """All experts of the base model."""
    return sum(block.num_experts for block in run.plan.model.blocks.values())
