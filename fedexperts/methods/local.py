"""No federation: each client fine-tunes a model of its own. What every federated method has to beat."""

from collections.abc import Iterable
from dataclasses import dataclass

from fedexperts.methods.base import Count
from fedexperts.methods.contract import Declaration, Method
from fedexperts.methods.personal import train_and_keep
from fedexperts.methods.submodel import same_for_all
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class Local(Method):
    """Clients keep all that they train; nothing is sent either way, and the server's model stays as it was.

    experts_per_layer: of random experts, the same in every client; None: all experts, whatever the client's memory.
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
