"""Federated averaging.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, https://arxiv.org/abs/1602.05629, Algorithm 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedexperts.methods.base import Count, by_examples, mean_rows
from fedexperts.methods.contract import Method
from fedexperts.methods.submodel import same_for_all
from fedexperts.types import Assignment, Client, Server, Update


@dataclass(frozen=True)
class FedAvg(Method):
    """Every client trains the same model; the server weights clients by their number of examples.

    experts_per_layer: number of random experts, the same on every client; None: all experts, regardless of the client's memory.
    """

    experts_per_layer: Count | None = None

    def assign(self, server: Server, client: Client) -> Assignment:
        return Assignment(same_for_all(server, client, self.experts_per_layer))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
