"""FedMoE: every client trains a smaller MoE of the experts that its data activates and that fit its memory.

Mei, Cai, Zhou, Wang, Xu, "FedMoE: Personalized Federated Learning via Heterogeneous Mixture of Experts",
https://arxiv.org/abs/2408.11304. Section numbers are the paper's; what it leaves open is marked (ours).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import torch
from torch import Tensor, nn

from fedexperts.core.training import examples, fit, validate
from fedexperts.errors import TooSmall
from fedexperts.methods.base import Count, Share, all_experts, by_examples, entries, mean_rows, tee_without_weights, with_flops
from fedexperts.methods.contract import Declaration, ExtraTensor, Method, Metric, number_of_experts
from fedexperts.methods.recommend import recommend
from fedexperts.methods.submodel import at_random, by_block, mask, predict, require_minimum, search, unmask
from fedexperts.moe import rows
from fedexperts.moe.flops import Batch, FlopsEstimate
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.types import Assignment, Client, ClientContext, Job, Patch, Server, Tensors, Training, Update


@dataclass(frozen=True)
class FedMoE(Method):
    """Stage 1 selects each client's sub-model from its routing; stage 2 trains, merges and adjusts the sub-models.

    initial: "profile" is stage 1; "random" skips it, and clients start with random experts (the paper's ablation).
    adjust: whether stage 2 recommends experts; False keeps the initial sub-models (the other ablation).
    profile_rounds: number of rounds whose local steps a client trains before its routing is measured.
    profile_rank: rank of LoRA on every expert for this training; a run with train = "lora" uses its own adapters.
    reserve: share of a client's memory that the initial sub-model may use (derived from the paper's figures).
    experts_per_layer: of initial = "random"; None: as many as fit (ours; the paper starts with 8).
    patience: participations without a better validation score after which a client gets a recommendation (ours: 3).
    neighbors: K of the recommendation (ours: 3).

    `method_state` has, per client: `p`, its routing; `held`, its experts; `best`, its best score; `stale`, participations since
    then; `former`, its experts before a change on trial; `frozen`, set if its experts no longer change.
    """

    initial: Literal["profile", "random"] = "profile"
    adjust: bool = True
    profile_rounds: Count = 5
    profile_rank: Count = 8
    reserve: Share = 0.7
    experts_per_layer: Count | None = None
    patience: Count = 3
    neighbors: Count = 3

    def declare(self) -> Declaration:
        return Declaration(
            setup_tasks=("profile",) if self.initial == "profile" else (),
            extra={
                "p": ExtraTensor(number_of_experts, low=0.0, high=1.001, tasks=("profile", "train")),
                "score": ExtraTensor(lambda server, job: (), torch.float64, high=0.0),
            },
            metrics={"validation_loss": Metric(low=0.0)},
        )

    def assign(self, server: Server, client: Client) -> Assignment | None:
        """Stage 1: the whole model, if it fits the memory. Stage 2: the client's experts.

        Raises:
            TooSmall: no legal sub-model fits the client's memory, or, in stage 1, the whole model fits no client's.
        """
        require_minimum(server, client)
        if server.task == "profile":
            self.require_profiler(server)
            return all_experts(server) if self.can_profile(server, client) else None
        return Assignment(self.experts_of(server, client))

    def require_profiler(self, server: Server) -> None:
        """Raises TooSmall if no client can execute stage 1."""
        largest = max(
            server.clients.values(), key=lambda client: math.inf if client.memory_bytes is None else client.memory_bytes
        )
        if not self.can_profile(server, largest):
            has, needs = largest.memory_bytes or 0, server.footprint.lora_training_bytes(self.profile_rank)
            raise TooSmall(
                f"client {largest.name}, the largest, has {has / 1e6:.1f} MB of memory, but to measure its routing it needs "
                f"{needs / 1e6:.1f} MB for the whole model and an adapter on every expert; give it more memory, or leave that "
                'stage out with method.initial = "random"'
            )

    def can_profile(self, server: Server, client: Client) -> bool:
        """Whether the frozen whole model and adapters on all experts fit the client's memory."""
        return client.memory_bytes is None or server.footprint.lora_training_bytes(self.profile_rank) <= client.memory_bytes

    def experts_of(self, server: Server, client: Client) -> dict[str, tuple[int, ...]]:
        """S_k, the experts of client k."""
        if f"held/{client.name}" in server.method_state:
            return dict(unmask(server.anatomy, server.method_state[f"held/{client.name}"]))
        rng = Random(f"{server.seed}/{client.name}/experts")
        return dict(at_random(server, client, self.reserve, self.experts_per_layer, rng))

    def train(self, job: Job, context: ClientContext) -> Update:
        """Trains the sub-model, measures its routing and its loss on the validation split, and sends all three."""
        model = self.build_model(job, context)
        if job.task == "profile":
            return self.profile(model, job, context)
        fitted = fit(model, context, seed=job.seed)
        validation = validate(model, context)
        routing = torch.cat([p.float() for p in validation.routing.probabilities().values()])
        score = torch.tensor(-validation.loss, dtype=torch.float64)
        patch = Patch(rows.read(model), job.patch.rows)
        metrics = {**fitted.metrics, "validation_loss": validation.loss}
        cost = with_flops(fitted.cost, validation.flops_estimated)
        return Update(job.client, job.round, job.task, patch, examples(context), {"p": routing, "score": score}, metrics, cost)

    def round_flops(self, model: nn.Module, batch: Batch, training: Training) -> float:
        """With the validation."""
        estimate, batches = FlopsEstimate(model), -(-training.validation_examples // training.batch_size)
        return super().round_flops(model, batch, training) + batches * estimate.forward(estimate.size(batch))

    def profile(self, model: torch.nn.Module, job: Job, context: ClientContext) -> Update:
        """Stage 1, step 1: trains LoRA on every expert, then measures p, because routing drifts during fine-tuning."""
        if context.training.tuning.train == "full":
            model = prepare(model, Tuning("lora", ("experts",), rank=self.profile_rank, alpha=2.0 * self.profile_rank), job.seed)
        fitted = fit(model, context, seed=job.seed, steps=self.profile_rounds * context.training.local_steps)
        validation = validate(model, context)
        routing = torch.cat([p.float() for p in validation.routing.probabilities().values()])
        cost = with_flops(fitted.cost, validation.flops_estimated)
        return Update(job.client, job.round, job.task, Patch({}), examples(context), {"p": routing}, fitted.metrics, cost)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """Modular aggregation: dense weights over all participants, an expert and its router row over clients that have it."""
        if server.task == "profile":  # clients send no weights
            return self.initialized(server, {update.client: update.extra["p"] for update in updates})
        answers: list[Update] = []
        server = mean_rows(server, tee_without_weights(updates, answers), by_examples)
        return self.adjusted(server, answers)

    def initialized(self, server: Server, measured: Tensors) -> Server:
        """Stage 1, steps 2 and 3: predicts p of the clients that did not measure it, then selects each client's experts."""
        if not measured:  # all clients failed: the caller of the loop stops the run with their reasons
            return server
        method_state: dict[str, Tensor] = {}
        for name, client in server.clients.items():
            p = measured[name] if name in measured else predict(client, measured, server.clients)
            experts = search(server, client, by_block(server.anatomy, p), self.reserve)
            method_state |= {f"p/{name}": p, f"held/{name}": mask(server.anatomy, experts)}
        return replace(server, method_state=method_state)

    def adjusted(self, server: Server, answers: Sequence[Update]) -> Server:
        """Stage 2, step 4: updates the state of each participant from the reports of all of them."""
        method_state = dict(server.method_state)
        for update in answers:
            expert_mask = mask(server.anatomy, self.experts_of(server, server.clients[update.client]))
            method_state[f"held/{update.client}"] = expert_mask
            method_state[f"p/{update.client}"] = torch.zeros(len(expert_mask)).masked_scatter(expert_mask, update.extra["p"])
        if self.adjust:
            reported = dict(method_state)
            for update in answers:
                method_state = self.after_score(
                    server, server.clients[update.client], float(update.extra["score"]), reported, method_state
                )
        return replace(server, method_state=method_state)

    def after_score(
        self, server: Server, client: Client, score: float, reported: Tensors, method_state: Tensors
    ) -> dict[str, Tensor]:
        """`method_state` after the client's score: keeps, changes or restores its experts."""
        name, after = client.name, dict(method_state)
        best = float(method_state.get(f"best/{name}", torch.tensor(-torch.inf)))
        stale = int(method_state.get(f"stale/{name}", torch.tensor(0))) + 1
        if score > best:
            best, stale = score, 0
            after.pop(f"former/{name}", None)  # the change was for the better
        elif stale >= self.patience and f"frozen/{name}" not in method_state:
            stale = 0
            if f"former/{name}" in method_state:
                after[f"held/{name}"] = after.pop(f"former/{name}")
                after[f"frozen/{name}"] = torch.tensor(True)
            else:
                current = method_state[f"held/{name}"]
                recommended = recommend(server, client, entries("p", reported), entries("held", reported), self.neighbors)
                if not torch.equal(current, recommended):
                    after |= {f"former/{name}": current, f"held/{name}": recommended}
        return after | {f"best/{name}": torch.tensor(best, dtype=torch.float64), f"stale/{name}": torch.tensor(stale)}
