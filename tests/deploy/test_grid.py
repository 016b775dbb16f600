"""A message over the wire piece by piece: as it was, never all of it twice, and no more than its job allows."""

import sys
from pathlib import Path
from random import Random

import pytest
from flwr.app import Message as FlowerMessage
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedexperts.deploy import grid
from fedexperts.engines.flower.codec import ABOUT, from_records, to_records
from fedexperts.engines.flower.codec import PARTS as PARTS_RECORD
from fedexperts.engines.message import Message
from fedexperts.errors import BadMessage

LARGE = bytes(12_000_000)  # three pieces of Flower's, of which two are equal
PARTS = {"a": b"1" * 12_000_000, "b": b"2" * 10, "c": LARGE, "d": LARGE}


class SuperLink:
    """Keeps what is pushed, and gives it back as a message."""

    def __init__(self):
        self.objects, self.head, self.tree, self.known, self.confirmed, self.pulled = {}, None, None, set(), [], 0

    def PushMessages(self, request):  # noqa: N802 (so Flower calls it)
        (self.head,), (self.tree,) = request.messages_list, request.message_object_trees
        missing = {node.object_id for node in grid.iterate_object_tree(self.tree)} - self.known
        return PushAppMessagesResponse(message_ids=["m1"], objects_to_push=missing, session_id="s")

    def PushObject(self, request):  # noqa: N802
        self.objects[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)

    def PullMessages(self, request):  # noqa: N802
        self.head.metadata.message_id = "m1"
        return PullAppMessagesResponse(messages_list=[self.head], message_object_trees=[self.tree])

    def PullObject(self, request):  # noqa: N802
        content = self.objects.get(request.object_id)
        self.pulled += len(content or b"")
        return PullObjectResponse(object_found=content is not None, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request):  # noqa: N802
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def links(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    links = grid.SuperLinkGrid("127.0.0.1:1", insecure=True, token="t")
    links.set_run(Run.create_empty(1))
    links._client = SuperLink()
    return links


def flower_message(parts):
    return FlowerMessage(to_records(Message({"some": "head"}, dict(parts))), 3, "query")


@pytest.mark.parametrize("parts", [PARTS, {}, {"b": b"2" * 10}], ids=["large", "empty", "small"])
def test_what_is_pulled_is_what_was_pushed(links, parts):
    assert links.push_messages([flower_message(parts)]) == ["m1"]
    (pulled,) = links.pull_messages(["m1"])
    message = from_records(pulled.content)
    assert (message.head, message.parts) == ({"some": "head"}, parts)
    assert pulled.metadata.message_id == "m1"
    assert links._client.confirmed == ["m1"]


def test_only_some_objects_are_ready_to_be_sent_at_a_time(links, monkeypatch):
    groups = []
    push = grid.push_objects
    monkeypatch.setattr(grid, "push_objects", lambda some, send: groups.append(len(some)) or push(some, send))
    monkeypatch.setattr(grid, "PUSHED_TOGETHER", 2)
    links.push_messages([flower_message(PARTS)])
    assert max(groups) == 2
    assert sum(groups) == len(links._client.objects)


def test_what_the_other_side_has_already_is_not_sent_again(links):
    sent = flower_message(PARTS)
    links.push_messages([sent])
    known = set(links._client.objects)
    links._client.known, links._client.objects = known, {}
    links.push_messages([sent])
    assert not links._client.objects


def test_a_message_that_lacks_a_piece_is_an_error_and_given_up(links):
    links.push_messages([flower_message(PARTS)])
    del links._client.objects[max(links._client.objects, key=lambda name: len(links._client.objects[name]))]
    with pytest.raises(ObjectPullError):
        links.pull_messages(["m1"])
    assert links._client.confirmed == ["m1"]


def test_a_message_that_cannot_be_read_is_given_up(links):
    links.push_messages([flower_message(PARTS)])
    del links._client.tree.children[:]  # its list of objects does not fit it
    with pytest.raises(KeyError):
        links.pull_messages(["m1"])
    assert links._client.confirmed == ["m1"]


def test_a_message_of_just_the_bytes_that_are_allowed_is_fetched_and_a_larger_one_is_given_up_early(links):
    sent = flower_message({"a": Random(0).randbytes(12_000_000), "b": Random(1).randbytes(12_000_000)})
    links.push_messages([sent])
    superlink = links._client
    own = sum(len(array.data) for array in sent.content[PARTS_RECORD].values())
    own += sum(len(value) for value in sent.content[ABOUT].values() if isinstance(value, bytes))
    (message,) = links.fetch("m1", own)
    assert len(from_records(message.content, own).parts) == 2
    everything = sum(map(len, superlink.objects.values()))
    superlink.confirmed, superlink.pulled = [], 0
    with pytest.raises(BadMessage, match=r"takes at least .* bytes, and its job allows 6,071,536; install"):
        links.fetch("m1", 6_000_000)
    assert superlink.pulled < 6_000_000 + 2 * 5_300_000 < everything, "an object beyond the limit, and one that is under way"
    assert superlink.confirmed == ["m1"]


def push_unfolding(links, piece, times):
    """Pushes a message with an array that names its one piece so many times."""
    links._client.objects.clear()
    links.push_messages([flower_message({"a": piece})])
    superlink = links._client
    (name,) = (name for name, content in superlink.objects.items() if content.startswith(b"Array "))
    names = b'"arraychunk_ids": [' + b"0, " * (times - 1) + b"0]"
    head, _, body = superlink.objects[name].replace(b'"arraychunk_ids": [0]', names).partition(b"\0")
    kind, children, _ = head.split(b" ")
    superlink.objects[name] = b" ".join([kind, children, str(len(body)).encode()]) + b"\0" + body


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
def test_64_uploads_of_4_mb_that_unfold_to_256_are_refused_and_hardly_take_memory(links):
    def memory(what):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

    push_unfolding(links, b"1" * 4_000_000, 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    for number in range(64):
        push_unfolding(links, bytes([number]) * 4_000_000, 64)
        with pytest.raises(BadMessage, match="takes at least 256,0"):
            links.fetch("m1", 8_000_000)
    assert memory("VmHWM") - before < 40_000_000


def test_an_array_of_a_thousand_times_the_same_piece_is_refused_before_it_is_joined(links):
    push_unfolding(links, b"1" * 100_000, 1000)
    with pytest.raises(BadMessage, match=r"takes at least 100,0\d\d,\d\d\d bytes, and its job allows 1,066,536"):
        links.fetch("m1", 1_000_000)
    (message,) = links.fetch("m1", 2 * 10**8)
    assert message.content["parts"]["0"].data == b"1" * 10**8


def test_whom_a_reply_is_from_and_to_what_is_the_superlinks_word_and_not_the_senders(links):
    links.push_messages([flower_message({})])
    links._client.head.metadata.reply_to_message_id = "asked"
    links._client.head.metadata.src_node_id = 7
    (message,) = links.fetch("m1", 10**6)
    assert (message.metadata.reply_to_message_id, message.metadata.src_node_id) == ("asked", 7)


def test_what_is_no_message_is_given_up(links):
    links.push_messages([flower_message({})])
    superlink = links._client
    superlink.tree = superlink.tree.children[0]  # its content alone
    with pytest.raises(TypeError, match="a RecordDict came, and no message"):
        links.fetch("m1", 10**6)
    assert superlink.confirmed == ["m1"]
