"""Shared by methods on low-rank adapters: finding them, the rank of each client, truncated adapters."""

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
from fedexperts.types import Assignment, Client, ClientContext, Job, Patch, Server, Training, Update


def validated_ranks(value: object) -> object:
    """Validates that `value` is a rank or a list of ranks, and returns it.

    Raises:
        BadValue: it is neither.
    """
    ranks = value if isinstance(value, list | tuple) else [value]
    if not ranks or not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in ranks):
        raise BadValue(
            f"method.ranks = {value!r:.60} is no rank; give a whole number from 1, or a list of some, in turn over the clients"
        )
    return value


Ranks = Annotated[Count | tuple[Count, ...], BeforeValidator(validated_ranks)]
"""A hyperparameter for the ranks of clients' adapters: one for all, or several, assigned in turn to clients sorted by name."""


def with_adapters(training: Training) -> Training:
    """`training`, but with adapters on its parts, if it would train none."""
    if training.train == "lora" and {"attention", "experts"} & {*training.trained}:
        return training
    kept = tuple(part for part in training.parts or () if part != "dense")
    return replace(training, train="lora", parts=kept if {"attention", "experts"} & {*kept} else None)


def adapters_of(server: Server, method: str) -> dict[str, str]:
    """The trained adapters: name of A → name of B.

    Raises:
        BadValue: the run trains no adapters, which `method` needs.
    """
    pairs = factors.pairs(server.weights)
    if not pairs:
        raise BadValue(
            f"method {method} works on LoRA's adapters, but this run trains none; "
            'set training.train = "lora", with attention or experts among training.parts'
        )
    return pairs


def rank_for(server: Server, client: Client, ranks: Ranks | None, method: str) -> int:
    """The rank of the adapters of `client` in `ranks`; None: the run's.

    Raises:
        BadValue: a rank above the run's, one that adapters of stacked experts do not support, or no adapters.
    """
    pairs = adapters_of(server, method)
    most = factors.rank_of(server.weights)
    if ranks is None:
        return most
    turn = sorted(server.clients).index(client.name)
    rank = ranks if isinstance(ranks, int) else ranks[turn % len(ranks)]
    if rank > most:
        raise BadValue(f"method.ranks has {rank}, but no rank may be above training.rank = {most}; raise that, or lower the rank")
    if factors.rank_step(server.weights) > 1:
        lora.check_rank(rank, server.weights[next(iter(pairs))].dtype, "method.ranks")
    return rank


def at_rank(server: Server, rank: int) -> Assignment:
    """The whole model, with adapters truncated to `rank`."""
    whole = all_experts(server)
    patch = patch_for(replace(server, weights=factors.cut(server.weights, rank)), whole)
    return replace(whole, extra={"rank": torch.tensor(rank)}, patch=patch)


def model_at_rank(job: Job, context: ClientContext) -> nn.Module:
    """The job's model with adapters of the job's rank, which have the scale of the run's adapters."""
    tuning, rank = context.training.tuning, int(job.extra["rank"])
    return sub_model(job, context, tuning=replace(tuning, rank=rank, alpha=tuning.alpha * rank / tuning.rank))


def split_adapters(updates: Iterable[Update], adapters: list[Update]) -> Iterator[Update]:
    """Yields `updates` without their adapters; appends to `adapters` the same updates with only their adapters."""

    def split(update: Update) -> Update:
        names = factors.rank_axes(update.patch.tensors).keys()
        adapters.append(replace(update, patch=subset(update.patch, names)))
        return replace(update, patch=subset(update.patch, update.patch.tensors.keys() - names))

    return map(split, updates)


def subset(patch: Patch, names: Set[str]) -> Patch:
    """`patch` with only the tensors in `names`."""
    tensors, ids = ({name: t for name, t in each.items() if name in names} for each in (patch.tensors, patch.rows))
    return Patch(tensors, ids)


def attention_adapters(training: Training) -> Training:
    """`training`, but with adapters on attention in place of a training of the experts."""
    return replace(training, train="lora", parts=("attention",)) if "experts" in training.trained else training
