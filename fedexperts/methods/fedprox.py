"""FedProx: federated averaging with a proximal term towards the received model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
https://arxiv.org/abs/1812.06127, Algorithm 2.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedexperts.core.training import Fitted, fit
from fedexperts.methods.base import Count, Positive, add_gradient, answer, by_examples, mean_rows
from fedexperts.methods.contract import Method
from fedexperts.methods.submodel import same_for_all
from fedexperts.moe.tuning import trainable
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update

Anchors = Sequence[tuple[nn.Parameter, Tensor]]
"""(trained parameter, its anchor in the proximal term)."""


@dataclass(frozen=True)
class FedProx(Method):
    """FedAvg, but each client minimizes h(w) = F(w) + μ/2 · ‖w − wᵗ‖², where wᵗ are the received weights (equation 2).

    mu: μ. The authors' code tunes it over 0.001, 0.01, 0.1, 0.5 and 1 for each dataset, without a default; 0.01 (ours) is a weak
    penalty, so that a run that does not tune it stays close to FedAvg.
    experts_per_layer: number of random experts, the same on every client; None: all experts, regardless of the client's memory.
    """

    mu: Positive = 0.01
    experts_per_layer: Count | None = None

    def assign(self, server: Server, client: Client) -> Assignment:
        return Assignment(same_for_all(server, client, self.experts_per_layer))

    def train(self, job: Job, context: ClientContext) -> Update:
        model = self.build_model(job, context)
        received = [(parameter, parameter.detach().clone()) for parameter in trainable(model)]
        return answer(job, context, model, fit_with_proximal_term(model, context, received, self.mu, seed=job.seed))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)


def fit_with_proximal_term(model: nn.Module, context: ClientContext, anchors: Anchors, weight: float, *, seed: str) -> Fitted:
    """`fit` with the proximal term `weight`/2 · ‖w − anchors‖² in the loss.

    The gradient of the term, `weight` (w − anchor), is added after backward, tensor by tensor, because autograd would keep it in
    memory during backward. The additional memory is the anchors, and temporaries of the largest tensor.
    """

    def penalty(_: nn.Module) -> Tensor:
        return weight / 2 * sum_of_squares(anchors)

    def add_penalty_gradient(_: nn.Module) -> None:
        for parameter, anchor in anchors:
            add_gradient(parameter, weight * (parameter.detach() - anchor))

    beside = [anchor for _, anchor in anchors]
    return fit(model, context, seed=seed, penalty=penalty, after_backward=add_penalty_gradient, beside=beside)


@torch.no_grad()
def sum_of_squares(anchors: Anchors) -> Float[Tensor, ""]:
    """‖w − anchors‖²."""
    return torch.stack([(parameter - anchor).square().sum() for parameter, anchor in anchors]).sum()
