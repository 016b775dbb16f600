"""Clients that answer without training, in processes of their own: for `engines.py`."""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedexperts.config import RunConfig
from fedexperts.deploy import client
from fedexperts.deploy.socket_rpc import end_with_parent
from fedexperts.engines import remote
from fedexperts.engines.local import ClientRuntime
from fedexperts.experiment.client_task import ClientTask
from fedexperts.experiment.runtime import runtime_for
from fedexperts.experiment.setup import Prepared, prepare_run
from fedexperts.io.toml import checked
from fedexperts.types import ClientContext, Job, Patch, Update


def noise(work: ClientTask, job: Job, context: ClientContext) -> Update:
    """In place of training. Noise, since Flower carries equal arrays only once; the engine has seeded it for the job."""
    if job.task == "evaluate":
        return work(job, context)
    patch = Patch({name: torch.randn_like(tensor) for name, tensor in job.patch.tensors.items()}, job.patch.rows)
    return Update(job.client, job.round, job.task, patch, context.client.examples)


def idle_site(prepared: Prepared, out: Path) -> ClientRuntime:
    runtime = runtime_for(prepared, out)
    return replace(runtime, work=partial(noise, runtime.work))


def worker() -> None:
    """A resident worker: its arguments are those of `fedexperts.deploy.client`."""
    client.runtime_for = idle_site
    client.main()


def nodes() -> None:
    """Nodes of a deployment that answer one after the other, and of each round's jobs the first one last."""
    from flwr.supernode.fleet_http_connection import http_request_response

    told = json.loads(sys.argv[1])
    end_with_parent()
    prepared = prepare_run(checked(RunConfig, told["settings"]))
    runtime, keys = idle_site(prepared, Path(told["out"])), Path(told["keys"])
    with ExitStack() as stack:
        there: dict[str, Any] = {}
        for name in prepared.config.data.names:
            key: Any = load_ssh_private_key((keys / name / "node.key").read_bytes(), None)
            known = (keys / name / "ca.pem").read_bytes(), (key, key.public_key())
            there[name] = stack.enter_context(http_request_response(told["server"], False, *known, None, 30))
        for name, node in there.items():
            reply(runtime, name, node, waited(node))  # who it is
        while True:
            jobs = [(name, node, waited(node)) for name, node in there.items()]
            for name, node, given in sorted(jobs, key=lambda job: -job[2][0].metadata.created_at):
                reply(runtime, name, node, given)


def waited(node: Any) -> Any:
    """The next message for a node, without what it holds."""
    receive = node[1]
    while (given := receive()) is None:
        time.sleep(0.2)
    return given


def reply(runtime: ClientRuntime, name: str, node: Any, given: Any) -> None:
    """What a SuperNode and its ClientApp do with a message."""
    from flwr.app import Message
    from flwr.supercore.inflatable import inflatable_object as objects
    from flwr.supercore.inflatable import inflatable_utils as parcels

    from fedexperts.engines.flower.codec import from_records, to_records

    _, _, send, _, _, pull, push, confirm = node
    told, tree = given
    run = told.metadata.run_id
    asked = parcels.pull_and_inflate_object_from_tree(tree, partial(pull, run), partial(confirm, run), return_type=Message)
    asked.metadata.__dict__["_message_id"] = told.metadata.message_id
    answer = Message(to_records(remote.answer(runtime, name, from_records(asked.content))), reply_to=asked)
    del asked
    with objects.no_object_id_recompute():
        answer.metadata.__dict__["_message_id"] = answer.object_id
        wanted, session = send(answer, objects.get_object_tree(answer), 0.0)
        parcels.push_objects(objects.get_all_nested_objects(answer), partial(push, run, session), object_ids_to_push=wanted)
