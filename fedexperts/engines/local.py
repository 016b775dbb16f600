"""Clients on this machine: sequentially in this process, or in parallel in worker processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from itertools import cycle, islice
from math import inf
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Protocol, Self, cast

import torch
from torch import Tensor, nn

from fedexperts.core.devices import Profile
from fedexperts.engines.client_store import ClientStateStore
from fedexperts.engines.serialization import pack_answer, pack_job, unpack_answer, unpack_job
from fedexperts.engines.wire import decode, encode
from fedexperts.errors import BadMessage, BadValue, Damaged, Undeclared
from fedexperts.io.allocator import return_freed
from fedexperts.io.processes import ProcessDied, Receive, TookTooLong, WorkerProcess
from fedexperts.methods.contract import Method, require_declared
from fedexperts.moe.anatomy import Experts
from fedexperts.moe.device import kept_generators, on_device, out_of_memory, release, working_on
from fedexperts.types import Client, ClientContext, Encoder, Failure, Job, Split, Tensors, Training, Update

CPU = torch.device("cpu")


class ClientTask(Protocol):
    """How the clients of a run execute a job (experiment.client_task)."""

    @property
    def method(self) -> Method: ...

    def scheduled(self, job: Job, context: ClientContext) -> ClientContext:
        """`context` with the settings of the job's round, such as the learning rate."""
        ...

    def scored(self, job: Job, update: Update, context: ClientContext) -> Update:
        """`update` with scores of the weights that it sends, if the run requests them."""
        ...

    def evaluate(self, job: Job, context: ClientContext, others: Mapping[str, Split]) -> Update: ...


@dataclass(frozen=True)
class ClientRuntime:
    """What the clients of one process share: the base model, all clients' data, the method and the client state store.

    device: that the process computes on. The model is copied there for the first job, if it is on another.
    reader: gives the model with the experts of a job, if `model` has shapes alone.
    """

    model: nn.Module
    encoder: Encoder
    training: Training
    clients: Mapping[str, Client]
    data: Mapping[str, Split]
    task: ClientTask
    client_store: ClientStateStore
    profiles: Mapping[str, Profile] = field(default_factory=dict)  # client → its device, if the run has a clock
    limits: Mapping[str, int] = field(default_factory=dict)  # client → bytes of memory; a job with a higher peak fails
    device: str = "cpu"
    reader: Callable[[Experts], nn.Module] | None = None

    @cached_property
    def base(self) -> nn.Module:
        """`model` on `device`."""
        return on_device(self.model, self.device)

    def answer(self, job: Job) -> Update | Failure:
        """Executes `job`: the client's update with its wall-clock seconds, or a failure with the reason of any exception.

        Raises:
            Undeclared: the method sends, reports or keeps something that it does not declare, which is an error of its code.
        """
        return_freed()  # of the last job, and of a merge
        started, client_state, device = perf_counter(), {}, torch.device(self.device)
        try:
            job = replace(job, patch=decode(job.patch, job.patch.wire_dtype))
            client_state = self.client_store.load(job, set_aside=True)
            context = self.context(job, client_state)
            with seeded_torch(job.seed, device), working_on(device):
                if job.task == "evaluate":
                    update = self.task.evaluate(job, context, {name: self.data[name] for name in job.also})
                else:
                    update = self.task.method.train(job, self.task.scheduled(job, context))
                    require_declared(self.task.method, job, update, client_state)
                    update = self.task.scored(job, update, context)
            self.require_possible(job, update, client_state)
            update = replace(update, patch=encode(update.patch, job.patch.wire_dtype, start=job.patch))
            if client_state and job.task != "evaluate":
                self.client_store.save(job, client_state)
        except Undeclared:
            raise
        except Exception as error:  # a client may fail in any way, and the round continues without it
            failure = Failure(job.client, job.round, job.task, reason_of(error, device))
        else:
            return replace(update, cost=replace(update.cost, seconds=perf_counter() - started))
        release(device)  # here, where the error and all that it refers to is gone
        return failure

    def context(self, job: Job, client_state: MutableMapping[str, Tensor]) -> ClientContext:
        """The context of the client of `job`."""
        base = self.base if self.reader is None else on_device(self.reader(job.experts), self.device)
        client = job.client
        return ClientContext(self.clients[client], base, self.data[client], self.encoder, self.training, client_state)

    def require_possible(self, job: Job, update: Update, client_state: Tensors) -> None:
        """Raises Impossible if the job exceeded the client's memory, or if its new client state is not finite."""
        if broken := next((name for name, t in client_state.items() if not bool(torch.isfinite(t).all())), None):
            raise Impossible(f"what it keeps to itself holds NaN or infinity in {broken}")
        if job.task != "evaluate" and update.cost.peak_bytes > self.limits.get(job.client, inf):
            needed, has = update.cost.peak_bytes / 1e6, self.limits[job.client] / 1e6
            raise Impossible(f"out of memory: it needs {needed:,.1f} MB and has {has:,.1f} MB")


class Impossible(Exception):
    """Why the result of a client's job is discarded, as a sentence."""


def reason_of(error: Exception, device: torch.device) -> str:
    """Why a job on `device` failed."""
    said = " ".join(str(error).split())
    if isinstance(error, Impossible | Damaged):
        return said
    return out_of_memory(error, device) or f"{type(error).__name__}: {said}"


class LocalEngine:
    """`workers` processes of `training.threads` threads each, on `devices` in turn; with one worker, this process.

    The base model is in shared memory, and once on each graphics card, so that workers do not copy it. (On mps, where processes
    cannot share it, each has a copy.) If a worker dies, the job of its client fails, and the worker is replaced.

    seconds: after which a job without an answer fails, and its worker, which may hang or be stopped, is killed and replaced.
    With it, one worker too is a process of its own. None: no limit.

    Raises:
        Undeclared: from `run`, if the method keeps, sends or reports something that it does not declare.
    """

    def __init__(
        self, runtime: ClientRuntime, workers: int = 1, devices: Sequence[str] = (), seconds: float | None = None
    ) -> None:
        chosen = [*islice(cycle(devices or [runtime.device]), workers)]
        place = placed if workers == 1 and seconds is None else shared
        self.runtimes = {device: place(runtime, device) for device in dict.fromkeys(chosen)}
        self.runtime = self.runtimes[chosen[0]]
        self.workers: list[WorkerProcess] = []
        if place is shared:
            self.workers = [
                WorkerProcess(partial(answer_packed, self.runtimes[each]), daemon=True, seconds=seconds) for each in chosen
            ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.stop()

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        return self.in_parallel(jobs) if self.workers else map(self.runtime.answer, jobs)

    def in_parallel(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        """Yields answers as they arrive; a worker gets its next job before its answer is yielded.

        A job starts only if it is fewer than 2 · workers jobs ahead of the oldest unfinished one, which bounds the number of
        updates that the caller must reorder.
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
            done = [
                busy.pop(cast("Connection", pipe)) for pipe in wait(list(busy))
            ]  # `wait` is typed more widely than its arguments
            answers = [answer_of(worker, job) for _, job, worker in done]


def placed(runtime: ClientRuntime, device: str) -> ClientRuntime:
    """`runtime` on `device`, with the base model there alone.

    Raises:
        BadValue: it does not fit there.
    """
    try:
        return replace(runtime, device=device, model=on_device(runtime.model, device))
    except torch.OutOfMemoryError:
        raise BadValue(
            f"the base model does not fit the memory of {device}; choose another training.device, or a smaller model"
        ) from None


def shared(runtime: ClientRuntime, device: str) -> ClientRuntime:
    """`runtime` for worker processes on `device`, which get its base model as torch hands it over: in memory that they share.

    A model on a card stays there as long as this process has it.
    """
    if torch.device(device).type == "cuda":
        return placed(runtime, device)
    runtime.model.share_memory()
    return replace(runtime, device=device)


UNDECLARED = b"undeclared "
"""Prefix of a worker's answer that reports an Undeclared error, which ends the run."""


def answer_packed(runtime: ClientRuntime, receive: Receive) -> bytes:
    """Executes one job in a worker process: receives it packed and returns its packed answer."""
    torch.set_num_threads(runtime.training.threads)
    job = unpack_job(receive())
    try:
        return pack_answer(runtime.answer(job))
    except Undeclared as error:
        return UNDECLARED + str(error).encode()


def answer_of(worker: WorkerProcess, job: Job) -> Update | Failure:
    """The answer of `worker` to `job`; a failure if the worker died or its answer cannot be decoded.

    Raises:
        Undeclared: the method sends, reports or keeps something that it does not declare.
    """
    try:
        data = worker.receive()
        if data.startswith(UNDECLARED):
            raise Undeclared(data.removeprefix(UNDECLARED).decode())
        return unpack_answer(data)
    except TookTooLong:
        late = f"it did not answer within federation.round_seconds = {worker.seconds:g}, and its worker process was killed"
        return Failure(job.client, job.round, job.task, late)
    except ProcessDied as death:
        return Failure(job.client, job.round, job.task, f"its worker process died ({death})")
    except BadMessage as error:
        return Failure(job.client, job.round, job.task, str(error))


@contextmanager
def seeded_torch(seed: str, device: torch.device = CPU) -> Iterator[None]:
    """Seeds torch's global generators for one job and restores them: dropout and PhiMoE's router draw from that of `device`."""
    with kept_generators(device):
        torch.manual_seed(int.from_bytes(sha256(seed.encode()).digest()[:8], "big"))
        yield
