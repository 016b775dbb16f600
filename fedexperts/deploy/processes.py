"""What the two sides of a deployment share: child processes, addresses, files of keys. Needs neither torch nor Flower."""

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from fedexperts.errors import BadRun, BadValue
from fedexperts.io import processes

PATIENCE_SECONDS = 60.0
"""For processes to start."""
STOP_SECONDS = 10.0
"""For a process to end after SIGTERM."""
POLL_SECONDS = 0.5
RECONNECT_SECONDS = 30
"""After which a process that cannot reach the server any more gives up."""
ALL_NETWORKS = ("0.0.0.0", "::")
"""Hosts to listen at for all networks."""
RETURNED_BYTES = 2**20
"""A freed block of this size goes back to the system. By itself the C library would keep it, in pieces, after large messages."""
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(RETURNED_BYTES), "MALLOC_ARENA_MAX": "1"}
"""The environment of processes that carry messages and compute nothing."""
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of malloc.h; each arena keeps some of what the threads freed that it was for
OBJECTS_VARIABLE = "FEDEXPERTS_OBJECTS"
"""The environment variable with the path of an empty folder in which a SuperLink keeps messages."""
PARENT_VARIABLE = "FEDEXPERTS_PARENT"
"""The environment variable with the id of the process that started this one; that may have ended before this one can look."""


def return_memory() -> None:
    """What `RETURN_MEMORY` does, for this process; nothing where the C library is not glibc."""
    with suppress(AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)
        library.mallopt(M_ARENA_MAX, 1)


@contextmanager
def child_process(
    command: Sequence[str],
    home: Path,
    log: str | None,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the context. Its output goes to the file `log`.log in `home`, and without `log` to ours."""
    commands = Path(sys.executable).parent  # Flower's, which its processes start by name
    path = f"{commands}{os.pathsep}{os.environ.get('PATH', '')}"
    ours = {"FLWR_HOME": str(home), "PATH": path, PARENT_VARIABLE: str(os.getpid())}
    every = {**os.environ, **ours, **(environment or {})}
    with ExitStack() as stack:
        output: Any = stack.enter_context((home / f"{log}.log").open("ab")) if log else None
        child = subprocess.Popen(command, env=every, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=pass_fds)
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def end_with_parent() -> None:
    """Ends this process soon after the one that started it with `child_process`, however that ends."""
    processes.end_with(int(os.environ[PARENT_VARIABLE]))


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs the module `name` of this package."""
    return [sys.executable, "-m", f"fedexperts.deploy.{name}", *map(str, arguments)]


def require_files(folder: Path, names: Sequence[str], owner: str) -> None:
    """Raises BadValue when a file of `owner`'s keys is missing, or a private key may be read by others than its user."""
    for name in names:
        path = folder / name
        if not path.exists():
            raise BadValue(f"{folder} has no {name}; give the folder {owner} that `fedexperts keys` made, or --insecure")
        if path.suffix == ".key" and path.stat().st_mode & 0o077:
            raise BadValue(f"{path} is a private key that others than its owner may read; chmod 600 it")


def require_free(host: str, port: int) -> None:
    """Raises BadRun when another process keeps listening there; one that was killed may need a moment to end."""
    deadline = monotonic() + PATIENCE_SECONDS / 4
    while True:
        try:
            socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
            return
        except OSError as error:
            if monotonic() > deadline:
                raise BadRun(f"cannot listen at {host}:{port} ({error.strerror}); give another --host or --port") from None
        sleep(POLL_SECONDS)


def is_reachable(address: str) -> bool:
    """Whether something listens at `address` (host:port)."""
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=1):
        return True
    return False


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def free_port() -> int:
    """A port of this machine that no process uses."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
