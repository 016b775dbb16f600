"""A client that is reached by messages: it says who it is, and answers jobs. Independent of who carries them, and from where."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fedexperts.core.devices import MOST, Profile
from fedexperts.engines.local import ClientRuntime
from fedexperts.engines.message import Message
from fedexperts.engines.serialization import answer_message, job_message, read_job, reading
from fedexperts.errors import BadMessage
from fedexperts.io.files import write_text
from fedexperts.types import Client, Job

PACKAGES = ("fedexperts", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Greeting:
    """What a client says of itself before its first job."""

    client: Client
    profile: Profile | None  # of its device, where the run has a clock
    versions: Mapping[str, str]
    counts: Mapping[str, Any] | None = None  # of its data, where it brings its own: `data.own.Counts` as JSON


GREETING = TypeAdapter(Greeting)
GREETINGS = "greetings.json"
"""The file in which a server saves them."""


def greeting_request(run: str) -> Message:
    """Asks a client who it is. `run`: what clients need to know of the run; every message has it, so none depends on another."""
    return Message({"hello": {}, "run": run}, {})


def job_request(job: Job, run: str) -> Message:
    """`job`, with what clients need to know of the run."""
    message = job_message(job)
    return replace(message, head={**message.head, "run": run})


def answer(runtime: ClientRuntime, name: str, message: Message, counts: Mapping[str, Any] | None = None) -> Message:
    """What the client `name` of `runtime` answers to a `greeting_request` or a `job_request`.

    Raises:
        BadMessage: it is neither, or is meant for another client.
    """
    if name not in runtime.clients:
        raise BadMessage(f"no client of the run is called {name}; its clients are {', '.join(runtime.clients)}")
    if "hello" in message.head:
        return greeting_message(Greeting(runtime.clients[name], runtime.profiles.get(name), versions(), counts))
    job = read_job(message)
    if job.client != name:
        raise BadMessage(f"a job of {job.client} came to {name}")
    return answer_message(runtime.answer(job))


def greeting_message(greeting: Greeting) -> Message:
    return Message({"greeting": asdict(greeting)}, {})


def read_greeting(message: Message) -> Greeting:
    """Raises BadMessage where `message` holds none."""
    with reading("greeting"):
        greeting = GREETING.validate_python(message.head["greeting"])
        device, client = greeting.profile, greeting.client
        numbers = [*astuple(device)] if device else []
        if client.examples < 0 or not all(0 < each < MOST for each in [*numbers, client.memory_bytes] if each is not None):
            raise ValueError(f"{client}, {device}")
        return greeting


def write_greetings(path: Path, greetings: Iterable[Greeting]) -> None:
    write_text(path, json.dumps([dict(greeting_message(each).head) for each in greetings]))


def read_greetings(path: Path) -> list[Greeting]:
    return [read_greeting(Message(each, {})) for each in json.loads(path.read_text())]


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}
