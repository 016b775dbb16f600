"""What strangers can do to a server's SuperLink: its memory under bodies without a key and under idle connections.

    python benchmarks/door.py [--megabytes 800] [--connections 1000]

It starts a SuperLink with keys that listens on all networks, and attacks it from an address of this machine that is not loopback,
which then counts as another machine's. Meanwhile a registered node is simulated, whose requests must be answered.
"""

import argparse
import resource
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from fedexperts.deploy.deployment import Federation
from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.processes import free_port
from fedexperts.deploy.site import ask, signed_headers

MB = 1e6
PATH = "/v1/fleet/push-messages"
BODY_BYTES = 2**24
TOGETHER = 50
"""Bodies that are under way at a time."""


def own_address() -> str:
    """An address of this machine that is not loopback; none is sent anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


def memory(pid: int, what: str = "VmRSS") -> float:
    """MB of a process: now, or at its peak (VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / MB for line in lines if line.startswith(what))


def trusting(keys: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(keys / "ca.pem"))
    context.check_hostname = False
    return context


def post(address: tuple[str, int], context: ssl.SSLContext) -> tuple[ssl.SSLSocket | None, int]:
    """Sends a body of BODY_BYTES without a key, all but its last byte; returns the open connection and the bytes that left."""
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/protobuf\r\ncontent-length: {BODY_BYTES}\r\n\r\n"
    piece, sent, connection = b"\0" * 2**16, 0, None
    with suppress(OSError):
        connection = context.wrap_socket(socket.create_connection(address, timeout=30))
        connection.sendall(head.encode())
        while sent < BODY_BYTES - 1:
            sent += connection.send(piece[: BODY_BYTES - 1 - sent])
    return connection, sent


def bodies(address: tuple[str, int], keys: Path, megabytes: int) -> str:
    """Posts `megabytes` in bodies of 16 MB, none of which ends for some seconds after all have been sent."""
    context, number = trusting(keys), int(megabytes * MB // BODY_BYTES)
    with ThreadPoolExecutor(TOGETHER) as pool:
        posted = list(pool.map(lambda _: post(address, context), range(number)))
    time.sleep(5)
    for connection, _ in posted:
        if connection is not None:
            connection.close()
    sent = sum(each for _, each in posted)
    return f"{number} bodies of {BODY_BYTES / MB:.0f} MB, of which {sent / MB:,.0f} MB were taken off the sender"


def idle(address: tuple[str, int], keys: Path, number: int) -> str:
    """Opens connections that send nothing, half of them after a handshake, and waits until the server may have closed them."""
    context, opened, refused = trusting(keys), [], 0
    for each in range(number):
        try:
            connection = socket.create_connection(address, timeout=15)
            opened.append(context.wrap_socket(connection) if each % 2 else connection)
        except OSError:
            refused += 1
    time.sleep(15)
    left = 0
    for connection in opened:
        connection.setblocking(False)
        try:
            left += connection.recv(1) != b""
        except (BlockingIOError, ssl.SSLWantReadError):
            left += 1
        except OSError:
            pass
        connection.close()
    return f"{number} connections, {refused} refused at once, {left} still open after 15 s"


def measured(name: str, superlink: int, attack: Callable[[], str], ask_again: Callable[[], bool]) -> None:
    """Prints a line for `attack`, during which a registered node asks every half second."""
    Path(f"/proc/{superlink}/clear_refs").write_text("5")  # the peak begins anew
    before = memory(superlink)
    with ThreadPoolExecutor(1) as pool:
        running, answers = pool.submit(attack), []
        while not running.done():
            started = time.perf_counter()
            answers.append((ask_again(), time.perf_counter() - started))
            time.sleep(0.5)
    peak = memory(superlink, "VmHWM")
    unanswered, slowest = sum(not answered for answered, _ in answers), max(seconds for _, seconds in answers)
    print(f"{name}: {running.result()}")
    print(f"  memory {before:.0f} MB, peak {peak:.0f} MB ({peak / before:.2f} x)")
    print(
        f"  a registered node asked {len(answers)} times: {unanswered} unanswered, the slowest took {slowest:.1f} s", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--connections", type=int, default=1000)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    host, port = own_address(), free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_keys(folder / "keys", ["localhost", host], ["north"])
        keys = folder / "keys" / "north"
        with Federation(folder / "home", host="0.0.0.0", port=port, keys=folder / "keys" / "server") as federation:
            pid = federation.superlink.pid

            def knows_us() -> bool:
                info = ask(f"localhost:{port}", keys, signed_headers(keys))
                return info is not None and info.said is not None and info.said.get("registered") is True

            print(f"{sys.version.split()[0]}, attacked from {host}")
            measured("bodies", pid, lambda: bodies((host, port), keys, options.megabytes), knows_us)
            measured("idle", pid, lambda: idle((host, port), keys, options.connections), knows_us)


if __name__ == "__main__":
    main()
