"""A deployment on this machine whose processes are killed at random, and whether it ends as it should.

    python tests/chaos.py OUT [--seeds 5] [--rounds 12] [--clients 4] [--kills 8]

Killed with SIGKILL are a client's worker, its SuperNode, the command that watches both, and the server's command; commands are
started again as systemd would. What and when is drawn from the seed; what Flower is at by then is not.
"""

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import tomli_w
from deployed import PATIENCE, Processes, processes, running, signalled
from safetensors.torch import load_file

from fedexperts.base.tokenizer import make_tokenizer
from fedexperts.engines.flower.keys import make_keys
from fedexperts.engines.flower.processes import free_port
from fedexperts.engines.kept import key
from fedexperts.testing import tiny_model

KINDS = ("worker", "supernode", "client", "server")
MOST_SECONDS_LATER = 8.0
SERVER = "server"


def chaos(folder: Path, model: Path, seed: int, *, clients: int, rounds: int, kinds: list[str]) -> dict[str, Any]:
    """Kills one process of each of `kinds`, in a drawn order and at drawn times, and says what came of it."""
    rng, names = Random(seed), [f"site{number}" for number in range(1, clients + 1)]
    write_run(folder, model, names, rounds)
    make_keys(folder / "keys", ["localhost"], names)
    port, out = free_port(), folder / "out"
    plan = sorted((rng.uniform(0.5, rounds - 0.5), kind) for kind in rng.sample(kinds, len(kinds)))
    killed, starts, began = [], 0, time.monotonic()

    with processes(folder) as started:
        for name in names:
            start_client(started, folder, name, port)
        start_server(started, folder, port)
        due = None
        while (code := started.running[SERVER].poll()) != 0:
            if time.monotonic() > began + PATIENCE * (2 + rounds):
                raise AssertionError(f"seed {seed}: not finished; {started.said(SERVER)[-2000:]}")
            if code is not None:
                starts += 1
                start_server(started, folder, port)
            for name in names:
                if started.running[name].poll() is not None:
                    start_client(started, folder, name, port)
            if plan and due is None and recorded(out) >= int(plan[0][0]):
                due = time.monotonic() + rng.uniform(0, MOST_SECONDS_LATER)
            if plan and due is not None and time.monotonic() >= due:
                kind, victim = plan.pop(0)[1], rng.choice(names)
                if kill(started, folder, kind, victim):
                    killed.append([recorded(out), kind, None if kind == "server" else victim])
                    due = None
                else:  # it is just being started
                    plan.insert(0, (0.0, kind))
            time.sleep(0.1)
    return {
        "seed": seed,
        "killed": killed,
        "server starts": starts + 1,
        "seconds": round(time.monotonic() - began),
        **found(folder, names),
    }


def write_run(folder: Path, model: Path, names: list[str], rounds: int) -> None:
    tree = {
        "model": {"name": str(model)},
        "method": {"name": "ditto"},  # each client keeps a model of its own
        "training": {"batch_size": 2, "local_steps": 2, "validation_examples": 2},
        "federation": {"rounds": rounds, "engine": "flower", "round_seconds": PATIENCE},
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


def start_client(started: Processes, folder: Path, name: str, port: int) -> None:
    where = ("--server", f"localhost:{port}", "--run", folder / "run.toml")
    started.start(name, "client", "--name", name, *where, "--keys", folder / "keys" / name, "--out", folder / name)


def start_server(started: Processes, folder: Path, port: int) -> None:
    told = ("--out", folder / "out", "--keys", folder / "keys" / "server", "--port", port, "--resume", "--quiet")
    started.start(SERVER, "server", folder / "run.toml", *told)


def kill(started: Processes, folder: Path, kind: str, victim: str) -> bool:
    """Whether there was one to kill."""
    if kind in ("client", "server"):
        started.kill(victim if kind == "client" else SERVER)
        return True
    there = running(folder / victim, {"worker": "fedexperts.resident", "supernode": "flower.supernode"}[kind])
    for pid in there:
        signalled(pid)
    return bool(there)


def recorded(out: Path) -> int:
    """Rounds that are behind the server."""
    rounds = out / "rounds.jsonl"
    return len(rounds.read_text().splitlines()) if rounds.exists() else 0


def found(folder: Path, names: list[str]) -> dict[str, Any]:
    """What is there in the end: the rounds, the answers that are missing, and the clients that lost what they had kept.

    The ledger says which of a client's answers counted last. It must have kept what it had then, whole, and nothing later,
    unless it could not be told: it did not answer the last evaluation.
    """
    out = folder / "out"
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    trained = [line for line in ledger if line["task"] == "train"]
    lost = []
    for name in names:
        answered = [line["round"] for line in trained if line["client"] == name and line["failed"] is None]
        own = folder / name / (out / "id").read_text() / "clients" / name
        kept = {path.stem: load_file(path) for path in own.glob("*.safetensors")}
        last = key(answered[-1], "train") if answered else ""
        told = any(
            line["client"] == name and line["task"] == "evaluate" and line["failed"] is None for line in ledger[-len(names) :]
        )
        if (last and not kept.get(last)) or (told and kept and max(kept) != last):
            lost.append({"client": name, "acknowledged": last, "kept": sorted(kept)})
    rounds = [json.loads(line)["round"] for line in (out / "rounds.jsonl").read_text().splitlines()]
    failed = [[line["round"], line["client"], line["failed"]] for line in trained if line["failed"]]
    return {"rounds": rounds, "answers": len(trained) - len(failed), "failed": failed, "lost": lost}


def make_model(folder: Path) -> Path:
    tokenizer = make_tokenizer(max_tokens=48)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_model("olmoe", vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    for name, default in (("seeds", 5), ("rounds", 12), ("clients", 4), ("kills", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    told = parser.parse_args()
    told.out.mkdir(parents=True)
    model = make_model(told.out / "model")
    for seed in range(told.seeds):
        folder = told.out.resolve() / str(seed)
        folder.mkdir()
        kinds = [KINDS[number % len(KINDS)] for number in range(told.kills)]
        print(json.dumps(chaos(folder, model, seed, clients=told.clients, rounds=told.rounds, kinds=kinds)), flush=True)


if __name__ == "__main__":
    main()
