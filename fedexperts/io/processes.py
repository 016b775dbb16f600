"""Worker processes: spoken to in bytes over a pipe, replaced when they die, ended with their parent. Needs no torch.

They are forked from a process that does nothing but import the library, so that only one of them takes the time for it, a worker
that takes the place of a dead one starts at once, and all share the memory of its code. Where the folder for temporary files has
too long a path for a socket, each imports by itself.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from tempfile import gettempdir
from threading import Lock, Thread, Timer, current_thread
from time import sleep
from typing import Any

STOP_SECONDS = 30.0
"""Time for a worker process to end by itself before it is killed."""
START_SECONDS = 120.0
"""Time that a new process has to start, on top of that for its first message."""
WATCH_SECONDS = 0.5
"""Between two looks at whether the parent still lives, or whether an answer that has come has been read."""

PRELOADED = "fedexperts.engines.local"
"""What the process imports that workers are forked from, beside peft, where this one has it: only adapters need it."""
LONGEST_FOLDER = 70
"""Bytes of the path of the folder for temporary files in which that process can have its socket, whose path has at most 107."""

Receive = Callable[[], bytes]
Handler = Callable[[Receive], bytes]
"""Receives one message and returns the answer: so the message need not stay in memory while it is answered."""


class ProcessDied(Exception):
    """A worker process ended before it answered; the message is the signal or the exit code it ended with."""


class TookTooLong(ProcessDied):
    """A worker process was killed because it had not answered by its deadline."""


class WorkerProcess:
    """A process that answers one message at a time by `handle`, which must be picklable.

    One that dies is replaced, and so is one that has not begun to answer by its deadline: it is killed, even if it is stopped.
    daemon: the process may start none of its own, and ends with the interpreter of this one.
    seconds: for each message, from when it is sent; a process that has just started has START_SECONDS more. None: no deadline.
    """

    def __init__(self, handle: Handler, *, daemon: bool, seconds: float | None = None) -> None:
        self.handle, self.daemon, self.seconds = handle, daemon, seconds
        self.lock = Lock()
        self.timer: Timer | None = None
        self.sender: Thread | None = None
        self.start()

    def start(self) -> None:
        self.is_new, self.is_late = True, False
        fits = len(os.fsencode(gettempdir())) <= LONGEST_FOLDER
        context: Any = get_context("forkserver" if fits else "spawn")
        context.set_forkserver_preload([PRELOADED, *({"peft"} & sys.modules.keys())])
        self.pipe: Connection
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=serve, args=(self.handle, child_pipe), daemon=self.daemon)
        with interrupts_held():
            self.process.start()
        child_pipe.close()  # so that the end of the process ends the pipe

    def send(self, message: bytes) -> None:
        if self.seconds is None:
            self.write(message)
        else:
            self.set_timer(self.seconds + START_SECONDS * self.is_new)
            self.is_new = False
            # A stopped process reads nothing, and no other worker may wait for that
            self.sender = Thread(target=self.write, args=(message,), name="send to worker", daemon=True)
            self.sender.start()

    def write(self, message: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it died idle: receive will say so
            self.pipe.send_bytes(message)

    def set_timer(self, seconds: float) -> None:
        self.timer = Timer(seconds, self.expire)
        self.timer.daemon = True
        self.timer.start()

    def expire(self) -> None:
        """Kills the process, unless its answer has begun to come in time, and waits to be read. Runs in the thread of a timer."""
        with self.lock:
            if current_thread() is not self.timer:  # it was cancelled at the last moment
                return
            if self.pipe.poll():
                self.set_timer(WATCH_SECONDS)
            else:
                self.is_late = True
                self.process.kill()

    def cancel_timer(self) -> None:
        with self.lock:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = None

    def receive(self) -> bytes:
        """The answer to the message that was sent last.

        Raises:
            TookTooLong: the process was killed at its deadline; a new one has taken its place.
            ProcessDied: the process ended before its answer; likewise.
        """
        try:
            return self.pipe.recv_bytes()
        except (EOFError, OSError):  # it died before its answer, or in the middle of it
            self.process.join()
            kind = TookTooLong if self.is_late else ProcessDied
            death = kind(exit_reason(self.process.exitcode))
            self.cancel_timer()
            if self.sender is not None:
                self.sender.join()  # nobody reads at the other end any more
            self.pipe.close()
            self.start()
            raise death from None
        finally:
            self.cancel_timer()

    def stop(self) -> None:
        """Interrupts the process and waits for it; after STOP_SECONDS it is killed."""
        self.cancel_timer()
        self.process.terminate()
        self.pipe.close()
        self.process.join(STOP_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Holds SIGINT back until the end of the block, and from processes that are started in it for good.

    Ctrl-C reaches all processes of a terminal. A worker that is still importing would end with a traceback; it leaves Ctrl-C to
    its parent.
    """
    resource_tracker.ensure_running()  # which else the first process would start, and which lets SIGINT through afterwards
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def serve(handle: Handler, pipe: Connection) -> None:
    """The main function of a worker process. SIGTERM and the end of its parent interrupt it, as Ctrl-C would."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = parent_process()
    assert parent is not None  # it is not the process that this one was forked from
    on_end(parent.join, grace_seconds=STOP_SECONDS)
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            pipe.send_bytes(handle(pipe.recv_bytes))


def end_with(parent: int) -> None:
    """Ends this process soon after the process `parent`, which started it, however that ends."""

    def wait() -> None:
        while os.getppid() == parent:
            sleep(WATCH_SECONDS)

    on_end(wait)


def on_end(wait: Callable[[], object], *, grace_seconds: float = 0.0) -> None:
    """Ends this process after `wait`, which returns at the end of its parent.

    grace_seconds: time between SIGTERM and the end; with 0 it ends at once, without SIGTERM.
    """

    def watch() -> None:
        wait()
        if grace_seconds:
            os.kill(os.getpid(), signal.SIGTERM)
            sleep(grace_seconds)
        os._exit(1)

    Thread(target=watch, name="end with parent", daemon=True).start()


def exit_reason(exitcode: int | None) -> str:
    """The name of the signal that ended a process, or its exit code."""
    return signal.Signals(-exitcode).name if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
