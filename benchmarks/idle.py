"""Clients that answer without training, in processes of their own: for `engine_starts.py`."""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedexperts.config import RunConfig
from fedexperts.deploy import client
from fedexperts.deploy.processes import end_with_parent
from fedexperts.engines import remote
from fedexperts.engines.local import ClientRuntime
from fedexperts.experiment.runtime import runtime_for, task_for
from fedexperts.experiment.setup import Prepared, prepare_run
from fedexperts.io.toml import checked
from fedexperts.methods.contract import Wrapper
from fedexperts.types import ClientContext, Job, Patch, Update


@dataclass(frozen=True)
class Noise(Wrapper):
    """A method whose clients answer with noise in place of training.

    Noise, since Flower carries equal arrays only once; the engine has seeded it for the job.
    """

    def train(self, job: Job, context: ClientContext) -> Update:
        patch = Patch({name: torch.randn_like(tensor) for name, tensor in job.patch.tensors.items()}, job.patch.rows)
        return Update(job.client, job.round, job.task, patch, context.client.examples)


def idle_runtime(prepared: Prepared, out: Path) -> ClientRuntime:
    runtime, task = runtime_for(prepared, out), task_for(prepared)
    return replace(runtime, task=replace(task, method=Noise(task.method)))


def worker() -> None:
    """A client's worker: its arguments are those of `fedexperts.deploy.client`."""
    client.runtime_for = idle_runtime
    client.main()


def nodes() -> None:
    """Nodes of a deployment that answer one after the other, and of each round's jobs the first one last."""
    from flwr.supernode.fleet_http_connection import http_request_response

    options = json.loads(sys.argv[1])
    end_with_parent()
    prepared = prepare_run(checked(RunConfig, options["settings"]))
    runtime, keys = idle_runtime(prepared, Path(options["out"])), Path(options["keys"])
    with ExitStack() as stack:
        connections: dict[str, Any] = {}
        for name in prepared.config.data.names:
            key: Any = load_ssh_private_key((keys / name / "node.key").read_bytes(), None)
            credentials = (keys / name / "ca.pem").read_bytes(), (key, key.public_key())
            connections[name] = stack.enter_context(http_request_response(options["server"], False, *credentials, None, 30))
        for name, connection in connections.items():
            reply(runtime, name, connection, next_message(connection))  # who it is
        while True:
            jobs = [(name, connection, next_message(connection)) for name, connection in connections.items()]
            for name, connection, received in sorted(jobs, key=lambda job: -job[2][0].metadata.created_at):
                reply(runtime, name, connection, received)


def next_message(connection: Any) -> Any:
    """The next message for a node, without its content."""
    receive = connection[1]
    while (received := receive()) is None:
        time.sleep(0.2)
    return received


def reply(runtime: ClientRuntime, name: str, connection: Any, received: Any) -> None:
    """What a SuperNode and its ClientApp do with a message."""
    from flwr.app import Message
    from flwr.supercore.inflatable import inflatable_object as objects
    from flwr.supercore.inflatable import inflatable_utils as parcels

    from fedexperts.engines.flower.codec import from_records, to_records

    _, _, send, _, _, pull, push, confirm = connection
    head, tree = received
    run = head.metadata.run_id
    message = parcels.pull_and_inflate_object_from_tree(tree, partial(pull, run), partial(confirm, run), return_type=Message)
    message.metadata.__dict__["_message_id"] = head.metadata.message_id
    answer = Message(to_records(remote.answer(runtime, name, from_records(message.content))), reply_to=message)
    del message
    with objects.no_object_id_recompute():
        answer.metadata.__dict__["_message_id"] = answer.object_id
        missing, session = send(answer, objects.get_object_tree(answer), 0.0)
        parcels.push_objects(objects.get_all_nested_objects(answer), partial(push, run, session), object_ids_to_push=missing)
