"""FedIT: federated averaging of LoRA adapters, A and B separately.

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen, "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
https://arxiv.org/abs/2305.05644, Algorithm 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedexperts.methods.adapters import adapters_of, with_adapters
from fedexperts.methods.base import all_experts, by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.types import Assignment, Client, Server, Update


@dataclass(frozen=True)
class FedIT(Method):
    """FedAvg that requires adapters. The product of the means of B and A is not the mean of BA."""

    def declare(self) -> Declaration:
        return Declaration(training=with_adapters)

    def assign(self, server: Server, client: Client) -> Assignment:
        """All trained weights.

        Raises:
            BadValue: the run trains no adapters.
        """
        adapters_of(server, "fedit")
        return all_experts(server)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
