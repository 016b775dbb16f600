"""Centralized training: all clients' training data in one place. What no federated method is expected to beat."""

from collections.abc import Iterable
from dataclasses import dataclass

from fedexperts.methods.base import all_experts, by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.types import Assignment, Client, Server, Update


@dataclass(frozen=True)
class Centralized(Method):
    """One participant with everybody's examples trains the whole model, as many steps a round as a round's clients would.

    What `centralized` asks for is seen to before the run (start.pooled); the rest is FedAvg with one client.
    """

    def declare(self) -> Declaration:
        return Declaration(centralized=True, reference=True)

    def assign(self, server: Server, client: Client) -> Assignment:
        return all_experts(server)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
