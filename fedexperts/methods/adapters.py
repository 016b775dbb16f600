"""What methods on low-rank adapters call: which there are, the rank of each client's, sending them truncated."""

from collections.abc import Iterable, Iterator, Set
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import BeforeValidator
from torch import nn

from fedexperts.core.training import sub_model
from fedexperts.errors import BadValue
from fedexperts.methods.base import Count, all_experts, patch_for
from fedexperts.moe import factors, lora
from fedexperts.types import Assignment, Client, ClientContext, Job, Patch, Server, Update


def ranks_like(given: object) -> object:
    """`given`, where it is a rank or some.

    Raises:
        BadValue: it is none.
    """
    ranks = given if isinstance(given, list | tuple) else [given]
    if not ranks or not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in ranks):
        raise BadValue(
            f"method.ranks = {given!r:.60} is no rank; give a whole number from 1, or a list of some, in turn over the clients"
        )
    return given


Ranks = Annotated[Count | tuple[Count, ...], BeforeValidator(ranks_like)]
"""A hyperparameter that gives each client's adapters their rank: one for all, or some that go in turn over clients by name."""


def adapters_of(server: Server, method: str) -> dict[str, str]:
    """The adapters that the run trains: A → B.

    Raises:
        BadValue: none, so `method` has nothing to work on.
    """
    found = factors.pairs(server.weights)
    if not found:
        raise BadValue(
            f"method {method} works on LoRA's adapters, but this run trains none; "
            'set training.train = "lora", with attention or experts among training.parts'
        )
    return found


def rank_for(server: Server, client: Client, ranks: Ranks | None, method: str) -> int:
    """The rank of the adapters of `client`: what `ranks` gives it; None: the run's.

    Raises:
        BadValue: a rank above the run's, or one that adapters of stacked experts do not take; or there are no adapters.
    """
    found = adapters_of(server, method)
    most = factors.rank_of(server.weights)
    if ranks is None:
        return most
    turn = sorted(server.clients).index(client.name)
    rank = ranks if isinstance(ranks, int) else ranks[turn % len(ranks)]
    if rank > most:
        raise BadValue(f"method.ranks has {rank}, but no rank may be above training.rank = {most}; raise that, or lower the rank")
    if factors.rank_step(server.weights) > 1:
        lora.check_rank(rank, server.weights[next(iter(found))].dtype, "method.ranks")
    return rank


def at_rank(server: Server, rank: int) -> Assignment:
    """The whole model, its adapters truncated to `rank`."""
    whole = all_experts(server)
    patch = patch_for(replace(server, weights=factors.cut(server.weights, rank)), whole)
    return replace(whole, extra={"rank": torch.tensor(rank)}, patch=patch)


def at_rank_of(job: Job, context: ClientContext) -> nn.Module:
    """The job's model with adapters of the rank that it says, whose scale is that of the run's."""
    tuning, rank = context.training.tuning, int(job.extra["rank"])
    return sub_model(job, context, tuning=replace(tuning, rank=rank, alpha=tuning.alpha * rank / tuning.rank))


def set_aside(updates: Iterable[Update], adapters: list[Update]) -> Iterator[Update]:
    """`updates` without their adapters; with nothing else they go into `adapters`."""

    def part(update: Update) -> Update:
        names = factors.rank_axes(update.patch.tensors).keys()
        adapters.append(replace(update, patch=among(update.patch, names)))
        return replace(update, patch=among(update.patch, update.patch.tensors.keys() - names))

    return map(part, updates)


def among(patch: Patch, names: Set[str]) -> Patch:
    """Those of the tensors of `patch` that `names` has."""
    tensors, ids = ({name: t for name, t in each.items() if name in names} for each in (patch.tensors, patch.rows))
    return Patch(tensors, ids)
