"""What several methods call: assigning, training and merging rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from fedexperts.core.training import Fitted, examples
from fedexperts.errors import BadValue
from fedexperts.moe import rows
from fedexperts.moe.anatomy import Experts
from fedexperts.moe.importance import require_coverage
from fedexperts.types import Assignment, Client, ClientContext, Job, Patch, Server, Tensors, Update

Count = Annotated[int, Field(ge=1)]
"""A hyperparameter that counts something; a run file is held to it."""

Share = Annotated[float, Field(gt=0, le=1)]
"""A hyperparameter that is a part of something, or all of it."""


def budget_like(given: object) -> object:
    """`given`, where it is a budget.

    Raises:
        BadValue: it is none.
    """
    count = isinstance(given, int) and not isinstance(given, bool) and given >= 1
    if not count and not (isinstance(given, float) and 0 < given <= 1):
        raise BadValue(
            f"method.budget = {given!r:.60} is no budget; give a count of experts from 1, or a share of all above 0 and at most 1"
        )
    return given


Budget = Annotated[int | float, BeforeValidator(budget_like)]
"""A hyperparameter that is a number of experts of the whole model: a count, or with a decimal point a share of all."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A hyperparameter that weighs something."""

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A hyperparameter that weighs something, or 0 and leaves it out."""


def all_experts(server: Server) -> Assignment:
    """The whole model."""
    return Assignment(server.anatomy.all_experts)


def patch_for(server: Server, assignment: Assignment) -> Patch:
    """The server's weights that `assignment` names, cut to its experts."""
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
    """What `model` trained of the weights of `job`, with what came of it; `experts`: of its experts only these.

    Whatever else it trained is the client's own.
    """
    patch = patch_of(model, job, experts) if experts is not None else Patch(shared(job, rows.read(model)), job.patch.rows)
    return Update(job.client, job.round, job.task, patch, examples(context), extra or {}, fitted.metrics, fitted.cost)


def shared(job: Job, tensors: Tensors) -> dict[str, Tensor]:
    """Those of `tensors` that `job` brought: all that may leave the client."""
    return {name: tensor for name, tensor in tensors.items() if name in job.patch.tensors}


def patch_of(model: nn.Module, job: Job, experts: Experts) -> Patch:
    """What `model`, which holds all experts, trained, but of the experts only `experts`; routers and dense weights whole."""
    return of_experts(Patch(shared(job, rows.read(model)), job.patch.rows), rows.layout(model), experts)


def of_experts(patch: Patch, layout: rows.Layout, experts: Experts) -> Patch:
    """`patch`, which holds all experts, but of the experts only `experts`; routers and dense weights whole."""
    own = {name: t for name, t in patch.tensors.items() if layout[name] and not rows.router_of(name, layout)}
    tensors, ids = rows.cut(own, layout, experts)
    return Patch({**patch.tensors, **tensors}, {**patch.rows, **ids})


def budget_for(server: Server, client: Client, given: Budget | None) -> int:
    """How many experts of the whole model backward reaches at a time on `client`: C_k of HFedMoE.

    As many as `given` says, or as fit its memory (ours: the paper gives no formula); not more than there are. What fits is
    never below the number of MoE blocks: a client that does not hold as many has too little memory and will say so.

    Raises:
        BadValue: `given` is below the number of MoE blocks.
    """
    blocks, most = len(server.anatomy.blocks), server.anatomy.num_experts
    if given is None:
        fit = most if client.memory_bytes is None else server.footprint.reached_within(client.memory_bytes)
        return max(fit, blocks)
    number = round(given * most) if isinstance(given, float) else given
    share = f", which is {number} of {most} experts," if isinstance(given, float) else ""
    require_coverage(number, blocks, f"method.budget = {given}{share}")
    return min(number, most)


@torch.no_grad()
def add_gradient(parameter: nn.Parameter, added: Tensor) -> None:
    """Adds to the gradient of `parameter`. A Switch expert that no token reached has none: it gets one unless `added` is 0."""
    if parameter.grad is not None:
        parameter.grad += added
    elif added.any():
        parameter.grad = added.clone()


def by_examples(update: Update) -> float:
    """A client weighs as much as it has training examples."""
    return float(update.examples)


def mean_rows(
    server: Server,
    updates: Iterable[Update],
    weigh: Callable[[Update], float],
    weigh_router: Callable[[Update, str], float] | None = None,
) -> Server:
    """Each row becomes the weighted mean over the clients that sent it; a row nobody sent stays as it was.

    McMahan et al. 2017, Algorithm 1, row by row; for experts this is the modular aggregation of FedMoE (section 4.3).
    `weigh_router`: what a client weighs in the mean of the router of a block; None: the same as everywhere.
    """
    means: dict[str, rows.RowMean] = {}

    def add(update: Update) -> None:
        for name, tensor in update.patch.tensors.items():
            block = rows.router_of(name, server.layout) if weigh_router else None
            weight = weigh_router(update, block) if weigh_router and block else weigh(update)
            mean = means.setdefault(name, rows.RowMean(server.weights[name]))
            mean.add(tensor, ids=update.patch.rows.get(name), weight=weight)

    for _ in map(add, updates):  # no update is bound to a name here, where it would live until the next one has come
        pass
    return replace(server, weights={**server.weights, **{name: mean.result() for name, mean in means.items()}})


def tee_without_weights(updates: Iterable[Update], notes: list[Update]) -> Iterator[Update]:
    """`updates`, leaving each in `notes` without its weights as it passes."""

    def note(update: Update) -> Update:
        notes.append(replace(update, patch=Patch({})))
        return update

    return map(note, updates)


def of(kind: str, method_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `method_state` that are called `kind`/…, by the rest of their names."""
    return {key.removeprefix(f"{kind}/"): tensor for key, tensor in method_state.items() if key.startswith(f"{kind}/")}
