"""A grid in this process, whose nodes answer at once, late, twice, wrongly or not at all, as a test says."""

from collections import defaultdict
from itertools import count

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedexperts.config import EvaluationSettings
from fedexperts.engines import remote
from fedexperts.engines.client_store import ClientStateStore
from fedexperts.engines.flower.client_app import client_app
from fedexperts.engines.flower.codec import from_records
from fedexperts.engines.flower.engine import FlowerEngine
from fedexperts.engines.local import ClientRuntime
from fedexperts.experiment.client_task import ClientTask
from fedexperts.methods.contract import Declaration, Method, Metric
from fedexperts.types import Client, Failure, Job, Patch, Split, Training, Update

CLIENTS = {f"c{number:02d}": Client(f"c{number:02d}", 10 * number, "t") for number in (1, 2, 3, 4)}
SOON = 0.2  # seconds, of a round that ends without all answers


class FakeGrid(Grid):
    """Nodes that answer at once; a reply is there when the test has not said otherwise.

    apps: node → its ClientApp. change: node → a function of its reply to a job, which returns the replies that come instead.
    """

    def __init__(self, answer, names):
        self.apps = {node: client_app(lambda message, _, name=name: answer(message, name)) for node, name in enumerate(names, 1)}
        self.change, self.pushed, self.pulled, self.withdrawn = {}, [], [], []
        self.replies, self.numbers, self.clock = {}, count(1), count()
        self.after = defaultdict(int)  # message → at which pull of all it is there

    run = property(lambda self: None)

    def set_run(self, run):
        raise NotImplementedError

    def create_message(self, *_, **__):
        raise NotImplementedError

    def send_and_receive(self, *_, **__):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.apps)

    def push_messages(self, messages):
        return [self.push(message) for message in messages]

    def push(self, message):
        node = message.metadata.dst_node_id
        if node not in self.apps:
            return None
        message.metadata.__dict__["_message_id"] = id = f"m{next(self.numbers)}"
        context = Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
        self.replies[id] = [self.apps[node](message, context)]
        if "hello" not in from_records(message.content).head:
            self.pushed.append(id)
            change = self.change.get(node)
            if change:
                self.replies[id] = change(self.replies[id][0])
        return id

    def withdraw(self, message_id):
        self.withdrawn.append(message_id)

    def pull_messages(self, message_ids):
        ids, now = list(message_ids), next(self.clock)
        self.pulled.append(ids)
        replies = [reply for id in ids if self.after[id] <= now for reply in self.replies.pop(id, [])]
        for broken in replies:
            if isinstance(broken, Exception):
                raise broken
        return replies


@pytest.fixture(autouse=True)
def identity():
    """Flower sets it where it starts a ServerApp, and messages need it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def job(client, round=1, task="train", accepted=""):
    return Job(client, round, task, f"0/{round}/{client}", {}, Patch({"w": torch.tensor([float(round)])}), accepted=accepted)


def jobs(*clients, round=1, accepted=None):
    return [job(client, round, accepted=(accepted or {}).get(client, "")) for client in clients or CLIENTS]


class Doubling(Method):
    """Each client doubles its weight, and counts its jobs in its client state."""

    def declare(self):
        return Declaration(metrics={"before": Metric()}, client_state=("rounds",))

    def train(self, job, context):
        before = context.client_state.get("rounds", torch.tensor(0.0))
        context.client_state["rounds"] = before + 1
        patch = Patch({"w": job.patch.tensors["w"] * 2})
        return Update(job.client, job.round, job.task, patch, context.client.examples, metrics={"before": before.item()})


class FakeClients:
    """The whole side of the clients."""

    def __init__(self, folder, names=tuple(CLIENTS)):
        data = dict.fromkeys(CLIENTS, Split([], [], []))
        task, store = ClientTask(Doubling(), EvaluationSettings(score="after_aggregation"), rounds=9), ClientStateStore(folder)
        self.runtime = ClientRuntime(torch.nn.Linear(1, 1), None, Training(), CLIENTS, data, task, store)
        self.grid = FakeGrid(self.answer, names)

    def answer(self, message, name):
        return remote.answer(self.runtime, name, message)

    def engine(self, **options):
        return FlowerEngine(self.grid, "the run", CLIENTS, **{"in_flight": 4, **options})

    def lie(self, client, message):
        """Has `client` answer every job with `message`."""
        node = list(CLIENTS).index(client) + 1
        self.grid.apps[node] = client_app(lambda sent, _: self.answer(sent, client) if "hello" in sent.head else message)


@pytest.fixture
def clients(tmp_path):
    return FakeClients(tmp_path)


@pytest.fixture
def engine(clients):
    engine = clients.engine()
    engine.connect()
    return engine


def answers(engine, *clients, round=1, accepted=None):
    """accepted: client → the key of its last job whose answer counted, which this brings up to date."""
    by_client = {answer.client: answer for answer in engine.run(jobs(*clients, round=round, accepted=accepted))}
    if accepted is not None:
        accepted |= {client: job(client, round).key for client, answer in by_client.items() if isinstance(answer, Update)}
    return by_client


def failed(client, reason, round=1):
    return Failure(client, round, "train", reason)


def reply_to(reply):
    """A message to which another reply can be made."""
    message = FlowerMessage(RecordDict(), 1, "query")
    message.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return message
