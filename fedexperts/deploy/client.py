"""The process of a client that stays: it holds the base model and the client's data, and answers whatever message comes.

python -m fedexperts.deploy.client SETTINGS SOCKET      (`fedexperts client` starts it; SETTINGS: its options as JSON)
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from fedexperts import config
from fedexperts.config import RunConfig
from fedexperts.data.own import counts
from fedexperts.deploy.socket_rpc import WATCH_SECONDS, end_with_parent, serve
from fedexperts.deploy.supervisor import MISTAKE
from fedexperts.engines import remote
from fedexperts.engines.local import ClientRuntime
from fedexperts.engines.message import Message
from fedexperts.engines.serialization import answer_message
from fedexperts.errors import BadMessage, BadValue, Busy, FedExpertsError
from fedexperts.experiment.runtime import runtime_for
from fedexperts.experiment.setup import Own, Parts, prepare_run
from fedexperts.io.files import locked
from fedexperts.io.toml import checked, different
from fedexperts.types import Failure, job_key

HOLD_SECONDS = 30.0
"""For the folder of a client to be let go by a process that was killed, or is about to see that its supervisor was."""


@dataclass(frozen=True, eq=False)
class ClientWorker:
    """A client: what is its own, whatever run the server has under way.

    config: of its own run file. What stands there about files and devices counts, and not what the server says of them: the
    model, where data are, whether code of a model's may run.
    data: its own files; none where it takes its part of the run's partition.

    Raises:
        BadValue: the run has no such client, or has its data from elsewhere than they come.
    """

    name: str
    config: RunConfig
    folder: Path  # what it keeps to itself lies below
    data: tuple[str, ...] = ()
    devices: Mapping[str, Any] = field(default_factory=dict)  # of DeviceSettings, what was told beside the run file

    def __post_init__(self) -> None:
        settings = self.config.data
        if settings.names and self.name not in settings.names:
            raise BadValue(f"the run has no client {self.name}; its clients are {', '.join(settings.names)}")
        if settings.own and not self.data:
            raise BadValue("data.own = true: each client brings its own data; give them with --data")
        if self.data and not settings.own:
            raise BadValue(
                "--data was given, but the run file divides its own sources among the clients; "
                "set data.own = true, with data.names"
            )
        if self.data:
            self.parts.clients(self.config)  # what is wrong with the data is said before anybody asks

    def answer(self, message: Message) -> Message:
        """What it answers; a failure where it kept something to itself, and not on from the answer that the server took last.

        Then another machine has answered in its name, or what it had is lost. It goes on from what there is in its next job.

        Raises:
            BadMessage: or whatever is wrong with the client's own settings and data.
        """
        runtime, told = self.runtime(str(message.head.get("run")))
        reply = remote.answer(runtime, self.name, message, told)
        if "update" not in reply.head:
            return reply
        job, notes = message.head["job"], runtime.client_store.folder.with_name("answered")
        accepted = job["accepted"]
        if accepted and accepted not in noted(notes) and runtime.client_store.versions(self.name):
            runtime.client_store.drop_newer(self.name, accepted)
            note(notes, accepted)
            reason = (
                f"it did not give the answer that the server took last ({accepted}), or has not kept that it did; bring back "
                f"{self.folder}, stop who else answers as {self.name}, or let it go on without from its next job"
            )
            self.say(reason)
            return answer_message(Failure(self.name, job["round"], job["task"], reason))
        if job["task"] != "evaluate":
            note(notes, job_key(job["round"], job["task"]))
        return reply

    @lru_cache(maxsize=1)  # noqa: B019  # there is one Resident in a process
    def runtime(self, run: str) -> tuple[ClientRuntime, Mapping[str, Any] | None]:
        """What it works with in the run that messages tell of, and what it tells of its own data."""
        told = json.loads(run)
        if not str(told["id"]).isalnum():  # it becomes a folder's name
            raise BadMessage(f"a run cannot be called {told['id']!r}")
        agreed = checked(RunConfig, self.agreed(told["settings"]))
        parts, model = self.parts, agreed.model
        if model not in parts.bases:
            started = perf_counter()
            parts.base(model)
            self.say(f"loaded the base model {model.name} in {perf_counter() - started:.1f} s")
        prepared = prepare_run(agreed, parts=parts)
        if prepared.base.identity != told["model_hash"]:
            raise BadMessage(f"its base model {model.name} is not the server's: their files differ; give both the same")
        own = asdict(counts(prepared.clients, self.name, parts.longest_response(agreed))) if self.data else None
        return runtime_for(prepared, self.folder / told["id"]), own

    @property
    def parts(self) -> Parts:
        """The base model and the data, which stay from run to run."""
        return parts_of(self.name, self.data)

    def agreed(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """The server's settings with what is this client's to say.

        Raises:
            BadMessage: the two disagree on how data are read.
        """
        mine = self.config.resolved()
        if apart := different(without_files(mine["data"]), without_files(theirs["data"])):
            raise BadMessage(f"its run file has another data.{apart[0]} than the server's; give both sides the same run file")
        own = {"model": mine["model"], "data": mine["data"], "devices": {**mine["devices"], **self.devices}}
        files = self.config.build_method().declare().local_files  # of this machine
        if any(name in theirs["method"] for name in files):
            own["method"] = {**theirs["method"], **{name: mine["method"].get(name) for name in files}}
        retained = {"retained": mine["evaluation"].get("retained", [])}
        return {**theirs, **own, "evaluation": {**theirs["evaluation"], **retained}}

    def say(self, sentence: str) -> None:
        print(f"{self.name}: {sentence}", file=sys.stderr, flush=True)


@lru_cache(maxsize=1)
def parts_of(name: str, data: tuple[str, ...]) -> Parts:
    return Own(name=name, files=data) if data else Parts()


def noted(path: Path) -> list[str]:
    """The keys of the jobs that it has answered in a run."""
    return path.read_text().split() if path.exists() else []


def note(path: Path, done: str) -> None:
    """Adds a job's key; it is on disk before the server can count on the answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"\n{done}\n")  # a line of its own also after one that a power cut left half written
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process; one whose supervisor was killed may need a moment to let it go.

    Raises:
        Busy: another holds it for longer.
    """
    until = monotonic() + HOLD_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder))
                break
            except Busy:
                if monotonic() > until:
                    raise
            sleep(WATCH_SECONDS)
        yield


def without_files(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of data but for where they are."""
    sources = [{key: value for key, value in source.items() if key not in ("name", "test")} for source in data["sources"]]
    return {**data, "sources": sources}


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    end_with_parent()
    told = json.loads(sys.argv[1])
    try:
        with alone(Path(told["folder"])):
            run = config.read(Path(told["run"]), told["set"])
            work(ClientWorker(told["name"], run, Path(told["folder"]), tuple(told["data"]), told["devices"]), int(sys.argv[2]))
    except FedExpertsError as error:
        print(f"{told['name']}: {error}", file=sys.stderr, flush=True)
    return MISTAKE


def work(resident: ClientWorker, listener: int) -> None:
    """Answers messages that come to the socket with the file descriptor `listener`, for ever."""

    def answer(message: Message) -> Message:
        try:
            runtime, _ = resident.runtime(str(message.head.get("run")))
            torch.set_num_threads(runtime.training.threads)
            return resident.answer(message)
        except FedExpertsError as error:
            resident.say(str(error))
            raise
        except Exception as error:  # the next message may be one that it can answer
            traceback.print_exc()
            raise BadMessage(f"{type(error).__name__}: {error}") from None

    serve(socket.socket(fileno=listener), answer)


if __name__ == "__main__":
    sys.exit(main())
