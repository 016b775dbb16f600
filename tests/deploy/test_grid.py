"""A message over the wire piece by piece: as it was, and never all of it twice."""

import pytest
from flwr.app import Message as FlowerMessage
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedexperts.deploy import grid
from fedexperts.engines.flower.codec import from_records, to_records
from fedexperts.engines.message import Message

LARGE = bytes(12_000_000)  # three pieces of Flower's, of which two are equal
PARTS = {"a": b"1" * 12_000_000, "b": b"2" * 10, "c": LARGE, "d": LARGE}


class SuperLink:
    """Keeps what is pushed, and gives it back as a message."""

    def __init__(self):
        self.objects, self.told, self.tree, self.known, self.confirmed = {}, None, None, set(), []

    def PushMessages(self, request):  # noqa: N802 (so Flower calls it)
        (self.told,), (self.tree,) = request.messages_list, request.message_object_trees
        wanted = {node.object_id for node in grid.iterate_object_tree(self.tree)} - self.known
        return PushAppMessagesResponse(message_ids=["m1"], objects_to_push=wanted, session_id="s")

    def PushObject(self, request):  # noqa: N802
        self.objects[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)

    def PullMessages(self, request):  # noqa: N802
        self.told.metadata.message_id = "m1"
        return PullAppMessagesResponse(messages_list=[self.told], message_object_trees=[self.tree])

    def PullObject(self, request):  # noqa: N802
        content = self.objects.get(request.object_id)
        return PullObjectResponse(object_found=content is not None, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request):  # noqa: N802
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def lent(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    lent = grid.Lent("127.0.0.1:1", insecure=True, token="t")
    lent.set_run(Run.create_empty(1))
    lent._client = SuperLink()
    return lent


def flower_message(parts):
    return FlowerMessage(to_records(Message({"it": "says"}, dict(parts))), 3, "query")


@pytest.mark.parametrize("parts", [PARTS, {}, {"b": b"2" * 10}], ids=["large", "empty", "small"])
def test_what_is_pulled_is_what_was_pushed(lent, parts):
    assert lent.push_messages([flower_message(parts)]) == ["m1"]
    (pulled,) = lent.pull_messages(["m1"])
    message = from_records(pulled.content)
    assert (message.head, message.parts) == ({"it": "says"}, parts)
    assert pulled.metadata.message_id == "m1"
    assert lent._client.confirmed == ["m1"]


def test_only_some_objects_are_ready_to_be_sent_at_a_time(lent, monkeypatch):
    groups = []
    push = grid.push_objects
    monkeypatch.setattr(grid, "push_objects", lambda some, send: groups.append(len(some)) or push(some, send))
    monkeypatch.setattr(grid, "AT_ONCE", 2)
    lent.push_messages([flower_message(PARTS)])
    assert max(groups) == 2
    assert sum(groups) == len(lent._client.objects)


def test_what_the_other_side_has_already_is_not_sent_again(lent):
    sent = flower_message(PARTS)
    lent.push_messages([sent])
    known = set(lent._client.objects)
    lent._client.known, lent._client.objects = known, {}
    lent.push_messages([sent])
    assert not lent._client.objects


def test_a_message_of_which_a_piece_is_missing_is_no_message(lent):
    lent.push_messages([flower_message(PARTS)])
    del lent._client.objects[max(lent._client.objects, key=lambda name: len(lent._client.objects[name]))]
    with pytest.raises(ObjectPullError):
        lent.pull_messages(["m1"])
    assert not lent._client.confirmed


def test_a_message_that_has_come_and_is_none_is_not_kept_for_ever(lent):
    lent.push_messages([flower_message(PARTS)])
    del lent._client.tree.children[:]  # its table of contents does not fit it
    with pytest.raises(KeyError):
        lent.pull_messages(["m1"])
    assert lent._client.confirmed == ["m1"]
