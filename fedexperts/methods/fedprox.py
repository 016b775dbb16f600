"""FedProx: federated averaging whose clients are held near the model they received.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
https://arxiv.org/abs/1812.06127, Algorithm 2.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedexperts.client import fit, install
from fedexperts.methods.base import Count, Positive, add_gradient, answer, by_examples, mean_rows
from fedexperts.methods.submodel import same_for_all
from fedexperts.moe.tuning import trainable
from fedexperts.types import Assignment, Bench, Client, Job, Server, Update


@dataclass(frozen=True)
class FedProx:
    """FedAvg, but each client minimises h(w) = F(w) + μ/2 · ‖w − wᵗ‖², wᵗ what it received (equation 2).

    mu: μ. The authors' code says to tune it among 0.001, 0.01, 0.1, 0.5 and 1 for each dataset, and names no default; 0.01 (ours)
    is a light hold, so that a run that does not tune it stays near FedAvg.
    experts_per_layer: of random experts, the same in every client; None: all experts, whatever the client's memory.
    """

    mu: Positive = 0.01
    experts_per_layer: Count | None = None
    before: ClassVar[tuple[str, ...]] = ()
    pooled: ClassVar[bool] = False

    def assign(self, server: Server, client: Client) -> Assignment:
        return Assignment(same_for_all(server, client, self.experts_per_layer))

    def train(self, job: Job, bench: Bench) -> Update:
        """The penalty's gradient, μ (w − wᵗ), comes in after backward, tensor by tensor: autograd would hold all of it through
        backward. So all that FedProx takes beside FedAvg is wᵗ, and temporaries of the largest tensor.
        """
        model = install(job, bench)
        received = [parameter.detach().clone() for parameter in trainable(model)]

        def penalty(model: nn.Module) -> Tensor:
            return self.mu / 2 * sum_of_squares(model, received)

        def draw_back(model: nn.Module) -> None:
            for parameter, then in zip(trainable(model), received, strict=True):
                add_gradient(parameter, self.mu * (parameter.detach() - then))

        return answer(
            job, bench, model, fit(model, bench, seed=job.seed, penalty=penalty, after_backward=draw_back, beside=received)
        )

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)


@torch.no_grad()
def sum_of_squares(model: nn.Module, received: Sequence[Tensor]) -> Float[Tensor, ""]:
    """‖w − wᵗ‖², w all that `model` trains."""
    pairs = zip(trainable(model), received, strict=True)
    return torch.stack([(now - then).square().sum() for now, then in pairs]).sum()
