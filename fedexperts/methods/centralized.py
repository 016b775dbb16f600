"""Centralized training on all clients' data: an upper bound for federated methods."""

from collections.abc import Iterable
from dataclasses import dataclass

from fedexperts.methods.base import all_experts, by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.types import Assignment, Client, Server, Update


@dataclass(frozen=True)
class Centralized(Method):
    """One participant with all clients' examples trains the whole model, with as many steps per round as the sampled clients.

    The participant is created before the run (experiment.setup.centralized); the rest is FedAvg with one client.
    """

    def declare(self) -> Declaration:
        return Declaration(centralized=True, reference=True)

    def assign(self, server: Server, client: Client) -> Assignment:
        return all_experts(server)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
