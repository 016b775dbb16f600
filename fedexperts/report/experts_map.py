"""The data of the interactive map of experts × layers, which page.js draws."""

from collections.abc import Sequence
from typing import Any

from fedexperts.report import expert_sets, retention
from fedexperts.report.read import Holds, Round, RunResults


def experts_map(label: str, run: RunResults) -> dict[str, Any]:
    """What page.js draws the experts × layers map from: for each client, what it held from which round on.

    A layer's experts are a hexadecimal number whose bit e is expert e. What did not change is not repeated. `trained`: for each
    client the rounds of which something came back, and what it trained there, where that is not all that it held. `uses`: in
    thousandths, how a layer's picks were shared out among its experts while a client trained, in each round that tells.
    """
    blocks = run.plan.model.blocks
    sent = {
        (row.round, client): _masks(each, list(blocks)) for row in expert_sets.training(run) for client, each in row.sends.items()
    }
    trained = expert_sets.work(run)
    labels = retention.block_labels(list(blocks))
    return {
        "run": label,
        "blocks": [{"label": labels[name], "experts": block.num_experts} for name, block in blocks.items()],
        "rounds": sorted({row.round for row in run.rounds if row.task == "train" and row.holds}),
        "planned": len(run.client_names),
        "clients": [
            {
                "name": name,
                "holds": _changes(held, list(blocks)),
                "trained": [(round, sent.get((round, name))) for round, _ in trained.get(name, [])],
                "uses": [
                    (row.round, [_shares(row, name, block, plan.num_experts) for block, plan in blocks.items()])
                    for row in expert_sets.training(run)
                    if name in row.uses
                ],
            }
            for name, held in expert_sets.history(run).items()
        ],
    }


def _changes(held: Sequence[tuple[int, Holds]], blocks: Sequence[str]) -> list[tuple[int, list[str]]]:
    """The rounds in which a client's experts were not those of the time before."""
    found: list[tuple[int, list[str]]] = []
    for round, holds in held:
        masks = _masks(holds, blocks)
        if not found or found[-1][1] != masks:
            found.append((round, masks))
    return found


def _masks(holds: Holds, blocks: Sequence[str]) -> list[str]:
    return [f"{sum(1 << expert for expert in set(holds.get(block, ()))):x}" for block in blocks]


def _shares(row: Round, client: str, block: str, experts: int) -> list[int]:
    """Of all picks in `block` while `client` trained, those of each expert, in thousandths."""
    picks = dict(zip(row.holds[client].get(block, ()), row.uses[client].get(block, ()), strict=True))
    return [round(1000 * picks.get(expert, 0) / max(sum(picks.values()), 1)) for expert in range(experts)]
