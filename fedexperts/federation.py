"""The federated round: client sampling, jobs, answers, aggregation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Protocol

import torch

from fedexperts.core.ledger import Ledger
from fedexperts.engines.base import Report, Reports, expectation, reorder_and_validate
from fedexperts.errors import BadRun
from fedexperts.methods.base import patch_for
from fedexperts.methods.contract import Method
from fedexperts.types import Assignment, Client, Engine, Job, Server, Tensors, Update, job_key


def no_reports(job: Job) -> Mapping[str, Report]:
    """No metrics besides those of the method."""
    return {}


class Guard(Protocol):
    """Sees the updates of a round, and decides whether the round stays."""

    def seen(self, server: Server, updates: Iterable[Update]) -> Iterable[Update]: ...

    def accepts(self, before: Server, after: Server) -> bool: ...


def federate(
    server: Server,
    method: Method,
    engine: Engine,
    ledger: Ledger,
    *,
    rounds: int,
    clients_per_round: int,
    by_task: bool = False,
    reports: Reports = no_reports,
    guard: Guard | None = None,
) -> Iterator[Server]:
    """Yields the server after each setup task and each round; continues after the last completed step of `server`.

    Setup tasks are round 0 and go to every client once; in a round, `clients_per_round` clients are sampled. `reports`: the
    metrics that the run requests in addition to the method's. `guard`: decides whether a round stays.

    Raises:
        BadRun: the merged weights are not finite, and there is no guard.
    """
    for round, task in steps(method, rounds)[done(server, method, rounds) :]:
        server = replace(server, round=round, task=task)
        clients = list(server.clients.values())
        chosen = choose(clients, clients_per_round, Random(f"{server.seed}/{round}"), by_task) if round else clients
        updates = answers(server, method, engine, ledger, chosen, reports)
        watched = guard if round else None
        merged = method.merge(server, updates if watched is None else watched.seen(server, updates))
        if not ledger.lost:  # a round without usable answers leaves the server unchanged
            after = replace(merged, accepted={**server.accepted, **accepted(ledger)})
            if watched is None:
                require_finite(server.weights, after)
            server = after if watched is None or watched.accepts(server, after) else server
        yield server


def answers(
    server: Server,
    method: Method,
    engine: Engine,
    ledger: Ledger,
    clients: Iterable[Client],
    reports: Reports = no_reports,
    also: Mapping[str, tuple[str, ...]] = {},
) -> Iterator[Update]:
    """Sends the jobs of `server.task` for `clients` to `engine` and yields the valid updates, in the order of the jobs.

    also: client → other clients that its evaluation scores with the same model.
    """
    expect = partial(expectation, server, method, reports, known_norms={})
    jobs = (replace(job, also=also.get(job.client, ())) for job in jobs_for(server, method, clients))
    return reorder_and_validate(engine.run, jobs, expect, ledger)


def accepted(ledger: Ledger) -> dict[str, str]:
    """Client → the key of its job in the current round, for clients whose answers were merged."""
    return {entry.client: job_key(entry.round, entry.task) for entry in ledger.entries if not entry.failed}


def require_finite(before: Tensors, merged: Server) -> None:
    """Raises BadRun if a merged weight that changed is not finite."""
    for name, tensor in merged.weights.items():
        if tensor is not before.get(name) and not bool(torch.isfinite(tensor).all()):
            raise BadRun(
                f"round {merged.round}: the merged weights hold NaN or infinity in {name}; the round before is saved: lower the "
                "learning rate (training.lr or that of federation.server_optimizer), and go on from it with another --out"
            )


def steps(method: Method, rounds: int) -> list[tuple[int, str]]:
    """(round, task) of all steps of a run, in order."""
    return [(0, task) for task in method.setup_tasks] + [(round, "train") for round in range(1, rounds + 1)]


def done(server: Server, method: Method, rounds: int) -> int:
    """Number of completed `steps`."""
    return 0 if server.task == "start" else steps(method, rounds).index((server.round, server.task)) + 1


def choose(clients: Sequence[Client], number: int, rng: Random, by_task: bool) -> list[Client]:
    """`number` random clients; `by_task`: of different tasks as far as possible (FedMoE's Enforced sampling)."""
    if not by_task:
        return rng.sample(clients, min(number, len(clients)))
    shuffled = rng.sample(clients, len(clients))
    turn = {id(client): sum(other.task == client.task for other in shuffled[:i]) for i, client in enumerate(shuffled)}
    return sorted(shuffled, key=lambda client: turn[id(client)])[:number]


def jobs_for(server: Server, method: Method, clients: Iterable[Client]) -> Iterator[Job]:
    """Generates, lazily, the jobs of `server.task` for those of the `clients` that take part in it."""
    for client in clients:
        assignment = method.assign(server, client)
        if assignment is not None:
            yield job_for(server, client, assignment)


def job_for(server: Server, client: Client, assignment: Assignment) -> Job:
    """The job of `assignment`: with its own patch, or the server's weights that it names."""
    patch = patch_for(server, assignment) if assignment.patch is None else assignment.patch
    return Job(
        client=client.name,
        round=server.round,
        task=server.task,
        seed=f"{server.seed}/{server.round}/{server.task}/{client.name}",
        experts=assignment.experts,
        patch=replace(patch, wire_dtype=server.wire_dtype),
        extra=assignment.extra,
        accepted=server.accepted.get(client.name, ""),
    )
