"""Processes of a deployment on this machine, for tests: starts them, lists them, kills them, and leaves none at the end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedexperts.deploy.processes import PARENT_VARIABLE

ENDING_WITH_US = """
from fedexperts.cli import main
from fedexperts.deploy.processes import end_with_parent
end_with_parent()
main()
"""
PATIENCE = 240  # seconds; whatever does not happen by then does not happen


class Processes:
    """Commands of `fedexperts`, each in a session of its own, with its output in `folder`/NAME.log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: object, code: str = ENDING_WITH_US, more: Mapping[str, str] | None = None) -> None:
        """Starts the command `name`; more: of its environment."""
        command = [sys.executable, "-c", code, *map(str, arguments)]
        with (self.folder / f"{name}.log").open("ab") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", PARENT_VARIABLE: str(os.getpid()), **(more or {})}
            self.running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running[name].wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    """Ends, whatever happens, all of them and what they have started, which is known by FLWR_HOME: it lies below `folder`."""
    started = Processes(folder)
    try:
        yield started
    finally:
        started.end()
        while left := [pid for pid in below(folder) if not gone(pid)]:
            for pid in left:
                send_signal(pid)
            time.sleep(0.05)


def below(folder: Path) -> list[int]:
    """All processes of a deployment whose FLWR_HOME is below `folder`."""
    home = f"FLWR_HOME={folder}/".encode()
    return [
        pid for pid in pids() if pid != os.getpid() and any(each.startswith(home) for each in read(pid, "environ").split(b"\0"))
    ]


def running(folder: Path, word: str) -> list[int]:
    """Those below `folder` with `word` in their command."""
    return [pid for pid in below(folder) if word.encode() in read(pid, "cmdline")]


def pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def read(pid: int, what: str) -> bytes:
    """Nothing of a process that has gone."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def parent(pid: int) -> int | None:
    """None of a process that has gone."""
    stat = read(pid, "stat")  # pid (name) state parent …
    return int(stat.rpartition(b")")[2].split()[1]) if stat else None


def gone(pid: int) -> bool:
    return not read(pid, "cmdline")  # of one that is dead and not yet buried it is empty


def send_signal(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def until(happens: Callable[[], bool], what: str, details: Callable[[], object] = str) -> None:
    """Waits until it `happens`."""
    last = time.monotonic() + PATIENCE
    while not happens():
        if time.monotonic() > last:
            raise AssertionError(f"{what} did not happen: {details()}")
        time.sleep(0.1)
