"""Shared by methods whose clients keep some of the trained weights."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field
from torch import nn

from fedexperts.core.training import fit
from fedexperts.errors import BadValue
from fedexperts.methods.base import answer
from fedexperts.methods.contract import Method
from fedexperts.moe import rows
from fedexperts.moe.rows import Layout
from fedexperts.moe.tuning import PROJECTIONS, Part
from fedexperts.types import ClientContext, Cost, Job, Server, Update

Personal = Annotated[tuple[Part, ...], Field(min_length=1)]
"""A hyperparameter: the parts of the model whose trained weights stay on each client."""


def shared_names(server: Server, personal: tuple[Part, ...]) -> frozenset[str]:
    """The trained weights that are sent: those of no part in `personal`.

    Raises:
        BadValue: a part that is not trained, or all trained parts are personal.
    """
    part = parts(server.layout)
    trained = list(dict.fromkeys(part.values()))
    if untrained := [each for each in personal if each not in trained]:
        raise BadValue(
            f"method.personal has {untrained[0]!r}, but this run trains {', '.join(trained)}; name some of these, or add "
            f"{untrained[0]!r} to training.parts"
        )
    if not {*trained} - {*personal}:
        raise BadValue(
            f"method.personal has all that this run trains ({', '.join(trained)}), so nothing would be shared; leave a part "
            "out, or take the method local"
        )
    return frozenset(name for name, its in part.items() if its not in personal)


def parts(layout: Layout) -> dict[str, Part]:
    """Trained weight → its part of the model, from names alone, because a server has no model; equal to `tuning.parts`.

    Attention are the weights below a module with projections for queries and keys, and all adapters outside experts.
    """
    attentions = tuple(f"{path}." for path in with_projection(layout, "q") & with_projection(layout, "k"))

    def part(name: str, block: str | None) -> Part:
        if block:
            return "router" if rows.router_of(name, layout) else "experts"
        return "attention" if ".lora_" in name or name.startswith(attentions) else "dense"

    return {name: part(name, block) for name, block in layout.items()}


def with_projection(names: Iterable[str], kind: str) -> set[str]:
    """Paths of the modules with a projection of `kind` (a key of PROJECTIONS)."""
    return {name.partition(f".{alias}.")[0] for name in names for alias in PROJECTIONS[kind] if f".{alias}." in name}


def train_and_keep(method: Method, job: Job, context: ClientContext) -> Update:
    """Trains received and personal weights together; sends the former and keeps the latter in the client state."""
    model = method.build_model(job, context)
    update = answer(job, context, model, fit(model, context, seed=job.seed))
    update_client_state(job, context, model)
    return update


def update_client_state(job: Job, context: ClientContext, model: nn.Module) -> None:
    """Stores in the client state the trained weights of `model` that are not in the patch of `job`."""
    context.client_state.update({name: tensor for name, tensor in rows.read(model).items() if name not in job.patch.tensors})


def sum_of_costs(*costs: Cost) -> Cost:
    """The cost of sequential work: sums of tokens and FLOPs, and the highest peak."""
    return Cost(
        tokens=sum(cost.tokens for cost in costs),
        peak_bytes=max(cost.peak_bytes for cost in costs),
        flops_estimated=sum(cost.flops_estimated for cost in costs),
    )
