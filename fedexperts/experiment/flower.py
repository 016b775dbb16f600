"""Runs on the engine flower: on Flower's simulation on this machine, or over another grid."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
from fedexperts.experiment.runtime import everyone, runtime_for
from fedexperts.experiment.setup import Parts, Prepared, prepare_run
from fedexperts.io.files import run_id
from fedexperts.io.toml import checked
from fedexperts.types import Engine

PARTS = Parts()
"""Cache of a simulation process: the base model is read once for all clients and all runs that use it."""


@contextmanager
def simulated(prepared: Prepared, out: Path) -> Iterator[Engine]:
    """The engine of a run on Flower's simulation: one node per client, executed by `federation.workers` processes."""
    federation, threads = prepared.config.federation, prepared.config.training.threads
    nodes, workers = len(everyone(prepared)), federation.workers
    with (
        Simulation(play, nodes, workers=workers, cpus=threads, gpus=federation.gpus_per_worker) as simulation,
        over(simulation.grid, simulation.check)(prepared, out) as engine,
    ):
        del prepared  # frees the base model, which the simulation's processes have read themselves
        yield engine


def over(
    grid: Grid, check: Callable[[], None] = lambda: None, *, patience: float | None = None, **options: Any
) -> Callable[[Prepared, Path], AbstractContextManager[Engine]]:
    """The `engine` argument of runner.run for clients that are or will be connected to `grid`.

    patience: seconds after which federation.min_clients connected clients are enough; None: all must be connected from the start.
    options: arguments of FlowerEngine, in place of those of a simulation.
    """
    return partial(connected, grid, check, patience, options)


@contextmanager
def connected(
    grid: Grid, check: Callable[[], None], patience: float | None, options: Mapping[str, Any], prepared: Prepared, out: Path
) -> Iterator[Engine]:
    federation = prepared.config.federation
    options = {"in_flight": 2 * federation.workers, "seconds": federation.round_seconds or inf, **options}
    on_dropped = partial(log_dropped, out / "dropped.jsonl")
    run = about(prepared.config, prepared.base.identity, out)
    engine = FlowerEngine(grid, run, everyone(prepared), check=check, on_dropped=on_dropped, **options)
    fewest = federation.min_clients if patience is not None else None
    del prepared  # frees the base model: this frame lives until the run ends
    engine.connect(patience, fewest)
    try:
        yield engine
    except Exception:
        check()  # raises the grid's own error if the grid has died
        raise


def log_dropped(path: Path, answer: Mapping[str, object]) -> None:
    """Appends a line for an answer that arrived late or twice, or for no open job."""
    with path.open("a") as file:
        file.write(json.dumps(answer) + "\n")


def about(config: RunConfig, model_hash: str, out: Path) -> str:
    """The description of the run in `out` for clients, as JSON; `id`: of the run, `model_hash`: identity of its base model."""
    run_info = {"settings": config.resolved(), "folder": str(out.resolve()), "id": run_id(out), "model_hash": model_hash}
    return json.dumps(run_info)


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
