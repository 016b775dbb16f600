"""FedSA-LoRA: A, which learns general knowledge, is shared; B, which learns client-specific knowledge, stays on the client.

Guo, Zeng, Wang, Fan, Wang, Qu, "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
https://arxiv.org/abs/2410.01463.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedexperts.methods.adapters import adapters_of, with_adapters
from fedexperts.methods.base import by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.methods.personal import train_and_keep
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class FedSALoRA(Method):
    """Clients train A and B and send A. Before its first training a client has B = 0: the base model with the shared routers."""

    def declare(self) -> Declaration:
        return Declaration(keeps_weights=True, training=with_adapters)

    def assign(self, server: Server, client: Client) -> Assignment:
        """All trained weights without B.

        Raises:
            BadValue: the run trains no adapters.
        """
        names = frozenset(server.weights) - {*adapters_of(server, "fedsa_lora").values()}
        return Assignment(server.anatomy.all_experts, names)

    def train(self, job: Job, context: ClientContext) -> Update:
        return train_and_keep(self, job, context)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
