"""FLoRA: clients' adapters are stacked, not averaged; everybody adds the product into its base and starts on fresh ones.

Wang, Shen, He, Sun, Wang, Lyu, Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
NeurIPS 2024, https://arxiv.org/abs/2409.05976. What it leaves open is marked (ours).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedexperts.core.training import fit, load_weights
from fedexperts.methods.adapters import Ranks, at_rank_of, rank_for
from fedexperts.methods.base import answer, by_examples, mean_rows, of, tee_without_weights
from fedexperts.methods.contract import Declaration, ExtraTensors, Method
from fedexperts.moe import factors, rows
from fedexperts.moe.tuning import Tuning
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Tensors, Update, size


@dataclass(frozen=True)
class FLoRA(Method):
    """ΔW = Σ p_k B_k A_k is exact: stacked, A_k above one another and p_k B_k side by side, no A meets another client's B.

    The server remembers each round's stack as `stack/<round>/<name>`, the sum of all products as `change/<name of A>`, and as
    `has/<client>` the last round that a client's base holds; a client keeps its own sum. A client is sent the stacks of the
    rounds that it has missed, as in the paper; or, where those would be more bytes than the sum itself, the sum (ours).

    ranks: of clients' adapters: one for all, or some that go in turn over clients by name; None: the run's.
    """

    ranks: Ranks | None = None

    def declare(self) -> Declaration:
        return Declaration(
            extra={"stack/": ExtraTensors(sent_factors, low=-100.0, high=100.0)},
            job_extra=("rank", "change/", "stack/"),
            client_state=("change/",),
            wrappers=frozenset(),  # a merge gives no weights to go on from: factors are drawn anew each round
        )

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """Adapters of the client's rank on the base with all that former rounds added to it."""
        model = at_rank_of(job, context)
        factors.add_to_base(model, of("change", base_change(job.extra, context.client_state)))
        return load_weights(model, job, context)

    def global_model(self, base: nn.Module, tuning: Tuning, server: Server | None, seed: str) -> nn.Module:
        """With the sum of all products in the base's weights."""
        model = super().global_model(base, tuning, server, seed)
        if server is not None:
            factors.add_to_base(model, of("change", base_change({}, server.method_state)))
        return model

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
        model = self.build_model(job, context)
        context.client_state.update(base_change(job.extra, context.client_state))
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
        change = base_change(named("stack", stack), server.method_state)
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


def base_change(extra: Tensors, client_state: Tensors) -> dict[str, Tensor]:
    """What was added to a client's frozen weights so far: `change/<name of an A>` → Σ BA under it, [rows, out, in].

    That is what the client kept of it, or what a job's `extra` has in its place; and the products of the factors that came since,
    which `extra` calls `stack/<name of an A or B>`.
    """
    change = {name: tensor for name, tensor in {**client_state, **extra}.items() if name.startswith("change/")}
    for a, b in factors.pairs(name for name in extra if name.startswith("stack/")).items():
        name, product = a.replace("stack/", "change/", 1), extra[b] @ extra[a]
        change[name] = change[name] + product if name in change else product
    return change


def sent_factors(server: Server, job: Job) -> dict[str, torch.Tensor]:
    """Adapters of the rank that `job` says, as its client sends them; only their shapes count."""
    cut = factors.cut(server.weights, int(job.extra["rank"]))
    return {name: cut[name] for name in factors.rank_axes(cut)}
