"""The server of a deployment: a process of Flower's SuperLink, and the grid of a run on it."""

import json
import logging
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from time import monotonic, sleep
from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedexperts.deploy.bundle import bundle
from fedexperts.deploy.flower_internals import (
    ControlHttpClient,
    RegisterNodeRequest,
    Run,
    RuntimeVersionHttpInterceptor,
    StartRunRequest,
    TaskIdentity,
    fab_to_proto,
    public_key_to_bytes,
)
from fedexperts.deploy.grid import SuperLinkGrid
from fedexperts.deploy.processes import (
    ABOUT_VARIABLE,
    ALL_NETWORKS,
    OBJECTS_VARIABLE,
    PATIENCE_SECONDS,
    POLL_SECONDS,
    RECONNECT_SECONDS,
    RETURN_MEMORY,
    child_process,
    is_loopback,
    is_reachable,
    module,
    require_files,
    require_free,
    return_memory,
    temporary,
)
from fedexperts.deploy.server_app import SOCKET_VARIABLE
from fedexperts.deploy.site import expiry_in
from fedexperts.deploy.socket_rpc import listening
from fedexperts.errors import BadRun, BadValue
from fedexperts.io.files import write_text

ABOUT = "about.json"
"""The file, in the home of a federation, of which registered nodes are told."""


class Federation:
    """A SuperLink, and one long run of Flower's on it, whose grid is open inside `with`.

    Nodes without a key in `keys`/clients are refused, and so are connections without TLS. Without `keys` there is neither TLS nor
    authentication, and only this machine is served. Other machines reach only those paths of its port that nodes use.

    home: a folder for what Flower writes. host: where it listens.
    """

    grid: SuperLinkGrid
    names: Mapping[int, str]
    """Node → the client whose key it has; empty without keys."""

    def __init__(self, home: Path, *, host: str = "127.0.0.1", port: int, keys: Path | None) -> None:
        self.home, self.host, self.port, self.keys = home.resolve(), host, port, keys
        if keys is None and not is_loopback(host):
            raise BadValue(
                f"--host {host} can be reached from other machines, which --insecure does not allow; give --keys, or a host "
                "of this machine only, such as 127.0.0.1"
            )
        if ":" in host:
            raise BadValue(
                f"--host {host} is no IPv4 address or name, and nothing else is served; give one, or 0.0.0.0 for all networks"
            )
        if keys is not None:
            require_files(keys, ("ca.pem", "server.pem", "server.key", "clients"), "server")
        self.address = f"{'127.0.0.1' if host in ALL_NETWORKS else host}:{port}"

    def __enter__(self) -> Self:
        logging.getLogger("flwr").setLevel(logging.ERROR)  # it logs every connection
        return_memory()
        self.home.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            require_free(self.host, self.port)
            folder = stack.enter_context(temporary(self.home))
            listener = stack.enter_context(listening(folder / "grid"))
            objects = stack.enter_context(empty_folder(self.home / "objects"))
            (self.home / ABOUT).unlink(missing_ok=True)
            self.superlink = stack.enter_context(self.start_superlink(folder / "grid", objects))
            self.names = self.start_run()
            self.server_app = stack.enter_context(self.accept_server_app(listener))
            self.grid = self.open_grid()
            stack.callback(self.grid.close)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @contextmanager
    def start_superlink(self, grid: Path, objects: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A SuperLink that listens, and keeps messages in `objects`; its ServerApp connects to the socket `grid`."""
        secured = ["--insecure"]
        if self.keys is not None:
            files = (("certfile", "server.pem"), ("keyfile", "server.key"), ("ca-certfile", "ca.pem"))
            secured = [word for kind, name in files for word in (f"--ssl-{kind}", str(self.keys / name))]
            secured.append("--enable-supernode-auth")
        command = module("superlink", "--host", self.host, "--port", self.port, "--disable-runtime-dependency-installation")
        paths = {SOCKET_VARIABLE: str(grid), OBJECTS_VARIABLE: str(objects), ABOUT_VARIABLE: str(self.home / ABOUT)}
        own = {**paths, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"}  # it has one task, and is asked for more as long as it runs
        with child_process([*command, *secured], self.home, "superlink", {**own, **RETURN_MEMORY}) as superlink:
            deadline = monotonic() + PATIENCE_SECONDS
            while not is_reachable(self.address):
                if superlink.poll() is not None or monotonic() > deadline:
                    raise BadRun(f"Flower's SuperLink does not start; {self.home / 'superlink.log'} says why")
                sleep(POLL_SECONDS / 5)
            yield superlink

    def start_run(self) -> dict[int, str]:
        """Registers the clients' keys and starts Flower's run; returns node → client."""
        root = None if self.keys is None else (self.keys / "ca.pem").read_bytes()
        calls = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
        control = ControlHttpClient.from_server_address(self.address, root is None, root, calls)
        try:
            keys = keys_in(self.keys / "clients") if self.keys else {}
            nodes = {control.RegisterNode(RegisterNodeRequest(public_key=key)).node_id: name for key, name in keys.items()}
            control.StartRun(StartRunRequest(fab=fab_to_proto(bundle())))
        finally:
            control.close()
        return nodes

    def accept_server_app(self, listener: socket.socket) -> socket.socket:
        """The connection of the ServerApp, which lends its grid as long as it is open."""
        listener.settimeout(POLL_SECONDS)
        deadline = monotonic() + PATIENCE_SECONDS
        while monotonic() < deadline and self.superlink.poll() is None:
            with suppress(TimeoutError):
                return listener.accept()[0]
        raise BadRun(f"Flower's SuperLink starts no run; {self.home / 'superlink.log'} says why")

    def open_grid(self) -> SuperLinkGrid:
        """The ServerApp's grid, opened in this process."""
        identity = json.loads(self.server_app.makefile("rb").readline())
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = identity["task"], identity["run"], identity["node"]
        root = None if self.keys is None else (self.keys / "ca.pem").read_bytes()
        grid = SuperLinkGrid(self.address, root is None, root, token=identity["token"])
        grid._retry_invoker.max_time = (
            RECONNECT_SECONDS  # of the one version that we pin; else a dead SuperLink is asked for ever
        )
        grid.set_run(Run.create_empty(identity["run"]))
        return grid

    def expiries(self) -> dict[str, datetime | None]:
        """When the server's certificate and that of its authority expire; empty without keys."""
        return {name: expiry_in(self.keys / name) for name in ("server.pem", "ca.pem")} if self.keys else {}

    def tell(self, about: Mapping[str, object]) -> None:
        """Has registered nodes told `about`, JSON values, when they ask who the server is."""
        write_text(self.home / ABOUT, json.dumps(about))

    def check(self) -> None:
        """Raises BadRun when the SuperLink or its run has ended before its time."""
        if self.superlink.poll() is not None or has_closed(self.server_app):
            raise BadRun(f"Flower's SuperLink has stopped; {self.home / 'superlink.log'} says why; go on with --resume")


@contextmanager
def empty_folder(folder: Path) -> Iterator[Path]:
    """`folder`, which only its owner can read, emptied of what an earlier process left; it is removed with the context."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keys_in(folder: Path) -> dict[bytes, str]:
    """The public keys in `folder`, and whose they are.

    Raises:
        BadValue: one is none, or two are the same.
    """
    found: dict[bytes, str] = {}
    for path in sorted(folder.glob("*.pub")):
        if (key := key_in(path)) in found:
            raise BadValue(f"{path} holds the key of {found[key]}; each client has its own: remove one of the two files")
        found[key] = path.stem
    return found


def key_in(path: Path) -> bytes:
    """The public key in `path`, as Flower registers it.

    Raises:
        BadValue: it is none that `fedexperts keys` made.
    """
    try:
        key = load_ssh_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BadValue(f"{path} is not a key made by `fedexperts keys`; make one with it")
    return public_key_to_bytes(key)


def has_closed(connection: socket.socket) -> bool:
    """Whether the other end has closed it."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
