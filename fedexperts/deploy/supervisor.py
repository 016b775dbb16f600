"""A client of a deployment: supervises Flower's SuperNode and the worker that stays. Needs neither torch nor Flower."""

import logging
import re
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from fedexperts.deploy.logs import say
from fedexperts.deploy.processes import (
    POLL_SECONDS,
    RECONNECT_SECONDS,
    RETURN_MEMORY,
    child_process,
    free_port,
    is_loopback,
    module,
    require_files,
    temporary,
)
from fedexperts.deploy.site import (
    address_of,
    ask,
    clock_error,
    expiry_in,
    expiry_warnings,
    require_own_keys,
    require_same_protocol,
)
from fedexperts.deploy.socket_rpc import listening
from fedexperts.engines.message import VERSION
from fedexperts.errors import BadRun, BadValue

RETRY_SECONDS = 3.0
"""Between two attempts to reach the server."""
LONG_SECONDS = 60.0
"""That a worker lives which is started again at once; before another one is, it waits, longer each time, up to this."""
UNUSABLE = 2
"""The exit code of a worker that cannot work with its settings or its data, and has printed why."""


@dataclass
class SuperNodeSupervisor:
    """A client's SuperNode and its worker, each started again when it ends.

    worker: the command of a process that answers messages on the listening socket whose file descriptor is its last argument. The
    socket stays open when the worker dies, so a message that comes meanwhile waits for the next one.
    """

    name: str
    server: str  # host:port
    home: Path
    keys: Path | None
    worker: Sequence[str]
    warned_of: str | None = None  # the server's version
    is_expiry_known: bool = False  # whether it has warned of certificates that expire

    def __post_init__(self) -> None:
        self.home = self.home.resolve()
        self.log = self.home / "supernode.log"
        host, _ = address_of(self.server)
        if self.keys is None and not is_loopback(host):
            raise BadValue(f"--insecure is for a server on this machine, and {host} is none; give --keys")
        if self.keys is not None:
            require_files(self.keys, ("ca.pem", "node.key"), self.name)
            require_own_keys(self.keys, self.name)

    def run(self) -> None:
        """Runs until it is interrupted.

        Raises:
            BadRun: the server's certificate is not from the authority in `keys`, or it has none; or the worker cannot work with
                its settings or its data.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            folder = stack.enter_context(temporary(self.home))
            listener = stack.enter_context(listening(folder / "worker"))
            worker_stack = stack.enter_context(ExitStack())
            node_stack = stack.enter_context(ExitStack())
            worker = self.start_worker(worker_stack, listener)
            node: subprocess.Popen[bytes] | None = None
            retry_at, announced = 0.0, ""  # why it has not joined
            started, pause = monotonic(), 0.0  # of the worker
            while True:
                if (code := worker.poll()) is not None:
                    if code == UNUSABLE:
                        raise BadRun(f"{self.name} cannot take part: its worker ended for the reason above; correct that first")
                    pause = next_pause(pause, monotonic() - started)
                    say(logging.WARNING, f"{self.name}: its worker ended ({code}) and is started again in {pause:.0f} s")
                    worker_stack.close()
                    sleep(pause)
                    worker, started = self.start_worker(worker_stack, listener), monotonic()
                if node is not None and node.poll() is not None:
                    say(logging.WARNING, f"{self.name}: {exit_reason(self.new_log())}; trying again")
                    node_stack.close()
                    node, retry_at = None, monotonic() + RETRY_SECONDS
                if node is None and monotonic() >= retry_at:
                    obstacle = self.obstacle()
                    if not obstacle:
                        node = self.start_node(node_stack, folder / "worker")
                    elif obstacle != announced:
                        say(logging.WARNING, f"{self.name}: {obstacle}; trying again")
                    announced, retry_at = obstacle, monotonic() + RETRY_SECONDS
                sleep(POLL_SECONDS)

    def start_worker(self, stack: ExitStack, listener: socket.socket) -> subprocess.Popen[bytes]:
        number = listener.fileno()
        return stack.enter_context(child_process([*self.worker, str(number)], self.home, None, pass_fds=(number,)))

    def start_node(self, stack: ExitStack, worker: Path) -> subprocess.Popen[bytes]:
        """A SuperNode, whose ClientApp calls the worker at the socket `worker`."""
        secured = ["--insecure"]
        if self.keys is not None:
            ca, key = self.keys / "ca.pem", self.keys / "node.key"
            secured = ["--root-certificates", str(ca), "--auth-supernode-private-key", str(key)]
        own = ("--host", "127.0.0.1", "--port", free_port(), "--max-wait-time", RECONNECT_SECONDS)
        config = ("--node-config", f'name="{self.name}" socket="{worker}"')
        say(logging.INFO, f"{self.name}: joining {self.server}")
        self.log_start = len(self.log.read_text(errors="replace")) if self.log.exists() else 0  # after those before it
        command = module("supernode", "--superlink", self.server, *own, *config)
        environment = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", **RETURN_MEMORY}
        return stack.enter_context(child_process([*command, *secured], self.home, "supernode", environment))

    def new_log(self) -> str:
        """The output of the SuperNode that was started last."""
        return self.log.read_text(errors="replace")[self.log_start :]

    def obstacle(self) -> str:
        """Why it cannot join yet; empty if it can.

        Raises:
            BadRun: the server cannot be trusted, or has a version that does not work with this one.
        """
        info = ask(self.server, self.keys)
        if info is None:
            return f"nobody answers at {self.server} yet"
        require_same_protocol(info, self.server)
        if not self.is_expiry_known and self.keys is not None:
            self.is_expiry_known = True
            for sentence in expiry_warnings(
                {"the server's certificate": info.expires, "ca.pem": expiry_in(self.keys / "ca.pem")}
            ):
                say(logging.WARNING, f"{self.name}: {sentence}")
        if info.version not in (None, VERSION, self.warned_of):
            say(
                logging.WARNING,
                f"{self.name}: the server has FedExperts {info.version}, and this is {VERSION}; they can work together",
            )
            self.warned_of = info.version
        return clock_error(info) or ""


def next_pause(last: float, lived: float) -> float:
    """Seconds before a worker is started again that `lived` so many, where the `last` pause had that many."""
    return 0.0 if lived > LONG_SECONDS else min(2 * last + 1, LONG_SECONDS)


def exit_reason(output: str) -> str:
    """Why a SuperNode ended, from its output."""
    if "Failed to activate SuperNode" in output:
        return "the server does not know its key; give it the server/clients folder that `fedexperts keys` made with this key"
    if "Giving up reconnection" in output:
        return "the server has gone"
    plain = re.sub(r"\x1b\[\d+m", "", output)  # without colors
    lines = [line.strip() for line in plain.splitlines() if "INFO" not in line and line.strip()]
    return f"its SuperNode ended ({lines[-1] if lines else 'without output'})"
