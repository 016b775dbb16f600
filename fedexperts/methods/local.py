"""Local training without federation: a lower bound for federated methods."""

from collections.abc import Iterable
from dataclasses import dataclass

from fedexperts.methods.base import Count
from fedexperts.methods.contract import Declaration, Method
from fedexperts.methods.personal import train_and_keep
from fedexperts.methods.submodel import same_for_all
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class Local(Method):
    """Clients keep all trained weights; no weights are sent in either direction, and the server's model does not change.

    experts_per_layer: number of random experts, the same on every client; None: all experts, regardless of the client's memory.
    """

    experts_per_layer: Count | None = None

    def declare(self) -> Declaration:
        return Declaration(reference=True, keeps_weights=True, wrappers=frozenset())

    def assign(self, server: Server, client: Client) -> Assignment:
        return Assignment(same_for_all(server, client, self.experts_per_layer), names=frozenset())

    def train(self, job: Job, context: ClientContext) -> Update:
        return train_and_keep(self, job, context)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        for _ in updates:
            pass
        return server
