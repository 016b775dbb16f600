"""A run whose clients are on other machines."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedexperts import flower, running
from fedexperts.config import RunConfig
from fedexperts.data.clients import Counts
from fedexperts.engines.flower.deployment import Federation
from fedexperts.engines.flower.engine import FlowerEngine
from fedexperts.engines.letter import Letter
from fedexperts.engines.remote import Greeting, greeting_letter, read_greeting
from fedexperts.errors import BadValue
from fedexperts.files import write_text
from fedexperts.progress import Progress
from fedexperts.settings import checked
from fedexperts.start import Parts, Told

POLL_SECONDS = 0.5
MOST_EXAMPLES = 10**7
"""That a client may tell of: the server holds a stand-in for each."""
COUNTS = TypeAdapter(Counts)
UPDATE = "install this version of FedExperts there, or leave it out of data.names"
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
    running.claim(config, out, resume)
    bounds: dict[str, Any] = {
        "names": federation.names,
        "since": lambda: {node.node_id: node.last_activated_at for node in federation.grid.get_nodes()},
        "tell": tell,
        "poll_seconds": POLL_SECONDS,
        "in_flight": config.data.clients,  # each has a machine of its own
    }
    if config.data.own:
        parts = told(config, out, federation, bounds)
    over = flower.over(federation.grid, federation.check, patience=patience, **bounds)
    return running.run(config, out, resume=resume, setting=setting, progress=progress, parts=parts, engine=over)


def deployed(config: RunConfig) -> RunConfig:
    """`config` with the engine that a deployment has.

    Raises:
        BadValue: its method pools data.
    """
    method = config.build_method()
    if method.pooled:
        raise BadValue(
            f"method.name = {config.method['name']!r} trains on all clients' data in one place, and here they stay apart; "
            "choose another method, or run it with `fedexperts run` where the data may lie together"
        )
    tree = config.resolved()
    return checked(RunConfig, {**tree, "federation": {**tree["federation"], "engine": "flower"}})


def told(config: RunConfig, out: Path, federation: Federation, bounds: Mapping[str, Any]) -> Told:
    """What the clients told of themselves when the run began; then all of them are waited for."""
    bases = Parts()
    noted = federation.home / "greetings.json"
    if noted.exists() and (out / "resolved.json").exists():
        found = [read_greeting(Letter(each, {})) for each in json.loads(noted.read_text())]
    else:
        names = dict.fromkeys(config.data.names)
        run = flower.about(config, bases.base(config.model).hash, federation.home)
        engine = FlowerEngine(federation.grid, run, names, check=federation.check, **bounds)
        engine.connect(seconds=float("inf"))
        found = [engine.greetings[name] for name in names]
        write_text(noted, json.dumps([dict(greeting_letter(each).head) for each in found]))
    by_name: dict[str, Greeting] = {each.client.name: each for each in found}
    return Told(
        bases=bases.bases,
        counts={name: counted(each) for name, each in by_name.items()},
        devices={name: each.profile for name, each in by_name.items() if each.profile},
        memory={name: each.client.memory_bytes for name, each in by_name.items()},
    )


def counted(greeting: Greeting) -> Counts:
    """Raises BadValue when it brought no data of its own, or says what cannot be."""
    client, told = greeting.client, greeting.counts
    if told is None:
        raise BadValue(f"{client.name} brought no data of its own (data.own = true); start it with --data")
    try:
        counts = COUNTS.validate_python(told)
    except ValidationError as error:
        raise BadValue(
            f"{client.name} tells of its data what cannot be read ({error.error_count()} mistakes); {UPDATE}"
        ) from None
    sound = counts.train and min([*counts.train.values(), counts.longest_response]) >= 1
    if not sound or min(counts.validation, counts.test) < 0 or sum(counts.train.values()) != client.examples:
        raise BadValue(f"{client.name} tells of data that cannot be: {counts}; {UPDATE}")
    if client.examples + counts.validation + counts.test > MOST_EXAMPLES:
        raise BadValue(
            f"{client.name} tells of {client.examples:,} examples, and a client may have {MOST_EXAMPLES:,}; give it fewer"
        )
    return counts
