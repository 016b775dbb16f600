"""What the methods share whose clients keep some of the trained weights to themselves."""

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
"""A hyperparameter that names the parts of the model whose trained weights stay with each client."""


def shared_names(server: Server, personal: tuple[Part, ...]) -> frozenset[str]:
    """The trained weights that belong to no part that is `personal`: what travels.

    Raises:
        BadValue: a part that is not trained, or all that are.
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
    """Trained weight → the part of the model it belongs to, as `tuning.parts` has it, but from the names alone: a server has no
    model. Attention is what lies below a module with projections for both queries and keys, and every adapter of no expert.
    """
    attentions = tuple(f"{path}." for path in with_projection(layout, "q") & with_projection(layout, "k"))

    def part(name: str, block: str | None) -> Part:
        if block:
            return "router" if rows.router_of(name, layout) else "experts"
        return "attention" if ".lora_" in name or name.startswith(attentions) else "dense"

    return {name: part(name, block) for name, block in layout.items()}


def with_projection(names: Iterable[str], kind: str) -> set[str]:
    """Paths of the modules with a projection of that `kind`, of those in PROJECTIONS."""
    return {name.partition(f".{alias}.")[0] for name in names for alias in PROJECTIONS[kind] if f".{alias}." in name}


def train_and_keep(method: Method, job: Job, context: ClientContext) -> Update:
    """Train what was sent and what the client has of its own, together; send back the one and keep the other."""
    model = method.build_model(job, context)
    update = answer(job, context, model, fit(model, context, seed=job.seed))
    keep(job, context, model)
    return update


def keep(job: Job, context: ClientContext, model: nn.Module) -> None:
    """What `model` trained that did not come with `job` becomes what the client goes on from and is scored with."""
    context.client_state.update({name: tensor for name, tensor in rows.read(model).items() if name not in job.patch.tensors})


def one_after_the_other(*costs: Cost) -> Cost:
    """What pieces of work took together."""
    return Cost(
        tokens=sum(cost.tokens for cost in costs),
        peak_bytes=max(cost.peak_bytes for cost in costs),
        flops_estimated=sum(cost.flops_estimated for cost in costs),
    )
