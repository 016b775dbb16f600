"""A client of a deployment: supervises Flower's SuperNode and the worker that stays. Needs neither torch nor Flower."""

import re
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from fedexperts.deploy.processes import (
    POLL_SECONDS,
    RECONNECT_SECONDS,
    RETURN_MEMORY,
    child_process,
    free_port,
    is_loopback,
    module,
    require_files,
)
from fedexperts.deploy.socket_rpc import listening
from fedexperts.errors import BadRun, BadValue

RETRY_SECONDS = 3.0
"""Between two attempts to reach the server."""
UNUSABLE = 2
"""The exit code of a worker that cannot work with its settings or its data, and has printed why."""


@dataclass
class SuperNodeSupervisor:
    """A client's SuperNode and its worker, each started again when it ends.

    worker: the command of a process that answers messages on the listening socket whose file descriptor is its last argument. The
    socket stays open when the worker dies, so a message that comes meanwhile waits for the next one.
    announce: receives a sentence when something happens that a person should know.
    """

    name: str
    server: str  # host:port
    home: Path
    keys: Path | None
    worker: Sequence[str]
    announce: Callable[[str], None]

    def __post_init__(self) -> None:
        self.home = self.home.resolve()
        self.log = self.home / "supernode.log"
        host, _, port = self.server.rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise BadValue(f"--server {self.server!r} is no address; give host:port, such as 10.0.0.1:9092")
        if self.keys is None and not is_loopback(host):
            raise BadValue(f"--insecure is for a server on this machine, and {host} is none; give --keys")
        if self.keys is not None:
            require_files(self.keys, ("ca.pem", "node.key"), self.name)

    def run(self) -> None:
        """Runs until it is interrupted.

        Raises:
            BadRun: the server's certificate is not from the authority in `keys`, or it has none; or the worker cannot work with
                its settings or its data.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedexperts-")))  # its mode is 0700
            listener = stack.enter_context(listening(folder / "worker"))
            worker_stack = stack.enter_context(ExitStack())
            node_stack = stack.enter_context(ExitStack())
            worker = self.start_worker(worker_stack, listener)
            node: subprocess.Popen[bytes] | None = None
            retry_at, announced = 0.0, False
            while True:
                if (code := worker.poll()) is not None:
                    if code == UNUSABLE:
                        raise BadRun(f"{self.name} cannot take part: its worker ended for the reason above; correct that first")
                    self.announce(f"{self.name}: its worker ended ({code}) and is started again")
                    worker_stack.close()
                    worker = self.start_worker(worker_stack, listener)
                if node is not None and node.poll() is not None:
                    self.announce(f"{self.name}: {exit_reason(self.new_log())}; trying again")
                    node_stack.close()
                    node, retry_at = None, monotonic() + RETRY_SECONDS
                if node is None and monotonic() >= retry_at:
                    if self.server_answers():
                        node, announced = self.start_node(node_stack, folder / "worker"), False
                    elif not announced:
                        self.announce(f"{self.name}: nobody answers at {self.server} yet; trying again")
                        announced = True
                    retry_at = monotonic() + RETRY_SECONDS
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
        self.announce(f"{self.name}: joining {self.server}")
        self.log_start = len(self.log.read_text(errors="replace")) if self.log.exists() else 0  # after those before it
        command = module("supernode", "--superlink", self.server, *own, *config)
        environment = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", **RETURN_MEMORY}
        return stack.enter_context(child_process([*command, *secured], self.home, "supernode", environment))

    def new_log(self) -> str:
        """The output of the SuperNode that was started last."""
        return self.log.read_text(errors="replace")[self.log_start :]

    def server_answers(self) -> bool:
        """Whether a server that can be trusted answers.

        Raises:
            BadRun: one answers that cannot.
        """
        host, _, port = self.server.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=10) as connection:
                if self.keys is not None:
                    context = ssl.create_default_context(cafile=str(self.keys / "ca.pem"))
                    context.wrap_socket(connection, server_hostname=host.strip("[]")).close()
                return True
        except ssl.SSLCertVerificationError as error:
            raise BadRun(
                f"the server at {self.server} has a certificate that {self.keys}/ca.pem does not vouch for "
                f"({error.verify_message}); give the keys that were made with the server's, for this host"
            ) from None
        except ssl.SSLEOFError:  # it ended in the middle of the handshake
            return False
        except ssl.SSLError as error:
            raise BadRun(f"the server at {self.server} does not speak TLS ({error.reason}); start it with --keys") from None
        except OSError:
            return False


def exit_reason(output: str) -> str:
    """Why a SuperNode ended, from its output."""
    if "Failed to activate SuperNode" in output:
        return "the server does not know its key; give it the server/clients folder that `fedexperts keys` made with this key"
    if "Giving up reconnection" in output:
        return "the server has gone"
    plain = re.sub(r"\x1b\[\d+m", "", output)  # without colors
    lines = [line.strip() for line in plain.splitlines() if "INFO" not in line and line.strip()]
    return f"its SuperNode ended ({lines[-1] if lines else 'without output'})"
