"""The record of what left a client: complete, on disk before anything leaves, and verified by `fedexperts audit`."""

import json
from datetime import UTC, datetime

import pytest
import torch

from fedexperts.core.devices import Profile
from fedexperts.deploy.sent import SENT, SentLog, audit
from fedexperts.deploy.socket_rpc import answered
from fedexperts.engines.flower.codec import to_records
from fedexperts.engines.message import to_bytes
from fedexperts.engines.remote import Greeting, greeting_message, greeting_request, job_request
from fedexperts.engines.serialization import answer_message
from fedexperts.errors import BadValue, Damaged
from fedexperts.types import Client, Cost, Failure, Job, Patch, Update

RUN = json.dumps({"id": "abc"})
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
WEIGHTS = Patch({"a.b": torch.arange(6.0).view(2, 3)}, {"a.b": torch.tensor([0, 4])})
UPDATE = Update(
    *("north", 3, "train", WEIGHTS, 17),
    extra={"control/x": torch.ones(4)},
    metrics={"loss": 0.5, "routed": {"block": [1] * 2000}},
    cost=Cost(seconds=1.5, tokens=99),
)
REQUEST = job_request(Job("north", 3, "train", "0", {}, Patch({})), RUN)


@pytest.fixture
def log(tmp_path):
    return SentLog(tmp_path, now=lambda: NOON)


def lines(folder):
    return [json.loads(line) for line in (folder / SENT).read_text().splitlines()]


def test_an_update_is_recorded_with_its_tensors_counts_and_metrics_and_the_hash_that_the_server_sees(log, tmp_path):
    message = answer_message(UPDATE)
    assert log(REQUEST, message) is message
    (line,) = lines(tmp_path)
    assert (line["time"], line["run"], line["round"], line["task"]) == ("2030-01-01T12:00:00+00:00", "abc", 3, "train")
    assert line["what"] == "update"
    assert line["tensors"] == {name: len(part) for name, part in message.parts.items()}
    assert {"patch/a.b", "rows/0", "extra/control/x"} == set(line["tensors"])
    content = line["content"]
    assert (content["examples"], content["cost"]["tokens"], content["metrics"]["loss"]) == (17, 99, 0.5)
    assert content["metrics"]["routed"]["bytes"] > 4000 and len(content["metrics"]["routed"]["sha256"]) == 64
    assert line["sha256"] == to_records(message)["message"]["sha256"]


def test_what_a_client_says_when_it_joins_is_recorded_whole(log, tmp_path):
    counts = {"train": {"double": 12}, "validation": 2, "test": 2, "longest_response": 3, "frames": {"double": ["Q: ", "A:"]}}
    greeting = Greeting(Client("north", 12, "double", 10**9), Profile(1e12, 1e6, 1e6), {"torch": "2"}, counts)
    log(greeting_request(RUN), greeting_message(greeting))
    (line,) = lines(tmp_path)
    assert (line["what"], line["run"], line["round"]) == ("greeting", "abc", None)
    assert line["content"]["counts"] == counts
    assert line["content"]["client"]["examples"] == 12
    assert line["content"]["profile"]["flops_per_second"] == 1e12 and line["content"]["versions"] == {"torch": "2"}


def test_failures_and_refusals_are_recorded_with_their_reasons_also_of_messages_that_cannot_be_read(log, tmp_path):
    def refuse(message):
        raise BadValue("it has another data.limit")

    log(REQUEST, answer_message(Failure("north", 3, "train", "RuntimeError: 4711")))
    assert answered(to_bytes(REQUEST), refuse, log).head == {"refused": "it has another data.limit"}
    assert "cut off" in answered(b"nonsense", refuse, log).head["refused"]
    failure, refusal, unreadable = lines(tmp_path)
    assert (failure["what"], failure["content"]["reason"]) == ("failure", "RuntimeError: 4711")
    assert (refusal["what"], refusal["round"], refusal["content"]) == ("refused", 3, {"reason": "it has another data.limit"})
    assert (unreadable["what"], unreadable["run"], unreadable["round"]) == ("refused", None, None)


def test_the_line_is_on_disk_before_the_message_leaves(log, tmp_path):
    reply = answered(to_bytes(REQUEST), lambda message: answer_message(UPDATE), log)
    assert "update" in reply.head  # it has not been sent yet
    assert len(lines(tmp_path)) == 1


def test_where_the_record_cannot_be_written_nothing_leaves_but_that_and_later_messages_are_recorded(log, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedexperts.io.chain.os.fsync", full)
        reply = log(REQUEST, answer_message(UPDATE))
    assert reply.parts == {}
    assert reply.head["refused"].startswith("its record of what leaves it cannot be written (No space left on device)")
    log(REQUEST, answer_message(UPDATE))
    assert len(audit(tmp_path).records) == 2  # the first was there in the end


def test_a_client_started_again_goes_on_with_its_record_and_not_with_a_changed_one(log, tmp_path):
    for _ in range(2):
        log(REQUEST, answer_message(UPDATE))
    SentLog(tmp_path)(REQUEST, answer_message(UPDATE))
    assert [line["number"] for line in lines(tmp_path)] == [1, 2, 3]
    (tmp_path / SENT).write_text((tmp_path / SENT).read_text().replace("17", "16", 1))
    with pytest.raises(Damaged, match=r"sent\.jsonl, line 1: it was changed"):
        SentLog(tmp_path)


def test_the_command_shows_what_left_and_exits_with_2_where_the_record_was_changed(fedexperts, log, tmp_path):
    for _ in range(3):
        log(REQUEST, answer_message(UPDATE))
    with (tmp_path / SENT).open("a") as file:
        file.write('{"number": 4')
    code, out, err = fedexperts("audit", tmp_path, "--json")
    assert code == 0
    assert [json.loads(line)["number"] for line in out.splitlines()] == [1, 2, 3]
    assert "3 messages" in err and "incomplete: line 4" in err and lines_of_seal(tmp_path) in err
    code, out, _ = fedexperts("audit", tmp_path)
    assert code == 0 and "Messages that left" in out and "no line was changed" in out

    text = (tmp_path / SENT).read_text().splitlines()
    (tmp_path / SENT).write_text("\n".join([text[0], text[2]]) + "\n")
    code, out, err = fedexperts("audit", tmp_path)
    assert code == 2 and "line 2: it is number 3, and number 2 belongs here" in err
    code, out, err = fedexperts("audit", tmp_path / "elsewhere")
    assert code == 2 and "is missing; give the folder of a client" in err


def lines_of_seal(folder):
    return json.loads((folder / SENT).read_text().splitlines()[2])["seal"]
