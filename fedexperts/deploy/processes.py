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

from fedexperts.deploy.socket_rpc import PARENT
from fedexperts.errors import BadRun, BadValue

PATIENCE_SECONDS = 60.0
"""For processes to start, or to end by themselves."""
LOOK_SECONDS = 0.5
FORGET_SECONDS = 30
"""After which whoever cannot reach the server any more gives up."""
ANYWHERE = ("0.0.0.0", "::")
"""The hosts that mean: on all networks."""
RETURNED_BYTES = 2**20
"""What is this large goes back to the machine when it is freed. By itself the C library would keep it, in pieces, after large
messages."""
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(RETURNED_BYTES), "MALLOC_ARENA_MAX": "1"}
"""The environment of processes that carry messages and compute nothing."""
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of malloc.h; each arena keeps some of what the threads freed that it was for
OBJECTS = "FEDEXPERTS_OBJECTS"
"""The environment variable that tells a SuperLink of an empty folder, for what messages are made of."""


def return_memory() -> None:
    """What `RETURNING` does, for this process; nothing where the C library is not glibc."""
    with suppress(AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)
        library.mallopt(M_ARENA_MAX, 1)


@contextmanager
def process(
    command: Sequence[str],
    home: Path,
    log: str | None,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the context; what it says goes to `log` in `home`, and without one to where ours goes."""
    here = Path(sys.executable).parent  # where Flower's commands are, which its processes start by name
    path = f"{here}{os.pathsep}{os.environ.get('PATH', '')}"
    every = {"FLWR_HOME": str(home), "PATH": path, PARENT: str(os.getpid()), **(environment or {})}
    with ExitStack() as stack:
        output: Any = stack.enter_context((home / f"{log}.log").open("ab")) if log else None
        child = subprocess.Popen(  # S603 is not ours to mind: the command is our own
            command, env={**os.environ, **every}, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=pass_fds
        )
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(PATIENCE_SECONDS / 6)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"fedexperts.deploy.{name}", *map(str, arguments)]


def require_files(folder: Path, names: Sequence[str], whose: str) -> None:
    """Raises BadValue when a file of `whose` keys is missing, or others than its owner may read a private one."""
    for name in names:
        path = folder / name
        if not path.exists():
            raise BadValue(f"{folder} has no {name}; give the folder {whose} that `fedexperts keys` made, or --insecure")
        if path.suffix == ".key" and path.stat().st_mode & 0o077:
            raise BadValue(f"{path} is a private key that others than its owner may read; chmod 600 it")


def require_free(host: str, port: int) -> None:
    """Raises BadRun when another process listens there, and goes on to; one that was killed may need a moment to end."""
    until = monotonic() + PATIENCE_SECONDS / 4
    while True:
        try:
            socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
            return
        except OSError as error:
            if monotonic() > until:
                raise BadRun(f"{host}:{port} is not to be had ({error.strerror}); give another --host or --port") from None
        sleep(LOOK_SECONDS)


def reached(address: str) -> bool:
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
    """A port of this machine that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])
