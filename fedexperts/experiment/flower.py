"""A run whose jobs Flower carries: to processes on this machine, or over whatever grid there is."""

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
"""Of a process that plays clients: the base model is read once for all of them, and for all runs that have it."""


@contextmanager
def simulated(prepared: Prepared, out: Path) -> Iterator[Engine]:
    """The engine of a run on Flower's simulation: a node for each client, and `federation.workers` processes that play them."""
    federation, threads = prepared.config.federation, prepared.config.training.threads
    nodes, workers = len(everyone(prepared)), federation.workers
    with (
        Simulation(play, nodes, workers=workers, cpus=threads, gpus=federation.gpus_per_worker) as simulation,
        over(simulation.grid, simulation.check)(prepared, out) as engine,
    ):
        del prepared  # it has the base, which the processes that play clients have read for themselves
        yield engine


def over(
    grid: Grid, check: Callable[[], None] = lambda: None, *, patience: float | None = None, **told: Any
) -> Callable[[Prepared, Path], AbstractContextManager[Engine]]:
    """For `running.run`: an engine over `grid`, on which all clients of the run are, or soon will be.

    After `patience` seconds federation.min_clients of them are enough; without it nobody is waited for who is not there. `told`
    is for the engine, whose bounds are those of a simulation unless it says otherwise.
    """
    return partial(connected, grid, check, patience, told)


@contextmanager
def connected(
    grid: Grid, check: Callable[[], None], patience: float | None, told: Mapping[str, Any], prepared: Prepared, out: Path
) -> Iterator[Engine]:
    federation = prepared.config.federation
    bounds = {"in_flight": 2 * federation.workers, "seconds": federation.round_seconds or inf, **told}
    note = partial(note_dropped, out / "dropped.jsonl")
    run = about(prepared.config, prepared.base.identity, out)
    engine = FlowerEngine(grid, run, everyone(prepared), check=check, note=note, **bounds)
    fewest = federation.min_clients if patience is not None else None
    del prepared  # it has the base, and this is here until the run ends
    engine.connect(patience, fewest)
    try:
        yield engine
    except Exception:
        check()  # what has died says it better
        raise


def note_dropped(path: Path, answer: Mapping[str, object]) -> None:
    """Adds a line for an answer that came too late, twice, or to nobody's question."""
    with path.open("a") as file:
        file.write(json.dumps(answer) + "\n")


def about(config: RunConfig, base: str, out: Path) -> str:
    """What clients need to know of the run in `out`, as JSON; `id` is what they call it, `base` the identity of its base."""
    told = {"settings": config.resolved(), "folder": str(out.resolve()), "id": run_id(out), "model_hash": base}
    return json.dumps(told)


def play(message: Message, node: Mapping[str, Any]) -> Message:
    """What the client answers that a node of Flower's simulation stands for."""
    runtime = runtime_of(message.head["run"])
    torch.set_num_threads(runtime.training.threads)
    names, number = list(runtime.clients), int(node["partition-id"])
    if number >= len(names):
        raise BadMessage(f"the run has {len(names)} clients, and this is node {number + 1}")
    return remote.answer(runtime, names[number], message)


@lru_cache(maxsize=1)
def runtime_of(run: str) -> ClientRuntime:
    """The clients of a run as its messages tell of it."""
    told = json.loads(run)
    return runtime_for(prepare_run(checked(RunConfig, told["settings"]), parts=PARTS), Path(told["folder"]))
