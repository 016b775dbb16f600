"""FedRep: clients first train a personal head on the shared representation, then the representation with their head.

Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021,
https://arxiv.org/abs/2102.07078, Algorithm 1. What it leaves open is marked (ours).
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from fedexperts.core.training import Fitted, fit
from fedexperts.methods.base import answer, by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.methods.personal import Personal, shared_names, sum_of_costs, update_client_state
from fedexperts.moe import rows
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class FedRep(Method):
    """The head h_i stays on client i, the representation φ is sent; a round trains h_i first, then φ.

    personal: the parts of the model whose trained weights are the head (ours: the routers; the paper's is the last layer).
    head_share: share of the local steps that train the head, τ of τ plus the steps of φ (ours: half).
    """

    personal: Personal = ("router",)
    head_share: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def declare(self) -> Declaration:
        return Declaration(keeps_weights=True)

    def assign(self, server: Server, client: Client) -> Assignment:
        """φ.

        Raises:
            BadValue: a personal part that is not trained, or no shared weights.
        """
        return Assignment(server.anatomy.all_experts, names=shared_names(server, self.personal))

    def train(self, job: Job, context: ClientContext) -> Update:
        """τ steps of the client's head with the received φ, then the other steps of φ with the new head."""
        model = self.build_model(job, context)
        steps, own = context.training.local_steps, rows.layout(model).keys() - job.patch.tensors.keys()
        tau = self.head_steps(steps)
        head = fit_only(own, model, context, f"{job.seed}/head", tau) if tau else None
        body = fit_only(job.patch.tensors.keys(), model, context, job.seed, steps - tau)
        update_client_state(job, context, model)
        if head is None:
            return answer(job, context, model, body)
        loss = (tau * head.loss + (steps - tau) * body.loss) / steps
        routed = {
            block: [a + b for a, b in zip(head.routed[block], counts, strict=True)] for block, counts in body.routed.items()
        }
        return answer(job, context, model, Fitted(loss, sum_of_costs(head.cost, body.cost), routed))

    def head_steps(self, steps: int) -> int:
        """τ: rounded down, at least 1 and at most all steps but one. A single step trains the representation."""
        return min(max(int(self.head_share * steps), 1), steps - 1)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """φ is the mean weighted by examples, as in FedAvg (ours; the paper's is unweighted)."""
        return mean_rows(server, updates, by_examples)


def fit_only(names: Set[str], model: nn.Module, context: ClientContext, seed: str, steps: int) -> Fitted:
    """`fit` that trains the weights in `names` only; all other weights are frozen."""
    frozen = rows.parameters(model, rows.layout(model).keys() - names)
    for parameter in frozen:
        parameter.requires_grad_(False)
    fitted = fit(model, context, seed=seed, steps=steps)
    for parameter in frozen:
        parameter.requires_grad_(True)
    return fitted
