"""LoRA on attention and on one random expert of each layer, averaged: a baseline of FLEx (arXiv 2506.00965)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

import torch

from fedexperts.errors import BadValue
from fedexperts.methods.base import all_experts, by_examples, mean_rows, of_experts, patch_for, train_assigned
from fedexperts.moe import factors
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


@dataclass(frozen=True)
class RandomExpert:
    """The same expert for all clients and rounds, drawn from the run's seed; no other has an adapter, or sends one."""

    setup_tasks: ClassVar[tuple[str, ...]] = ()
    centralized: ClassVar[bool] = False

    def assign(self, server: Server, client: Client) -> Assignment:
        """All that is trained, but of the experts' adapters only those of the chosen.

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

    def train(self, job: Job, context: ClientContext) -> Update:
        return train_assigned(job, context)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return mean_rows(server, updates, by_examples)
