"""Federated averaging.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, https://arxiv.org/abs/1602.05629, Algorithm 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedexperts.methods.base import all_experts, by_examples, mean_rows, train_assigned
from fedexperts.types import Assignment, Bench, Client, Job, Server, Update


@dataclass(frozen=True)
class FedAvg:
    """Every client trains every expert, whatever its memory; the server weighs clients by their number of examples."""

    before: ClassVar[tuple[str, ...]] = ()

    def assign(self, server: Server, client: Client) -> Assignment:
        return all_experts(server)

    def train(self, job: Job, bench: Bench) -> Update:
        return train_assigned(job, bench)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
