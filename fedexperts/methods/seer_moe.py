"""SEER-MoE: prunes rarely used experts, then fine-tunes with an entropy penalty on the routers.

Muzio, Sun, He, "SEER-MoE: Sparse Expert Efficiency through Regularization for Mixture-of-Experts",
https://arxiv.org/abs/2404.05089, which prunes one model for one device. Its federated version, a baseline of HFedMoE
(arXiv 2601.00583, section 5), is ours.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fedexperts.core.training import cross_entropy, examples, fit, seen
from fedexperts.errors import TooSmall
from fedexperts.methods.base import Share, Weight, all_experts, answer, by_examples, mean_rows
from fedexperts.methods.contract import Declaration, ExtraTensor, Method, number_of_experts
from fedexperts.methods.submodel import by_block, require_minimum, search
from fedexperts.moe.flops import FlopsEstimate
from fedexperts.moe.importance import importance
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.routing import Recorder, gating_entropy
from fedexperts.types import Assignment, Client, ClientContext, Cost, Job, Patch, Server, Update


@dataclass(frozen=True)
class SEERMoE(Method):
    """In a setup task every client counts the tokens per expert; each then gets the most used experts that fit its memory.

    counting: "hard": tokens routed to an expert; "soft": the sum of its probability over all tokens.
    entropy: weight of the routers' entropy in the loss (ours: 0.01, as of the load balance, which has the opposite effect).
    reserve: share of a client's memory that its experts may use (ours: all of it).

    `method_state` has `counts`, the sum over all clients.
    """

    counting: Literal["hard", "soft"] = "hard"
    entropy: Weight = 0.01
    reserve: Share = 1.0

    def declare(self) -> Declaration:
        counts = ExtraTensor(number_of_experts, torch.float64, low=0.0, high=1e15, tasks=("count",))
        return Declaration(setup_tasks=("count",), extra={"counts": counts})

    def assign(self, server: Server, client: Client) -> Assignment | None:
        """Task count: the whole model, if its weights and the activations of a training step fit the memory, which is more than
        counting needs (ours). Task train: the most used experts.

        Raises:
            TooSmall: no legal sub-model fits the client's memory, or counting fits no client's.
        """
        require_minimum(server, client)
        if server.task != "count":
            return Assignment(search(server, client, by_block(server.anatomy, server.method_state["counts"]), self.reserve))
        needed = server.footprint.frozen_bytes + server.footprint.activation_bytes
        able = [each.name for each in server.clients.values() if each.memory_bytes is None or each.memory_bytes >= needed]
        if not able:
            raise TooSmall(
                f"no client can count whom its data is routed to: the whole model's weights and the activations of a batch take "
                f"{needed / 1e6:.1f} MB and all clients have less memory; give one of them more, or take a smaller batch"
            )
        return all_experts(server) if client.name in able else None

    def train(self, job: Job, context: ClientContext) -> Update:
        """Counts in stage 1; in stage 2 trains the pruned model with the gating entropy added to the loss."""
        model = self.build_model(job, context)
        if job.task == "count":
            counts, cost = self.count(model, context)
            return Update(job.client, job.round, job.task, Patch({}), examples(context), {"counts": counts}, {}, cost)
        fitted = fit(model, context, seed=job.seed, watch=self.entropy_penalty if self.entropy else None)
        return answer(job, context, model, fitted)

    def entropy_penalty(self, recorder: Recorder) -> Tensor:
        """The penalty on the entropy of the routers, which is added to the loss."""
        return self.entropy * gating_entropy(recorder)

    def count(self, model: nn.Module, context: ClientContext) -> tuple[Tensor, Cost]:
        """Counts the tokens per expert over the client's training examples, in one pass without gradients."""
        data, size = context.data.train, context.training.batch_size
        batches = [context.encoder.batch(data[start : start + size]) for start in range(0, len(data), size)]
        largest = max(batches, key=lambda batch: batch["input_ids"].numel() + batch["labels"].numel())
        estimate, counts, peak = FlopsEstimate(model), torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            with MemoryMeter(model) if batch is largest else nullcontext() as meter:
                counts = counts + self.batch_counts(model, batch)
            peak = meter.peak_bytes if meter else peak
        tokens = sum(seen(model, batch) for batch in batches)
        flops = sum(estimate.forward(estimate.size(batch)) for batch in batches)
        return counts, Cost(tokens=tokens, peak_bytes=peak, flops_estimated=flops)

    @torch.no_grad()
    def batch_counts(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The counts of one batch."""
        with Recorder(model, keep_logits=True) as recorder:
            cross_entropy(model, batch)
        found = importance(recorder)
        return (found.picked if self.counting == "hard" else found.usage * found.tokens).double()

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """Sums the counts of all clients; in rounds, modular aggregation as in FedMoE."""
        if server.task != "count":
            return mean_rows(server, updates, by_examples)
        counts = [update.extra["counts"] for update in updates]
        return replace(server, method_state={"counts": torch.stack(counts).sum(0)}) if counts else server
