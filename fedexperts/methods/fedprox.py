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
from torch.nn import functional

from fedexperts.client import fit, install
from fedexperts.methods.base import Count, Positive, answer, by_examples, mean_rows
from fedexperts.methods.submodel import same_for_all
from fedexperts.moe.tuning import trainable
from fedexperts.types import Assignment, Bench, Client, Job, Server, Update


@dataclass(frozen=True)
class FedProx:
    """FedAvg, but each client minimises h(w) = F(w) + μ/2 · ‖w − wᵗ‖², wᵗ what it received (equation 2).

    mu: μ. The authors tune it among 0.001, 0.01, 0.1, 0.5 and 1 and name no default; 0.01 (ours) is a light hold, so that a run
    that does not tune it stays near FedAvg.
    experts_per_layer: of random experts, the same in every client; None: all experts, whatever the client's memory.
    """

    mu: Positive = 0.01
    experts_per_layer: Count | None = None
    before: ClassVar[tuple[str, ...]] = ()
    pooled: ClassVar[bool] = False

    def assign(self, server: Server, client: Client) -> Assignment:
        return Assignment(same_for_all(server, client, self.experts_per_layer))

    def train(self, job: Job, bench: Bench) -> Update:
        model = install(job, bench)
        received = [parameter.detach().clone() for parameter in trainable(model)]
        fitted = fit(
            model, bench, seed=job.seed, penalty=lambda model: self.mu / 2 * squared_distance(model, received), beside=received
        )
        return answer(job, bench, model, fitted)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)


def squared_distance(model: nn.Module, received: Sequence[Tensor]) -> Float[Tensor, ""]:
    """‖w − wᵗ‖², w all that `model` trains. mse_loss, unlike (w − wᵗ)², holds no difference until backward."""
    pairs = zip(trainable(model), received, strict=True)
    return torch.stack([functional.mse_loss(now, then, reduction="sum") for now, then in pairs]).sum()
