"""What several methods call: assigning, training and merging rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fedexperts.client import Fitted, examples, fit, install
from fedexperts.moe import rows
from fedexperts.types import Assignment, Bench, Job, Patch, Server, Tensors, Update

Count = Annotated[int, Field(ge=1)]
"""A hyperparameter that counts something; a run file is held to it."""

Share = Annotated[float, Field(gt=0, le=1)]
"""A hyperparameter that is a part of something, or all of it."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A hyperparameter that weighs something."""


def all_experts(server: Server) -> Assignment:
    """The whole model."""
    return Assignment(server.anatomy.all_experts)


def patch_for(server: Server, assignment: Assignment) -> Patch:
    """The server's weights that `assignment` names, cut to its experts."""
    names = server.weights.keys() if assignment.names is None else assignment.names
    weights = {name: tensor for name, tensor in server.weights.items() if name in names}
    return Patch(*rows.cut(weights, server.layout, assignment.experts))


def train_assigned(job: Job, bench: Bench) -> Update:
    """Train what was sent on the client's own examples, and send it all back."""
    model = install(job, bench)
    return answer(job, bench, model, fit(model, bench, seed=job.seed))


def answer(job: Job, bench: Bench, model: nn.Module, fitted: Fitted, extra: Tensors | None = None) -> Update:
    """All that `model` trained, in the rows of `job`, with what came of it."""
    patch, metrics = Patch(rows.read(model), job.patch.rows), {"loss": fitted.loss}
    return Update(job.client, job.round, job.task, patch, examples(bench), extra or {}, metrics, fitted.cost)


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


def mean_rows(server: Server, updates: Iterable[Update], weigh: Callable[[Update], float]) -> Server:
    """Each row becomes the weighted mean over the clients that sent it; a row nobody sent stays as it was.

    McMahan et al. 2017, Algorithm 1, row by row; for experts this is the modular aggregation of FedMoE (section 4.3).
    """
    means: dict[str, rows.RowMean] = {}
    for update in updates:
        for name, tensor in update.patch.tensors.items():
            mean = means.setdefault(name, rows.RowMean(server.weights[name]))
            mean.add(tensor, ids=update.patch.rows.get(name), weight=weigh(update))
    return replace(server, weights={**server.weights, **{name: mean.result() for name, mean in means.items()}})


def heard(updates: Iterable[Update], notes: list[Update]) -> Iterator[Update]:
    """`updates`, leaving each in `notes` without its weights as it passes."""
    for update in updates:
        yield update
        notes.append(replace(update, patch=Patch({})))


def of(kind: str, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `memory` that are called `kind`/…, by the rest of their names."""
    return {key.removeprefix(f"{kind}/"): tensor for key, tensor in memory.items() if key.startswith(f"{kind}/")}
