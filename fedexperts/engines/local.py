"""Clients on this machine: one after the other in this process, or side by side in worker processes."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import islice
from math import inf
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Protocol, Self, cast

import torch
from torch import Tensor, nn

from fedexperts.core.devices import Profile
from fedexperts.engines.client_store import ClientStateStore
from fedexperts.engines.serialization import pack_answer, pack_job, unpack_answer, unpack_job
from fedexperts.errors import BadMessage, Undeclared
from fedexperts.io.processes import ProcessDied, Receive, WorkerProcess
from fedexperts.methods.contract import Method, require_declared
from fedexperts.types import Client, ClientContext, Encoder, Failure, Job, Split, Tensors, Training, Update


class ClientTask(Protocol):
    """What every client of a run does with a job (experiment.client_task)."""

    @property
    def method(self) -> Method: ...

    def scheduled(self, job: Job, context: ClientContext) -> ClientContext:
        """`context` with what changes from round to round, such as the learning rate."""
        ...

    def scored(self, job: Job, update: Update, context: ClientContext) -> Update:
        """`update` with the scores of what it would send, where the run asks for them."""
        ...

    def evaluate(self, job: Job, context: ClientContext) -> Update: ...


@dataclass(frozen=True)
class ClientRuntime:
    """All that the clients of one process share: the base model, their data, and what they do with a job."""

    model: nn.Module
    encoder: Encoder
    training: Training
    clients: Mapping[str, Client]
    data: Mapping[str, Split]
    task: ClientTask
    client_store: ClientStateStore
    profiles: Mapping[str, Profile] = field(default_factory=dict)  # client → its device, where the run has a clock
    limits: Mapping[str, int] = field(default_factory=dict)  # client → bytes of memory; a job that takes more fails

    def answer(self, job: Job) -> Update | Failure:
        """The client's update and the seconds it took. Whatever goes wrong on a client is its failure, with the reason.

        Raises:
            Undeclared: the method sends, reports or keeps what it does not declare: its code is at fault, and no client.
        """
        started, client_state = perf_counter(), {}
        try:
            client_state = self.client_store.load(job)
            context = self.context(job.client, client_state)
            with own_chance(job.seed):
                if job.task == "evaluate":
                    update = self.task.evaluate(job, context)
                else:
                    update = self.task.method.train(job, self.task.scheduled(job, context))
                    require_declared(self.task.method, job, update, client_state)
                    update = self.task.scored(job, update, context)
            self.require_possible(job, update, client_state)
            if client_state and job.task != "evaluate":
                self.client_store.save(job, client_state)
        except Undeclared:
            raise
        except Exception as error:  # a client's device may fail in any way, and the round goes on without it
            reason = " ".join(str(error).split())
            named = reason if isinstance(error, Impossible) else f"{type(error).__name__}: {reason}"
            return Failure(job.client, job.round, job.task, named)
        return replace(update, cost=replace(update.cost, seconds=perf_counter() - started))

    def context(self, client: str, client_state: MutableMapping[str, Tensor]) -> ClientContext:
        """What `client` works with."""
        return ClientContext(self.clients[client], self.model, self.data[client], self.encoder, self.training, client_state)

    def require_possible(self, job: Job, update: Update, client_state: Tensors) -> None:
        """Raises Impossible for work that the client's device could not have done, or whose state cannot be gone on from."""
        if broken := next((name for name, t in client_state.items() if not bool(torch.isfinite(t).all())), None):
            raise Impossible(f"what it keeps to itself holds NaN or infinity in {broken}")
        if job.task != "evaluate" and update.cost.peak_bytes > self.limits.get(job.client, inf):
            needed, has = update.cost.peak_bytes / 1e6, self.limits[job.client] / 1e6
            raise Impossible(f"out of memory: it needs {needed:,.1f} MB and has {has:,.1f} MB")


class Impossible(Exception):
    """Why a client's work does not count, as a sentence."""


class LocalEngine:
    """`workers` processes of `training.threads` threads each; with one worker, this process.

    The base model lies in shared memory, so workers do not multiply it. A worker that dies is its client's failure, and
    another takes its place.

    Raises:
        Undeclared: from `run`, where the method's code keeps, sends or reports what it does not declare.
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


UNDECLARED = b"undeclared "
"""The beginning of a worker's answer when not the client but the method's code is at fault, which ends the run."""


def answer_packed(runtime: ClientRuntime, receive: Receive) -> bytes:
    """What a worker process does: the packed answer to the packed job that it receives."""
    torch.set_num_threads(runtime.training.threads)
    job = unpack_job(receive())
    try:
        return pack_answer(runtime.answer(job))
    except Undeclared as error:
        return UNDECLARED + str(error).encode()


def answer_of(worker: WorkerProcess, job: Job) -> Update | Failure:
    """The answer of `worker` to `job`, which it was sent; a failure where it died of it, or where its answer cannot be read.

    Raises:
        Undeclared: the method sends, reports or keeps what it does not declare.
    """
    try:
        data = worker.receive()
        if data.startswith(UNDECLARED):
            raise Undeclared(data.removeprefix(UNDECLARED).decode())
        return unpack_answer(data)
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
