"""FedPer: federated averaging of the base layers; personal layers stay on each client.

Arivazhagan, Aggarwal, Singh, Choudhary, "Federated Learning with Personalization Layers", 2019,
https://arxiv.org/abs/1912.00818, Algorithms 1 (client) and 2 (server). What it leaves open is marked (ours).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedexperts.methods.base import by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.methods.personal import Personal, shared_names, train_and_keep
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class FedPer(Method):
    """Base layers W_B and personal layers W_P are trained together; only W_B is sent.

    personal: the parts of the model whose trained weights are W_P (ours: the routers; the paper's are a network's last layers).
    """

    personal: Personal = ("router",)

    def declare(self) -> Declaration:
        return Declaration(keeps_weights=True)

    def assign(self, server: Server, client: Client) -> Assignment:
        """W_B.

        Raises:
            BadValue: a personal part that is not trained, or no shared weights.
        """
        return Assignment(server.anatomy.all_experts, names=shared_names(server, self.personal))

    def train(self, job: Job, context: ClientContext) -> Update:
        """Algorithm 1. W_P is initialized with the base model's weights (ours; random in the paper)."""
        return train_and_keep(self, job, context)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """Algorithm 2: W_B is the mean weighted by examples, γ_j = n_j / Σ n_j."""
        return mean_rows(server, updates, by_examples)
