"""The FLOPs that clients report, against torch's counter; and what the virtual clock makes of them.

    python benchmarks/flops.py --out flops.json [--former former.json --csv docs/results/flops.csv]

counter     every method for two rounds on the shipped `tiny`: reported / counted FLOPs of all its jobs, setup tasks included
settings    the methods of the reported runs with a clock, for two rounds of their settings (seed 0): virtual seconds, which are
            the sum over rounds of their slowest client, and FLOPs of all jobs

--former: the file that this script wrote with another version of the library, to compare with. `flop_counter` must be in its
fedexperts/testing.py.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedexperts.config import RunConfig, read
from fedexperts.core.ledger import Ledger
from fedexperts.engines.local import ClientRuntime
from fedexperts.experiment.runtime import clock_for, runtime_for
from fedexperts.experiment.setup import Parts, Prepared, prepare_run
from fedexperts.federation import federate
from fedexperts.io.toml import checked
from fedexperts.methods import METHODS
from fedexperts.testing import flop_counter
from fedexperts.types import Failure, Job, Update

ROUNDS = 2
ON_ADAPTERS = ("fedit", "ffa_lora", "fedsa_lora", "flora", "flexlora", "hetlora", "random_expert")
HFEDMOE = {  # as in runs/hfedmoe/table.sh
    "HFedMoE": ["name=hfedmoe", "usage_floor=1"],
    "FedAvg": ["name=fedavg"],
    "FedMoE": ["name=fedmoe", "reserve=1"],
    "PFL-MoE": ["name=pfl_moe"],
    "SEER-MoE": ["name=seer_moe"],
    "random selection": ["name=hfedmoe", "usage_floor=1", "select=random"],
    "usage selection": ["name=hfedmoe", "usage_floor=1", "select=usage"],
}
SETTINGS = {"runs/hfedmoe/four.toml": HFEDMOE, "runs/hfedmoe/twenty.toml": HFEDMOE}


@dataclass
class Counted:
    """A local engine that counts the FLOPs of its jobs with torch's counter."""

    runtime: ClientRuntime
    flops: float = 0.0

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        for job in jobs:
            with flop_counter() as counter:
                answer = self.runtime.answer(job)
            if isinstance(answer, Failure):
                raise RuntimeError(f"{answer.client} failed: {answer.reason}")
            self.flops += counter.get_total_flops()
            yield answer


@dataclass
class Plain:
    """A local engine in this process."""

    runtime: ClientRuntime

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        return map(self.runtime.answer, jobs)


def on_tiny(name: str) -> RunConfig:
    training: dict[str, Any] = {"batch_size": 4, "local_steps": 4}
    if name == "flex":
        training |= {"train": "lora", "parts": ["attention"]}
    elif name in ON_ADAPTERS:
        training |= {"train": "lora"}
    return checked(
        RunConfig,
        {
            "model": {"name": "tiny"},
            "method": {"name": name},
            "training": training,
            "federation": {"rounds": ROUNDS},
            "data": {
                "sources": ["synthetic/double", "synthetic/first"],
                "clients": 2,
                "limit": 200,
                "test_examples": 8,
                "max_tokens": 64,
            },
        },
    )


def against_counter(name: str, parts: Parts) -> float:
    """Reported / counted FLOPs of the jobs of a run."""
    prepared = prepare_run(on_tiny(name), name, parts=parts)
    with tempfile.TemporaryDirectory() as folder:
        engine = Counted(runtime_for(prepared, Path(folder)))
        return sum(entry["flops_estimated"] for entry in entries(prepared, engine)) / engine.flops


def virtual(path: str, method: Sequence[str], parts: Parts) -> dict[str, float]:
    """Virtual seconds and FLOPs of the first rounds of a run file with another method."""
    prepared = prepare_run(read(Path(path), [f"method.{setting}" for setting in method]), parts=parts)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(entries(prepared, Plain(runtime_for(prepared, Path(folder)))))
    slowest: dict[tuple[int, str], float] = {}
    for row in rows:
        key = (row["round"], row["task"])
        slowest[key] = max(slowest.get(key, 0.0), row["clock_seconds"])
    return {
        "setup_seconds": sum(seconds for (_, task), seconds in slowest.items() if task != "train"),
        "round_seconds": sum(seconds for (_, task), seconds in slowest.items() if task == "train"),
        "flops": sum(row["flops_estimated"] for row in rows),
    }


def entries(prepared: Prepared, engine: Counted | Plain) -> Iterator[dict[str, Any]]:
    """The ledger's rows of the first rounds."""
    ledger, federation = Ledger(clock_for(prepared)), prepared.config.federation
    chosen = federation.clients_per_round or len(prepared.server.clients)
    for _ in federate(prepared.server, prepared.method, engine, ledger, rounds=ROUNDS, clients_per_round=chosen):
        yield from (entry.as_json() for entry in ledger.entries)
        ledger.clear()


def compared(now: Mapping[str, Any], former: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """A row for each number of `now`, with the former one."""
    for name, ratio in now["counter"].items():
        before = former.get("counter", {}).get(name)
        yield row("tiny", name, "reported / counted FLOPs", before, ratio)
    for path, methods in now["settings"].items():
        for name, numbers in methods.items():
            for key, number in numbers.items():
                yield row(path, name, key, former.get("settings", {}).get(path, {}).get(name, {}).get(key), number)


def row(setting: str, method: str, measure: str, before: float | None, after: float) -> dict[str, str]:
    ratio = f"{after / before:.3f}" if before else ""
    numbers = {"before": "" if before is None else f"{before:.4g}", "after": f"{after:.4g}", "after / before": ratio}
    return {"setting": setting, "method": method, "measure": measure, **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--former", type=Path)
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts, found = Parts(), {"counter": {}, "settings": {path: {} for path in SETTINGS}}
    for name in METHODS:
        found["counter"][name] = against_counter(name, parts)
        print(name, found["counter"][name], flush=True)
    for path, methods in SETTINGS.items():
        for label, method in methods.items():
            found["settings"][path][label] = virtual(path, method, parts)
            print(path, label, found["settings"][path][label], flush=True)
            asked.out.write_text(json.dumps(found, indent=1))
    rows = list(compared(found, json.loads(asked.former.read_text()) if asked.former else {}))
    table = Table(*rows[0])
    for each in rows:
        table.add_row(*each.values())
    Console(width=130).print(table)
    if asked.csv:
        with asked.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
