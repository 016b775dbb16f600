"""Averaged LoRA on attention and on one random expert per layer: a baseline of FLEx (arXiv 2506.00965)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import nn

from fedexperts.core.training import load_weights, sub_model
from fedexperts.errors import BadValue
from fedexperts.methods.base import all_experts, by_examples, mean_rows, of_experts, patch_for
from fedexperts.methods.contract import Declaration, Method
from fedexperts.moe import factors
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Training, Update


def adapters_on_experts(training: Training) -> Training:
    """`training`, but with adapters on the experts, if it would train none."""
    adapted = training.train == "lora" and "experts" in training.trained
    return training if adapted else replace(training, train="lora", parts=("experts",))


@dataclass(frozen=True)
class RandomExpert(Method):
    """One expert per layer, the same for all clients and rounds, drawn from the run's seed; no other expert has adapters."""

    def declare(self) -> Declaration:
        return Declaration(job_extra=("adapted",), training=adapters_on_experts)

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """The whole model with adapters on one expert per layer."""
        adapted = {block: (expert,) for block, expert in zip(job.experts, job.extra["adapted"].tolist(), strict=True)}
        return load_weights(sub_model(job, context, adapted=adapted), job, context)

    def assign(self, server: Server, client: Client) -> Assignment:
        """All trained weights, with the adapters of the chosen experts only.

        Raises:
            BadValue: no adapters of experts.
        """
        if not any(server.layout[a] for a in factors.pairs(server.weights)):
            raise BadValue(
                "method random_expert works on LoRA's adapters of experts, but this run trains none; "
                'set training.train = "lora", with experts among training.parts'
            )
        rng, blocks = Random(f"{server.seed}/random expert"), server.anatomy.blocks
        chosen = {block: (rng.randrange(shape.num_experts),) for block, shape in blocks.items()}
        whole = all_experts(server)
        adapted = torch.tensor([expert for (expert,) in chosen.values()])
        patch = of_experts(patch_for(server, whole), server.layout, chosen)
        return replace(whole, extra={"adapted": adapted}, patch=patch)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
