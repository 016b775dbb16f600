"""The round, written once: who takes part, what goes out, what comes back, what becomes of it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from random import Random

from fedexperts.core.ledger import Ledger
from fedexperts.engines.base import reorder_and_validate
from fedexperts.methods.base import patch_for
from fedexperts.types import Assignment, Client, Engine, Job, Method, Server


def federate(
    server: Server, method: Method, engine: Engine, ledger: Ledger, *, rounds: int, clients_per_round: int, by_task: bool = False
) -> Iterator[Server]:
    """The server after each stage and round; picks up after the round that `server` has behind it.

    Stages (`method.setup_tasks`) are round 0 and ask every client once; a round asks `clients_per_round` of them.
    """
    for round, task in steps(method, rounds)[done(server, method, rounds) :]:
        server = replace(server, round=round, task=task)
        clients = list(server.clients.values())
        chosen = choose(clients, clients_per_round, Random(f"{server.seed}/{round}"), by_task) if round else clients
        jobs = jobs_for(server, method, chosen)
        updates = reorder_and_validate(engine.run, ledger.sent(jobs))
        merged = method.merge(server, ledger.received(updates))
        if not ledger.lost:  # a round of which nothing can be used changes nothing
            server = merged
        yield server


def steps(method: Method, rounds: int) -> list[tuple[int, str]]:
    """(round, task) of all that a run does, in order."""
    return [(0, task) for task in method.setup_tasks] + [(round, "train") for round in range(1, rounds + 1)]


def done(server: Server, method: Method, rounds: int) -> int:
    """How many of the `steps` the server has behind it."""
    return 0 if server.task == "start" else steps(method, rounds).index((server.round, server.task)) + 1


def choose(clients: Sequence[Client], number: int, rng: Random, by_task: bool) -> list[Client]:
    """`number` of the clients at random; `by_task`: of different tasks as long as there are any (FedMoE's Enforced)."""
    if not by_task:
        return rng.sample(clients, min(number, len(clients)))
    shuffled = rng.sample(clients, len(clients))
    turn = {id(client): sum(other.task == client.task for other in shuffled[:i]) for i, client in enumerate(shuffled)}
    return sorted(shuffled, key=lambda client: turn[id(client)])[:number]


def jobs_for(server: Server, method: Method, clients: Iterable[Client]) -> Iterator[Job]:
    """The jobs of `server.task` for those of the `clients` that have a part in it, made as they are asked for."""
    for client in clients:
        assignment = method.assign(server, client)
        if assignment is not None:
            yield job_for(server, client, assignment)


def job_for(server: Server, client: Client, assignment: Assignment) -> Job:
    """`assignment` with the weights that it names, or brings."""
    return Job(
        client=client.name,
        round=server.round,
        task=server.task,
        seed=f"{server.seed}/{server.round}/{server.task}/{client.name}",
        experts=assignment.experts,
        patch=patch_for(server, assignment) if assignment.patch is None else assignment.patch,
        extra=assignment.extra,
    )
