"""Ditto: federated averaging, beside which each client trains a model of its own that is held near the common one.

Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
https://arxiv.org/abs/2012.04221, Algorithm 1. What it leaves open is marked (ours).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedexperts.core.training import Fitted
from fedexperts.methods.base import Positive, all_experts, by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.methods.fedprox import fit_near
from fedexperts.methods.personal import one_after_the_other
from fedexperts.moe import rows
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class Ditto(Method):
    """Client k has two models: wᵗ, which it trains and sends, and v_k, which it keeps and is scored with.

    hold: λ of h_k(v; wᵗ) = F_k(v) + λ/2 · ‖v − wᵗ‖². The paper's choice of it is among 0.1, 1 and 2 on each client's own
    validation examples, and 1 where there are too few of them, which is the default here.
    """

    hold: Positive = 1.0

    def declare(self) -> Declaration:
        return Declaration(keeps_weights=True)

    def assign(self, server: Server, client: Client) -> Assignment:
        return all_experts(server)

    def train(self, job: Job, context: ClientContext) -> Update:
        """Both parts start from wᵗ and ask nothing of each other, so v_k goes first: then one model at a time is held (ours).

        What is sent is trained as if nothing were kept, with the same chances of dropout.
        """
        with torch.random.fork_rng():
            personal = self.personalised(job, context)
        update = super().train(job, replace(context, client_state={}))
        return replace(update, cost=one_after_the_other(personal.cost, update.cost))

    def personalised(self, job: Job, context: ClientContext) -> Fitted:
        """v_k ← v_k − η (∇F_k(v_k) + λ (v_k − wᵗ)), as many steps as wᵗ gets; v_k begins as the first wᵗ it sees (ours)."""
        model = self.build_model(job, context)
        fitted = fit_near(model, context, rows.paired(model, job.patch.tensors), self.hold, seed=f"{job.seed}/personal")
        context.client_state.update(rows.read(model))
        return fitted

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """The algorithm's AGGREGATE is the mean by examples, as in FedAvg."""
        return mean_rows(server, updates, by_examples)
