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
from fedexperts.methods.base import answer, by_examples, mean_rows, of, tee_without_weights
from fedexperts.moe import factors, rows
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Tensors, Update, size


@dataclass(frozen=True)
class FLoRA:
    """ΔW = Σ p_k B_k A_k is exact: stacked, A_k above one another and p_k B_k side by side, no A meets another client's B.

    The server remembers each round's stack as `stack/<round>/<name>`, the sum of all products as `change/<name of A>`, and as
    `has/<client>` the last round that a client's base holds; a client keeps its own sum. A client is sent the stacks of the
    rounds that it has missed, as in the paper; or, where those would be more bytes than the sum itself, the sum (ours).

    ranks: of clients' adapters: one for all, or some that go in turn over clients by name; None: the run's.
    """

    ranks: Ranks | None = None
    setup_tasks: ClassVar[tuple[str, ...]] = ()
    centralized: ClassVar[bool] = False

    def assign(self, server: Server, client: Client) -> Assignment:
        """What is trained besides adapters; the client's rank; what its base lacks.

        Raises:
            BadValue: no adapters, or a rank that cannot be.
        """
        rank = torch.tensor(rank_for(server, client, self.ranks, "flora"))
        names = frozenset(server.weights) - factors.rank_axes(server.weights).keys()
        return Assignment(
            server.anatomy.all_experts, names, extra={"rank": rank, **missed(server.method_state, server.round, client)}
        )

    def train(self, job: Job, context: ClientContext) -> Update:
        """Fresh adapters, A drawn from the job's seed, on the base as it now is; all of both goes up."""
        model = install(job, context)
        context.client_state.update(factors.base_change(job.extra, context.client_state))
        fitted = fit(model, context, seed=job.seed)
        trained = rows.read(model)
        return answer(job, context, model, fitted, extra={f"stack/{name}": trained[name] for name in factors.rank_axes(trained)})

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """The round's stack, and what there is of it to add. All that is no adapter is the mean by examples (ours)."""
        notes: list[Update] = []
        merged = mean_rows(server, tee_without_weights(updates, notes), by_examples)
        if not notes:
            return merged
        stack = factors.stacked([(by_examples(note), of("stack", note.extra)) for note in notes])
        change = factors.base_change(named("stack", stack), server.method_state)
        has = {f"has/{note.client}": torch.tensor(server.round - 1) for note in notes}
        method_state = {**server.method_state, **change, **named(f"stack/{server.round}", stack), **has}
        return replace(merged, method_state=without_long_past(method_state, server.round))


def named(kind: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": tensor for name, tensor in tensors.items()}


def missed(method_state: Tensors, newest: int, client: Client) -> dict[str, torch.Tensor]:
    """The stacks, joined to one, of the rounds that the base of `client` lacks; or the whole sum, where not all are there."""
    has, forgotten = int(method_state.get(f"has/{client.name}", 0)), int(method_state.get("forgotten", 0))
    if has < forgotten:
        return named("change", of("change", method_state))
    stacks = [stack for round in range(has + 1, newest + 1) if (stack := of(f"stack/{round}", method_state))]
    return named("stack", joined(stacks)) if stacks else {}


def joined(stacks: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Factors of the sum of the products of `stacks`."""
    return {name: torch.cat([stack[name] for stack in stacks], axis) for name, axis in factors.rank_axes(stacks[0]).items()}


def without_long_past(method_state: Tensors, newest: int) -> dict[str, torch.Tensor]:
    """`method_state` without the stacks of rounds that, with all after, take more bytes than the sum; the last is `forgotten`."""
    most, bytes_since = size(of("change", method_state)), 0
    forgotten = int(method_state.get("forgotten", 0))
    for round in range(newest, forgotten, -1):
        bytes_since += size(of(f"stack/{round}", method_state))
        if bytes_since > most:
            forgotten = round
            break
    past = tuple(f"stack/{round}/" for round in range(forgotten + 1))
    kept = {key: tensor for key, tensor in method_state.items() if not key.startswith(past)}
    return {**kept, "forgotten": torch.tensor(forgotten)}
