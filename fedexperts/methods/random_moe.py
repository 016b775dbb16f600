"""randomMoE: sub-models as in FedMoE with random experts, a baseline in FedMoE's paper (arXiv 2408.11304, section 5)."""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from fedexperts.methods.base import Count, Share, by_examples, mean_rows
from fedexperts.methods.contract import Method
from fedexperts.methods.submodel import at_random
from fedexperts.types import Assignment, Client, Server, Update


@dataclass(frozen=True)
class RandomMoE(Method):
    """Each client has the same random experts in all rounds; modular aggregation as in FedMoE.

    experts_per_layer: their number; None (ours): as many as fit `reserve` of the client's memory, so that it differs from FedMoE
    only in the choice of experts.
    """

    experts_per_layer: Count | None = None
    reserve: Share = 0.7

    def assign(self, server: Server, client: Client) -> Assignment:
        rng = Random(f"{server.seed}/{client.name}/experts")
        return Assignment(at_random(server, client, self.reserve, self.experts_per_layer, rng))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
