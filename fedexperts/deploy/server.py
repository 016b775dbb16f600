"""A run whose clients are on other machines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedexperts.config import RunConfig
from fedexperts.deploy.deployment import Federation
from fedexperts.engines.flower.engine import FlowerEngine
from fedexperts.engines.remote import GREETINGS, Greeting, read_greetings, write_greetings
from fedexperts.errors import BadValue
from fedexperts.experiment import flower, runner
from fedexperts.experiment.progress import Progress
from fedexperts.experiment.setup import Parts, Prepared, told_by
from fedexperts.io.toml import checked
from fedexperts.types import Engine

Carrier = Callable[[Prepared, Path], AbstractContextManager[Engine]]
"""What makes the engine of a run."""
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 600.0
"""For which a server waits for all clients before fewer are enough."""


def serve(
    config: RunConfig,
    out: Path,
    federation: Federation,
    *,
    resume: bool = False,
    setting: str = "",
    progress: Progress | None = None,
    tell: Callable[[str], None],
    patience: float = PATIENCE_SECONDS,
    parts: Parts | None = None,
) -> Path:
    """Runs `config` with clients that join `federation`, and gives its results folder.

    Raises:
        BadValue: a method whose clients' data would lie in one place, and whatever a run raises.
    """
    config = deployed(config)
    runner.claim(config, out, resume)
    bounds: dict[str, Any] = {
        "names": federation.names,
        "since": lambda: {node.node_id: node.last_activated_at for node in federation.grid.get_nodes()},
        "tell": tell,
        "poll_seconds": POLL_SECONDS,
        "in_flight": config.data.clients,  # each has a machine of its own
    }
    over: Carrier = flower.over(federation.grid, federation.check, patience=patience, **bounds)
    if config.data.own:
        bases = Parts()
        greetings = told(config, out, federation, bounds, bases)
        parts, over = told_by(greetings, bases), partial(telling, greetings, bases, over)
    return runner.run(config, out, resume=resume, setting=setting, progress=progress, parts=parts, engine=over)


def deployed(config: RunConfig) -> RunConfig:
    """`config` with the engine that a deployment has.

    Raises:
        BadValue: its method pools data.
    """
    method = config.build_method()
    if method.centralized:
        raise BadValue(
            f"method.name = {config.method['name']!r} trains on all clients' data in one place, and here they stay apart; "
            "choose another method, or run it with `fedexperts run` where the data may lie together"
        )
    tree = config.resolved()
    return checked(RunConfig, {**tree, "federation": {**tree["federation"], "engine": "flower"}})


def told(config: RunConfig, out: Path, federation: Federation, bounds: Mapping[str, Any], bases: Parts) -> list[Greeting]:
    """What the clients told of themselves when the run began; then all of them are waited for."""
    noted = federation.home / GREETINGS
    if noted.exists() and (out / "resolved.json").exists():
        return read_greetings(noted)
    names = dict.fromkeys(config.data.names)
    run = flower.about(config, bases.base(config.model).identity, federation.home)
    engine = FlowerEngine(federation.grid, run, names, check=federation.check, **bounds)
    engine.connect(seconds=float("inf"))
    found = [engine.greetings[name] for name in names]
    write_greetings(noted, found)
    return found


@contextmanager
def telling(greetings: Sequence[Greeting], bases: Parts, over: Carrier, prepared: Prepared, out: Path) -> Iterator[Engine]:
    """The engine of `over`, with what the clients told in the results folder: who has that can export a client's model.

    `bases` let go of the base, which the server needs no more.
    """
    write_greetings(out / GREETINGS, greetings)
    bases.bases.clear()
    with over(prepared, out) as engine:
        del prepared
        yield engine
