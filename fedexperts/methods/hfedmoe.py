"""HFedMoE: every client computes with the whole MoE and trains its most important experts within its budget.

Fang, Lin, Hu, Ma, Tao, Deng, Chen, Fang, "HFedMoE: Resource-aware Heterogeneous Federated Learning with Mixture-of-Experts",
https://arxiv.org/abs/2601.00583. Equation numbers are the paper's; what it leaves open is marked (ours).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fedexperts.core.training import fit
from fedexperts.methods.base import Budget, Share, Weight, answer, budget_for, by_examples, mean_rows, selective_round_flops
from fedexperts.methods.contract import Declaration, ExtraTensor, Method, Metric, number_of_experts
from fedexperts.methods.submodel import by_block, unmask
from fedexperts.moe.anatomy import Anatomy, Experts, anatomy
from fedexperts.moe.backward import Through
from fedexperts.moe.flops import Batch
from fedexperts.moe.importance import Importance, at_random, importance, select
from fedexperts.moe.routing import Recorder
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Training, Update


@dataclass(frozen=True)
class HFedMoE(Method):
    """A client whose budget is below the number of experts selects, per batch, those that backward reaches; forward is unchanged.

    select: criterion: "importance"; "usage", tokens routed to an expert; "random"; "none": no budget.
    refresh: select for each "batch", as in the algorithm, or on the first batch of a "round", as in the text.
    aggregate: "selective": an expert is averaged over the clients that qualify it, (17); "selective+weighted router": and routers
    are weighted by preference, (21); "fedavg": clients send all experts, trained or not, and all is weighted by examples.
    alpha: a client's weight in (21) is one for all routers ("client", the paper's) or one per router ("layer").
    gradient_through: the experts through which gradients flow to the layers below (ours: the paper says only which experts are
    trained). "chosen": cheapest; routers and attention below the last layer then lack what comes through the other experts.
    "all": all but the weights of experts that are not selected get the gradients of a full backward.
    """

    select: Literal["importance", "usage", "random", "none"] = "importance"
    mean_share: Share = 0.9  # λ of (5); 1 leaves specific importance out
    redundancy: Weight = 0.1  # β of (14); 0 leaves redundancy out, so that s of (5) decides and not I
    refresh: Literal["batch", "round"] = "batch"
    budget: Budget | None = None  # C_k of every client; None: as many as fit its memory (ours)
    usage_floor: Weight = 1.0  # τ of (16) times the number of experts of a layer (ours): 1 is the layer's average usage
    absolute_floor: Weight | None = None  # τ itself, in place of usage_floor; the paper's is 0.05
    aggregate: Literal["selective+weighted router", "selective", "fedavg"] = "selective+weighted router"
    alpha: Literal["client", "layer"] = "client"
    gradient_through: Through = "chosen"

    def declare(self) -> Declaration:
        return Declaration(
            extra={
                "usage": ExtraTensor(number_of_experts, low=0.0, high=1.001),
                "preference": ExtraTensor(lambda server, job: (len(job.experts),), torch.float64, low=0.0, high=1.001),
            },
            metrics={"qualified": Metric(low=0, whole=True), "sent": Metric(low=0, whole=True)},
            job_extra=("budget",),
            selects_experts=self.aggregate != "fedavg",
            if_no_expert_is_sent="lower method.usage_floor, or method.absolute_floor where it is set",
        )

    def budget_of(self, assignment: Assignment) -> int | None:
        return int(assignment.extra["budget"]) if "budget" in assignment.extra else None

    def assign(self, server: Server, client: Client) -> Assignment:
        """The whole model, and C_k.

        Raises:
            BadValue: a budget that does not cover the layers.
        """
        limit = {} if self.select == "none" else {"budget": torch.tensor(budget_for(server, client, self.budget))}
        return Assignment(server.anatomy.all_experts, extra=limit)

    def train(self, job: Job, context: ClientContext) -> Update:
        """Trains with (3) to (5), (14) and (15) on each batch; then computes S_k and the preference for each layer."""
        model = self.build_model(job, context)
        shape = anatomy(model)
        budget = int(job.extra.get("budget", shape.num_experts))
        batches: list[Importance] = []
        reached: list[Tensor] = []  # by backward, in each batch

        def watch(recorder: Recorder) -> None:
            batches.append(importance(recorder, self.mean_share, self.redundancy))
            reached.append(batches[-1].picked > 0)

        def select_experts(recorder: Recorder) -> Experts:
            reached[-1] = (
                reached[0] if self.refresh == "round" and reached[1:] else self.selected(batches, shape, budget, job.seed)
            )
            return unmask(shape, reached[-1])

        fitted = fit(
            model,
            context,
            seed=job.seed,
            watch=watch,
            select_experts=select_experts if budget < shape.num_experts else None,
            through=self.gradient_through,
        )

        tokens = torch.stack([batch.tokens for batch in batches])
        usage = (tokens * torch.stack([batch.usage for batch in batches]).double()).sum(0) / tokens.sum(0).clamp(min=1)  # (16)
        qualified = usage >= self.floor(shape)  # S_k
        mean_score = torch.stack([batch.combined for batch in batches]).double().mean(0)  # s̄, over the batches (ours)
        preference = by_block(shape, qualified * usage * mean_score)  # of (19)
        sent = qualified & torch.stack(reached).any(0)

        extra = {"usage": usage.float(), "preference": torch.stack([part.sum() for part in preference.values()])}
        update = answer(job, context, model, fitted, extra, None if self.aggregate == "fedavg" else unmask(shape, sent))
        per_step = [float(part.sum(1).double().mean()) for part in torch.stack(reached).split(sizes(shape), 1)]
        metrics = {"reached": per_step, "qualified": int(qualified.sum()), "sent": int(sent.sum())}
        return replace(update, metrics={**update.metrics, **metrics})

    def selected(self, batches: list[Importance], shape: Anatomy, budget: int, seed: str) -> Tensor:
        """Mask of the experts that backward reaches in the last of the `batches`, (15)."""
        batch = batches[-1]
        score = batch.bottleneck if self.select == "importance" else batch.picked
        if self.select == "random":
            score = at_random(len(score), f"{seed}/{len(batches)}")
        return select(score, batch.picked, sizes(shape), budget)

    def floor(self, shape: Anatomy) -> Tensor:
        """τ for each expert: the lowest usage with which it qualifies for S_k.

        Usages of a layer sum to 1, so that with `usage_floor` = 1 an expert qualifies if its usage is at least the layer's
        average; each layer has such an expert, for any number of experts and top-k.
        """
        relative = torch.tensor([self.usage_floor / number for number in sizes(shape) for _ in range(number)])
        return relative if self.absolute_floor is None else torch.full_like(relative, self.absolute_floor)

    def round_flops(self, model: nn.Module, batch: Batch, training: Training) -> float:
        """If backward reaches all experts within a budget, which computes some products again."""
        return selective_round_flops(model, batch, training)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """(17): an expert is the mean, by examples, over clients that sent it. (21) for routers. Others by examples (ours)."""
        weighted = self.aggregate == "selective+weighted router"
        return mean_rows(server, updates, by_examples, self.alpha_of(server) if weighted else None)

    def alpha_of(self, server: Server) -> Callable[[Update, str], float]:
        """α_k of a client for the router of a block, (18) to (20): r_k times its mean preference, which is its preference / |∪S|.

        (21) is divided by Σ α_k (ours: otherwise routers would shrink each round), so that |∪S|, the same for all, cancels.
        """
        place = {block: number for number, block in enumerate(server.anatomy.blocks)}

        def alpha(update: Update, block: str) -> float:
            preference = update.extra["preference"]
            return float(preference.sum() if self.alpha == "client" else preference[place[block]])

        return alpha


def sizes(shape: Anatomy) -> list[int]:
    """Number of experts of each block."""
    return [block.num_experts for block in shape.blocks.values()]
