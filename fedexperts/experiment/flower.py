"""Runs on the engine flower: on Flower's simulation on this machine, or over another grid."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import inf
from pathlib import Path
from typing import Any

import torch

from fedexperts.config import RunConfig
from fedexperts.engines import remote
from fedexperts.engines.flower.engine import FlowerEngine, Grid
from fedexperts.engines.flower.simulation import Simulation
from fedexperts.engines.local import ClientRuntime
from fedexperts.engines.message import Message
from fedexperts.errors import BadMessage
from fedexperts.experiment.runtime import devices_of, everyone, runtime_for
from fedexperts.experiment.setup import Parts, Prepared, prepare_run
from fedexperts.io.files import run_id
from fedexperts.io.toml import checked
from fedexperts.types import Client, Engine

PARTS = Parts()
"""Cache of a simulation process: the base model is read once for all clients and all runs that use it."""


# The engines below do not refer to `prepared` while they are open: it holds the base model, which the processes that play clients
# have read for themselves, and the server's first weights.


def simulated(prepared: Prepared, out: Path) -> AbstractContextManager[Engine]:
    """The engine of a run on Flower's simulation: a node for each client, and `federation.workers` processes that play them."""
    federation, threads = prepared.config.federation, prepared.config.training.threads
    simulation = Simulation(
        play, len(everyone(prepared)), workers=federation.workers, cpus=threads, gpus=federation.gpus_per_worker
    )
    return opened(simulation, connection(prepared, out))


@contextmanager
def opened(simulation: Simulation, connect: "Connection") -> Iterator[Engine]:
    with simulation, connect(simulation.grid, simulation.check) as engine:
        yield engine


def over(
    grid: Grid, check: Callable[[], None] = lambda: None, *, patience: float | None = None, **options: Any
) -> Callable[[Prepared, Path], AbstractContextManager[Engine]]:
    """For `runner.run`: an engine over `grid`, to which all clients of the run are connected, or soon will be.

    After `patience` seconds federation.min_clients of them are enough; without it no client that is missing is waited for.
    `options` are arguments of the FlowerEngine, in place of those of a simulation.
    """
    return lambda prepared, out: connection(prepared, out, **options)(grid, check, patience)


def connection(prepared: Prepared, out: Path, **options: Any) -> "Connection":
    """What an engine over a grid needs of a run."""
    federation = prepared.config.federation
    return Connection(
        run=about(seen_by_workers(prepared.config), prepared.base.identity, out),
        clients=everyone(prepared),
        fewest=federation.min_clients,
        options={
            "in_flight": 2 * federation.workers,
            "seconds": federation.round_seconds or inf,
            "on_dropped": partial(log_dropped, out / "dropped.jsonl"),
            **options,
        },
    )


@dataclass(frozen=True)
class Connection:
    """A run, as it is connected to its clients.

    run: what clients need to know of it. fewest: clients that are enough once patience is over. options: of the FlowerEngine.
    """

    run: str
    clients: Mapping[str, Client]
    fewest: int
    options: Mapping[str, Any]

    @contextmanager
    def __call__(self, grid: Grid, check: Callable[[], None], patience: float | None = None) -> Iterator[Engine]:
        engine = FlowerEngine(grid, self.run, self.clients, check=check, **self.options)
        engine.connect(patience, self.fewest if patience is not None else None)
        try:
            yield engine
        except Exception:
            check()  # where the grid has died, that is the reason
            raise


def log_dropped(path: Path, answer: Mapping[str, object]) -> None:
    """Appends a line for an answer that arrived late or twice, or for no open job."""
    with path.open("a") as file:
        file.write(json.dumps(answer) + "\n")


def about(config: RunConfig, model_hash: str, out: Path) -> str:
    """The description of the run in `out` for clients, as JSON; `id`: of the run, `model_hash`: identity of its base model."""
    run_info = {"settings": config.resolved(), "folder": str(out.resolve()), "id": run_id(out), "model_hash": model_hash}
    return json.dumps(run_info)


def seen_by_workers(config: RunConfig) -> RunConfig:
    """`config` for processes that may see cards which they should not take: "auto" is the CPU where the run's devices are."""
    if devices_of(config) != ("cpu",):
        return config
    return config.model_copy(update={"training": replace(config.training, device="cpu")})


def play(message: Message, node_config: Mapping[str, Any]) -> Message:
    """The answer of the client that a node of Flower's simulation simulates."""
    runtime = runtime_of(message.head["run"])
    torch.set_num_threads(runtime.training.threads)
    names, number = list(runtime.clients), int(node_config["partition-id"])
    if number >= len(names):
        raise BadMessage(f"the run has {len(names)} clients, and this is node {number + 1}")
    return remote.answer(runtime, names[number], message)


@lru_cache(maxsize=1)
def runtime_of(run: str) -> ClientRuntime:
    """The client runtime of the run that `run` describes, as JSON."""
    run_info = json.loads(run)
    return runtime_for(prepare_run(checked(RunConfig, run_info["settings"]), parts=PARTS), Path(run_info["folder"]))
