"""Work that is done in several processes at once, each doing one thing after the other."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any, Generic, TypeVar, cast

from fedexperts.engines.local import death

Task = TypeVar("Task")
Done = TypeVar("Done")


class Died(str):
    """How a process ended before its task."""


def side_by_side(work: Callable[[Task], Done], tasks: Sequence[Task], number: int) -> Iterator[tuple[Task, Done | Died]]:
    """What `work` makes of each of the `tasks`, as it comes, from `number` processes; of one whose process died, that.

    `work` is a function that can be imported, or a partial of one. When the caller stops, the processes are told to and are
    waited for; when it is killed, they end too.
    """
    waiting = list(reversed(tasks))
    lanes: list[WorkerProcess[Task, Done]] = []
    try:
        lanes += [WorkerProcess(work) for _ in range(min(number, len(tasks)))]
        busy: dict[Connection, tuple[WorkerProcess[Task, Done], Task]] = {}
        while waiting or busy:
            for lane in [lane for lane in lanes if lane.pipe not in busy][: len(waiting)]:
                task = waiting.pop()
                lane.send(task)
                busy[lane.pipe] = (lane, task)
            for pipe in wait(list(busy)):
                lane, task = busy.pop(cast("Connection", pipe))  # wait returns what it was given
                yield task, lane.receive()
    finally:
        for lane in lanes:
            lane.stop()


class WorkerProcess(Generic[Task, Done]):
    """A process that does one task at a time; unlike a pool's, it may start processes of its own."""

    def __init__(self, work: Callable[[Task], Done]) -> None:
        self.work = work
        self.start()

    def start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(self.work, theirs))
        self.process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def send(self, task: Task) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it died idle: receive will say so
            self.pipe.send(task)

    def receive(self) -> Done | Died:
        """Where the process died, another takes its place."""
        try:
            return cast("Done", self.pipe.recv())
        except (EOFError, OSError):
            self.process.join()
            died = Died(f"its process died ({death(self.process.exitcode)})")
            self.pipe.close()
            self.start()
            return died

    def stop(self) -> None:
        self.process.terminate()
        self.pipe.close()
        self.process.join()


def serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """A process's life: it ends with the pipe, or when it is told to, as if interrupted, so that what it holds is given back."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    Thread(target=end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            pipe.send(work(pipe.recv()))


def end_with_parent() -> None:
    """Tells this process to stop once its parent is dead."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
