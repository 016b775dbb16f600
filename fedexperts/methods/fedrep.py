"""FedRep: clients first fit a head of their own to the shared representation, then the representation to their head.

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
from fedexperts.methods.personal import Personal, keep, one_after_the_other, shared_names
from fedexperts.moe import rows
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class FedRep(Method):
    """The head h_i stays with client i, the representation φ travels; a round's local steps go to h_i first, then to φ.

    personal: the parts of the model whose trained weights are the head (ours: the routers; the paper's is the last layer).
    head_share: of the local steps, those of the head: its τ over τ and the steps of φ (ours: half of them).
    """

    personal: Personal = ("router",)
    head_share: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def declare(self) -> Declaration:
        return Declaration(keeps_weights=True)

    def assign(self, server: Server, client: Client) -> Assignment:
        """φ.

        Raises:
            BadValue: a personal part that is not trained, or nothing that is shared.
        """
        return Assignment(server.anatomy.all_experts, names=shared_names(server, self.personal))

    def train(self, job: Job, context: ClientContext) -> Update:
        """τ steps of the head from where it was, with φ as it came; then steps of φ, with that head."""
        model = self.build_model(job, context)
        steps, own = context.training.local_steps, rows.layout(model).keys() - job.patch.tensors.keys()
        of_head = self.head_steps(steps)
        head = fit_only(own, model, context, f"{job.seed}/head", of_head) if of_head else None
        body = fit_only(job.patch.tensors.keys(), model, context, job.seed, steps - of_head)
        keep(job, context, model)
        if head is None:
            return answer(job, context, model, body)
        loss = (of_head * head.loss + (steps - of_head) * body.loss) / steps
        routed = {
            block: [a + b for a, b in zip(head.routed[block], counts, strict=True)] for block, counts in body.routed.items()
        }
        return answer(job, context, model, Fitted(loss, one_after_the_other(head.cost, body.cost), routed))

    def head_steps(self, steps: int) -> int:
        """τ: rounded down, but one at least, and one less than all at most. A single step is the representation's."""
        return min(max(int(self.head_share * steps), 1), steps - 1)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """φ is the mean by examples, as in FedAvg (ours; the paper weighs clients alike)."""
        return mean_rows(server, updates, by_examples)


def fit_only(names: Set[str], model: nn.Module, context: ClientContext, seed: str, steps: int) -> Fitted:
    """`fit` of the weights called `names`; all others stand still meanwhile."""
    still = rows.parameters(model, rows.layout(model).keys() - names)
    for parameter in still:
        parameter.requires_grad_(False)
    fitted = fit(model, context, seed=seed, steps=steps)
    for parameter in still:
        parameter.requires_grad_(True)
    return fitted
