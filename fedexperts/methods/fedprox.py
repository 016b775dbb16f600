"""FedProx: federated averaging whose clients are held near the model they received.

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
"""What is trained, each with the value that it is held near."""


@dataclass(frozen=True)
class FedProx(Method):
    """FedAvg, but each client minimises h(w) = F(w) + μ/2 · ‖w − wᵗ‖², wᵗ what it received (equation 2).

    mu: μ. The authors' code says to tune it among 0.001, 0.01, 0.1, 0.5 and 1 for each dataset, and names no default; 0.01 (ours)
    is a light hold, so that a run that does not tune it stays near FedAvg.
    experts_per_layer: of random experts, the same in every client; None: all experts, whatever the client's memory.
    """

    mu: Positive = 0.01
    experts_per_layer: Count | None = None

    def assign(self, server: Server, client: Client) -> Assignment:
        return Assignment(same_for_all(server, client, self.experts_per_layer))

    def train(self, job: Job, context: ClientContext) -> Update:
        model = self.build_model(job, context)
        received = [(parameter, parameter.detach().clone()) for parameter in trainable(model)]
        return answer(job, context, model, fit_near(model, context, received, self.mu, seed=job.seed))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)


def fit_near(model: nn.Module, context: ClientContext, anchors: Anchors, hold: float, *, seed: str) -> Fitted:
    """`fit`, with `hold`/2 · ‖w − anchors‖² in the loss.

    The penalty's gradient, `hold` (w − anchor), comes in after backward, tensor by tensor: autograd would hold all of it through
    backward. So all that it takes beside `fit` is the anchors, and temporaries of the largest tensor.
    """

    def penalty(_: nn.Module) -> Tensor:
        return hold / 2 * sum_of_squares(anchors)

    def draw_back(_: nn.Module) -> None:
        for parameter, anchor in anchors:
            add_gradient(parameter, hold * (parameter.detach() - anchor))

    beside = [anchor for _, anchor in anchors]
    return fit(model, context, seed=seed, penalty=penalty, after_backward=draw_back, beside=beside)


@torch.no_grad()
def sum_of_squares(anchors: Anchors) -> Float[Tensor, ""]:
    """‖w − anchors‖²."""
    return torch.stack([(parameter - anchor).square().sum() for parameter, anchor in anchors]).sum()
