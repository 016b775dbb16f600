"""What it costs to carry a run: time, bytes and memory of the three engines, and a worker that stays against one that does not.

    python -m benchmarks.engines [rounds] [wire] [memory] [worker] [--repeat 3]

Nobody trains: each client answers with noise of the size of what it was sent. Parts (all, where none is named):

rounds     three clients of the shipped `small`, five rounds of FedAvg: seconds of a round (sending, answering, merging; median of
           the rounds after the first) and of the start (until the first round's end, less a round), for the local engine and
           Flower's simulation with two workers each, and a deployment on loopback with TLS and node keys; engines take turns.
wire       bytes that such rounds send, both ways, over the ledger's. Local: what goes through the pipes; simulation: messages as
           Ray serializes them; deployment: all that goes over TCP between SuperNodes and SuperLink (a proxy between them
           counts), heartbeats and polls included. After the first round its clients' model folder is removed, so that nobody can
           load it again.
memory     ten clients × 200 MB, a whole run of two rounds, from loading the base to the last checkpoint: the peak of the process
           that runs the rounds over what it held after its imports, and that of the SuperLink over what it held before the
           first job, in model sizes. In the deployment one process plays the nodes, and the first client answers last, so that
           nine answers wait. On the local engine the process of the rounds holds the base for its workers.
worker     a message with a job to a worker that stays, and to a new one for each: seconds, and seconds of processor time.
"""

import argparse
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Lock, Thread
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import long_lived, memory
from benchmarks.engine_starts import (
    ENGINES,
    ROUNDS,
    SENT,
    STARTS,
    Start,
    in_process,
    joined,
    on_deployment,
    on_local,
    on_simulation,
    settings,
)
from fedexperts.core.ledger import Ledger
from fedexperts.engines import local
from fedexperts.experiment.runtime import clock_for
from fedexperts.experiment.setup import Prepared, prepare_run
from fedexperts.federation import federate
from fedexperts.models.files import location_of
from fedexperts.types import Engine, Job

IDLE_SECONDS = 20


@dataclass(frozen=True)
class Measured:
    start_seconds: float
    round_seconds: float
    ledger_bytes: int  # of the rounds after the first


def measure(prepared: Prepared, out: Path, start: Start, after_first: Callable[[], None] = lambda: None) -> Measured:
    ledger, ends, counted = Ledger(clock_for(prepared)), [perf_counter()], 0
    clients = len(prepared.config.data.names)
    with start(prepared, out) as engine:
        for server in federate(prepared.server, prepared.method, engine, ledger, rounds=ROUNDS, clients_per_round=clients):
            ends.append(perf_counter())
            if failed := [f"{entry.client}: {entry.failed}" for entry in ledger.entries if entry.failed]:
                raise RuntimeError("; ".join(failed))
            if server.round == 1:
                after_first()
            else:
                counted += sum(entry.bytes_down + entry.bytes_up for entry in ledger.entries)
            ledger.clear()
    seconds = [end - begin for begin, end in pairwise(ends)]
    usual = statistics.median(seconds[1:])
    return Measured(seconds[0] - usual, usual, counted)


def rounds(repeat: int) -> Table:
    table = Table("engine", "sent", "start-up s", "round s", "each repeat: start-up, round")
    for sent in SENT:
        measured: dict[str, list[Measured]] = {engine: [] for engine in ENGINES}
        for _ in range(repeat):
            for engine in ENGINES:
                measured[engine].append(Measured(**in_process("engines", "timed", engine, sent)))
        for engine, each in measured.items():
            start, usual = (statistics.median(values) for values in zip(*map(seconds_of, each), strict=True))
            every = "  ".join("{:.1f}, {:.2f}".format(*seconds_of(one)) for one in each)
            table.add_row(engine, sent, f"{start:.1f}", f"{usual:.2f}", every)
    return table


def seconds_of(measured: Measured) -> tuple[float, float]:
    return measured.start_seconds, measured.round_seconds


def timed(engine: str, sent: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        return asdict(measure(prepare_run(settings(sent)), Path(folder), STARTS[engine]))


def wire(repeat: int) -> Table:
    table = Table("engine", "sent", "ledger MB", "on the wire MB", "over the ledger's", "besides")
    for sent in SENT:
        for engine in ENGINES:
            carried, counted, besides = in_process("engines", f"weigh_{engine}", sent)
            row = (f"{counted / 1e6:.3f}", f"{carried / 1e6:.3f}", f"{carried / counted:.4f}", besides)
            table.add_row(engine, sent, *row)
    return table


def weigh_local(sent: str) -> tuple[int, int, str]:
    """Bytes carried and counted after the first round, and what else is to be said."""
    carried: list[int] = []
    before: list[int] = []
    pack, unpack = local.pack_job, local.unpack_answer

    def packed(job: Job) -> bytes:
        data = pack(job)
        carried.append(len(data))
        return data

    def unpacked(data: bytes) -> Any:
        carried.append(len(data))
        return unpack(data)

    local.pack_job, local.unpack_answer = packed, unpacked
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        measured = measure(prepare_run(settings(sent)), Path(folder), on_local, lambda: before.append(sum(carried)))
    return sum(carried) - before[0], measured.ledger_bytes, ""


@dataclass
class Weighed:
    """A grid, and the bytes of the messages that it carried."""

    grid: Any
    bytes: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def push_messages(self, messages: list[Any]) -> Any:
        return self.grid.push_messages([self.weighed(message) for message in messages])

    def pull_messages(self, ids: list[str]) -> list[Any]:
        return [self.weighed(message) for message in self.grid.pull_messages(ids)]

    def weighed(self, message: Any) -> Any:
        from ray import cloudpickle

        self.bytes += len(cloudpickle.dumps(message))
        return message


def weigh_simulation(sent: str) -> tuple[int, int, str]:
    grids: list[Weighed] = []
    before: list[int] = []

    def carried(grid: Any) -> Weighed:
        grids.append(Weighed(grid))
        return grids[0]

    start = partial(on_simulation, carried=carried)
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        measured = measure(prepare_run(settings(sent)), Path(folder), start, lambda: before.append(grids[0].bytes))
    return grids[0].bytes - before[0], measured.ledger_bytes, ""


class Proxy:
    """Listens at `port`, hands all on to `target`, and counts the bytes both ways."""

    def __init__(self, target: int) -> None:
        self.target, self.bytes, self.lock = target, 0, Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            far = socket.create_connection(("127.0.0.1", self.target))
            for source, to in ((near, far), (far, near)):
                Thread(target=self.carry, args=(source, to), daemon=True).start()

    def carry(self, source: socket.socket, to: socket.socket) -> None:
        try:
            while data := source.recv(2**16):
                with self.lock:
                    self.bytes += len(data)
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)
        except OSError:  # one of the two has gone
            source.close()
            to.close()


def weigh_deployment(sent: str) -> tuple[int, int, str]:
    proxies: list[Proxy] = []
    counts: dict[str, float] = {}

    def port_for(server: int) -> int:
        proxies.append(Proxy(server))
        return proxies[0].port

    with tempfile.TemporaryDirectory(prefix="engines-") as temporary:
        folder = Path(temporary)
        model = Path(shutil.copytree(location_of("small"), folder / "model"))
        prepared = prepare_run(settings(sent, str(model)))

        def after_first() -> None:
            shutil.rmtree(model)
            counts.update(bytes=proxies[0].bytes, since=perf_counter())

        @contextmanager
        def start(prepared: Prepared, out: Path) -> Iterator[Engine]:
            with on_deployment(prepared, out, joined, port_for) as engine:
                yield engine
                counts.update(carried=proxies[0].bytes - counts["bytes"], seconds=perf_counter() - counts["since"])
                before = proxies[0].bytes
                time.sleep(IDLE_SECONDS)
                counts["idle"] = (proxies[0].bytes - before) / IDLE_SECONDS / len(prepared.config.data.names)

        measured = measure(prepared, folder, start, after_first)
        loads = [path.read_text().count("loaded the base model") for path in sorted(folder.glob("c*/client.log"))]
    besides = f"in {counts['seconds']:.0f} s; idle {counts['idle']:.0f} bytes/s a client; bases loaded by the clients: {loads}"
    return int(counts["carried"]), measured.ledger_bytes, besides


PARTS: Mapping[str, Callable[[int], Table]] = {
    "rounds": rounds,
    "wire": wire,
    "memory": memory.table,
    "worker": long_lived.table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=PARTS)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    os.environ.update(PYTHONPATH=str(Path(__file__).resolve().parents[1]), OMP_NUM_THREADS="1")  # of all processes that come
    for name in options.parts or PARTS:
        Console(width=130).print(PARTS[name](options.repeat))


if __name__ == "__main__":
    main()
