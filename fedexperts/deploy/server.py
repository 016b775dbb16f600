"""A run whose clients are on other machines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from fedexperts.config import RunConfig
from fedexperts.deploy.deployment import Federation
from fedexperts.engines.flower.engine import FlowerEngine
from fedexperts.engines.remote import GREETINGS, Greeting, read_greetings, write_greetings
from fedexperts.errors import BadValue, listed
from fedexperts.experiment import flower, runner
from fedexperts.experiment.progress import Progress
from fedexperts.experiment.reported import parts_from_greetings
from fedexperts.experiment.setup import Parts, Prepared
from fedexperts.io.toml import checked
from fedexperts.types import Engine

EngineFactory = Callable[[Prepared, Path], AbstractContextManager[Engine]]
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 600.0
"""For which a server waits for all clients before fewer are enough."""
NO_DEADLINE = (
    "federation.round_seconds is not set, so a client that never answers, and stays connected, stops the run; set it to more "
    "than the longest job takes, such as 3600"
)


def serve(
    config: RunConfig,
    out: Path,
    federation: Federation,
    *,
    resume: bool = False,
    setting: str = "",
    progress: Progress | None = None,
    announce: Callable[[str], None],
    connected: Callable[[], None] = lambda: None,
    patience: float = PATIENCE_SECONDS,
    parts: Parts | None = None,
) -> Path:
    """Runs `config` with clients that join `federation`, and returns its results folder.

    connected: called when clients need not be waited for any more.

    Raises:
        BadValue: a method whose clients' data would lie in one place, and whatever a run raises.
    """
    config = deployed(config)
    runner.claim(config, out, resume)
    options = engine_options(federation, in_flight=config.data.clients)  # each has a machine of its own
    options["announce"] = announce
    connect: EngineFactory = flower.over(federation.grid, federation.check, patience=patience, **options)
    engine: EngineFactory = partial(telling, federation, connected, connect)
    if config.data.own:
        bases = Parts()
        greetings = greetings_of(config, out, federation, options, bases)
        parts, engine = parts_from_greetings(greetings, bases), partial(with_greetings, greetings, bases, engine)
    return runner.run(config, out, resume=resume, setting=setting, progress=progress, parts=parts, engine=engine)


def engine_options(federation: Federation, in_flight: int) -> dict[str, Any]:
    """The arguments of a FlowerEngine over the grid of `federation`."""
    return {
        "names": federation.names,
        "connections": lambda: {node.node_id: node.last_activated_at for node in federation.grid.get_nodes()},
        "fetch": federation.grid.fetch,
        "withdraw": federation.grid.withdraw,
        "poll_seconds": POLL_SECONDS,
        "in_flight": in_flight,
    }


def deployed(config: RunConfig) -> RunConfig:
    """`config` with the engine that a deployment has; the server itself computes on the CPU, clients where their run files say.

    Raises:
        BadValue: its method is centralized.
    """
    method = config.build_method()
    if method.centralized:
        raise BadValue(
            f"method.name = {config.method['name']!r} trains on all clients' data in one place, but here each client's data "
            "stays on its machine; choose another method, or use `fedexperts run` on one machine that has all data"
        )
    tree = config.resolved()
    federation, training = {**tree["federation"], "engine": "flower"}, {**tree["training"], "device": "cpu"}
    return checked(RunConfig, {**tree, "federation": federation, "training": training})


def greetings_of(
    config: RunConfig, out: Path, federation: Federation, options: Mapping[str, Any], bases: Parts
) -> list[Greeting]:
    """The greetings with which the clients joined when the run began; at its first start all clients are waited for."""
    saved = federation.home / GREETINGS
    if saved.exists() and (out / "resolved.json").exists():
        return read_greetings(saved)
    names = dict.fromkeys(config.data.names)
    if without_key := [name for name in names if federation.names and name not in federation.names.values()]:
        raise BadValue(
            f"data.names has {listed(without_key)}, whose key the server does not have, and the first start needs what every "
            "client says of its data; leave it out of data.names, or copy its .pub file to keys/server/clients"
        )
    run = flower.about(config, bases.base(config.model).identity, federation.home)
    federation.tell({"model_hash": bases.base(config.model).identity, "clients": list(names)})
    engine = FlowerEngine(federation.grid, run, names, check=federation.check, **options)
    engine.connect(seconds=inf)
    greetings = [engine.greetings[name] for name in names]
    write_greetings(saved, greetings)
    return greetings


@contextmanager
def telling(
    federation: Federation, connected: Callable[[], None], connect: EngineFactory, prepared: Prepared, out: Path
) -> Iterator[Engine]:
    """The engine of `connect`, after registered nodes can be told what base model the run has; then calls `connected`."""
    federation.tell({"model_hash": prepared.base.identity, "clients": list(prepared.clients)})
    opening = connect(prepared, out)
    del prepared  # it holds the base model and the first weights
    with opening as engine:
        connected()
        yield engine


def with_greetings(
    greetings: Sequence[Greeting], bases: Parts, engine: EngineFactory, prepared: Prepared, out: Path
) -> AbstractContextManager[Engine]:
    """`engine`, after `greetings` were saved in the results folder: a client's model can be exported where that is.

    The base models in `bases` are let go of, since the server needs them no more.
    """
    write_greetings(out / GREETINGS, greetings)
    bases.bases.clear()
    return engine(prepared, out)
