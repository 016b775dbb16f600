"""Whether rounds go on while strangers attack the server: benchmarks/door.py's two attacks, on a whole deployment.

    python -m benchmarks.door_rounds OUT [--rounds 12] [--model small]

A server with keys that listens on all networks, and two clients, which train and send the whole model. After a third of the
rounds two attacks begin, from an address that counts as another machine's: 800 MB of bodies and 1,000 connections, again and
again, until two thirds of the rounds are done. It prints the seconds of the rounds before, under and after the attacks, the jobs
that failed, and the memory of the SuperLink. Everything, the attackers too, runs on this machine.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread

from benchmarks.door import bodies, idle, memory, own_address
from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.processes import free_port

CLIENTS = ("north", "south")
RUN = """
model = {{ name = "{model}" }}
method = {{ name = "fedavg" }}
training = {{ batch_size = 4, local_steps = 5 }}
federation = {{ rounds = {rounds}, engine = "flower", round_seconds = 300 }}
evaluation = {{ every = {rounds}, generate_tokens = 2 }}
[data]
sources = ["synthetic/double", "synthetic/first"]
names = ["north", "south"]
limit = 60
test_examples = 2
max_tokens = 48
"""


@contextmanager
def deployment(folder: Path, host: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server's command and those of two clients, each in a session of its own; ended together."""
    keys, run_file = folder / "keys", folder / "run.toml"
    make_keys(keys, ["localhost", host], CLIENTS)
    commands = {"server": ["--out", folder / "out", "--keys", keys / "server", "--host", "0.0.0.0", "--port", port, run_file]}
    for name in CLIENTS:
        where = ["--server", f"localhost:{port}", "--run", run_file]
        commands[name] = ["--name", name, *where, "--keys", keys / name, "--out", folder / name]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, options in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                what = "client" if name in CLIENTS else "server"
                line = [sys.executable, "-m", "fedexperts", what, *map(str, options)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                started.append(subprocess.Popen(line, stdout=log, stderr=log, env=environment, start_new_session=True))
        yield started[0]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            process.wait(60)


def superlink(port: int) -> int:
    """The process that listens on `port`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0") if path.exists() else []
        if b"fedexperts.deploy.superlink" in words and any(str(port).encode() in word for word in words):
            return int(path.parent.name)
    raise SystemExit("no SuperLink is running")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def again(attack: str, address: tuple[str, int], keys: Path, over: Event, done: list[str]) -> None:
    """One of the two attacks, until it is `over`."""
    while not over.is_set():
        done.append(bodies(address, keys, 800) if attack == "bodies" else idle(address, keys, 1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--model", default="small")
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(RUN.format(model=options.model, rounds=options.rounds))
    host, port, log = own_address(), free_port(), folder / "out" / "rounds.jsonl"
    over, done, ended = Event(), [], [time.monotonic()]
    attackers = [
        Thread(target=again, args=(attack, (host, port), folder / "keys" / CLIENTS[0], over, done))
        for attack in ("bodies", "connections")
    ]
    third, peaks = options.rounds // 3, []
    starts = iter([1, third, 2 * third])  # when the peak that is measured begins anew
    start = next(starts, None)
    with deployment(folder, host, port) as server:
        while server.poll() is None:
            time.sleep(0.1)
            recorded = len(lines(log))
            ended += [time.monotonic()] * (recorded + 1 - len(ended))
            if start is not None and recorded >= start:
                pid = superlink(port)
                peaks.append(memory(pid, "VmHWM"))
                Path(f"/proc/{pid}/clear_refs").write_text("5")
                if start == third:
                    for each in attackers:
                        each.start()
                elif start == 2 * third:
                    over.set()
                start = next(starts, None)
        over.set()
    for each in attackers:
        each.join()
    seconds = [b - a for a, b in pairwise(ended)]
    for name, part in (
        ("before", seconds[1:third]),
        ("under attack", seconds[third : 2 * third]),
        ("after", seconds[2 * third :]),
    ):
        print(f"rounds {name}: {len(part)}, median {statistics.median(part):.1f} s, longest {max(part):.1f} s")
    failed = [line for line in lines(folder / "out" / "ledger.jsonl") if line["failed"]]
    print(f"the server ended with {server.returncode}; rounds {len(lines(log))}, jobs that failed {len(failed)}")
    _, quiet, attacked = peaks
    print(
        f"SuperLink, peak: {quiet:.0f} MB in the rounds before the attacks, {attacked:.0f} under them ({attacked / quiet:.2f} x)"
    )
    print("\n".join(done))


if __name__ == "__main__":
    main()
