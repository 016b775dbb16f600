"""A pool of processes that execute tasks in parallel."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar, cast

from fedexperts.io.processes import ProcessDied, Receive, WorkerProcess

Task = TypeVar("Task")
Done = TypeVar("Done")


class Died(str):
    """How a process died before its task was finished."""


def in_parallel(work: Callable[[Task], Done], tasks: Sequence[Task], number: int) -> Iterator[tuple[Task, Done | Died]]:
    """Yields (task, result of `work`) as tasks finish, executed by `number` processes; Died if the process of a task died.

    `work` is an importable function, or a partial of one; tasks and results are pickled. If the caller stops, the processes are
    interrupted and joined; if it is killed, they exit too.
    """
    waiting = list(reversed(tasks))
    workers: list[WorkerProcess] = []
    try:
        workers += [WorkerProcess(partial(call, work), daemon=False) for _ in range(min(number, len(tasks)))]
        busy: dict[Connection, tuple[WorkerProcess, Task]] = {}
        while waiting or busy:
            for worker in [worker for worker in workers if worker.pipe not in busy][: len(waiting)]:
                task = waiting.pop()
                worker.send(bytes(ForkingPickler.dumps(task)))
                busy[worker.pipe] = (worker, task)
            for pipe in wait(list(busy)):
                worker, task = busy.pop(cast("Connection", pipe))  # `wait` is typed more widely than its arguments
                yield task, result_of(worker)
    finally:
        for worker in workers:
            worker.stop()


def call(work: Callable[[Any], Any], receive: Receive) -> bytes:
    return bytes(ForkingPickler.dumps(work(ForkingPickler.loads(receive()))))


def result_of(worker: WorkerProcess) -> Any:
    try:
        return ForkingPickler.loads(worker.receive())
    except ProcessDied as death:
        return Died(f"its process died ({death})")
