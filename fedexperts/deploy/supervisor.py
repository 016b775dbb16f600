"""A client of a deployment: Flower's SuperNode and the worker that stays, started and watched. Needs neither torch nor Flower."""

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
    FORGET_SECONDS,
    LOOK_SECONDS,
    RETURNING,
    free_port,
    is_loopback,
    module,
    process,
    require_files,
)
from fedexperts.deploy.socket_rpc import listening
from fedexperts.errors import BadRun, BadValue

AGAIN_SECONDS = 3.0
"""Between two attempts to reach the server."""
MISTAKE = 2
"""The exit code of a worker that cannot work with the settings or the data that it was given, and has said so."""


@dataclass
class SuperNodeSupervisor:
    """A client's SuperNode and its worker, each started again when it ends.

    worker: the command of a process that answers messages on the listening socket whose file descriptor comes as its last
    argument. The socket stays when the worker dies, so whoever asks meanwhile waits for the next one.
    tell: gets a sentence when something happens that a person should know.
    """

    name: str
    server: str  # host:port
    home: Path
    keys: Path | None
    worker: Sequence[str]
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        self.home = self.home.resolve()
        self.log, self.said = self.home / "supernode.log", 0
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
            BadRun: the server's certificate is not from the authority in `keys`, or it has none.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedexperts-")))  # its mode is 0700
            listener = stack.enter_context(listening(folder / "worker"))
            works = stack.enter_context(ExitStack())
            joins = stack.enter_context(ExitStack())
            node: subprocess.Popen[bytes] | None = None
            worker, again, alone = self.start_worker(works, listener), 0.0, False
            while True:
                if (code := worker.poll()) is not None:
                    if code == MISTAKE:
                        raise BadRun(f"{self.name} cannot take part: what its worker said above has to be mended first")
                    self.tell(f"{self.name}: its worker ended ({code}) and is started again")
                    works.close()
                    worker = self.start_worker(works, listener)
                if node is not None and node.poll() is not None:
                    self.tell(f"{self.name}: {why(self.log.read_text(errors='replace')[self.said :])}; trying again")
                    joins.close()
                    node, again = None, monotonic() + AGAIN_SECONDS
                if node is None and monotonic() >= again:
                    if self.knocks():
                        node, alone = self.join(joins, folder / "worker"), False
                    elif not alone:
                        self.tell(f"{self.name}: nobody answers at {self.server} yet; trying again")
                        alone = True
                    again = monotonic() + AGAIN_SECONDS
                sleep(LOOK_SECONDS)

    def start_worker(self, stack: ExitStack, listener: socket.socket) -> subprocess.Popen[bytes]:
        number = listener.fileno()
        return stack.enter_context(process([*self.worker, str(number)], self.home, None, pass_fds=(number,)))

    def join(self, stack: ExitStack, worker: Path) -> subprocess.Popen[bytes]:
        """A SuperNode."""
        secured = ["--insecure"]
        if self.keys is not None:
            ca, key = self.keys / "ca.pem", self.keys / "node.key"
            secured = ["--root-certificates", str(ca), "--auth-supernode-private-key", str(key)]
        own = ("--host", "127.0.0.1", "--port", free_port(), "--max-wait-time", FORGET_SECONDS)
        config = ("--node-config", f'name="{self.name}" socket="{worker}"')
        self.tell(f"{self.name}: joining {self.server}")
        self.said = len(self.log.read_text(errors="replace")) if self.log.exists() else 0  # by those before
        command = module("supernode", "--superlink", self.server, *own, *config)
        environment = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", **RETURNING}
        return stack.enter_context(process([*command, *secured], self.home, "supernode", environment))

    def knocks(self) -> bool:
        """Whether a server answers that can be trusted.

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
                f"the server at {self.server} shows a certificate that {self.keys}/ca.pem does not vouch for "
                f"({error.verify_message}); give the keys that were made with the server's, for this host"
            ) from None
        except ssl.SSLEOFError:  # it ended while it was asked
            return False
        except ssl.SSLError as error:
            raise BadRun(f"the server at {self.server} does not speak TLS ({error.reason}); start it with --keys") from None
        except OSError:
            return False


def why(said: str) -> str:
    """Why a SuperNode ended that `said` this last."""
    if "Failed to activate SuperNode" in said:
        return "the server does not know its key; give it the server/clients folder that `fedexperts keys` made with this key"
    if "Giving up reconnection" in said:
        return "the server has gone"
    plain = re.sub(r"\x1b\[\d+m", "", said)  # without colours
    lines = [line.strip() for line in plain.splitlines() if "INFO" not in line and line.strip()]
    return f"its SuperNode ended ({lines[-1] if lines else 'it said nothing'})"
