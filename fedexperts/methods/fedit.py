"""FedIT: federated averaging of LoRA's adapters, A and B each by itself.

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen, "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
https://arxiv.org/abs/2305.05644, Algorithm 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedexperts.methods.adapters import adapters_of
from fedexperts.methods.base import all_experts, by_examples, mean_rows
from fedexperts.methods.contract import Method
from fedexperts.types import Assignment, Client, Server, Update


@dataclass(frozen=True)
class FedIT(Method):
    """FedAvg that is sure to average adapters. The mean of A times the mean of B is not the mean of BA."""

    def assign(self, server: Server, client: Client) -> Assignment:
        """All that is trained.

        Raises:
            BadValue: no adapters.
        """
        adapters_of(server, "fedit")
        return all_experts(server)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
