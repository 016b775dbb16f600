"""What the two sides of a deployment share: child processes, addresses, files of keys. Needs neither torch nor Flower."""

import ctypes
import fcntl
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any, BinaryIO

from fedexperts.errors import BadRun, BadValue, Busy
from fedexperts.io import processes

PATIENCE_SECONDS = 60.0
"""For processes to start."""
STOP_SECONDS = 10.0
"""For a process to end after SIGTERM."""
POLL_SECONDS = 0.5
MOST_LOG_BYTES = 2**26
"""Of the output of a child process in one file, of which the one before is kept."""
LOG_SECONDS = 1.0
"""Between two looks at how large that file is."""
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
ABOUT_PATH = "/v1/fleet/about"
"""At which a SuperLink says what time it has and which version it is."""
ABOUT_VARIABLE = "FEDEXPERTS_ABOUT"
"""The environment variable with the path of a JSON file of which a SuperLink tells registered nodes, if it exists."""
PARENT_VARIABLE = "FEDEXPERTS_PARENT"
"""The environment variable with the id of the process that started this one; that may have ended before this one can look."""


@contextmanager
def private() -> Iterator[None]:
    """New files of this process and of those that it starts are its user's only: 0600, and folders 0700."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def temporary(owner: Path) -> Iterator[Path]:
    """A folder for all temporary files of this process and of those that it starts, by the folder `owner` that it works for.

    What an earlier process left in it that was killed is removed. Its path is short, since sockets lie in it.

    Raises:
        Busy: another process works for `owner`.
        BadRun: the folder is another user's.
    """
    name = f"fedexperts-{os.getuid()}-{sha256(os.fsencode(owner.resolve())).hexdigest()[:12]}"
    folder, before, variable = Path(tempfile.gettempdir()) / name, tempfile.tempdir, os.environ.get("TMPDIR")
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise BadRun(f"{folder} is not a folder that only this user can read; remove it, or set TMPDIR to another folder")
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, owner)
        remove_contents(folder)
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
        tempfile.tempdir = before
        if variable is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = variable


def lock(handle: int, owner: Path) -> None:
    """Raises Busy when another process has locked the folder that `handle` opened, for `owner`."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(f"another process is running for {owner}; wait for it, or give another folder with --out") from None


def remove_contents(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
    """A process that ends with the context. Its output goes to the file `log`.log in `home`, and without `log` to ours.

    Files that it writes are its user's only. What is in the file goes to `log`.log.1 once it has MOST_LOG_BYTES: others can cause
    a line with every request.
    """
    commands = Path(sys.executable).parent  # Flower's, which its processes start by name
    path = f"{commands}{os.pathsep}{os.environ.get('PATH', '')}"
    ours = {"FLWR_HOME": str(home), "PATH": path, PARENT_VARIABLE: str(os.getpid())}
    every = {**os.environ, **ours, **(environment or {})}
    with ExitStack() as stack:
        output: Any = stack.enter_context(limited(home / f"{log}.log")) if log else None
        options: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "pass_fds": pass_fds, "umask": 0o077}
        child = subprocess.Popen(command, env=every, **options)
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextmanager
def limited(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, to whose end a process may write as long as the context lasts; it is kept small."""
    ended = Event()

    def keep_small() -> None:
        while not ended.wait(LOG_SECONDS):
            with suppress(OSError):  # somebody has moved the file
                move_if_large(path)

    watcher = Thread(target=keep_small, daemon=True)
    with path.open("ab") as file:
        watcher.start()
        try:
            yield file
        finally:
            ended.set()
            watcher.join()


def move_if_large(path: Path) -> None:
    """Copies the end of the file at `path` to `path`.1 and empties it, if it is large. Who writes at its end goes on.

    Where the disk is full, nothing is copied.
    """
    if path.stat().st_size <= MOST_LOG_BYTES:
        return
    former = path.with_name(f"{path.name}.1")
    try:
        with path.open("rb") as file, former.open("wb") as copy:
            file.seek(-MOST_LOG_BYTES, os.SEEK_END)
            shutil.copyfileobj(file, copy)
    except OSError:
        former.unlink(missing_ok=True)
    os.truncate(path, 0)


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
