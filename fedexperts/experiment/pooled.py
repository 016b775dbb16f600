"""Evaluations: one job for each client, or one for several clients whose model is the same."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fedexperts.core.ledger import Ledger
from fedexperts.engines.base import Reports
from fedexperts.experiment.client_task import ClientTask
from fedexperts.experiment.progress import Progress
from fedexperts.experiment.runtime import evaluated_clients, task_for
from fedexperts.experiment.setup import Prepared
from fedexperts.federation import answers
from fedexperts.methods.contract import Method
from fedexperts.types import Assignment, Client, Engine, Server

MANY_CLIENTS = 32
"""Number of clients from which on evaluations are pooled where the run file does not say."""
EXAMPLES = 256
"""Number of examples from which on a pass takes no further client. It does not depend on the engine or its workers."""


def evaluate_clients(
    prepared: Prepared, server: Server, engine: Engine, ledger: Ledger, progress: Progress
) -> dict[str, Mapping[str, Any]]:
    """Client → the metrics of its evaluation with the weights of `server`, in the run's order; clients that fail are left out.

    Where a pass over several clients fails, each of them is evaluated alone.
    """
    server, task, reports = (
        replace(server, task="evaluate", clients=prepared.server.clients),
        task_for(prepared),
        reports_of(prepared),
    )
    chosen = {name: server.clients[name] for name in evaluated_clients(prepared)}
    progress.evaluating(len(chosen))

    def metrics_of(groups: list[list[Client]]) -> dict[str, Mapping[str, Any]]:
        also = {first.name: tuple(client.name for client in rest) for first, *rest in groups}
        updates = answers(server, prepared.method, engine, ledger, [first for first, *_ in groups], reports, also)
        found = {client: each for update in updates for client, each in by_client(update.client, also, update.metrics).items()}
        shown = {client: each["predictions"] for client, each in found.items() if "predictions" in each}
        ledger.predictions = {**ledger.predictions, **shown}  # by client, also those of a pass
        return found

    groups = [*grouped(prepared, server, task, chosen)]
    metrics = metrics_of(groups)
    lost = [group for group in groups if len(group) > 1 and group[0].name not in metrics]
    if lost:
        reasons = {entry.client: entry.failed for entry in ledger.entries if entry.failed}
        for first, *rest in lost:
            alone = f"{first.name} and {len(rest)} more clients are evaluated one by one"
            progress.noted(server, f"{alone}, since a pass over the examples of all of them failed: {reasons[first.name]}")
        leaders = {group[0].name for group in lost}
        ledger.entries = [entry for entry in ledger.entries if entry.client not in leaders]
        metrics |= metrics_of([[client] for group in lost for client in group])
    return {client: metrics[client] for client in chosen if client in metrics}


def reports_of(prepared: Prepared) -> Reports:
    """The metrics that the run requests from clients."""
    return partial(task_for(prepared).reports, prepared.data, prepared.clients.metrics())


def by_client(first: str, also: Mapping[str, tuple[str, ...]], metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Client → its metrics, of an evaluation of the client `first` and of `also`; a comparison with the base is that of all."""
    if not also[first]:
        return {first: metrics}
    scored = ("scores", "predictions", "validation")
    shared = {name: each for name, each in metrics.items() if name not in scored}
    own = {client: {name: metrics[name][client] for name in scored if name in metrics} for client in (first, *also[first])}
    return {client: {**each, **shared} for client, each in own.items()}


def grouped(prepared: Prepared, server: Server, task: ClientTask, clients: Mapping[str, Client]) -> Iterator[list[Client]]:
    """The clients of each evaluation job: several if evaluations are pooled and their model is the same."""
    if not is_pooled(prepared, server, task):
        yield from ([client] for client in clients.values())
        return
    waiting: dict[Hashable, tuple[list[Client], int]] = {}  # the clients and examples of passes that are not full yet
    for client in clients.values():
        if (assignment := prepared.method.assign(server, client)) is None:
            continue
        group, examples = waiting.pop(contents(assignment), ([], 0))
        group, examples = [*group, client], examples + len(task.scored_examples(prepared.data[client.name]))
        if examples >= EXAMPLES:
            yield group
        else:
            waiting[contents(assignment)] = group, examples
    yield from (group for group, _ in waiting.values())


def is_pooled(prepared: Prepared, server: Server, task: ClientTask) -> bool:
    """Whether an evaluation may score several clients in one job.

    Not if clients keep weights or state, which are part of their model, nor if their data are on their own machines, nor if the
    drift of routers is measured on each client's own examples.
    """
    settings, config = prepared.config.evaluation, prepared.config
    wanted = len(server.clients) >= MANY_CLIENTS if settings.pooled is None else settings.pooled
    own_drift = settings.drift and not task.retained and server.round == config.federation.rounds
    return wanted and has_one_model(prepared.method) and not config.data.own and not own_drift


def has_one_model(method: Method) -> bool:
    """Whether the model of a client depends on its job alone."""
    declared = method.declare()
    return not declared.keeps_weights and not declared.client_state


def contents(assignment: Assignment) -> Hashable:
    """What an assignment sends: the same for two clients that get the same job."""
    extra = tuple((name, tensor.dtype, tuple(tensor.shape), stored_bytes(tensor)) for name, tensor in assignment.extra.items())
    patch = None if assignment.patch is None else tuple(map(id, assignment.patch.tensors.values()))
    return tuple(assignment.experts.items()), assignment.names, patch, extra


def stored_bytes(tensor: Tensor) -> bytes:
    return bytes(cast("Any", tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
