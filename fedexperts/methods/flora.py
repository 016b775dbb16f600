"""FLoRA: clients' adapters are stacked, not averaged; each client adds their product to its base and starts with new ones.

Wang, Shen, He, Sun, Wang, Lyu, Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
NeurIPS 2024, https://arxiv.org/abs/2409.05976. What it leaves open is marked (ours).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedexperts.core.training import fit, load_weights
from fedexperts.methods.adapters import Ranks, model_at_rank, rank_for, with_adapters
from fedexperts.methods.base import answer, by_examples, entries, mean_rows, tee_without_weights, with_flops
from fedexperts.methods.contract import Declaration, ExtraTensors, Method
from fedexperts.moe import factors, rows
from fedexperts.moe.flops import Batch
from fedexperts.moe.tuning import Tuning
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Tensors, Training, Update, size


@dataclass(frozen=True)
class FLoRA(Method):
    """ΔW = Σ p_k B_k A_k is exact: stacked, A_k above one another and p_k B_k side by side, no A meets another client's B.

    `method_state` has each round's stack as `stack/<round>/<name>`, the sum of all products as `change/<name of A>`, and as
    `has/<client>` the last round that is in the client's base; the client state has the client's sum. A client is sent the stacks
    of the rounds that it has missed, as in the paper; or the sum itself, if that takes fewer bytes (ours).

    ranks: of clients' adapters: one for all, or several, assigned in turn to clients sorted by name; None: the run's.
    """

    ranks: Ranks | None = None

    def declare(self) -> Declaration:
        return Declaration(
            extra={"stack/": ExtraTensors(sent_factors, low=-100.0, high=100.0)},
            job_extra=("rank", "change/", "stack/"),
            client_state=("change/",),
            training=with_adapters,
            wrappers=frozenset(),  # adapters are drawn anew each round, so a merge has no weights to continue from
        )

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """Adapters of the client's rank on the base with the products of former rounds added."""
        model = model_at_rank(job, context)
        factors.add_to_base(model, entries("change", base_change(job.extra, context.client_state)))
        return load_weights(model, job, context)

    def global_model(self, base: nn.Module, tuning: Tuning, server: Server | None, seed: str) -> nn.Module:
        """The whole model, with the sum of all products added to the base's weights."""
        model = super().global_model(base, tuning, server, seed)
        if server is not None:
            factors.add_to_base(model, entries("change", base_change({}, server.method_state)))
        return model

    def assign(self, server: Server, client: Client) -> Assignment:
        """The other trained weights, the client's rank, and the products that its base lacks.

        Raises:
            BadValue: no adapters, or a rank that is not allowed.
        """
        rank = torch.tensor(rank_for(server, client, self.ranks, "flora"))
        names = frozenset(server.weights) - factors.rank_axes(server.weights).keys()
        return Assignment(
            server.anatomy.all_experts, names, extra={"rank": rank, **missed_products(server.method_state, server.round, client)}
        )

    def train(self, job: Job, context: ClientContext) -> Update:
        """Trains new adapters, with A drawn from the job's seed, on the client's updated base; sends A and B."""
        context.client_state.update(base_change(job.extra, context.client_state))
        model = self.build_model(replace(job, extra={"rank": job.extra["rank"]}), context)
        fitted = fit(model, context, seed=job.seed)
        fitted = replace(fitted, cost=with_flops(fitted.cost, product_flops(job.extra)))
        trained = rows.read(model)
        return answer(job, context, model, fitted, extra={f"stack/{name}": trained[name] for name in factors.rank_axes(trained)})

    def round_flops(self, model: nn.Module, batch: Batch, training: Training) -> float:
        """With the products of the adapters that a client missed, which never take more bytes than their sum."""
        own, products = dict(model.named_parameters()), 0.0
        for a, b in factors.pairs(own).items():
            rank, fan_in, fan_out = own[a].shape[-2], own[a].shape[-1], own[b].shape[-2]
            products += 2 * own[a].numel() / rank * fan_out * (fan_in * fan_out / (fan_in + fan_out))
        return super().round_flops(model, batch, training) + products

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """Stacks the adapters of the round and adds their product to the sum. Other weights are the mean by examples (ours)."""
        adapters: list[Update] = []
        merged = mean_rows(server, tee_without_weights(updates, adapters), by_examples)
        if not adapters:
            return merged
        stack = factors.stacked([(by_examples(each), entries("stack", each.extra)) for each in adapters])
        change = base_change(with_prefix("stack", stack), server.method_state)
        has = {f"has/{each.client}": torch.tensor(server.round - 1) for each in adapters}
        method_state = {**server.method_state, **change, **with_prefix(f"stack/{server.round}", stack), **has}
        return replace(merged, method_state=without_old_stacks(method_state, server.round))


def with_prefix(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """`tensors` with names that start with `prefix`/; the inverse of `entries`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def missed_products(method_state: Tensors, newest: int, client: Client) -> dict[str, torch.Tensor]:
    """The stacks of the rounds that the base of `client` lacks, joined; or the whole sum if not all of them are stored."""
    has, forgotten = int(method_state.get(f"has/{client.name}", 0)), int(method_state.get("forgotten", 0))
    if has < forgotten:
        return with_prefix("change", entries("change", method_state))
    stacks = [stack for round in range(has + 1, newest + 1) if (stack := entries(f"stack/{round}", method_state))]
    return with_prefix("stack", joined(stacks)) if stacks else {}


def joined(stacks: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """The factors whose product is the sum of the products of `stacks`."""
    return {name: torch.cat([stack[name] for stack in stacks], axis) for name, axis in factors.rank_axes(stacks[0]).items()}


def without_old_stacks(method_state: Tensors, newest: int) -> dict[str, torch.Tensor]:
    """Removes the oldest stacks, so that the others take no more bytes than the sum; `forgotten` is the last removed round."""
    most, bytes_since = size(entries("change", method_state)), 0
    forgotten = int(method_state.get("forgotten", 0))
    for round in range(newest, forgotten, -1):
        bytes_since += size(entries(f"stack/{round}", method_state))
        if bytes_since > most:
            forgotten = round
            break
    past = tuple(f"stack/{round}/" for round in range(forgotten + 1))
    remaining = {key: tensor for key, tensor in method_state.items() if not key.startswith(past)}
    return {**remaining, "forgotten": torch.tensor(forgotten)}


def base_change(extra: Tensors, client_state: Tensors) -> dict[str, Tensor]:
    """The sum that is added to the frozen weights: `change/<name of A>` → Σ BA, [rows, out, in].

    It is the sum in the client state, or in `extra` if a job sends it, plus the products of the factors in `extra`, which are
    named `stack/<name of A or B>`.
    """
    change = {name: tensor for name, tensor in {**client_state, **extra}.items() if name.startswith("change/")}
    for a, b in factors.pairs(name for name in extra if name.startswith("stack/")).items():
        name, product = a.replace("stack/", "change/", 1), extra[b] @ extra[a]
        change[name] = change[name] + product if name in change else product
    return change


def product_flops(extra: Tensors) -> float:
    """FLOPs of the products that `base_change` computes: 2 for each weight and rank."""
    pairs = factors.pairs(name for name in extra if name.startswith("stack/"))
    return float(sum(2 * extra[b].numel() * extra[a].shape[-1] for a, b in pairs.items()))


def sent_factors(server: Server, job: Job) -> dict[str, torch.Tensor]:
    """Adapters of the job's rank, with the shapes that its client sends; the values are not used."""
    cut = factors.cut(server.weights, int(job.extra["rank"]))
    return {name: cut[name] for name in factors.rank_axes(cut)}
