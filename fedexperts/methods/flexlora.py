"""FlexLoRA: the server averages the products BA and sends each client their best factors of its rank.

Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024, https://arxiv.org/abs/2402.11505. What it leaves open is marked (ours).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fedexperts.core.training import load_weights
from fedexperts.methods.adapters import Ranks, at_rank, model_at_rank, rank_for, split_adapters, with_adapters
from fedexperts.methods.base import by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method, Wrapping
from fedexperts.moe import factors
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class FlexLoRA(Method):
    """ΔW = Σ p_k B_k A_k; a client of rank r gets U_r Σ_r and V_rᵀ of its singular value decomposition.

    The server keeps the factors of the run's rank, which is the highest; a client of rank r gets the first r of them (ours; the
    paper keeps ΔW, which also retains the ranks above).

    ranks: of clients' adapters: one for all, or several, assigned in turn to clients sorted by name; None: the run's.
    """

    ranks: Ranks | None = None

    def declare(self) -> Declaration:
        no_wrappers: frozenset[Wrapping] = frozenset()  # each merge computes new factors
        return Declaration(job_extra=("rank",), training=with_adapters, wrappers=no_wrappers)

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """The whole model with adapters of the client's rank."""
        return load_weights(model_at_rank(job, context), job, context)

    def assign(self, server: Server, client: Client) -> Assignment:
        """The whole model, with adapters truncated to the client's rank.

        Raises:
            BadValue: no adapters, or a rank that is not allowed.
        """
        return at_rank(server, rank_for(server, client, self.ranks, "flexlora"))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """Factors of the mean product BA; all other weights are the mean, both weighted by examples (ours for the others)."""
        sent: list[Update] = []
        merged = mean_rows(server, split_adapters(updates, sent), by_examples)
        if not sent:
            return merged
        # The server's factors, with weight 0, fill the ranks of A that the clients' products do not have.
        stack = factors.stacked([*((by_examples(each), each.patch.tensors) for each in sent), (0.0, server.weights)])
        rank = factors.rank_of(server.weights)
        merged_factors: dict[str, Tensor] = {}
        for a, b in factors.pairs(server.weights).items():
            merged_factors[b], merged_factors[a] = factors.truncated_svd(stack[b], stack[a], rank)
        return replace(merged, weights={**merged.weights, **merged_factors})
