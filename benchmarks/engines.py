"""What it costs to carry a run: time, bytes and memory of the three engines, and a worker that stays against one that does not.

    python -m benchmarks.engines [rounds] [wire] [memory] [resident] [--repeat 3]

Nobody trains: each client answers with noise of the size of what it was sent. Parts (all, where none is named):

rounds     three clients of the shipped `small`, five rounds of FedAvg: seconds of a round (sending, answering, merging; median of
           the rounds after the first) and of the start (until the first round's end, less a round), for the local engine and
           Flower's simulation with two workers each, and a deployment on loopback with TLS and node keys; engines take turns.
wire       bytes that such rounds send, both ways, over the ledger's. Local: what goes through the pipes; simulation: messages as
           Ray serialises them; deployment: all that goes over TCP between SuperNodes and SuperLink (a relay between them
           counts), heartbeats and polls included. After the first round its clients' model folder is removed, so that nobody can
           load it again.
memory     ten clients × 200 MB, a whole run of two rounds, from loading the base to the last checkpoint: the peak of the process
           that runs the rounds over what it held after its imports, and that of the SuperLink over what it held before the
           first job, in model sizes. In the deployment one process plays the nodes, and the first client answers last, so that
           nine answers wait. On the local engine the process of the rounds holds the base for its workers.
resident   a message with a job to a worker that stays, and to a new one for each: seconds, and seconds of processor time.
"""

import argparse
import json
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Lock, Thread
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.idle import idle_site
from fedexperts.config import RunConfig
from fedexperts.core.ledger import Ledger
from fedexperts.deploy import server
from fedexperts.deploy.deployment import Federation
from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.processes import free_port, process, return_memory
from fedexperts.deploy.socket_rpc import ask, listening
from fedexperts.engines import local
from fedexperts.engines.flower.simulation import Simulation
from fedexperts.engines.message import Message
from fedexperts.engines.remote import order
from fedexperts.experiment import flower, runner
from fedexperts.experiment.runtime import clock_for
from fedexperts.experiment.setup import Prepared, prepare_run
from fedexperts.federation import federate, jobs_for
from fedexperts.io.toml import checked, to_toml
from fedexperts.models.load import location_of
from fedexperts.types import Engine, Job

ADAPTERS = {"train": "lora", "parts": ["attention"], "attention_modules": ["q_proj", "k_proj", "v_proj"], "rank": 32, "alpha": 64}
SENT: Mapping[str, Mapping[str, Any]] = {"adapters": ADAPTERS, "all weights": {"train": "full"}}
ENGINES = ("local", "simulation", "deployment")
ROUNDS = 5
IDLE_SECONDS = 20
JOBS = 50  # to a worker that stays, for each to a new one: the processor's time is told in hundredths
WIDE = 880  # of an expert: with it `small` has 50 M parameters, 200 MB
ROOT = Path(__file__).resolve().parents[1]
CLIENT = """
import json, sys
from pathlib import Path
from fedexperts.engines.flower.member import Member
told = json.loads(sys.argv[1])
Member(told["name"], told["server"], Path(told["home"]), Path(told["keys"]), told["worker"], print).run()
"""

Start = Callable[[Prepared, Path], AbstractContextManager[Engine]]


def settings(
    sent: str, model: str = "small", clients: int = 3, rounds: int = ROUNDS, score: str = "after_aggregation"
) -> RunConfig:
    return checked(
        RunConfig,
        {
            "model": {"name": model},
            "method": {"name": "fedavg"},
            "training": {"batch_size": 2, "local_steps": 1, **SENT[sent]},
            "federation": {"rounds": rounds, "engine": "flower", "workers": 2},
            "evaluation": {"score": score},
            "data": {
                "sources": ["synthetic/double", "synthetic/first"],
                "names": [f"c{number:02}" for number in range(clients)],
                "limit": 30 * clients,
                "test_examples": 4,
                "max_tokens": 64,
            },
        },
    )


def python(code: str, *arguments: object) -> list[str]:
    """The command of a process of ours."""
    return [sys.executable, "-c", code, *map(str, arguments)]


def in_process(name: str, *given: object) -> Any:
    """What the function `name` of this file gives, called in a process of its own: each measurement starts from nothing."""
    code = "import json, sys; from benchmarks import engines; given = json.loads(sys.argv[1])"
    code += f"; print(json.dumps(engines.{name}(*given)))"
    done = subprocess.run(python(code, json.dumps(given)), stdout=subprocess.PIPE, text=True, check=True)
    found = done.stdout.splitlines()[-1]
    print(name, *given, found, flush=True)
    return json.loads(found)


# The engines


def on_local(prepared: Prepared, out: Path) -> AbstractContextManager[Engine]:
    return local.LocalEngine(idle_site(prepared, out), workers=2)


@contextmanager
def on_simulation(prepared: Prepared, out: Path, carried: Callable[[Any], Any] = lambda grid: grid) -> Iterator[Engine]:
    with (
        Simulation(play, len(prepared.config.data.names), workers=2) as simulation,
        flower.over(carried(simulation.grid), simulation.check)(prepared, out) as engine,
    ):
        del prepared  # as in `flower.simulated`
        yield engine


def play(message: Message, node: Mapping[str, Any]) -> Message:
    flower.runtime_for = idle_site  # in the process that plays clients
    return flower.play(message, node)


Join = Callable[[RunConfig, Path, str], AbstractContextManager[None]]


@contextmanager
def on_deployment(prepared: Prepared, out: Path, join: Join, port_for: Callable[[int], int] = int) -> Iterator[Engine]:
    """`join` starts the clients, `port_for` gives them the port that leads to the server's."""
    config, port = prepared.config, free_port()
    names = config.data.names
    make_keys(out / "keys", ["localhost"], names)
    with Federation(out / "federation", port=port, keys=out / "keys" / "server") as federation:
        bounds: dict[str, Any] = {
            "names": federation.names,
            "since": lambda: {node.node_id: node.last_activated_at for node in federation.grid.get_nodes()},
            "poll_seconds": server.POLL_SECONDS,
            "in_flight": len(names),
        }
        over = flower.over(federation.grid, federation.check, patience=server.PATIENCE_SECONDS, **bounds)
        with join(config, out, f"localhost:{port_for(port)}"), over(prepared, out) as engine:
            del prepared  # or the base would stay, which the server of a run lets go of
            yield engine


@contextmanager
def joined(config: RunConfig, out: Path, server: str) -> Iterator[None]:
    """The clients as `fedexperts client` starts them: for each a SuperNode, and a worker that stays."""
    with ExitStack() as stack:
        for name in config.data.names:
            home = out / name
            home.mkdir()
            worker = worker_command(config, name, out)
            told = {"name": name, "server": server, "home": str(home), "keys": str(out / "keys" / name), "worker": worker}
            stack.enter_context(process(python(CLIENT, json.dumps(told)), home, "client"))
        yield


def worker_command(config: RunConfig, name: str, out: Path) -> list[str]:
    """Of a resident worker."""
    run = out / "run.toml"
    out.mkdir(exist_ok=True)
    run.write_text(to_toml(config.resolved()))
    told = {"name": name, "run": str(run), "set": [], "folder": str(out / name), "data": [], "devices": {}}
    return python("from benchmarks.idle import worker; worker()", json.dumps(told))


@contextmanager
def played(config: RunConfig, out: Path, server: str) -> Iterator[None]:
    """All clients in one process: ten SuperNodes and what they start would take most of 10 GB."""
    told = {"settings": config.resolved(), "server": server, "keys": str(out / "keys"), "out": str(out)}
    with process(python("from benchmarks.idle import nodes; nodes()", json.dumps(told)), out, "nodes"):
        yield


STARTS: Mapping[str, Start] = {
    "local": on_local,
    "simulation": on_simulation,
    "deployment": partial(on_deployment, join=joined),
}


# Rounds and their bytes


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
        found: dict[str, list[Measured]] = {engine: [] for engine in ENGINES}
        for _ in range(repeat):
            for engine in ENGINES:
                found[engine].append(Measured(**in_process("timed", engine, sent)))
        for engine, each in found.items():
            start, usual = (statistics.median(values) for values in zip(*map(seconds_of, each), strict=True))
            every = "  ".join("{:.1f}, {:.2f}".format(*seconds_of(one)) for one in each)
            table.add_row(engine, sent, f"{start:.1f}", f"{usual:.2f}", every)
    return table


def seconds_of(found: Measured) -> tuple[float, float]:
    return found.start_seconds, found.round_seconds


def timed(engine: str, sent: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        return asdict(measure(prepare_run(settings(sent)), Path(folder), STARTS[engine]))


def wire(repeat: int) -> Table:
    table = Table("engine", "sent", "ledger MB", "on the wire MB", "over the ledger's", "besides")
    for sent in SENT:
        for engine in ENGINES:
            carried, counted, besides = in_process(f"weigh_{engine}", sent)
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
        found = measure(prepare_run(settings(sent)), Path(folder), on_local, lambda: before.append(sum(carried)))
    return sum(carried) - before[0], found.ledger_bytes, ""


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
        found = measure(prepare_run(settings(sent)), Path(folder), start, lambda: before.append(grids[0].bytes))
    return grids[0].bytes - before[0], found.ledger_bytes, ""


class Relay:
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
    relays: list[Relay] = []
    counts: dict[str, float] = {}

    def port_for(server: int) -> int:
        relays.append(Relay(server))
        return relays[0].port

    with tempfile.TemporaryDirectory(prefix="engines-") as temporary:
        folder = Path(temporary)
        model = Path(shutil.copytree(location_of("small"), folder / "model"))
        prepared = prepare_run(settings(sent, str(model)))

        def after_first() -> None:
            shutil.rmtree(model)
            counts.update(bytes=relays[0].bytes, since=perf_counter())

        @contextmanager
        def start(prepared: Prepared, out: Path) -> Iterator[Engine]:
            with on_deployment(prepared, out, joined, port_for) as engine:
                yield engine
                counts.update(carried=relays[0].bytes - counts["bytes"], seconds=perf_counter() - counts["since"])
                before = relays[0].bytes
                time.sleep(IDLE_SECONDS)
                counts["idle"] = (relays[0].bytes - before) / IDLE_SECONDS / len(prepared.config.data.names)

        found = measure(prepared, folder, start, after_first)
        loads = [path.read_text().count("loaded the base model") for path in sorted(folder.glob("c*/client.log"))]
    besides = f"in {counts['seconds']:.0f} s; idle {counts['idle']:.0f} bytes/s a client; bases loaded by the clients: {loads}"
    return int(counts["carried"]), found.ledger_bytes, besides


# Memory


def memory(repeat: int) -> Table:
    table = Table("engine", "process", "peak in model sizes, over what it held before", "peak MB, all")
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        model = wide_model(Path(folder) / "model")
        for engine in ENGINES:
            for row in in_process("peaks", engine, str(model)):
                over = (row["peak"] - row["before"]) / row["model"]
                table.add_row(engine, row["process"], f"{over:.2f}", f"{row['peak'] / 1e6:.0f}")
    return table


def wide_model(folder: Path) -> Path:
    """A random model of 200 MB with the tokenizer of `small`."""
    config = AutoConfig.from_pretrained(location_of("small"), intermediate_size=WIDE, dtype="float32")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(location_of("small")) / name, folder)
    return folder


def peaks(engine: str, model: str) -> list[dict[str, Any]]:
    """What the server's processes took in a whole run of two rounds with ten clients, in bytes."""
    before = status("self", "VmRSS")
    forget("self")
    if engine == "deployment":
        return_memory()  # `fedexperts server` opens the federation, which does it, before it loads anything
    config = settings("all weights", model, clients=10, rounds=2, score="before_aggregation")
    start = partial(on_deployment, join=played) if engine == "deployment" else STARTS[engine]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        out = runner.run(config, Path(folder) / "run", engine=partial(watched, start, found))
        (weights,) = out.glob("checkpoint/*/weights.safetensors")
        lines = map(json.loads, (out / "rounds.jsonl").read_text().splitlines())
        assert not any(line["failed"] for line in lines), "an update that did not come would not count"
        own = {"process": "rounds", "before": before, "peak": status("self", "VmHWM")}
        return [{**row, "model": weights.stat().st_size} for row in (own, *found)]


@contextmanager
def watched(start: Start, found: list[dict[str, Any]], prepared: Prepared, out: Path) -> Iterator[Engine]:
    """The engine of `start`; at its end, the peaks of the SuperLinks that it has go to `found`."""
    with start(prepared, out) as engine:
        del prepared
        before = {pid: status(pid, "VmRSS") for pid in superlinks()}
        for pid in before:
            forget(pid)
        yield engine
        found += ({"process": "SuperLink", "before": rss, "peak": status(pid, "VmHWM")} for pid, rss in before.items())


def forget(pid: str) -> None:
    """The peak of a process begins anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def status(pid: str, what: str) -> int:
    """A line of /proc/PID/status in bytes."""
    (found,) = re.findall(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found) * 1024


def superlinks() -> list[str]:
    """The SuperLink that this process started, where it did."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in children if "deploy.superlink" in Path(f"/proc/{pid}/cmdline").read_text()]


# A worker that stays


def stays(repeat: int) -> Table:
    table = Table("base", "to one that stays: s, processor s", "to a new one", "over", "of that loading the base s")
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        for label, model in (("small, 43 MB", "small"), ("random, 200 MB", str(wide_model(Path(folder) / "model")))):
            old, new, loading = in_process("messages", model, repeat)
            over = " and ".join(f"{b / a:.0f}" for a, b in zip(old, new, strict=True))
            table.add_row(label, *("{:.3f}, {:.3f}".format(*each) for each in (old, new)), over, f"{loading:.2f}")
    return table


def messages(model: str, repeat: int) -> tuple[list[float], list[float], float]:
    """Medians: seconds and processor seconds of a job to a worker that stays, the same to a new one, seconds to load the base."""
    config = settings("adapters", model)
    prepared = prepare_run(config)
    old: list[tuple[float, float]] = []
    new: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        out = Path(folder)
        job = next(jobs_for(replace(prepared.server, round=1, task="train"), prepared.method, prepared.server.clients.values()))
        message = order(job, flower.about(config, prepared.base.identity, out), "")
        command, again = (worker_command(config, job.client, out / each) for each in ("old", "new"))  # one folder, one process
        with worker(command, out) as (path, pid):
            seconds(path, message)  # the first job loads the base
            for _ in range(repeat):
                before = processor(pid)
                each = statistics.median(seconds(path, message) for _ in range(JOBS))
                old.append((each, (processor(pid) - before) / JOBS))
                started, ended = perf_counter(), of_children()
                with worker(again, out) as (other, _):
                    seconds(other, message)
                    whole = perf_counter() - started
                new.append((whole, of_children() - ended))
        loads = re.findall(r"loaded the base model .* in ([\d.]+) s", (out / "worker.log").read_text())
    assert len(loads) == 1 + repeat, "each new worker loads, the one that stays once"
    middles = ([statistics.median(values) for values in zip(*each, strict=True)] for each in (old, new))
    return (*middles, statistics.median(map(float, loads[1:])))


@contextmanager
def worker(command: list[str], out: Path) -> Iterator[tuple[str, int]]:
    """A resident worker: where it listens, and its process."""
    with tempfile.TemporaryDirectory(prefix="engines-") as folder, listening(Path(folder) / "worker") as listener:
        number = listener.fileno()
        with process([*command, str(number)], out, "worker", pass_fds=(number,)) as child:
            yield str(Path(folder) / "worker"), child.pid


def seconds(path: str, message: Message) -> float:
    started = perf_counter()
    answer = ask(path, message)
    assert "update" in answer.head, answer.head
    return perf_counter() - started


def processor(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def of_children() -> float:
    """Seconds of processor time of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


PARTS: Mapping[str, Callable[[int], Table]] = {"rounds": rounds, "wire": wire, "memory": memory, "resident": stays}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=PARTS)
    parser.add_argument("--repeat", type=int, default=3)
    asked = parser.parse_args()
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")  # of all processes that come
    for name in asked.parts or PARTS:
        Console(width=130).print(PARTS[name](asked.repeat))


if __name__ == "__main__":
    main()
