"""FedIT: federated averaging of LoRA's adapters, A and B each by itself.

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen, "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
https://arxiv.org/abs/2305.05644, Algorithm 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedexperts.methods.adapters import adapters_of
from fedexperts.methods.base import all_experts, by_examples, mean_rows, train_assigned
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class FedIT:
    """FedAvg that is sure to average adapters. The mean of A times the mean of B is not the mean of BA."""

    setup_tasks: ClassVar[tuple[str, ...]] = ()
    centralized: ClassVar[bool] = False

    def assign(self, server: Server, client: Client) -> Assignment:
        """All that is trained.

        Raises:
            BadValue: no adapters.
        """
        adapters_of(server, "fedit")
        return all_experts(server)

    def train(self, job: Job, context: ClientContext) -> Update:
        return train_assigned(job, context)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
