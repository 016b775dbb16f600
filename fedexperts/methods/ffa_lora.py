"""FFA-LoRA: A is frozen and the same for all clients; only B is trained and sent, so that the mean of B is exact for BA.

Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, https://arxiv.org/abs/2403.12313.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fedexperts.core.training import fit, load_weights, sub_model
from fedexperts.methods.adapters import adapters_of, with_adapters
from fedexperts.methods.base import answer, by_examples, mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.moe import factors
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class FFALoRA(Method):
    """Clients draw A from the seed of the server's A: the seed is sent in place of A (ours)."""

    def declare(self) -> Declaration:
        return Declaration(job_extra=("seed",), training=with_adapters)

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """The whole model with A drawn from the received seed, the same for all clients."""
        return load_weights(sub_model(job, context, seed=bytes(job.extra["seed"].tolist()).decode()), job, context)

    def assign(self, server: Server, client: Client) -> Assignment:
        """All trained weights without A, and the seed of A.

        Raises:
            BadValue: the run trains no adapters.
        """
        names = frozenset(server.weights) - adapters_of(server, "ffa_lora").keys()
        seed = torch.tensor(list(f"{server.seed}/start".encode()), dtype=torch.uint8)
        return Assignment(server.anatomy.all_experts, names, extra={"seed": seed})

    def train(self, job: Job, context: ClientContext) -> Update:
        model = self.build_model(job, context)
        for name in factors.pairs(name for name, _ in model.named_parameters()):
            model.get_parameter(name).requires_grad_(False)
        return answer(job, context, model, fit(model, context, seed=job.seed))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
