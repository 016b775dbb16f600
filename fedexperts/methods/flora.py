"""FLoRA: clients' adapters are stacked, not averaged; everybody adds the product into its base and starts on fresh ones.

Wang, Shen, He, Sun, Wang, Lyu, Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
NeurIPS 2024, https://arxiv.org/abs/2409.05976. What it leaves open is marked (ours).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedexperts.core.training import fit, install
from fedexperts.methods.adapters import Ranks, rank_for
from fedexperts.methods.base import answer, by_examples, heard, mean_rows, of
from fedexperts.moe import factors, rows
from fedexperts.types import Assignment, Bench, Client, Job, Server, Tensors, Update, size


@dataclass(frozen=True)
class FLoRA:
    """ΔW = Σ p_k B_k A_k is exact: stacked, A_k above one another and p_k B_k side by side, no A meets another client's B.

    The server remembers each round's stack as `stack/<round>/<name>`, the sum of all products as `change/<name of A>`, and as
    `has/<client>` the last round that a client's base holds; a client keeps its own sum. A client is sent the stacks of the
    rounds that it has missed, as in the paper; or, where those would be more bytes than the sum itself, the sum (ours).

    ranks: of clients' adapters: one for all, or some that go in turn over clients by name; None: the run's.
    """

    ranks: Ranks | None = None
    before: ClassVar[tuple[str, ...]] = ()
    pooled: ClassVar[bool] = False

    def assign(self, server: Server, client: Client) -> Assignment:
        """What is trained besides adapters; the client's rank; what its base lacks.

        Raises:
            BadValue: no adapters, or a rank that cannot be.
        """
        rank = torch.tensor(rank_for(server, client, self.ranks, "flora"))
        names = frozenset(server.weights) - factors.rank_axes(server.weights).keys()
        return Assignment(server.anatomy.all_experts, names, extra={"rank": rank, **missed(server.memory, server.round, client)})

    def train(self, job: Job, bench: Bench) -> Update:
        """Fresh adapters, A drawn from the job's seed, on the base as it now is; all of both goes up."""
        model = install(job, bench)
        bench.kept.update(factors.base_change(job.extra, bench.kept))
        fitted = fit(model, bench, seed=job.seed)
        trained = rows.read(model)
        return answer(job, bench, model, fitted, extra={f"stack/{name}": trained[name] for name in factors.rank_axes(trained)})

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """The round's stack, and what there is of it to add. All that is no adapter is the mean by examples (ours)."""
        notes: list[Update] = []
        merged = mean_rows(server, heard(updates, notes), by_examples)
        if not notes:
            return merged
        stack = factors.stacked([(by_examples(note), of("stack", note.extra)) for note in notes])
        change = factors.base_change(named("stack", stack), server.memory)
        has = {f"has/{note.client}": torch.tensor(server.round - 1) for note in notes}
        memory = {**server.memory, **change, **named(f"stack/{server.round}", stack), **has}
        return replace(merged, memory=without_long_past(memory, server.round))


def named(kind: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": tensor for name, tensor in tensors.items()}


def missed(memory: Tensors, newest: int, client: Client) -> dict[str, torch.Tensor]:
    """The stacks, joined to one, of the rounds that the base of `client` lacks; or the whole sum, where not all are there."""
    has, forgotten = int(memory.get(f"has/{client.name}", 0)), int(memory.get("forgotten", 0))
    if has < forgotten:
        return named("change", of("change", memory))
    stacks = [stack for round in range(has + 1, newest + 1) if (stack := of(f"stack/{round}", memory))]
    return named("stack", joined(stacks)) if stacks else {}


def joined(stacks: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Factors of the sum of the products of `stacks`."""
    return {name: torch.cat([stack[name] for stack in stacks], axis) for name, axis in factors.rank_axes(stacks[0]).items()}


def without_long_past(memory: Tensors, newest: int) -> dict[str, torch.Tensor]:
    """`memory` without the stacks of rounds that, with all after them, take more bytes than the sum; the last is `forgotten`."""
    most, bytes_since = size(of("change", memory)), 0
    forgotten = int(memory.get("forgotten", 0))
    for round in range(newest, forgotten, -1):
        bytes_since += size(of(f"stack/{round}", memory))
        if bytes_since > most:
            forgotten = round
            break
    past = tuple(f"stack/{round}/" for round in range(forgotten + 1))
    kept = {key: tensor for key, tensor in memory.items() if not key.startswith(past)}
    return {**kept, "forgotten": torch.tensor(forgotten)}
