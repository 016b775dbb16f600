"""The worker of a client, a process that stays: it has the base model and the client's data in memory, and answers every message.

python -m fedexperts.deploy.client SETTINGS SOCKET      (`fedexperts client` starts it; SETTINGS: its options as JSON)
"""

import json
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from fedexperts import config
from fedexperts.config import RunConfig
from fedexperts.data.own import counts
from fedexperts.deploy.logs import LOG, logging_to, say
from fedexperts.deploy.processes import POLL_SECONDS, end_with_parent
from fedexperts.deploy.sent import SentLog
from fedexperts.deploy.socket_rpc import Leaving, serve
from fedexperts.deploy.supervisor import UNUSABLE
from fedexperts.engines import remote
from fedexperts.engines.local import ClientRuntime
from fedexperts.engines.message import Message
from fedexperts.engines.serialization import answer_message
from fedexperts.errors import BadMessage, BadValue, Busy, FedExpertsError
from fedexperts.experiment.runtime import runtime_for
from fedexperts.experiment.setup import Cache, OwnDataParts, Parts, cached, prepare_run
from fedexperts.io.files import locked
from fedexperts.io.manifest import finite
from fedexperts.io.toml import checked, different
from fedexperts.models.load import load
from fedexperts.moe.device import find_devices
from fedexperts.types import Failure, job_key

REFUSED = "refused:"
"""In the record of answered jobs, before the key of a job that failed since client state was lost."""
LOST = "lost:"
"""There, before the key of a job whose client state was lost, once a failure has said so."""
KEPT = "kept:"
"""There, before the key of a job after which client state was written."""
LOCK_SECONDS = 30.0
"""For a process that was killed, or whose supervisor was, to release the folder of its client."""


@dataclass(frozen=True, eq=False)
class ClientWorker:
    """A client: what is its own, whatever run the server has under way.

    config: of its own run file. Its settings of files and devices count, not the server's: the model, where data are, whether
        code of a model's repository may run, what it computes on.
    data: its own files; none where it takes its part of the run's partition.

    Raises:
        BadValue: the run has no such client, takes its data from elsewhere, or names a device that this machine does not have.
    """

    name: str
    config: RunConfig
    folder: Path  # of its client state
    data: tuple[str, ...] = ()
    devices: Mapping[str, Any] = field(default_factory=dict)  # fields of DeviceSettings that replace the run file's
    prepared: Cache[tuple[ClientRuntime, Mapping[str, Any] | None]] = field(default_factory=dict)  # of the run that is under way

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
        find_devices(self.config.training.device)  # reports a device that is missing before the first message
        if self.data:
            self.parts.clients(self.config)  # reports mistakes in the data before the first message

    def answer(self, message: Message) -> Message:
        """Its answer; a failure where it has client state that does not continue from the answer the server accepted last.

        Then another machine has answered in its name, or its client state was lost. The same job fails again if it is repeated;
        in its next job the client goes on from what it has.

        Raises:
            BadMessage: or whatever is wrong with the client's own settings and data.
        """
        runtime, data_counts = self.runtime(str(message.head.get("run")))
        reply = remote.answer(runtime, self.name, message, data_counts)
        if "update" not in reply.head:
            return reply
        job = message.head["job"]
        accepted, key = job["accepted"], job_key(job["round"], job["task"])
        record = runtime.client_store.folder.with_name("answered")
        known, store = answered_jobs(record), runtime.client_store
        if REFUSED + key in known or self.has_lost(accepted, known, runtime):  # a restarted server may ask again
            store.drop_newer(self.name, accepted)
            record_answered(record, REFUSED + key, LOST + accepted)
            missing = "lost the client state" if accepted in known else "no record"
            reason = (
                f"it has {missing} of the answer that the server accepted last ({accepted}); restore {self.folder}, stop any "
                f"other client called {self.name}, or let it continue without that client state from its next job"
            )
            self.log(reason)
            return answer_message(Failure(self.name, job["round"], job["task"], reason))
        if job["task"] != "evaluate":
            record_answered(record, *([KEPT + key] if store.has(self.name, key) else []), key)
        return reply

    def has_lost(self, accepted: str, known: Sequence[str], runtime: ClientRuntime) -> bool:
        """Whether the client state after the job `accepted` is missing, and no failure has said so; known: the record."""
        declared, store = runtime.task.method.declare(), runtime.client_store
        if not accepted or LOST + accepted in known:
            return False
        if accepted not in known:
            return declared.keeps_weights or bool(declared.client_state) or bool(store.versions(self.name))
        return KEPT + accepted in known and not store.has(self.name, accepted)

    def runtime(self, run: str) -> tuple[ClientRuntime, Mapping[str, Any] | None]:
        """The client runtime of the run that `run` describes, as JSON, and the counts of the client's own data."""
        return cached(self.prepared, 1, run, lambda: self.prepare(run))

    def prepare(self, run: str) -> tuple[ClientRuntime, Mapping[str, Any] | None]:
        run_info = json.loads(run)
        if not str(run_info["id"]).isalnum():  # it becomes a folder's name
            raise BadMessage(f"a run cannot be called {run_info['id']!r}")
        agreed = checked(RunConfig, self.agreed(run_info["settings"]))
        parts, model = self.parts, agreed.model
        if model not in parts.bases:
            started = perf_counter()
            parts.base(model)
            self.log(f"loaded the base model {model.name} in {perf_counter() - started:.1f} s", logging.INFO)
        prepared = prepare_run(agreed, parts=parts)
        if prepared.base.identity != run_info["model_hash"]:
            raise BadMessage(f"its base model {model.name} is not the server's: their files differ; give both the same")
        own = asdict(counts(prepared.clients, self.name, parts.longest_response(agreed))) if self.data else None
        return runtime_for(prepared, self.folder / run_info["id"]), own

    @property
    def parts(self) -> Parts:
        """The base model and the data, which stay from run to run."""
        return parts_of(self.name, self.data)

    def agreed(self, server_settings: Mapping[str, Any]) -> dict[str, Any]:
        """The server's settings, with the client's own for what a server may not decide.

        Raises:
            BadMessage: the two disagree on how data are read.
        """
        own = self.config.resolved()
        if names := different(without_files(own["data"]), without_files(server_settings["data"])):
            raise BadMessage(f"its run file has another data.{names[0]} than the server's; give both sides the same run file")
        settings = {
            **server_settings,
            "model": {name: value for name, value in own["model"].items() if name != "adapter"},  # the server sends its weights
            "training": {**server_settings["training"], "device": own["training"]["device"]},
            "data": own["data"],
            "devices": {**own["devices"], **self.devices},
        }
        of_server = checked(RunConfig, server_settings)
        own_evaluation = {  # the server must not ask for more of the client's examples than the client's own run file shows
            "retained": own["evaluation"].get("retained", []),
            "predictions": min(self.config.predictions, of_server.predictions),
        }
        settings["evaluation"] = {**server_settings["evaluation"], **own_evaluation}
        # the server must not name a file of this machine
        own_files = {name: own["method"].get(name) for name in of_server.build_method().declare().local_files}
        settings["method"] = {**server_settings["method"], **own_files}
        return settings

    def log(self, sentence: str, level: int = logging.WARNING, **fields: Any) -> None:
        say(level, f"{self.name}: {sentence}", client=self.name, **fields)


@lru_cache  # a process has one client; tests have several
def parts_of(name: str, data: tuple[str, ...]) -> Parts:
    read = partial(load, on_demand=True)
    return OwnDataParts(name=name, files=data, load=read) if data else Parts(load=read)


def answered_jobs(record: Path) -> list[str]:
    """The keys of the jobs of a run that the client has answered."""
    return record.read_text().split() if record.exists() else []


def record_answered(record: Path, *jobs: str) -> None:
    """Adds the keys of jobs, or what is said of them; it is on disk before the server can count on the answer."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a") as file:
        file.write("".join(f"\n{job}\n" for job in jobs))  # a line of its own also after one that a power cut left half written
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process; waits for one whose supervisor was killed, which may need a moment to end.

    Raises:
        Busy: another process has it for longer.
    """
    deadline = monotonic() + LOCK_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder))
                break
            except Busy:
                if monotonic() > deadline:
                    raise
            sleep(POLL_SECONDS)
        yield


def without_files(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of data without the names of files."""
    sources = [
        {key: value for key, value in source.items() if key not in ("name", "test", "folder")} for source in data["sources"]
    ]
    return {**data, "sources": sources}


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    end_with_parent()
    options = json.loads(sys.argv[1])
    name, folder = options["name"], Path(options["folder"])
    try:
        with exclusive(folder), logging_to(folder / LOG, options.get("level", logging.INFO)):
            run = config.read(Path(options["run"]), options["set"])
            worker = ClientWorker(name, run, folder, tuple(options["data"]), options["devices"])
            answer_messages(worker, int(sys.argv[2]), SentLog(folder))
    except FedExpertsError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return UNUSABLE
    except OSError as error:  # such as a full disk, which may be over when it is started again
        print(f"{name}: {error}", file=sys.stderr, flush=True)
    return 1


def answer_messages(worker: ClientWorker, listener: int, leaving: Leaving) -> None:
    """Answers messages that come to the socket with the file descriptor `listener`, for ever, as `leaving` lets them leave."""

    def answer(message: Message) -> Message:
        started = perf_counter()
        try:
            runtime, _ = worker.runtime(str(message.head.get("run")))
            torch.set_num_threads(runtime.training.threads)
            reply = worker.answer(message)
            log_answer(worker, reply, perf_counter() - started)
            return reply
        except FedExpertsError as error:
            worker.log(str(error))
            raise
        except Exception as error:  # the next message may be one that it can answer
            traceback.print_exc()
            raise BadMessage(f"{type(error).__name__}: {error}") from None

    serve(socket.socket(fileno=listener), answer, leaving)


def log_answer(worker: ClientWorker, reply: Message, seconds: float) -> None:
    """Logs an answer that took so many `seconds`."""
    head, size = reply.head, sum(map(len, reply.parts.values()))
    if "greeting" in head:
        worker.log(f"said who it is, in {seconds:.1f} s", logging.INFO, seconds=round(seconds, 3))
        return
    job = head.get("update") or head["failure"]
    where = {"round": job["round"], "task": job["task"], "seconds": round(seconds, 3), "bytes": size}
    what = f"round {job['round']}, {job['task']}"
    if "failure" in head:
        worker.log(f"{what}: failed after {seconds:.1f} s: {job['reason']}", logging.WARNING, **where, failed=job["reason"])
        return
    loss = job["metrics"].get("loss")
    text = "" if loss is None else f", loss {loss:.4f}"
    worker.log(f"{what}: answered in {seconds:.1f} s{text}, {size / 1e6:.2f} MB", logging.INFO, **finite({**where, "loss": loss}))


if __name__ == "__main__":
    sys.exit(main())
