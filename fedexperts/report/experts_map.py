"""The data of the interactive map of experts × layers, which page.js draws."""

from collections.abc import Sequence
from typing import Any

from fedexperts.report import expert_sets, retention
from fedexperts.report.read import Holds, Round, RunResults


def experts_map(label: str, run: RunResults) -> dict[str, Any]:
    """The data from which page.js draws the map: for each client the experts it was assigned, from which round on.

    The experts of a layer are a hexadecimal number whose bit e stands for expert e; `holds` lists only the rounds in which they
    change. `trained`: the rounds in which the client's update was used, with the experts it trained if not all of its assigned
    ones. `uses`: for the rounds that have it, the share of each expert in the tokens that the layer's router assigned while the
    client trained, in thousandths.
    """
    blocks = run.plan.model.blocks
    sent = {
        (row.round, client): _masks(each, list(blocks))
        for row in expert_sets.training_rounds(run)
        for client, each in row.sends.items()
    }
    trained = expert_sets.trained_by_client(run)
    labels = retention.block_labels(list(blocks))
    return {
        "run": label,
        "blocks": [{"label": labels[name], "experts": block.num_experts} for name, block in blocks.items()],
        "rounds": sorted({row.round for row in run.rounds if row.task == "train" and row.holds}),
        "planned": len(run.client_names),
        "clients": [
            {
                "name": name,
                "holds": _changes(rounds, list(blocks)),
                "trained": [(round, sent.get((round, name))) for round, _ in trained.get(name, [])],
                "uses": [
                    (row.round, [_shares(row, name, block, plan.num_experts) for block, plan in blocks.items()])
                    for row in expert_sets.training_rounds(run)
                    if name in row.uses
                ],
            }
            for name, rounds in expert_sets.assigned_by_client(run).items()
        ],
    }


def _changes(rounds: Sequence[tuple[int, Holds]], blocks: Sequence[str]) -> list[tuple[int, list[str]]]:
    """The rounds in which a client's experts differ from those of its round before."""
    changes: list[tuple[int, list[str]]] = []
    for round, holds in rounds:
        masks = _masks(holds, blocks)
        if not changes or changes[-1][1] != masks:
            changes.append((round, masks))
    return changes


def _masks(holds: Holds, blocks: Sequence[str]) -> list[str]:
    """The hexadecimal number of each block's experts."""
    return [f"{sum(1 << expert for expert in set(holds.get(block, ()))):x}" for block in blocks]


def _shares(row: Round, client: str, block: str, experts: int) -> list[int]:
    """The share of each expert in the tokens that were routed in `block` while `client` trained, in thousandths."""
    picks = dict(zip(row.holds[client].get(block, ()), row.uses[client].get(block, ()), strict=True))
    return [round(1000 * picks.get(expert, 0) / max(sum(picks.values()), 1)) for expert in range(experts)]
