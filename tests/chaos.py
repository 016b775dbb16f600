"""Kills processes of a deployment on this machine at random, and checks that its run ends as if nothing had happened.

    python tests/chaos.py OUT [--seeds 5] [--first-seed 0] [--rounds 12] [--clients 4] [--kills 8] [--faults]

It sends SIGKILL to a client's worker, the process that forwards a message to it (clientapp) and the one that starts such
processes (superexec), its SuperNode, the command that supervises them, and all of these at once (machine); to the server's
SuperLink, and its command. Commands are started again as systemd would.
Victims and times are drawn from the seed; what Flower does at these times is not.

With --faults (root on Linux, and Debian's faketime) it also stops a client's processes with SIGSTOP for 10 to 120 s, of which a
round waits for 90; restarts a client with a clock that is 60 s ahead or behind, for 90 s; fills the disk of a client, and of the
server, for 20 to 60 s; and changes a byte of what a client keeps.

At the end the same run is done on the local engine, with the same answers missing: the server's weights and state and the
clients' states must be the same, byte for byte. `unsaid` has the faults that no log names: where
all the rest is right, they met nothing (a disk is full while nobody writes, a damaged version is not read again).
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import tomli_w
from deployed import PATIENCE, Processes, below, parent, processes, running, send_signal

from fedexperts import config
from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.processes import free_port
from fedexperts.engines.local import LocalEngine
from fedexperts.experiment import checkpoint, runner
from fedexperts.experiment.runtime import runtime_for
from fedexperts.experiment.setup import Prepared
from fedexperts.io import manifest
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.testing import tiny_model
from fedexperts.types import Engine, Failure, Job, Update, job_key

COMMANDS = {"worker": "fedexperts.deploy.client", "superexec": "deploy.superexec", "supernode": "deploy.supernode"}
KINDS = (*COMMANDS, "clientapp", "client", "machine", "superlink", "server")
FAULTS = ("stopped", "clock ahead", "clock behind", "client's disk", "server's disk", "damage")
MAX_DELAY_SECONDS = 8.0
SLOWER = {"round_seconds": 90.0, "local_steps": 20}
SERVER = "server"
DISK = "64m"
DAMAGED = "is damaged; restore"


def chaos(folder: Path, model: Path, seed: int, *, clients: int, rounds: int, kinds: list[str]) -> dict[str, Any]:
    """Kills one process of each of `kinds`, in a drawn order and at drawn times, and returns how the run ended."""
    rng, names = Random(seed), [f"client{number}" for number in range(1, clients + 1)]
    faults = any(kind in FAULTS for kind in kinds)
    write_run(folder, model, names, rounds, **SLOWER if faults else {})
    make_keys(folder / "keys", ["localhost"], names)
    port, out = free_port(), folder / "out"
    plan = sorted((rng.uniform(0.5, rounds - 0.5), kind) for kind in rng.sample(kinds, len(kinds)))
    killed, starts, began = [], 0, time.monotonic()
    repairs: list[tuple[float, Callable[[], None]]] = []  # when, and what

    with disks([folder / name for name in ("out", *names)] if faults else []), processes(folder) as started:
        for name in names:
            start_client(started, folder, name, port)
        start_server(started, folder, port)
        due = None
        while (code := started.running[SERVER].poll()) != 0:
            if time.monotonic() > began + PATIENCE * (2 + rounds):
                raise AssertionError(f"seed {seed}: not finished; {started.log(SERVER)[-2000:]}")
            if code is not None:
                starts += 1
                start_server(started, folder, port)
            for name in names:
                if started.running[name].poll() is not None:
                    start_client(started, folder, name, port)
            for repair in [each for each in repairs if time.monotonic() >= each[0]]:
                repair[1]()
                repairs.remove(repair)
            if plan and due is None and recorded(out) >= int(plan[0][0]):
                due = time.monotonic() + rng.uniform(0, MAX_DELAY_SECONDS)
            if plan and due is not None and time.monotonic() >= due:
                kind, victim = plan.pop(0)[1], rng.choice(names)
                repair = fault(started, folder, kind, victim, port, rng) if kind in FAULTS else None
                if repair is not None:
                    repairs.append(repair)
                if repair is not None or (kind not in FAULTS and kill(started, folder, kind, victim)):
                    killed.append([recorded(out), kind, None if "server" in kind or kind == "superlink" else victim])
                    due = None
                else:  # it is starting, or has nothing to do
                    plan.insert(0, (0.0, kind))
            time.sleep(0.1)
    return {
        "seed": seed,
        "killed": killed,
        "server starts": starts + 1,
        "seconds": round(time.monotonic() - began),
        **outcome(folder, names),
        "unsaid": unsaid(folder, killed),
    }


@contextmanager
def disks(folders: Sequence[Path]) -> Iterator[None]:
    """Small disks in memory, as `folders`; what they had at the end stays."""
    for folder in folders:
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        for folder in folders:
            copy = folder.with_name(f".{folder.name}")
            shutil.copytree(folder, copy, symlinks=True, ignore_dangling_symlinks=True, ignore=sockets)
            subprocess.run(["umount", "--lazy", folder], check=True)
            folder.rmdir()
            copy.rename(folder)


def sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_socket()]


def fault(
    started: Processes, folder: Path, kind: str, victim: str, port: int, rng: Random
) -> tuple[float, Callable[[], None]] | None:
    """Does something bad of a kind; returns when to repair it and how, or None if it could not be done yet."""
    now = time.monotonic()
    if kind == "stopped":
        pids = of_client(folder / victim, rng.choice([*COMMANDS]))
        for pid in pids:
            send_signal(pid, signal.SIGSTOP)
        return (now + rng.uniform(10, 120), lambda: [send_signal(pid, signal.SIGCONT) for pid in pids]) if pids else None
    if kind.startswith("clock"):
        kill(started, folder, "machine", victim)
        start_client(started, folder, victim, port, "+60s" if kind == "clock ahead" else "-60s")
        return now + 90, lambda: kill(started, folder, "machine", victim)  # it is started again, with the right clock
    if kind == "damage":
        states = sorted((folder / victim).glob(f"*/clients/{victim}/[0-9]*.safetensors"))
        if not states:
            return None
        content = bytearray(states[-1].read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        states[-1].write_bytes(content)
        return now, lambda: None
    full = folder / ("out" if kind == "server's disk" else victim) / "full"
    with suppress(OSError), full.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    return now + rng.uniform(20, 60), full.unlink


def unsaid(folder: Path, done: Sequence[Sequence[Any]]) -> list[str]:
    """The faults that no log names."""
    said = {path.stem: path.read_text() for path in folder.glob("*.log")}
    failed = [line["failed"] for line in lines(folder / "out" / "ledger.jsonl") if line["failed"]]
    victims = {kind: victim for _, kind, victim in done}
    found = []
    if "clock ahead" in victims and not re.search(r"its clock is \d+ s ahead", said[victims["clock ahead"]]):
        found.append("clock ahead")
    if "server's disk" in victims and "No space left on device" not in said[SERVER]:
        found.append("server's disk")
    if "damage" in victims and not any(DAMAGED in reason for reason in failed):
        found.append("damage")
    return found


def write_run(
    folder: Path, model: Path, names: list[str], rounds: int, round_seconds: float = PATIENCE, local_steps: int = 2
) -> None:
    tree = {
        "model": {"name": str(model)},
        "method": {"name": "ditto"},  # each client keeps a model of its own
        "training": {"batch_size": 2, "local_steps": local_steps, "validation_examples": 2},
        "federation": {"rounds": rounds, "engine": "flower", "round_seconds": round_seconds},
        "evaluation": {"every": rounds, "generate_tokens": 2},
        "data": {
            "sources": ["synthetic/double", "synthetic/first"],
            "names": names,
            "limit": 16,
            "test_examples": 2,
            "max_tokens": 24,
        },
    }
    (folder / "run.toml").write_text(tomli_w.dumps(tree))


def start_client(started: Processes, folder: Path, name: str, port: int, clock: str = "") -> None:
    where = ("--server", f"localhost:{port}", "--run", folder / "run.toml")
    options = ("--name", name, *where, "--keys", folder / "keys" / name, "--out", folder / name)
    started.start(name, "client", *options, more={"LD_PRELOAD": str(faketime()), "FAKETIME": clock} if clock else None)


def faketime() -> Path:
    """The library that the command of this name preloads; the command itself would stand between a client and this process."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


def start_server(started: Processes, folder: Path, port: int) -> None:
    options = ("--out", folder / "out", "--keys", folder / "keys" / "server", "--port", port, "--resume", "--quiet")
    started.start(SERVER, "server", folder / "run.toml", *options)


def kill(started: Processes, folder: Path, kind: str, victim: str) -> bool:
    """Whether there was a process of that kind to kill."""
    if kind == "server":
        started.kill(SERVER)
        return True
    if kind in ("client", "machine"):
        started.kill(victim)
        for pid in below(folder / victim) if kind == "machine" else []:
            send_signal(pid)
        return True
    pids = running(folder, "deploy.superlink") if kind == "superlink" else of_client(folder / victim, kind)
    for pid in pids:
        send_signal(pid)
    return bool(pids)


def of_client(folder: Path, kind: str) -> list[int]:
    """Its processes of this kind. A clientapp is forked from the SuperExec, and has its command."""
    pids = running(folder, COMMANDS["superexec" if kind == "clientapp" else kind])
    if kind in ("superexec", "clientapp"):
        return [pid for pid in pids if (parent(pid) in pids) == (kind == "clientapp")]
    return pids


def recorded(out: Path) -> int:
    """The number of rounds that the server has recorded."""
    rounds = out / "rounds.jsonl"
    return len(rounds.read_text().splitlines()) if rounds.exists() else 0


def outcome(folder: Path, names: list[str]) -> dict[str, Any]:
    """The rounds that were recorded, the answers that are missing, and the clients that lost client state.

    The ledger says which of a client's answers counted last: the client must have its state of that job, byte for byte.
    """
    out, local = folder / "out", folder / "local"
    ledger = lines(out / "ledger.jsonl")
    missing = {(line["client"], line["round"], line["task"]): line["failed"] for line in ledger if line["failed"]}
    runner.run(config.read(folder / "run.toml", []), local, engine=partial(without, missing))
    lost = []
    for name in names:
        answered = [line["round"] for line in ledger if (line["client"], line["task"], line["failed"]) == (name, "train", None)]
        last = job_key(answered[-1], "train") if answered else ""
        states = tensor_files(folder / name / (out / "id").read_text() / "clients" / name)
        expected = tensor_files(local / "clients" / name).get(last)
        damaged = any(reason.startswith(f"its client state of {last} ") for (who, *_), reason in missing.items() if who == name)
        if last and not damaged and (expected is None or states.get(last) != expected):
            lost.append({"client": name, "accepted": last, "states": sorted(states)})
    return {
        "rounds": [line["round"] for line in lines(out / "rounds.jsonl")],
        "answers": sum(line["task"] == "train" and not line["failed"] for line in ledger),
        "failed": [[*whose[:2], reason] for whose, reason in missing.items()],
        "server as on the local engine": same(out, local),
        "lost": lost,
    }


@contextmanager
def without(missing: Mapping[tuple[str, int, str], str], prepared: Prepared, out: Path) -> Iterator[Engine]:
    """A local engine on which answers are `missing`: client, round and task → why."""
    with LocalEngine(runtime_for(prepared, out)) as engine:
        yield Forgetful(engine, missing, out / "clients")


class Forgetful:
    """An engine that loses the answers that are `missing`."""

    def __init__(self, engine: Engine, missing: Mapping[tuple[str, int, str], str], kept: Path) -> None:
        self.engine, self.missing, self.kept = engine, missing, kept

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        for job in jobs:
            reason = self.missing.get((job.client, job.round, job.task))
            if reason is None:
                yield from self.engine.run([job])
            else:
                if DAMAGED in reason:  # so its next job goes on from the version before
                    (self.kept / job.client / f"{reason.split()[4]}.safetensors").unlink()
                yield Failure(job.client, job.round, job.task, reason)


def tensor_files(folder: Path) -> dict[str, bytes]:
    """The files of tensors in `folder`, by name: weights, the method's state, or the versions of a client state."""
    return {path.stem: path.read_bytes() for path in folder.glob("*.safetensors")}


def same(out: Path, local: Path) -> bool:
    """Whether two runs ended with the same weights and method state, and logged the same of every round."""
    ends = [tensor_files(checkpoint.latest(run)) for run in (out, local)]
    logs = [[lines(run / name) for name in manifest.LOGS] for run in (out, local)]
    return ends[0] == ends[1] and logs[0] == logs[1]


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without measured seconds."""
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in path.read_text().splitlines()]


def make_model(folder: Path) -> Path:
    tokenizer = make_tokenizer(max_tokens=48)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_model("olmoe", vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    for name, default in (("seeds", 5), ("first-seed", 0), ("rounds", 12), ("clients", 4), ("kills", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--faults", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    model = make_model(options.out / "model")
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        folder = options.out.resolve() / str(seed)
        folder.mkdir()
        kinds = [KINDS[number % len(KINDS)] for number in range(options.kills)] + [*FAULTS] * options.faults
        print(json.dumps(chaos(folder, model, seed, clients=options.clients, rounds=options.rounds, kinds=kinds)), flush=True)


if __name__ == "__main__":
    main()
