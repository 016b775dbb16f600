"""What a federated run costs over a bare training loop, what a second worker brings, and what a hundred clients hold.

    python benchmarks/overhead.py [--repeat 5]

1. Tokens a second inside a whole run (cutting, sending, installing, training, validating, merging, checkpoints, logs; no
   evaluation) over those of a bare loop (encode, forward, the same loss, backward, clip, AdamW) on the same model, batches
   and number of steps, alternating job by job in one process, one thread: with LoRA (FedAvg), and with FedMoE's sub-models.
   The bare loop trains each client's sub-model as its run did, so the ratio shows what federation costs, not what a small
   model saves. The lines "without balance" train both with cross-entropy alone. Seconds are of the processor, since others may
   use it too; those on the wall, which also have the waits for the disk (two fsyncs a round), are the second line of each.
2. Seconds of the rounds with one worker over those with two.
3. Peak memory (VmHWM) of a whole process that runs 10 clients and of one that runs 100, each of the same size, 4 a round.
"""

import argparse
import gc
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch import nn

from fedexperts.config import RunConfig
from fedexperts.core.evaluation import Scores
from fedexperts.core.training import batches, cross_entropy, optimizer_for
from fedexperts.data.encode import Encoder
from fedexperts.engines.local import LocalEngine
from fedexperts.experiment import runner
from fedexperts.experiment.progress import Quiet
from fedexperts.experiment.runtime import runtime_for
from fedexperts.experiment.setup import Prepared
from fedexperts.io.toml import checked
from fedexperts.moe.routing import Recorder, balance_loss
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import prepare
from fedexperts.types import Failure, Job, Server, Training, Update

LORA = {"train": "lora", "parts": ["attention", "experts"], "rank": 8}


def config(method: dict, training: dict, *, clients: int = 8, rounds: int = 2, workers: int = 1) -> RunConfig:
    return checked(
        RunConfig,
        {
            "model": {"name": "tiny"},
            "method": method,
            "training": {"batch_size": 16, "local_steps": 20, **training},
            "federation": {"rounds": rounds, "clients_per_round": 4, "workers": workers},
            "devices": {"memory_share": {"uniform": [0.7, 1.3]}, "out_of_memory": "train anyway"},
            "evaluation": {"every": 1000},
            "data": {
                "sources": ["synthetic/double", "synthetic/first", "synthetic/descend", "synthetic/next"],
                "clients": clients,
                "limit": 25 * clients,
                "test_examples": 4,
                "max_tokens": 64,
            },
        },
    )


@dataclass
class Seconds:
    """Seconds between starts and stops: of this process on the processor, and on the wall."""

    cpu: float = 0.0
    wall: float = 0.0
    since: tuple[float, float] | None = None  # None: stopped

    def start(self) -> None:
        self.since = process_time(), perf_counter()

    def stop(self) -> None:
        if self.since is not None:
            self.cpu, self.wall = self.cpu + process_time() - self.since[0], self.wall + perf_counter() - self.since[1]
        self.since = None


class Clock(Quiet):
    """Seconds of the training rounds, with all that belongs to them, and without stages and evaluations."""

    def __init__(self) -> None:
        self.seconds = Seconds()

    def evaluating(self, clients: int) -> None:
        self.seconds.stop()

    def scored(self, server: Server, scores: Scores) -> None:
        self.seconds.start()  # also after the evaluation before the first round, by which all workers have started

    def round(self, server: Server) -> None:
        if server.round:
            self.seconds.stop()
        self.seconds.start()


class Alternating(LocalEngine):
    """After each training job, a plain training loop over the same sub-model and batches, while the clock of the run stands."""

    def __init__(self, clock: Clock, prepared: Prepared, out: Path) -> None:
        super().__init__(runtime_for(prepared, out))
        self.clock, self.plain = clock, Seconds()

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        for job in jobs:
            answer = self.runtime.answer(job)
            if job.task == "train":
                self.clock.seconds.stop()
                self.bare(job)
                self.clock.seconds.start()
            yield answer

    def bare(self, job: Job) -> None:
        training = self.runtime.training
        model = prepare(shrink(self.runtime.model, job.experts), training.tuning, job.seed)
        chosen = list(batches(self.runtime.data[job.client].train, training.batch_size, training.local_steps, job.seed))
        self.plain.start()
        plain_loop(model, self.runtime.encoder, chosen, training)
        self.plain.stop()


def plain_loop(model: nn.Module, encoder: Encoder, chosen: list, training: Training) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_for(trained, training)
    model.train()
    for examples in chosen:
        batch = encoder.batch(examples)
        if training.router_aux_loss_coef:
            with Recorder(model, keep_logits=True) as recorder:
                loss = cross_entropy(model, batch, training.label_smoothing)
            (loss + training.router_aux_loss_coef * balance_loss(recorder)).backward()
        else:
            cross_entropy(model, batch, training.label_smoothing).backward()
        nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def overhead(method: dict, training: dict, repeat: int) -> tuple[list[float], list[float]]:
    """Tokens a second of the run over those of the bare loop, `repeat` times: on the processor, and on the wall."""
    cpu, wall = [], []
    for _ in range(repeat):
        clock, engines = Clock(), []

        def engine(prepared: Prepared, out: Path, clock: Clock = clock, engines: list = engines) -> Alternating:
            engines.append(Alternating(clock, prepared, out))
            return engines[0]

        with tempfile.TemporaryDirectory() as folder:
            runner.run(config(method, training), Path(folder) / "run", progress=clock, engine=engine)
        cpu.append(engines[0].plain.cpu / clock.seconds.cpu)
        wall.append(engines[0].plain.wall / clock.seconds.wall)
    return cpu, wall


def speedup(repeat: int) -> list[float]:
    """Seconds of the rounds with one worker over those with two, `repeat` times."""
    ratios = []
    for _ in range(repeat):
        seconds = []
        for workers in (1, 2):
            clock = Clock()
            with tempfile.TemporaryDirectory() as folder:
                runner.run(config({"name": "fedavg"}, {}, rounds=4, workers=workers), Path(folder) / "run", progress=clock)
            seconds.append(clock.seconds.wall)
        ratios.append(seconds[0] / seconds[1])
    return ratios


def peak_kib(clients: int) -> int:
    """VmHWM of a process of its own that runs `clients` clients."""
    code = f"from benchmarks.overhead import run_once; run_once({clients})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    return int(done.stdout.split()[-1])


def run_once(clients: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runner.run(config({"name": "fedmoe", "initial": "random"}, {}, clients=clients, rounds=3), Path(folder) / "run")
    print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def shown(name: str, values: list[float], wanted: float, least: bool = True) -> None:
    middle = statistics.median(values)
    right = middle >= wanted if least else middle <= wanted
    each = " ".join(f"{value:.2f}" for value in values)
    print(
        f"{name:52} {middle:5.2f}  ({'≥' if least else '≤'} {wanted:.2f}: {'met' if right else 'NOT met'})   {each}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    overhead({"name": "fedavg"}, LORA, 1)  # the first run of a process imports and compiles
    gc.freeze()  # else a collection of all that was imported, 0.2 s, falls into a run or into a bare loop, by chance
    for name, method, training in (
        ("tokens/s, FedAvg with LoRA over a bare loop", "fedavg", LORA),
        ("the same without balance", "fedavg", {**LORA, "router_aux_loss_coef": 0}),
        ("tokens/s, FedMoE sub-models over a bare loop", "fedmoe", {}),
        ("the same without balance", "fedmoe", {"router_aux_loss_coef": 0}),
    ):
        cpu, wall = overhead({"name": method}, training, repeat)
        shown(name, cpu, 0.95)
        shown("  on the wall", wall, 0.95)
    shown("speed of two workers over one", speedup(repeat), 1.8)
    shown("peak memory of 100 clients over 10", [peak_kib(100) / peak_kib(10) for _ in range(min(repeat, 3))], 1.2, least=False)


if __name__ == "__main__":
    main()
