"""What attackers do to honest clients, with and without robust merging: OUT.csv has a line for each run.

    python benchmarks/robust.py OUT.csv [--methods fedavg,fedmoe] [--rules none,clip,median] [--attacks flip,noise] [--seeds 1]

Ten clients of generated tasks on `tiny`, of which the first two attack in every round (none of them in the line "nobody"):

    flip     the change with the opposite sign           flip10   ten times that
    noise    a normal change of ten times the norm
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from time import process_time

import torch
from torch import Tensor

from fedexperts.config import RunConfig
from fedexperts.experiment import runner
from fedexperts.experiment.setup import Prepared
from fedexperts.io.toml import checked
from fedexperts.types import Engine, Failure, Job, Update

CLIENTS = 10
ATTACKERS = ("c01", "c02")
TRAINING = {"flex": {"train": "lora", "rank": 8, "parts": ["attention"]}}


@dataclass(frozen=True)
class Attacked:
    """An engine whose attackers send something else."""

    engine: Engine
    attack: str

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        given: dict[str, Job] = {}

        def noted() -> Iterator[Job]:
            for job in jobs:
                given[job.client] = job
                yield job

        for update in self.engine.run(noted()):
            attacks = isinstance(update, Update) and update.task == "train" and update.client in ATTACKERS
            yield attacked(update, given[update.client], self.attack) if attacks else update


def attacked(update: Update, job: Job, attack: str) -> Update:
    """`update` with another change of the weights of `job`."""
    tensors = {}
    for name, tensor in update.patch.tensors.items():
        had, has = (patch.rows.get(name, torch.arange(len(patch.tensors[name]))) for patch in (job.patch, update.patch))
        before = job.patch.tensors[name][torch.searchsorted(had, has)]
        tensors[name] = before + wrong(tensor - before, attack, f"{update.round}/{update.client}/{name}")
    return replace(update, patch=replace(update.patch, tensors=tensors))


def wrong(change: Tensor, attack: str, seed: str) -> Tensor:
    if attack == "noise":
        generator = torch.Generator().manual_seed(int.from_bytes(seed.encode()) % 2**63)
        noise = torch.randn(change.shape, generator=generator)
        return 10 * noise * change.norm() / noise.norm()
    return change * {"flip": -1, "flip10": -10}[attack]


def tree(method: str, rule: str, seed: int) -> dict:
    """The run file."""
    return {
        "seed": seed,
        "model": {"name": "tiny"},
        "method": {"name": method},
        "training": {"lr": 1e-3, "batch_size": 8, "local_steps": 10, "validation_examples": 16, **TRAINING.get(method, {})},
        "federation": {"rounds": 8, **({} if rule == "none" else {"robust": rule})},
        "devices": {"memory_share": {"uniform": [0.9, 1.3]}, "out_of_memory": "train anyway"} if "moe" in method else {},
        "evaluation": {"every": 8, "generate_tokens": 12},
        "data": {
            "sources": ["synthetic/room", "synthetic/feeling", "synthetic/last", "synthetic/double"],
            "clients": CLIENTS,
            "partition": "iid",
            "limit": 400,
            "test_examples": 100,
            "max_tokens": 64,
        },
    }


def honest_quality(method: str, rule: str, attack: str, seed: int) -> float:
    """The mean quality of the honest clients after the last round, in %."""

    @contextmanager
    def engine(prepared: Prepared, out: Path) -> Iterator[Engine]:
        with runner.engine_for(prepared, out) as local:
            yield local if attack == "nobody" else Attacked(local, attack)

    with tempfile.TemporaryDirectory() as folder:
        out = runner.run(checked(RunConfig, tree(method, rule, seed)), Path(folder) / "run", engine=engine)
        lines = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["round"] == 8 and line["task"] and line["client"] not in (None, *ATTACKERS)]
    names = sorted({line["client"] for line in own})
    return 100 * fmean(fmean(line["value"] for line in own if line["client"] == name) for name in names)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default="fedavg,fedmoe")
    parser.add_argument("--rules", default="none,clip,median")
    parser.add_argument("--attacks", default="nobody,flip,noise")
    parser.add_argument("--seeds", type=int, default=1)
    chosen = parser.parse_args()
    rows = []
    for seed in range(chosen.seeds):
        for method in chosen.methods.split(","):
            for attack in chosen.attacks.split(","):
                for rule in chosen.rules.split(","):
                    started = process_time()
                    quality = honest_quality(method, rule, attack, seed)
                    rows.append((method, attack, rule, seed, f"{quality:.2f}", f"{process_time() - started:.1f}"))
                    print(*rows[-1], flush=True)
                    with chosen.out.open("w", newline="") as file:
                        head = ("method", "attack", "rule", "seed", "honest_quality", "cpu_seconds")
                        csv.writer(file, lineterminator="\n").writerows([head, *rows])


if __name__ == "__main__":
    main()
