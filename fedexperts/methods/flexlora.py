"""FlexLoRA: the server averages the products BA, and gives each client the best factors of its own rank.

Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024, https://arxiv.org/abs/2402.11505. What it leaves open is marked (ours).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fedexperts.core.training import load_weights
from fedexperts.methods.adapters import Ranks, at_rank, at_rank_of, rank_for, set_aside
from fedexperts.methods.base import by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.moe import factors
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class FlexLoRA(Method):
    """ΔW = Σ p_k B_k A_k; a client of rank r gets U_r Σ_r and V_rᵀ of its singular value decomposition.

    The server holds the factors of the run's rank, which is the highest: the first r of them are what r gives (ours; the paper
    holds ΔW, and loses nothing between clients' ranks and that of ΔW).

    ranks: of clients' adapters: one for all, or some that go in turn over clients by name; None: the run's.
    """

    ranks: Ranks | None = None

    def declare(self) -> Declaration:
        return Declaration(job_extra=("rank",), wrappers=frozenset())  # its factors are chosen anew in each merge

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """The whole model with adapters of the client's rank."""
        return load_weights(at_rank_of(job, context), job, context)

    def assign(self, server: Server, client: Client) -> Assignment:
        """Raises:
        BadValue: no adapters, or a rank that cannot be.
        """
        return at_rank(server, rank_for(server, client, self.ranks, "flexlora"))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """All that is no adapter is the mean by examples (ours)."""
        sent: list[Update] = []
        merged = mean_rows(server, set_aside(updates, sent), by_examples)
        if not sent:
            return merged
        # The server's own with weight 0: where clients' products have fewer ranks than it, A goes on within what it was.
        stack = factors.stacked([*((by_examples(each), each.patch.tensors) for each in sent), (0.0, server.weights)])
        rank = factors.rank_of(server.weights)
        found: dict[str, Tensor] = {}
        for a, b in factors.pairs(server.weights).items():
            found[b], found[a] = factors.truncated_svd(stack[b], stack[a], rank)
        return replace(merged, weights={**merged.weights, **found})
