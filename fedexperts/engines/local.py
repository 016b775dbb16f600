"""Clients on this machine: one after the other in this process, or side by side in worker processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import islice
from math import inf
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Self, cast

import torch
from torch import nn

from fedexperts.core.ledger import Clock, answered, asked, not_finite
from fedexperts.engines.base import validate_update
from fedexperts.engines.client_store import ClientStateStore
from fedexperts.engines.serialization import pack_answer, pack_job, unpack_answer, unpack_job
from fedexperts.errors import BadMessage
from fedexperts.io.processes import ProcessDied, Receive, WorkerProcess
from fedexperts.types import Client, ClientContext, Encoder, Failure, Job, Split, Training, Update

JobHandler = Callable[[Job, ClientContext], Update]


@dataclass(frozen=True)
class ClientRuntime:
    """All that the clients of one process share: the base model, their data, and what they do with a job."""

    model: nn.Module
    encoder: Encoder
    training: Training
    clients: Mapping[str, Client]
    data: Mapping[str, Split]
    work: JobHandler
    client_store: ClientStateStore
    clock: Clock = Clock()
    limits: Mapping[str, int] = field(default_factory=dict)  # client → bytes of memory; a job that takes more fails

    def answer(self, job: Job) -> Update | Failure:
        """The client's update and the seconds it took. Whatever goes wrong on a client is its failure, with the reason."""
        started = perf_counter()
        try:
            kept = self.client_store.load(job)
            context = ClientContext(
                self.clients[job.client], self.model, self.data[job.client], self.encoder, self.training, kept
            )
            with own_chance(job.seed):
                update = self.work(job, context)
            answer = validate_update(job, update)
            if isinstance(answer, Failure):
                return answer
            if broken := not_finite(kept):
                return Failure(job.client, job.round, job.task, f"what it keeps to itself holds NaN or infinity in {broken}")
            if job.task != "evaluate" and update.cost.peak_bytes > self.limits.get(job.client, inf):
                needed, has = update.cost.peak_bytes / 1e6, self.limits[job.client] / 1e6
                reason = f"out of memory: it needs {needed:,.1f} MB and has {has:,.1f} MB"
                return Failure(job.client, job.round, job.task, reason)
            usable = not answered(asked(job), update, self.clock).failed
            if kept and job.task != "evaluate" and usable:  # or server and client would remember different rounds
                self.client_store.save(job, kept)
        except Exception as error:  # a client's device may fail in any way, and the round goes on without it
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Failure(job.client, job.round, job.task, reason)
        return replace(update, cost=replace(update.cost, seconds=perf_counter() - started))


class LocalEngine:
    """`workers` processes of `training.threads` threads each; with one worker, this process.

    The base model lies in shared memory, so workers do not multiply it. A worker that dies is its client's failure, and
    another takes its place.
    """

    def __init__(self, runtime: ClientRuntime, workers: int = 1) -> None:
        self.runtime = runtime
        self.workers: list[WorkerProcess] = []
        if workers > 1:
            runtime.model.share_memory()
            self.workers = [WorkerProcess(partial(answer_packed, runtime), daemon=True) for _ in range(workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.stop()

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        return self.side_by_side(jobs) if self.workers else map(self.runtime.answer, jobs)

    def side_by_side(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        """Answers as they come; before one is handed on, whoever gave it has its next job.

        A job starts only while fewer than two for each worker wait for an older one to end, so no more updates than that
        wait for their turn.
        """
        numbered = enumerate(jobs)
        busy: dict[Connection, tuple[int, Job, WorkerProcess]] = {}
        answers: list[Update | Failure] = []
        started = 0
        while True:
            for worker in [worker for worker in self.workers if worker.pipe not in busy]:
                oldest = min((number for number, _, _ in busy.values()), default=started)
                if started - oldest >= 2 * len(self.workers):
                    break
                for number, job in islice(numbered, 1):
                    worker.send(pack_job(job))
                    busy[worker.pipe] = (number, job, worker)
                    started = number + 1
            yield from answers
            if not busy:
                return
            done = [busy.pop(cast("Connection", pipe)) for pipe in wait(list(busy))]  # wait returns what it was given
            answers = [answer_of(worker, job) for _, job, worker in done]


def answer_packed(runtime: ClientRuntime, receive: Receive) -> bytes:
    """What a worker process does: the packed answer to the packed job that it receives."""
    torch.set_num_threads(runtime.training.threads)
    return pack_answer(runtime.answer(unpack_job(receive())))


def answer_of(worker: WorkerProcess, job: Job) -> Update | Failure:
    """The answer of `worker` to `job`, which it was sent; a failure where it died of it, or where its answer cannot be read."""
    try:
        return unpack_answer(worker.receive())
    except ProcessDied as death:
        return Failure(job.client, job.round, job.task, f"its worker process died ({death})")
    except BadMessage as error:
        return Failure(job.client, job.round, job.task, str(error))


@contextmanager
def own_chance(seed: str) -> Iterator[None]:
    """Torch's global generator seeded for one job and put back: dropout and PhiMoE's router draw from it."""
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(sha256(seed.encode()).digest()[:8], "big"))
        yield
