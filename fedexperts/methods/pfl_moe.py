"""PFL-MoE: every client computes with all experts, which are shared, and trains a fixed subset of them.

A baseline in HFedMoE's comparison (arXiv 2601.00583, section 5), described there only as clients that train a subset of shared
experts. The paper of that name (Guo et al., https://arxiv.org/abs/2012.15589) mixes a client's model with the global one and
has no such experts. So this is HFedMoE's variant; the number and the choice of experts are ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fedexperts.core.training import fit
from fedexperts.methods.base import Budget, answer, budget_for, by_examples, mean_rows, selective_round_flops
from fedexperts.methods.contract import Declaration, Method
from fedexperts.methods.submodel import unmask
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.flops import Batch
from fedexperts.moe.importance import at_random, select
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Training, Update


@dataclass(frozen=True)
class PFLMoE(Method):
    """A client's subset is drawn once, at random, with at least one expert per layer; HFedMoE without its selection.

    budget: experts in every client's subset, a count or a share of all; None: as many as its memory can train.
    """

    budget: Budget | None = None

    def declare(self) -> Declaration:
        return Declaration(job_extra=("budget", "subset"), selects_experts=True)

    def budget_of(self, assignment: Assignment) -> int:
        return int(assignment.extra["budget"])

    def assign(self, server: Server, client: Client) -> Assignment:
        """The whole model, and the subset.

        Raises:
            BadValue: a budget that does not cover the layers.
        """
        budget = budget_for(server, client, self.budget)
        sizes = [block.num_experts for block in server.anatomy.blocks.values()]
        scores = at_random(sum(sizes), f"{server.seed}/{client.name}/experts")
        subset = select(scores, torch.ones_like(scores), sizes, budget)
        return Assignment(server.anatomy.all_experts, extra={"budget": torch.tensor(budget), "subset": subset})

    def train(self, job: Job, context: ClientContext) -> Update:
        """Trains the subset and all other trained weights; with all experts in the subset it trains as in FedAvg."""
        model = self.build_model(job, context)
        subset = unmask(anatomy(model), job.extra["subset"])
        limited = not job.extra["subset"].all()
        fitted = fit(model, context, seed=job.seed, select_experts=(lambda _: subset) if limited else None)
        return answer(job, context, model, fitted, experts=subset)

    def round_flops(self, model: nn.Module, batch: Batch, training: Training) -> float:
        """If backward reaches all experts within a budget, which computes some products again."""
        return selective_round_flops(model, batch, training)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """An expert is the mean, by examples, over the clients that have it in their subset."""
        return mean_rows(server, updates, by_examples)
