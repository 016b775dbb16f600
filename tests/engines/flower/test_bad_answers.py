"""Whatever a client sends, it fails alone, by name, and before it takes more memory than its job allows."""

import re
import tracemalloc
from dataclasses import replace

import pytest
import torch
from fakegrid import CLIENTS, SOON, answers, failed, job, reply_to
from flwr.app import Array, Error, RecordDict
from flwr.app import Message as FlowerMessage

from fedexperts.engines.base import LONGEST_REASON, answer_limit
from fedexperts.engines.flower.client_app import client_app
from fedexperts.engines.flower.codec import ABOUT, PARTS, compressed, decompressed, from_records
from fedexperts.engines.message import MAX_DEPTH, Message, digest
from fedexperts.engines.remote import Greeting, greeting_message
from fedexperts.engines.serialization import answer_message
from fedexperts.errors import BadRun
from fedexperts.types import Failure, Patch, Update

ANSWER = answer_message(Update("c02", 1, "train", Patch({"w": torch.ones(1)}), 20, metrics={"loss": 0.5}))


def failure_of_c02_alone(engine):
    """Why the second client failed, where the others did not."""
    by_client = answers(engine)
    assert [type(answer) for answer in by_client.values()] == [Update, Failure, Update, Update]
    return by_client["c02"].reason


def test_an_error_is_the_clients_failure_in_one_line(clients, engine):
    clients.grid.change[3] = lambda reply: [FlowerMessage(Error(1, "two\nlines  of trouble"), reply_to=reply_to(reply))]
    assert answers(engine)["c03"] == failed("c03", "two lines of trouble")


def of_another_protocol(reply):
    reply.content[ABOUT]["protocol"] = 99


def cut_off(reply):
    data = reply.content[PARTS]["0"].data
    reply.content[PARTS]["0"] = Array("uint8", (len(data) - 2,), "safetensors", data[:-2])


def empty(reply):
    reply.content = RecordDict()


@pytest.mark.parametrize(
    ("how", "reason"),
    [(of_another_protocol, "it speaks protocol 99"), (cut_off, "its sha256 is not that"), (empty, "holds no message of ours")],
)
def test_an_answer_that_cannot_be_read_is_a_failure_with_the_reason(clients, engine, how, reason):
    clients.grid.change[2] = lambda reply: [how(reply) or reply]
    assert reason in failure_of_c02_alone(engine)


def test_an_answer_that_flower_cannot_read_fails_its_client_alone_in_its_job_and_when_it_comes_late(clients):
    engine, late = clients.engine(seconds=SOON), []
    engine.connect()
    clients.grid.change = {2: lambda reply: [KeyError("Strange")], 3: lambda reply: late.append(reply) or []}
    by_client = answers(engine)
    assert by_client["c02"] == failed("c02", "its answer cannot be read (KeyError: 'Strange')")
    assert [type(answer) for answer in by_client.values()] == [Update, Failure, Failure, Update]
    clients.grid.change = {}
    clients.grid.replies[late[0].metadata.reply_to_message_id] = [ValueError("cut off")]
    assert all(isinstance(answer, Update) for answer in answers(engine, round=2).values())


def test_when_the_grid_dies_while_an_answer_is_fetched_no_client_is_blamed(clients):
    def dead():
        if clients.grid.pushed:
            raise BadRun("Flower's SuperLink has stopped")

    engine = clients.engine(check=dead)
    engine.connect()
    clients.grid.change[1] = lambda reply: [ConnectionError("no route")]
    with pytest.raises(BadRun, match="SuperLink has stopped"):
        answers(engine)


def test_the_reason_that_a_client_gives_is_one_printable_line_and_not_endless(clients, engine):
    clients.grid.change[3] = lambda reply: [FlowerMessage(Error(1, "a\n\x1b[31mb" + 99_999 * "c"), reply_to=reply_to(reply))]
    reason = answers(engine)["c03"].reason
    assert reason.startswith("a [31mbcc")
    assert len(reason) == LONGEST_REASON


def with_head(**changes):
    return Message({**ANSWER.head, "update": {**ANSWER.head["update"], **changes}}, ANSWER.parts)


@pytest.mark.parametrize(
    "message",
    [
        with_head(metrics=[]),
        with_head(metrics={"loss": "low"}),
        with_head(metrics={"loss": [1.0]}),
        with_head(metrics={"loss": None}),
        with_head(examples="many"),
        with_head(examples=-1),
        with_head(cost={**ANSWER.head["update"]["cost"], "seconds": float("nan")}),
        with_head(cost={**ANSWER.head["update"]["cost"], "tokens": -1}),
        with_head(cost=None),
        with_head(round=[1]),
        Message({**ANSWER.head, "tensors": {"patch/w": [10**18, 10**18]}}, ANSWER.parts),
        Message({**ANSWER.head, "tensors": [3]}, ANSWER.parts),
        Message({"failure": {"client": "c02", "round": 1, "task": "train", "reason": {"a": 1}}}, {}),
    ],
)
def test_an_answer_with_values_of_the_wrong_kind_fails_its_client_alone(clients, engine, message):
    clients.lie("c02", message)
    assert "holds no answer that can be read" in failure_of_c02_alone(engine)


JSON = {
    "900 lists": "[" * 900 + "]" * 900,
    "900 objects": '{"a": ' * 900 + "1" + "}" * 900,
    "one list too many": "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2),
    "lists without end": "[" * 100_000,
    "10^400": "1" + "0" * 400,
    "5,000 digits": "9" * 5000,
    "65 bits": str(2**63),
    "half a character": '"\\ud800"',
}


def with_json(reply, text):
    """Has the metrics of an answer be `text`, as a client that does not use our code can."""
    about, parts = reply.content[ABOUT], from_records(reply.content).parts
    head = decompressed(about["head"]).replace('"metrics": {"before": 0.0}', f'"metrics": {{"loss": {text}}}')
    assert text in head
    about["head"], about["sha256"] = compressed(head), digest(head, parts)


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_json_that_nobody_could_write_again_fails_its_client_alone(clients, engine, text):
    clients.grid.change[2] = lambda reply: [with_json(reply, text) or reply]
    assert failure_of_c02_alone(engine).startswith("its JSON ")


@pytest.mark.parametrize(
    "text", ["-9223372036854775808", "1e308", '"\\ud83d\\ude00"', "[" * (MAX_DEPTH - 3) + "]" * (MAX_DEPTH - 3)]
)
def test_json_at_the_limits_is_read(clients, engine, text):
    clients.grid.change[2] = lambda reply: [with_json(reply, f'0.5, "other": {text}') or reply]
    assert all(isinstance(answer, Update) for answer in answers(engine).values())


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_a_greeting_with_such_json_is_refused_and_the_others_are_there(clients, text):
    honest = clients.grid.apps[3]

    def app(message, context):
        reply = honest(message, context)
        about = reply.content[ABOUT]
        head = decompressed(about["head"]).replace('"counts": null', f'"counts": {{"train": {text}}}')
        about["head"], about["sha256"] = compressed(head), digest(head, {})
        return reply

    clients.grid.apps[3] = app
    with pytest.raises(BadRun, match=r"1 of 4 clients are not there: c03 \(its JSON .*"):
        clients.engine().connect()


def test_a_job_of_260_kb_that_is_answered_by_600_mb_is_a_failure_before_any_of_them_is_decoded(clients, engine):
    sent = replace(job("c02"), patch=Patch({"w": torch.zeros(65_000)}))
    huge = bytes(600_000_000)  # zeros that nobody has written take no memory

    def extra(reply):
        reply.content[PARTS]["1"] = Array("uint8", (len(huge),), "safetensors", huge)
        return [reply]

    clients.grid.change[2] = extra
    tracemalloc.start()
    try:
        (answer,) = engine.run([sent])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent.nbytes == 260_000
    assert peak < 2**23
    numbers = re.fullmatch(r"its answer takes at least ([\d,]+) bytes, and its job allows ([\d,]+); install .*", answer.reason)
    took, allowed = (int(number.replace(",", "")) for number in numbers.groups())
    assert 600_260_000 < took < 600_262_000
    assert allowed == answer_limit(sent) < 2**25


def test_an_answer_that_is_larger_than_its_job_allows_is_dropped_also_when_it_comes_late(clients):
    engine, late = clients.engine(seconds=SOON), []
    engine.connect()
    clients.grid.change[2] = lambda reply: late.append(reply) or []
    failure_of_c02_alone(engine)
    fetched = []
    engine.fetch = lambda message_id, limit: fetched.append(limit) or clients.grid.pull_messages([message_id])
    clients.grid.change, clients.grid.replies[late[0].metadata.reply_to_message_id] = {}, late
    answers(engine, round=2)
    assert engine.dropped == {"c02": 1}
    assert fetched == [answer_limit(job("c02"))] * 5, "the late one, and the four of the round"


@pytest.mark.parametrize(
    "change",
    [
        {"client": {"name": ["c03"], "examples": 30}},
        {"client": {"name": "c03", "examples": -30}},
        {"client": {"name": "c03", "examples": 30, "memory_bytes": float("nan")}},
        {"profile": {"flops_per_second": 0, "down_bytes_per_second": 1, "up_bytes_per_second": 1}},
        {"profile": {"flops_per_second": 1e300, "down_bytes_per_second": 1, "up_bytes_per_second": 1}},
        {"versions": 3},
        {"counts": "many"},
    ],
)
def test_a_greeting_with_values_of_the_wrong_kind_is_refused_and_the_others_are_there(clients, change):
    message = greeting_message(Greeting(CLIENTS["c03"], None, {}))
    strange = Message({"greeting": {**message.head["greeting"], **change}}, {})
    clients.grid.apps[3] = client_app(lambda sent, _: strange)
    with pytest.raises(BadRun, match=r"1 of 4 clients are not there: c03 .*holds no greeting that can be read"):
        clients.engine().connect()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"round": 7}, "it answered for c02 in round 7, train, which is not its job"),
        ({"client": "c03"}, "it answered for c03 in round 1, train, which is not its job"),
        ({"task": "profile"}, "it answered for c02 in round 1, profile, which is not its job"),
    ],
)
def test_an_answer_to_another_job_is_a_failure(clients, engine, wrong, reason):
    clients.lie("c02", answer_message(replace(Update("c02", 1, "train", Patch({}), 20), **wrong)))
    assert failure_of_c02_alone(engine).startswith(reason)
