"""What a SuperLink gives out, and keeps on its disk, of answers that have not come whole and of jobs that nobody fetches."""

import os

import pytest
from flwr.app import Message as FlowerMessage
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from fedexperts.deploy.grid import SuperLinkGrid
from fedexperts.deploy.superlink import DiskObjectStore, ReconnectingLinkState
from fedexperts.engines.flower.codec import from_records, to_records
from fedexperts.engines.message import Message

LIMIT = 1e9
SIZE = 7_000_000  # of a message: two of Flower's pieces


class Runtime:
    """The server's side of a SuperLink, in this process."""

    def __init__(self, state):
        self.state = state
        ((task_id, self.task),) = state.task_store.items()
        self.task_id = task_id

    def __getattr__(self, name):
        handler = getattr(runtime_handlers, "".join(f"_{each.lower()}" if each.isupper() else each for each in name).lstrip("_"))
        return lambda request: handler(request, self.state, self.task)


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet_handlers, "check_abort", lambda *_: None)
    return ReconnectingLinkState(NoOpFederationManager(), DiskObjectStore(tmp_path))


@pytest.fixture
def node(state):
    node = state.create_node(NOOP_FLWR_AID, "none", b"key", 30)
    assert state.activate_node(node, 30)
    return node


@pytest.fixture
def links(state, monkeypatch):
    run = state.create_run("app", "1", "hash", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
    runtime = Runtime(state)
    for name, value in (("_task_id", runtime.task_id), ("_run_id", run), ("_node_id", SUPERLINK_NODE_ID)):
        monkeypatch.setattr(TaskIdentity, name, value)
    links = SuperLinkGrid("127.0.0.1:1", insecure=True, token="t")
    links.set_run(Run.create_empty(run))
    links._client = runtime
    return links


def asked(links, node):
    """The id of a job that was sent to `node`."""
    (message_id,) = links.push_messages([FlowerMessage(to_records(Message({}, {"w": os.urandom(SIZE)})), node, "query")])
    return message_id


def announced(state, node):
    """The objects of the answer to the job that waits for `node`, which has announced it."""
    (job,) = state.get_message_ins(node, 1)
    answer = FlowerMessage(to_records(Message({"some": "answer"}, {"w": os.urandom(SIZE)})), reply_to=job)
    answer.metadata.__dict__["_message_id"] = answer.object_id
    answer.metadata.__dict__["_src_node_id"] = node
    head = message_to_proto(remove_content_from_message(answer))
    trees = [get_object_tree(answer)]
    fleet_handlers.push_messages(
        PushMessagesRequest(node=Node(node_id=node), messages_list=[head], message_object_trees=trees), state
    )
    return {name: each.deflate() for name, each in get_all_nested_objects(answer).items()}


def test_an_answer_is_given_out_when_all_of_it_has_come(state, node, links):
    job = asked(links, node)
    assert links.fetch(job, LIMIT) == []
    objects = announced(state, node)
    for name, content in objects.items():
        assert links.fetch(job, LIMIT) == [], "not waited for"
        state.object_store.put(name, content)
    (answer,) = links.fetch(job, LIMIT)
    assert from_records(answer.content).head == {"some": "answer"}
    links.withdraw(job)  # which the node of this test has not fetched
    assert not state.object_store.store, "what was fetched is not kept"


def test_a_node_that_goes_in_the_middle_of_its_answer_has_gone(state, node, links):
    job = asked(links, node)
    name, content = next(iter(announced(state, node).items()))
    state.object_store.put(name, content)
    assert links.fetch(job, LIMIT) == []
    state.deactivate_node(node)
    (error,) = links.fetch(job, LIMIT)
    assert error.has_error()


def test_a_job_that_was_never_fetched_leaves_nothing_on_disk_when_it_is_withdrawn(state, node, links, tmp_path):
    jobs = [asked(links, node) for _ in range(2)]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 2 * SIZE
    for job in jobs:
        links.withdraw(job)
        links.withdraw(job)
    assert not [*tmp_path.iterdir()]
