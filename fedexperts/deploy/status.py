"""What a server tells operators and their tools: /health, /status (JSON) and /metrics (Prometheus' text format)."""

import hmac
import json
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import BoundedSemaphore, Lock, Thread, Timer
from time import time
from typing import Any, ClassVar

from fedexperts.core.ledger import Entry
from fedexperts.deploy.processes import is_loopback
from fedexperts.deploy.site import address_of
from fedexperts.engines.message import VERSION
from fedexperts.errors import BadRun, BadValue, FedExpertsError
from fedexperts.io.manifest import finite

SECONDS = 10.0
"""For a request to come whole and to be answered."""
MOST_REQUESTS = 16
"""At a time."""
TOKEN_CHARACTERS = 16
"""Of a token, at least."""


@dataclass
class ClientStatus:
    """A client, as the server last saw it."""

    answers: int = 0
    failures: int = 0
    last_round: int | None = None
    last_failure: str | None = None
    loss: float | None = None
    seconds: float = 0.0  # of its last job
    bytes_down: int = 0  # in all
    bytes_up: int = 0


@dataclass
class Status:
    """A run, as its server sees it; written by the thread of the run, read by those of requests."""

    state: str = "waiting for clients"
    run: str = ""
    method: str = ""
    seed: int | None = None
    round: int = 0  # the last complete one
    steps_done: int = 0  # rounds and setup tasks
    steps: int = 0
    loss: float | None = None  # mean over the clients of the last round
    round_seconds: float | None = None
    scores: dict[str, float] = field(default_factory=dict)  # task → score at the last evaluation
    clients: dict[str, ClientStatus] = field(default_factory=dict)
    started: float = field(default_factory=time)
    updated: float = field(default_factory=time)

    def __post_init__(self) -> None:
        self.lock = Lock()

    @contextmanager
    def changing(self) -> Iterator["Status"]:
        with self.lock:
            yield self
            self.updated = time()

    def answered(self, entry: Entry) -> None:
        with self.changing():
            client = self.clients.setdefault(entry.client, ClientStatus())
            client.last_round, client.seconds = entry.round, entry.seconds
            client.bytes_down += entry.bytes_down
            client.bytes_up += entry.bytes_up
            if entry.failed is None:
                client.answers += 1
                client.loss = client.loss if entry.loss is None else entry.loss
            else:
                client.failures += 1
                client.last_failure = f"round {entry.round}, {entry.task}: {entry.failed}"

    def as_json(self) -> dict[str, Any]:
        """All fields, with times in UTC (ISO 8601)."""
        with self.lock:
            tree = asdict(self)
        times = {name: datetime.fromtimestamp(tree[name], UTC).isoformat(timespec="seconds") for name in ("started", "updated")}
        whole: dict[str, Any] = finite({"version": VERSION, **tree, **times})
        return whole

    def metrics(self, expiries: Mapping[str, datetime | None]) -> str:
        """The numbers in Prometheus' text format. expiries: of certificates, by file."""
        with self.lock:
            tree = asdict(self)
        clients = tree["clients"].items()
        by_client = {
            name: [({"client": client}, each[name]) for client, each in clients] for name in ClientStatus.__annotations__
        }
        whole: list[tuple[str, str, str, list[tuple[dict[str, str], float | None]]]] = [
            ("up", "gauge", "1 while the server runs.", [({"version": VERSION}, 1)]),
            ("round", "gauge", "The last complete round.", [({}, tree["round"])]),
            ("steps", "gauge", "Rounds and setup tasks of the run.", [({}, tree["steps"])]),
            ("steps_done", "gauge", "Of these, how many are complete.", [({}, tree["steps_done"])]),
            ("round_seconds", "gauge", "Seconds of the last round.", [({}, tree["round_seconds"])]),
            ("loss", "gauge", "Mean training loss of the clients in the last round.", [({}, tree["loss"])]),
            ("score", "gauge", "Score of a task at the last evaluation.", [({"task": k}, v) for k, v in tree["scores"].items()]),
            ("client_answers_total", "counter", "Answers of a client that were used.", by_client["answers"]),
            ("client_failures_total", "counter", "Jobs in which a client failed.", by_client["failures"]),
            ("client_bytes_down_total", "counter", "Bytes sent to a client.", by_client["bytes_down"]),
            ("client_bytes_up_total", "counter", "Bytes received from a client.", by_client["bytes_up"]),
            ("client_seconds", "gauge", "Seconds of a client's last job.", by_client["seconds"]),
            ("client_loss", "gauge", "Training loss of a client's last job.", by_client["loss"]),
            ("updated_seconds", "gauge", "When one of these last changed (Unix time).", [({}, tree["updated"])]),
            (
                "certificate_expires_seconds",
                "gauge",
                "When a certificate expires (Unix time).",
                [({"file": name}, day.timestamp()) for name, day in expiries.items() if day],
            ),
        ]
        return "".join(metric(*each) for each in whole)


def metric(name: str, kind: str, help: str, values: list[tuple[dict[str, str], float | None]]) -> str:
    """The lines of a metric; none of values that are not known."""
    lines = [f"fedexperts_{name}{labelled(labels)} {value}\n" for labels, value in values if value is not None]
    return f"# HELP fedexperts_{name} {help}\n# TYPE fedexperts_{name} {kind}\n{''.join(lines)}" if lines else ""


def labelled(labels: Mapping[str, str]) -> str:
    """The labels of a value, as the format writes them."""
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return "{" + ",".join(f'{name}="{value.translate(escapes)}"' for name, value in labels.items()) + "}" if labels else ""


@dataclass(frozen=True)
class StatusPage:
    """Where the status is served: `address`, host:port; elsewhere than on loopback with a `token` and over TLS, with `keys`.

    Raises:
        BadValue: an address that other machines reach, without keys or without a token.
    """

    address: str
    token: str | None = None
    keys: Path | None = None

    def __post_init__(self) -> None:
        host, _ = address_of(self.address, "--status")
        if not is_loopback(host) and (self.token is None or self.keys is None):
            raise BadValue(
                f"--status {self.address} can be reached from other machines, which needs --keys and --status-token (a file), or "
                "an address of this machine only, such as 127.0.0.1:9093"
            )

    @contextmanager
    def serving(
        self, status: Status, check: Callable[[], None], expiries: Mapping[str, datetime | None]
    ) -> Iterator[tuple[str, int]]:
        """Serves `status` inside the block, at the address that it yields. check: raises where the server is not well.

        Raises:
            BadRun: the address is taken.
        """
        bodies: dict[str, Callable[[], tuple[int, str, str]]] = {
            "/health": lambda: health(check),
            "/status": lambda: (200, "application/json", json.dumps(status.as_json())),
            "/metrics": lambda: (200, "text/plain; version=0.0.4", status.metrics(expiries)),
        }
        handler = type("Bound", (Handler,), {"bodies": bodies, "token": self.token})
        host, port = address_of(self.address, "--status")
        try:
            server = FewAtATime((host, port), handler)
        except OSError as error:
            raise BadRun(f"the status cannot be served at {self.address} ({error.strerror}); give another --status") from None
        if self.keys is not None and not is_loopback(host):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.keys / "server.pem", self.keys / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = Thread(target=server.serve_forever, name="status", daemon=True)
        thread.start()
        try:
            yield server.server_address[0], server.server_address[1]  # type: ignore[misc]  # typed for any family
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class FewAtATime(ThreadingHTTPServer):
    """Answers MOST_REQUESTS at a time, each in a thread, and says nothing of connections that end badly."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.places = BoundedSemaphore(MOST_REQUESTS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        over = Timer(SECONDS, cut_off, [request])
        over.daemon = True
        over.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            over.cancel()
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a handshake or a connection that failed is its sender's matter
            super().handle_error(request, client_address)


def cut_off(connection: socket.socket) -> None:
    """Ends what waits for `connection`."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def health(check: Callable[[], None]) -> tuple[int, str, str]:
    """200, or 503 with the reason."""
    try:
        check()
    except FedExpertsError as error:
        return 503, "application/json", json.dumps({"ok": False, "reason": str(error)})
    return 200, "application/json", json.dumps({"ok": True})


class Handler(BaseHTTPRequestHandler):
    """Answers a GET with the body of its path, where the token is right."""

    bodies: ClassVar[Mapping[str, Callable[[], tuple[int, str, str]]]] = {}
    token: ClassVar[str | None] = None
    timeout = SECONDS
    server_version = "fedexperts"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not self.is_allowed():
            self.reply(401, "application/json", json.dumps({"error": "give the token: Authorization: Bearer TOKEN"}))
        elif path in self.bodies:
            self.reply(*self.bodies[path]())
        else:
            self.reply(404, "application/json", json.dumps({"error": f"there are {', '.join(self.bodies)}"}))

    def is_allowed(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.token is None or hmac.compare_digest(given.encode(), self.token.encode())

    def reply(self, code: int, kind: str, body: str) -> None:
        data = body.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Logs nothing: a tool asks every few seconds."""


def token_in(path: Path | None) -> str | None:
    """The token in a file; None without one.

    Raises:
        BadValue: others can read it, or it is short.
    """
    if path is None:
        return None
    if not path.is_file() or path.stat().st_mode & 0o077:
        raise BadValue(f"--status-token {path} should be a file that only this user can read; chmod 600 it")
    token = path.read_text().strip()
    if len(token) < TOKEN_CHARACTERS:
        raise BadValue(f"the token in {path} has {len(token)} characters; give {TOKEN_CHARACTERS} at least: openssl rand -hex 16")
    return token
