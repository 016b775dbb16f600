"""A client that is reached by letters: it says who it is, and answers jobs. Whoever brings them, and wherever it runs."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fedexperts.core.devices import MOST, Profile
from fedexperts.engines.local import Site
from fedexperts.engines.message import Letter
from fedexperts.engines.serialization import answer_letter, job_letter, read_job, reading
from fedexperts.errors import BadLetter
from fedexperts.io.files import write_text
from fedexperts.types import Client, Job

PACKAGES = ("fedexperts", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Greeting:
    """All that a client tells of itself before its first job."""

    client: Client
    profile: Profile | None  # of its device, where the run has a clock
    versions: Mapping[str, str]
    counts: Mapping[str, Any] | None = None  # of its data, where it brings its own: `data.clients.Counts` as JSON


GREETING = TypeAdapter(Greeting)
GREETINGS = "greetings.json"
"""The file in which a server notes them."""


def hello(run: str) -> Letter:
    """Asks a client who it is. `run`: what clients need to know of the run; every letter has it, so none depends on another."""
    return Letter({"hello": {}, "run": run}, {})


def order(job: Job, run: str, accepted: str) -> Letter:
    """`job`, and the key of the client's last job whose answer the server took; empty before the first."""
    letter = job_letter(job)
    return replace(letter, head={**letter.head, "run": run, "accepted": accepted})


def answer(site: Site, name: str, letter: Letter, counts: Mapping[str, Any] | None = None) -> Letter:
    """What the client `name` of `site` answers to a `hello` or an `order`.

    What it kept in a job whose answer the server did not take (it came too late, or never) is dropped first, or server and
    client would remember different rounds.

    Raises:
        BadLetter: it is neither, or is meant for another client.
    """
    if name not in site.clients:
        raise BadLetter(f"no client of the run is called {name}; its clients are {', '.join(site.clients)}")
    if "hello" in letter.head:
        return greeting_letter(Greeting(site.clients[name], site.clock.profiles.get(name), versions(), counts))
    job = read_job(letter)
    if job.client != name:
        raise BadLetter(f"a job of {job.client} came to {name}")
    site.keeper.drop_newer(name, letter.head["accepted"])
    return answer_letter(site.answer(job))


def greeting_letter(greeting: Greeting) -> Letter:
    return Letter({"greeting": asdict(greeting)}, {})


def read_greeting(letter: Letter) -> Greeting:
    """Raises BadLetter where there is none in it."""
    with reading("greeting"):
        greeting = GREETING.validate_python(letter.head["greeting"])
        device, client = greeting.profile, greeting.client
        numbers = [*astuple(device)] if device else []
        if client.examples < 0 or not all(0 < each < MOST for each in [*numbers, client.memory_bytes] if each is not None):
            raise ValueError(f"{client}, {device}")
        return greeting


def write_greetings(path: Path, greetings: Iterable[Greeting]) -> None:
    write_text(path, json.dumps([dict(greeting_letter(each).head) for each in greetings]))


def read_greetings(path: Path) -> list[Greeting]:
    return [read_greeting(Letter(each, {})) for each in json.loads(path.read_text())]


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}
