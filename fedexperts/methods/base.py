"""Shared by methods: assignments, updates and row-wise aggregation."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from fedexperts.core.training import Fitted, examples
from fedexperts.errors import BadValue
from fedexperts.moe import rows
from fedexperts.moe.anatomy import Experts, anatomy
from fedexperts.moe.flops import Batch, FlopsEstimate
from fedexperts.moe.importance import require_coverage
from fedexperts.types import Assignment, Client, ClientContext, Cost, Job, Patch, Server, Tensors, Training, Update

Count = Annotated[int, Field(ge=1)]
"""A hyperparameter that is a count, from 1; validated in run files."""

Share = Annotated[float, Field(gt=0, le=1)]
"""A hyperparameter that is a share, above 0 and at most 1."""


def validated_budget(value: object) -> object:
    """Validates that `value` is a budget, and returns it.

    Raises:
        BadValue: it is not.
    """
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not count and not (isinstance(value, float) and 0 < value <= 1):
        raise BadValue(
            f"method.budget = {value!r:.60} is no budget; give a count of experts from 1, or a share of all above 0 and at most 1"
        )
    return value


Budget = Annotated[int | float, BeforeValidator(validated_budget)]
"""A hyperparameter that is a number of experts of the whole model: a count (int), or a share of all (float)."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A hyperparameter that is a weight above 0."""

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A hyperparameter that is a weight; 0 turns its term off."""


def all_experts(server: Server) -> Assignment:
    """The whole model."""
    return Assignment(server.anatomy.all_experts)


def patch_for(server: Server, assignment: Assignment) -> Patch:
    """The server's weights named by `assignment`, cut to its experts."""
    names = server.weights.keys() if assignment.names is None else assignment.names
    weights = {name: tensor for name, tensor in server.weights.items() if name in names}
    return Patch(*rows.cut(weights, server.layout, assignment.experts))


def answer(
    job: Job,
    context: ClientContext,
    model: nn.Module,
    fitted: Fitted,
    extra: Tensors | None = None,
    experts: Experts | None = None,
) -> Update:
    """The update with the weights of `job` that `model` trained, the metrics and the cost; `experts`: only these experts.

    Other trained weights are not sent.
    """
    patch = patch_of(model, job, experts) if experts is not None else Patch(shared(job, rows.read(model)), job.patch.rows)
    return Update(job.client, job.round, job.task, patch, examples(context), extra or {}, fitted.metrics, fitted.cost)


def shared(job: Job, tensors: Tensors) -> dict[str, Tensor]:
    """The `tensors` whose names are in the patch of `job`; only these may leave the client."""
    return {name: tensor for name, tensor in tensors.items() if name in job.patch.tensors}


def patch_of(model: nn.Module, job: Job, experts: Experts) -> Patch:
    """The trained weights of `model`, which has all experts: `experts` only, and whole routers and dense weights."""
    return of_experts(Patch(shared(job, rows.read(model)), job.patch.rows), rows.layout(model), experts)


def of_experts(patch: Patch, layout: rows.Layout, experts: Experts) -> Patch:
    """`patch`, which has all experts, with `experts` only, and whole routers and dense weights."""
    own = {name: t for name, t in patch.tensors.items() if layout[name] and not rows.router_of(name, layout)}
    tensors, ids = rows.cut(own, layout, experts)
    return Patch({**patch.tensors, **tensors}, {**patch.rows, **ids})


def budget_for(server: Server, client: Client, budget: Budget | None) -> int:
    """The number of experts of the whole model that backward reaches in a step on `client`: C_k of HFedMoE.

    It is `budget`, or the number that fits its memory if None (ours: the paper gives no formula), at most all experts. The
    number that fits is at least the number of MoE blocks: jobs of a client with less memory fail.

    Raises:
        BadValue: `budget` is below the number of MoE blocks.
    """
    blocks, most = len(server.anatomy.blocks), server.anatomy.num_experts
    if budget is None:
        fit = most if client.memory_bytes is None else server.footprint.reached_within(client.memory_bytes)
        return max(fit, blocks)
    number = round(budget * most) if isinstance(budget, float) else budget
    share = f", which is {number} of {most} experts," if isinstance(budget, float) else ""
    require_coverage(number, blocks, f"method.budget = {budget}{share}")
    return min(number, most)


def selective_round_flops(model: nn.Module, batch: Batch, training: Training) -> float:
    """An upper bound of the FLOPs of the training steps if backward reaches only some experts in each (moe/backward.py)."""
    estimate = FlopsEstimate(model)
    step = estimate.step(estimate.size(batch), chosen=anatomy(model).all_experts)
    return step * training.local_steps * training.gradient_accumulation_steps


@torch.no_grad()
def add_gradient(parameter: nn.Parameter, added: Tensor) -> None:
    """Adds `added` to the gradient of `parameter`; a Switch expert without tokens has none and gets one unless `added` is 0."""
    if parameter.grad is not None:
        parameter.grad += added
    elif added.any():
        parameter.grad = added.clone()


def with_flops(cost: Cost, flops: float) -> Cost:
    """`cost` with the FLOPs of work beside the training steps."""
    return replace(cost, flops_estimated=cost.flops_estimated + flops)


def by_examples(update: Update) -> float:
    """Weight of an update: the client's number of training examples."""
    return float(update.examples)


def mean_rows(
    server: Server,
    updates: Iterable[Update],
    weigh: Callable[[Update], float],
    weigh_router: Callable[[Update, str], float] | None = None,
) -> Server:
    """Each row becomes the weighted mean over the clients that sent it; a row that no client sent keeps its value.

    McMahan et al. 2017, Algorithm 1, row by row; for experts this is the modular aggregation of FedMoE (section 4.3).
    weigh: weight of an update. weigh_router: its weight in the mean of the router of a block; None: `weigh`.
    """
    means: dict[str, rows.RowMean] = {}

    def add(update: Update) -> None:
        for name, tensor in update.patch.tensors.items():
            block = rows.router_of(name, server.layout) if weigh_router else None
            weight = weigh_router(update, block) if weigh_router and block else weigh(update)
            mean = means.setdefault(name, rows.RowMean(server.weights[name]))
            mean.add(tensor, ids=update.patch.rows.get(name), weight=weight)

    for _ in map(add, updates):  # binds no update to a name, which would keep it in memory until the next one arrives
        pass
    return replace(server, weights={**server.weights, **{name: mean.result() for name, mean in means.items()}})


def tee_without_weights(updates: Iterable[Update], copies: list[Update]) -> Iterator[Update]:
    """Yields `updates` and appends a copy of each, without its weights, to `copies`."""

    def copied(update: Update) -> Update:
        copies.append(replace(update, patch=Patch({})))
        return update

    return map(copied, updates)


def entries(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `state` under `prefix`/…, without the prefix."""
    return {key.removeprefix(f"{prefix}/"): tensor for key, tensor in state.items() if key.startswith(f"{prefix}/")}
