"""What a SuperLink gives out, and keeps on its disk, of answers that have not come whole and of jobs that nobody fetches."""

import os
from datetime import timedelta

import pytest
from flwr.app import ArrayRecord, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from fedexperts.deploy.grid import SuperLinkGrid
from fedexperts.deploy.link_state import (
    MOST_HEAD_BYTES,
    MOST_WAITING,
    DiskObjectStore,
    LimitedLinkState,
    require_recipient,
    require_reply,
)
from fedexperts.engines.flower.codec import from_records, to_records
from fedexperts.engines.flower.engine import read_reply
from fedexperts.engines.message import Message
from fedexperts.errors import BadMessage

LIMIT = 1e9
KEPT = {ArrayRecord().object_id}  # from the start
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
    return LimitedLinkState(NoOpFederationManager(), DiskObjectStore(tmp_path))


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


def asked(links, node, limit=""):
    """The id of a job that was sent to `node`, and whose answer may take `limit` bytes."""
    job = FlowerMessage(to_records(Message({}, {"w": os.urandom(SIZE)})), node, "query", group_id=str(limit))
    (message_id,) = links.push_messages([job])
    return message_id


def answer_to(job, node, size=SIZE):
    answer = FlowerMessage(to_records(Message({"some": "answer"}, {"w": os.urandom(size)})), reply_to=job)
    answer.metadata.__dict__["_message_id"] = answer.object_id
    answer.metadata.__dict__["_src_node_id"] = node
    return answer


def announce(state, node, answer, tree=None):
    """What the SuperLink says to `node`, which announces `answer`, with another tree where one is given."""
    head = message_to_proto(remove_content_from_message(answer))
    request = PushMessagesRequest(
        node=Node(node_id=node), messages_list=[head], message_object_trees=[tree or get_object_tree(answer)]
    )
    return fleet_handlers.push_messages(request, state)


def announced(state, node):
    """The objects of the answer to the job that waits for `node`, which has announced it."""
    (job,) = state.get_message_ins(node, 1)
    answer = answer_to(job, node)
    announce(state, node, answer)
    return {name: each.deflate() for name, each in get_all_nested_objects(answer).items()}


def sent(state, node, answer):
    """How many objects of `answer`, which `node` announces and sends, were taken."""
    said = announce(state, node, answer)
    contents = {name: each.deflate() for name, each in get_all_nested_objects(answer).items()}
    run = answer.metadata.run_id
    return sum(state.store_object(run, said.session_id, name, contents[name]) for name in said.objects_to_push)


def names(state):
    """The objects that a SuperLink has or waits for."""
    return state.object_store.store.keys()


def used(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


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
    assert names(state) == KEPT, "what was fetched is not kept"


def test_a_node_that_goes_in_the_middle_of_its_answer_has_gone(state, node, links, tmp_path):
    job = asked(links, node)
    name, content = next(iter(announced(state, node).items()))
    state.object_store.put(name, content)
    assert links.fetch(job, LIMIT) == []
    state.deactivate_node(node)
    (error,) = links.fetch(job, LIMIT)
    assert error.has_error()
    links.withdraw(job)
    assert {path.name for path in tmp_path.iterdir()} == KEPT and names(state) == KEPT and not state.message_res_store


def test_a_job_that_was_never_fetched_leaves_nothing_on_disk_when_it_is_withdrawn(state, node, links, tmp_path):
    jobs = [asked(links, node) for _ in range(2)]
    assert used(tmp_path) > 2 * SIZE
    for job in jobs:
        links.withdraw(job)
        links.withdraw(job)
    assert {path.name for path in tmp_path.iterdir()} == KEPT


def test_an_answer_larger_than_its_job_allows_does_not_stay_on_the_disk_and_fails_with_a_sentence(state, node, links, tmp_path):
    job = asked(links, node, limit=10_000)
    (received,) = state.get_message_ins(node, 1)
    links.withdraw(job)  # its own objects
    large = answer_to(received, node)
    assert sent(state, node, large) < len(get_all_nested_objects(large))
    assert used(tmp_path) < 10_000
    assert sent(state, node, answer_to(received, node, 100)) == 0, "it is not asked for another"
    (error,) = links.fetch(job, 10_000)
    assert error.metadata.reply_to_message_id == job
    with pytest.raises(BadMessage, match=r"its answer takes at least .* and its job allows 10,000;"):
        read_reply(error, 10_000)
    assert {path.name for path in tmp_path.iterdir()} == KEPT and names(state) == KEPT and not state._object_push_sessions


def test_an_answer_may_be_cut_off_and_come_again_but_not_for_ever(state, node, links, tmp_path):
    asked(links, node, limit=SIZE + 10_000)
    (job,) = state.get_message_ins(node, 1)
    for attempt in range(5):
        answer = answer_to(job, node)
        said = announce(state, node, answer)
        contents = {name: each.deflate() for name, each in get_all_nested_objects(answer).items()}
        pieces = [name for name in said.objects_to_push if len(contents[name]) > 1_000_000]
        taken = [state.store_object(job.metadata.run_id, said.session_id, name, contents[name]) for name in pieces]
        assert taken == ([True] * len(pieces) if attempt < 2 else [False] * len(pieces)), attempt
        assert len(pieces) == (2 if attempt < 3 else 0), attempt
        for session in state._object_push_sessions.values():
            session.expires_at = now() - timedelta(seconds=1)
        state.get_message_res({job.metadata.message_id}, job.metadata.run_id)
        assert used(tmp_path) < 1.5 * SIZE, "the job, and nothing that has stopped coming"


def test_objects_that_do_not_belong_to_the_answer_are_not_announced(state, node, links):
    asked(links, node, limit=SIZE)
    (job,) = state.get_message_ins(node, 1)
    answer, before = answer_to(job, node, 100), len(state.object_store)
    tree, other = get_object_tree(answer), get_object_tree(answer_to(job, node, 100))
    twice = ObjectTree(object_id=tree.object_id, children=[tree, *tree.children])
    for wrong in (other, twice):
        said = announce(state, node, answer, wrong)
        assert not said.objects_to_push and len(state.object_store) == before
    assert sent(state, node, answer) == len(get_all_nested_objects(answer))
    assert not announce(state, node, answer, ObjectTree(object_id=tree.object_id, children=other.children)).objects_to_push


def test_a_list_of_objects_counts_too_and_who_sends_one_says_in_which_session(state, node, links):
    asked(links, node, limit=10_000)
    (job,) = state.get_message_ins(node, 1)
    answer = answer_to(job, node, 100)
    said = announce(state, node, answer)
    name, content = next((name, each.deflate()) for name, each in get_all_nested_objects(answer).items())
    assert not state.store_object(job.metadata.run_id, "", name, content)
    assert state.store_object(job.metadata.run_id, said.session_id, name, content)
    names = [ObjectTree(object_id=f"{number:064x}") for number in range(1000)]
    other = answer_to(job, node, 200)
    before = len(state.object_store)
    announce(state, node, other, ObjectTree(object_id=other.object_id, children=names))
    assert len(state.object_store) < before


def test_what_has_another_hash_or_other_parts_than_announced_is_not_on_the_disk(state, node, links, tmp_path):
    asked(links, node, limit=SIZE)
    (job,) = state.get_message_ins(node, 1)
    answer = answer_to(job, node, 100)
    before, said = used(tmp_path), announce(state, node, answer)
    for name in said.objects_to_push:
        assert not state.store_object(job.metadata.run_id, said.session_id, name, os.urandom(1000))
    assert used(tmp_path) == before
    said = announce(state, node, answer, ObjectTree(object_id=answer.object_id))
    assert not said.objects_to_push, "it was announced with other parts, which are still to come"


def test_an_object_that_names_other_parts_than_were_announced_is_not_kept(state, node, links, tmp_path):
    asked(links, node, limit=SIZE)
    (job,) = state.get_message_ins(node, 1)
    answer, before = answer_to(job, node, 100), used(tmp_path)
    said = announce(state, node, answer, ObjectTree(object_id=answer.object_id))
    assert said.objects_to_push == [answer.object_id]
    assert not state.store_object(job.metadata.run_id, said.session_id, answer.object_id, answer.deflate())
    assert used(tmp_path) == before and state.object_store.get(answer.object_id) == b""


def test_a_list_with_a_name_that_is_no_hash_announces_nothing(state, node, links):
    asked(links, node, limit=SIZE)
    (job,) = state.get_message_ins(node, 1)
    answer, before = answer_to(job, node), len(state.object_store)
    for name in ("no hash", "1" * 63, "\U0001d7d8" * 64):
        tree = get_object_tree(answer)
        tree.children.append(ObjectTree(object_id=name))
        assert not announce(state, node, answer, tree).objects_to_push
        assert len(state.object_store) == before and not state._object_push_sessions


def test_a_node_sends_one_answer_at_a_time(state, node, links, tmp_path):
    jobs = [asked(links, node, limit=SIZE + 10_000) for _ in range(4)]
    for number, job in enumerate(state.get_message_ins(node, None)):
        links.withdraw(job.metadata.message_id)
        answer = answer_to(job, node)
        said = announce(state, node, answer)
        contents = {name: each.deflate() for name, each in get_all_nested_objects(answer).items()}
        largest = max(said.objects_to_push, key=lambda name: len(contents[name]))
        assert state.store_object(job.metadata.run_id, said.session_id, largest, contents[largest])
        assert len(state.message_res_store) == 1, number
    assert len(jobs) == 4 and used(tmp_path) < SIZE


def lying(job, node, about, size=100):
    """An answer, and a tree that says of the object `about` that it has a part that never comes."""
    answer, never = answer_to(job, node, size), ObjectTree(object_id="0" * 64)
    return answer, ObjectTree(object_id=answer.object_id, children=[ObjectTree(object_id=about, children=[never])])


def test_a_lie_about_an_object_that_others_have_too_keeps_no_answer_away(state, node, links):
    other = state.create_node(NOOP_FLWR_AID, "none", b"other key", 30)
    assert state.activate_node(other, 30)
    lied, answered = asked(links, node, limit=SIZE), asked(links, other, limit=SIZE)
    (first,), (second,) = state.get_message_ins(node, 1), state.get_message_ins(other, 1)
    answer = answer_to(second, other, 100)
    piece = next(name for name, each in get_all_nested_objects(answer).items() if not get_object_tree(each).children)
    assert announce(state, node, *lying(first, node, piece)).objects_to_push
    assert sent(state, other, answer) == len(get_all_nested_objects(answer))
    assert [each.metadata.message_id for each in links.fetch(answered, LIMIT)] == [answer.object_id]
    (error,) = links.fetch(lied, LIMIT)
    with pytest.raises(BadMessage, match="announces an object that another message has with other parts"):
        read_reply(error, SIZE)
    assert "0" * 64 not in names(state)


def test_the_empty_record_that_messages_share_cannot_be_lied_about(state, node, links):
    asked(links, node, limit=SIZE)
    (job,) = state.get_message_ins(node, 1)
    assert not announce(state, node, *lying(job, node, ArrayRecord().object_id)).objects_to_push
    answer = FlowerMessage(RecordDict({"none": ArrayRecord()}), reply_to=job)
    answer.metadata.__dict__.update(_message_id=answer.object_id, _src_node_id=node)
    assert sent(state, node, answer) == len(get_all_nested_objects(answer)) - 1
    assert [each.metadata.message_id for each in links.fetch(job.metadata.message_id, LIMIT)] == [answer.object_id]
    assert state.object_store.has(*KEPT), "what came with it is removed with it, but for this"


def test_an_answer_to_one_job_is_not_announced_as_that_to_another(state, node, links):
    asked(links, node, limit=SIZE), asked(links, node, limit=SIZE)
    first, second = state.get_message_ins(node, None)
    answer = answer_to(first, node, 100)
    assert sent(state, node, answer)
    tree = get_object_tree(answer)
    answer.metadata.__dict__["_reply_to_message_id"] = second.metadata.message_id
    announce(state, node, answer, tree)
    assert {*state.taken} == {first.metadata.message_id}


def test_an_answer_whose_objects_its_node_has_removed_is_not_whole(state, node, links):
    asked(links, node, limit=SIZE), asked(links, node, limit=SIZE)
    first, second = state.get_message_ins(node, None)
    answer = answer_to(first, node, 100)
    assert sent(state, node, answer)
    state.object_store.delete(answer.object_id)
    assert sent(state, node, answer_to(second, node, 200))
    assert {*state.message_ins_id_to_message_res_id} == {second.metadata.message_id}


def test_of_answers_that_nobody_fetches_a_node_leaves_a_few(state, node, links):
    for _ in range(6):
        asked(links, node, limit=SIZE)
    for job in state.get_message_ins(node, None):
        assert sent(state, node, answer_to(job, node, 100))
    assert len(state.message_res_store) == MOST_WAITING + 1


def test_an_object_that_is_sent_again_since_the_response_was_lost_is_there(state, node, links):
    asked(links, node, limit=SIZE)
    (job,) = state.get_message_ins(node, 1)
    answer = answer_to(job, node, 100)
    said = announce(state, node, answer)
    contents = {name: each.deflate() for name, each in get_all_nested_objects(answer).items()}
    for name in said.objects_to_push:
        assert [state.store_object(job.metadata.run_id, said.session_id, name, contents[name]) for _ in range(2)] == [True, True]


def test_a_node_confirms_what_it_received_alone(state, node, links):
    other = state.create_node(NOOP_FLWR_AID, "none", b"other key", 30)
    confirm = require_recipient(fleet_handlers.confirm_message_received)
    job = asked(links, node, limit=SIZE)
    for sender, is_there in ((other, True), (node, False)):
        request = ConfirmMessageReceivedRequest(node=Node(node_id=sender), run_id=1, message_object_id=job)
        confirm(request, state, state.object_store)
        assert state.object_store.has(job) == is_there


def test_a_node_pushes_nothing_but_replies_in_its_own_name(state, node, links):
    asked(links, node, limit=SIZE)
    (job,) = state.get_message_ins(node, 1)
    push = require_reply(fleet_handlers.push_messages)
    answer = answer_to(job, node, 100)
    good = PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[message_to_proto(remove_content_from_message(answer))],
        message_object_trees=[get_object_tree(answer)],
    )
    wrong = []
    for change in (
        lambda each: each.messages_list[0].metadata.ClearField("reply_to_message_id"),
        lambda each: setattr(each.messages_list[0].metadata, "src_node_id", SUPERLINK_NODE_ID),
        lambda each: setattr(each.node, "node_id", node + 1),
        lambda each: each.ClearField("messages_list"),
        lambda each: each.messages_list.append(each.messages_list[0]),
        lambda each: each.message_object_trees.append(each.message_object_trees[0]),
        lambda each: setattr(each.messages_list[0].metadata, "group_id", "x" * MOST_HEAD_BYTES),
    ):
        wrong.append(PushMessagesRequest())
        wrong[-1].CopyFrom(good)
        change(wrong[-1])
        assert not push(wrong[-1], state).objects_to_push and answer.object_id not in names(state)
    assert len(wrong) == 7
    (error,) = links.fetch(job.metadata.message_id, LIMIT)
    with pytest.raises(BadMessage, match="the head of its answer has more than 65,536 bytes"):
        read_reply(error, SIZE)


def test_an_answer_with_an_error_is_taken(state, node, links):
    job = asked(links, node, limit=10_000)
    (received,) = state.get_message_ins(node, 1)
    answer = FlowerMessage(Error(1, "x" * 10_000), reply_to=received)
    answer.metadata.__dict__.update(_message_id=answer.object_id, _src_node_id=node)
    request = PushMessagesRequest(
        node=Node(node_id=node), messages_list=[message_to_proto(answer)], message_object_trees=[get_object_tree(answer)]
    )
    said = require_reply(fleet_handlers.push_messages)(request, state)
    for name, each in get_all_nested_objects(answer).items():
        assert state.store_object(received.metadata.run_id, said.session_id, name, each.deflate())
    (error,) = links.fetch(job, 10_000)
    assert error.error.reason == "x" * 10_000


def test_a_node_that_gives_its_job_up_while_it_is_sent_does_not_end_the_run(state, node, links, monkeypatch):
    store = state.object_store.put

    def confirm(name, content):
        store(name, content)
        for each in list(state.message_ins_store):
            state.object_store.delete(each)

    monkeypatch.setattr(state.object_store, "put", confirm)
    job = FlowerMessage(to_records(Message({}, {"w": os.urandom(100)})), node, "query", group_id="10")
    assert links.push_messages([job]) == []
