"""Ditto: federated averaging, plus a personal model per client that is regularized towards the global model.

Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
https://arxiv.org/abs/2012.04221, Algorithm 1. What it leaves open is marked (ours).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from fedexperts.core.training import Fitted
from fedexperts.methods.base import Positive, all_experts, by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.methods.fedprox import fit_with_proximal_term
from fedexperts.methods.personal import sum_of_costs
from fedexperts.moe import rows
from fedexperts.moe.device import device_of, kept_generators
from fedexperts.moe.flops import Batch
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Training, Update


@dataclass(frozen=True)
class Ditto(Method):
    """Client k has two models: wᵗ, which it trains and sends, and v_k, which it keeps and is evaluated with.

    hold: λ of h_k(v; wᵗ) = F_k(v) + λ/2 · ‖v − wᵗ‖². The paper selects it from 0.1, 1 and 2 on each client's
    validation examples, and uses 1 if there are too few of them, which is the default here.
    """

    hold: Positive = 1.0

    def declare(self) -> Declaration:
        return Declaration(keeps_weights=True)

    def assign(self, server: Server, client: Client) -> Assignment:
        return all_experts(server)

    def train(self, job: Job, context: ClientContext) -> Update:
        """The trainings of v_k and wᵗ are independent; v_k is trained first, so that one model at a time is in memory (ours).

        The update is the same as without v_k, including the draws of dropout.
        """
        with kept_generators(device_of(context.model)):
            personal = self.personalized(job, context)
        update = super().train(job, replace(context, client_state={}))
        return replace(update, cost=sum_of_costs(personal.cost, update.cost))

    def personalized(self, job: Job, context: ClientContext) -> Fitted:
        """v_k ← v_k − η (∇F_k(v_k) + λ (v_k − wᵗ)), with as many steps as wᵗ; v_k starts as the client's first wᵗ (ours)."""
        model = self.build_model(job, context)
        fitted = fit_with_proximal_term(
            model, context, rows.paired(model, job.patch.tensors), self.hold, seed=f"{job.seed}/personal"
        )
        context.client_state.update(rows.read(model))
        return fitted

    def round_flops(self, model: nn.Module, batch: Batch, training: Training) -> float:
        """Both trainings."""
        return 2 * super().round_flops(model, batch, training)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """AGGREGATE of the algorithm is the mean weighted by examples, as in FedAvg."""
        return mean_rows(server, updates, by_examples)
