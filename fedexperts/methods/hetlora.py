"""HetLoRA: adapters of different ranks, zero-padded and averaged, truncated to each client's rank, which clients may lower.

Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024,
https://arxiv.org/abs/2401.06432. What it leaves open is marked (ours).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fedexperts.core.training import fit, load_weights
from fedexperts.methods.adapters import Ranks, at_rank, model_at_rank, rank_for, split_adapters, with_adapters
from fedexperts.methods.base import Share, Weight, answer, by_examples, mean_rows
from fedexperts.methods.contract import Declaration, ExtraTensor, Method
from fedexperts.moe import factors
from fedexperts.moe.rows import RowMean
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Tensors, Update


@dataclass(frozen=True)
class HetLoRA(Method):
    """The server's adapters have the run's rank, the highest; a client of rank r gets their first r ranks.

    ranks: initial ranks of clients: one for all, or several, assigned in turn to clients sorted by name; None: the run's.
    aggregate: weight of a client: "sparsity", the Frobenius norm of its BA; or "examples".
    prune: λ, the weight of ‖B‖·‖A‖ of the ranks above γr in the loss; if that norm has shrunk, they are pruned. 0: no pruning.
    decay: γ.
    """

    ranks: Ranks | None = None
    aggregate: Literal["sparsity", "examples"] = "sparsity"
    prune: Weight = 0.005
    decay: Share = 0.99

    def declare(self) -> Declaration:
        rank = ExtraTensor(lambda server, job: (), torch.int64, low=1, required=False)
        return Declaration(extra={"rank": rank}, job_extra=("rank",), lowers_rank=True, training=with_adapters)

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """The whole model with adapters of the client's rank."""
        return load_weights(model_at_rank(job, context), job, context)

    def assign(self, server: Server, client: Client) -> Assignment:
        """The adapters truncated to the client's rank: the last that it sent, or its initial rank.

        Raises:
            BadValue: no adapters, or a rank that is not allowed.
        """
        start = rank_for(server, client, self.ranks, "hetlora")
        return at_rank(server, int(server.method_state.get(f"rank/{client.name}", start)))

    def train(self, job: Job, context: ClientContext) -> Update:
        """Local steps on F_k + λ ‖B[:, γr:]‖·‖A[γr:]‖; if that product has shrunk, these ranks are pruned."""
        low = lower(self.decay, job.patch.tensors)
        if not self.prune or low == int(job.extra["rank"]):
            return super().train(job, context)
        model = self.build_model(job, context)
        before = tail(model, low).item()
        fitted = fit(model, context, seed=job.seed, penalty=lambda model: self.prune * tail(model, low))
        update = answer(job, context, model, fitted)
        if tail(model, low).item() >= before:
            return update
        pruned = replace(update.patch, tensors=factors.cut(update.patch.tensors, low))
        return replace(update, patch=pruned, extra={"rank": torch.tensor(low)})

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """The means of the padded A and of the padded B; other weights are the mean by examples (ours).

        In each row (an expert, for stacked experts), ranks that no client with a positive weight sent keep their values (ours):
        otherwise the padding of lower ranks would set them to zero for good.
        """
        sent: list[Update] = []
        merged = mean_rows(server, split_adapters(updates, sent), by_examples)
        axes, most = factors.rank_axes(server.weights), factors.rank_of(server.weights)
        means = {name: RowMean(server.weights[name]) for name in axes}
        ranks = {each.client: factors.rank_of(each.patch.tensors) for each in sent}
        highest = {a: torch.zeros(len(server.weights[a]), dtype=torch.long) for a in factors.pairs(server.weights)}
        for each in sent:
            tensors, rank = each.patch.tensors, ranks[each.client]
            for a, b in factors.pairs(tensors).items():
                weight = by_examples(each) if self.aggregate == "examples" else factors.norm(tensors[b], tensors[a])
                means[a].add(factors.padded(tensors[a], 1, most), weight=weight)
                means[b].add(factors.padded(tensors[b], 2, most), weight=weight)
                highest[a] = torch.where(torch.as_tensor(weight) > 0, highest[a].clamp(min=rank), highest[a])

        merged_factors = {name: mean.result() for name, mean in means.items()}
        for a, b in factors.pairs(server.weights).items():
            stays = torch.arange(most) >= highest[a][:, None]  # rows × ranks
            merged_factors[a] = torch.where(stays[:, :, None], server.weights[a], merged_factors[a])
            merged_factors[b] = torch.where(stays[:, None, :], server.weights[b], merged_factors[b])
        method_state = {**server.method_state, **{f"rank/{client}": torch.tensor(rank) for client, rank in ranks.items()}}
        return replace(merged, weights={**merged.weights, **merged_factors}, method_state=method_state)


def lower(decay: float, tensors: Tensors) -> int:
    """⌊γr⌋, r the rank of `tensors`; rounded down to a rank that adapters of stacked experts support (ours)."""
    step = factors.rank_step(tensors)
    return max(int(decay * factors.rank_of(tensors)) // step * step, step)


def tail(model: nn.Module, low: int) -> Tensor:
    """Σ ‖B[:, low:]‖·‖A[low:]‖ over all adapters of `model`, per expert (ours; the paper has a single adapter)."""
    own = dict(model.named_parameters())
    norm = partial(torch.linalg.vector_norm, dim=(-2, -1))
    ends = ((own[b][..., low:], own[a][..., low:, :]) for a, b in factors.pairs(own).items())
    return torch.stack([(norm(b) * norm(a)).sum() for b, a in ends]).sum()
