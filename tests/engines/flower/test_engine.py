"""Jobs over a grid: whose answer is whose, in which order, and what happens to those that are late, twice or missing."""

import errno
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from fakegrid import CLIENTS, SOON, Doubling, FakeClients, answers, failed, jobs
from flwr.app import Message as FlowerMessage

from fedexperts.core.ledger import Ledger
from fedexperts.engines import client_store
from fedexperts.engines.base import expectation, reorder_and_validate
from fedexperts.engines.flower.client_app import client_app
from fedexperts.engines.remote import Greeting, greeting_message
from fedexperts.errors import BadRun
from fedexperts.federation import no_reports
from fedexperts.methods.base import mean_rows
from fedexperts.testing import bare_server
from fedexperts.types import Failure, Update


def test_every_job_has_its_clients_answer(engine):
    by_client = answers(engine)
    assert [answer.examples for answer in by_client.values()] == [10, 20, 30, 40]
    assert all(answer.patch.tensors["w"].item() == 2.0 for answer in by_client.values())
    assert not engine.dropped


def test_answers_come_in_the_order_of_the_jobs_whichever_is_there_first(clients, engine):
    first = len(clients.grid.pulled)
    clients.grid.after = {"m5": first + 4, "m6": first + 2, "m7": 0, "m8": 0}  # four greetings went before
    assert list(answers(engine)) == ["c01", "c02", "c03", "c04"]
    assert clients.grid.pushed == ["m5", "m6", "m7", "m8"]
    assert clients.grid.pulled[first:] == [["m5"]] * 5 + [["m6"], ["m7"], ["m8"]], "others stay with Flower until their turn"


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_jobs_are_under_way_than_allowed(clients, most):
    engine, started = clients.engine(in_flight=most), []
    engine.connect()
    for number, _ in enumerate(engine.run(started.append(each) or each for each in jobs())):
        assert len(started) == min(number + most, 4)
    assert len(started) == 4


def test_the_server_holds_one_update_at_a_time(engine):
    answers_seen, alive = [], []

    def watched(jobs):
        for answer in engine.run(jobs):
            alive.append(sum(reference() is not None for reference in answers_seen))
            answers_seen.append(weakref.ref(answer))
            yield answer
            del answer

    server = replace(bare_server([], CLIENTS.values()), weights={"w": torch.zeros(1)}, layout={"w": None})
    expect = partial(expectation, server, Doubling(), no_reports)
    merged = mean_rows(server, reorder_and_validate(watched, jobs(), expect, Ledger()), lambda update: 1.0)
    assert merged.weights["w"].item() == 2.0
    assert alive == [0, 0, 0, 0]


def test_a_reply_that_comes_twice_counts_once(clients, engine):
    clients.grid.change[2] = lambda reply: [reply, reply]
    assert all(isinstance(answer, Update) for answer in answers(engine).values())
    assert engine.dropped == {"c02": 1}


def test_a_reply_to_no_job_is_dropped(clients, engine):
    def stray(reply):
        other = FlowerMessage(reply.content, reply_to=reply)
        other.metadata.__dict__["_reply_to_message_id"] = "m99"
        return [other, reply]

    clients.grid.change[3] = stray
    assert all(isinstance(answer, Update) for answer in answers(engine).values())
    assert engine.dropped == {"": 1}


def test_a_client_that_does_not_answer_in_time_fails_and_its_late_answer_is_dropped(clients):
    engine, late = clients.engine(seconds=SOON, withdraw=clients.grid.withdraw), []
    engine.connect()
    clients.grid.change[2] = lambda reply: late.append(reply) or []
    by_client = answers(engine)
    assert clients.grid.withdrawn == [late[0].metadata.reply_to_message_id]
    assert by_client["c02"] == failed("c02", "it did not answer within federation.round_seconds = 0.2")
    assert [type(answer) for answer in by_client.values()] == [Update, Failure, Update, Update]
    assert not engine.dropped
    clients.grid.change, clients.grid.replies[late[0].metadata.reply_to_message_id] = {}, late
    again = answers(engine, round=2)
    assert [(answer.round, type(answer)) for answer in again.values()] == [(2, Update)] * 4
    assert engine.dropped == {"c02": 1}
    answers(engine, round=3)
    assert engine.dropped == {"c02": 1}


def test_a_client_that_has_gone_is_sent_nothing(clients, engine, monkeypatch):
    """Flower would take the message, and keep it."""
    monkeypatch.setattr(clients.grid, "get_node_ids", lambda: [1, 3, 4])
    assert answers(engine)["c02"] == failed("c02", "it is not connected")
    assert len(clients.grid.pushed) == 3


def test_late_answers_are_fetched_one_at_a_time(clients):
    engine, late = clients.engine(seconds=SOON), []
    engine.connect()
    clients.grid.change = dict.fromkeys((1, 2, 3), lambda reply: late.append(reply) or [])
    answers(engine)
    clients.grid.change = {}
    clients.grid.replies |= {reply.metadata.reply_to_message_id: [reply] for reply in late}
    first = len(clients.grid.pulled)
    answers(engine, round=2)
    assert engine.dropped == dict.fromkeys(("c01", "c02", "c03"), 1)
    assert {len(ids) for ids in clients.grid.pulled[first:]} == {1}


def test_an_answer_that_is_there_at_its_turn_counts_though_another_took_all_the_time(clients):
    engine = clients.engine(seconds=SOON)
    engine.connect()
    clients.grid.change[1] = lambda reply: []
    assert [type(answer) for answer in answers(engine).values()] == [Failure, Update, Update, Update]


def test_client_state_of_a_job_that_did_not_count_is_gone_in_the_next(clients):
    """Or server and client would remember different rounds."""
    engine = clients.engine(seconds=SOON)
    engine.connect()
    clients.grid.change[2] = lambda reply: [] if len(clients.grid.pushed) == 6 else [reply]  # its answer in the second round
    accepted = {}
    rounds = [answers(engine, round=round, accepted=accepted) for round in (1, 2, 3)]
    assert [by_client["c01"].metrics["before"] for by_client in rounds] == [0, 1, 2]
    assert isinstance(rounds[1]["c02"], Failure)
    assert [rounds[i]["c02"].metrics["before"] for i in (0, 2)] == [0, 1]


def test_a_client_whose_disk_is_full_fails_with_that_reason_and_goes_on_from_its_last_client_state(clients, engine, monkeypatch):
    accepted = {}
    assert answers(engine, accepted=accepted)["c02"].metrics["before"] == 0
    with monkeypatch.context() as full:
        full.setattr(client_store, "write_tensors", no_room)
        reason = answers(engine, "c02", round=2, accepted=accepted)["c02"].reason
    assert reason == "OSError: [Errno 28] No space left on device"
    assert answers(engine, round=3, accepted=accepted)["c02"].metrics["before"] == 1


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_resumed_server_says_which_answers_it_had_accepted(clients, tmp_path):
    first, accepted = clients.engine(), {}
    first.connect()
    answers(first, "c01", "c02", round=1, accepted=accepted)
    answers(first, "c01", round=2, accepted=dict(accepted))  # and its server is killed before it has saved this round
    resumed = clients.engine()
    resumed.connect()
    again = answers(resumed, "c01", "c02", round=2, accepted=accepted)
    assert {client: answer.metrics["before"] for client, answer in again.items()} == {"c01": 1, "c02": 1}


def test_a_job_for_another_client_is_not_done(clients, engine):
    engine.nodes["c01"] = engine.nodes["c02"]
    assert answers(engine, "c01")["c01"] == failed("c01", "a job of c01 came to c02")


def test_a_client_that_is_not_there_fails_and_takes_part_when_it_is(clients, tmp_path):
    gone = clients.grid.apps.pop(4)
    engine = clients.engine()
    engine.connect(seconds=0, fewest=3)
    assert answers(engine)["c04"] == failed("c04", "it is not connected")
    clients.grid.apps[9] = gone  # as another node: its name is what counts
    assert isinstance(answers(engine, round=2)["c04"], Update)


def test_a_client_whose_node_has_gone_fails_and_takes_part_again_under_its_name(clients, engine):
    gone = clients.grid.apps.pop(4)
    assert answers(engine)["c04"] == failed("c04", "it is not connected")
    clients.grid.apps[9] = gone
    assert isinstance(answers(engine, round=2)["c04"], Update)


def test_a_second_node_under_a_name_is_refused_as_long_as_the_first_is_there(clients, engine):
    clients.grid.apps[9] = client_app(lambda message, _: clients.answer(message, "c01"))
    answers(engine)
    assert engine.nodes["c01"] == 1
    assert engine.refused[9] == "two nodes say that they are c01; stop one of them"
    del clients.grid.apps[1]
    assert isinstance(answers(engine, round=2)["c01"], Update)
    assert (engine.nodes["c01"], engine.refused) == (9, {})


@pytest.mark.parametrize("seconds", [0, None])
def test_too_few_clients_are_an_error_that_names_those_that_are_missing_and_why(tmp_path, seconds):
    clients = FakeClients(tmp_path, ["c01", "c02", "x", "y"])
    with pytest.raises(BadRun, match=r"^2 of 4 clients are not there: c03, c04 .*no client of the run is called x; .*start them"):
        clients.engine().connect(seconds=seconds, fewest=3)


def test_a_client_with_other_data_is_refused(clients):
    other = greeting_message(Greeting(replace(CLIENTS["c03"], examples=7), None, {}))
    clients.grid.apps[3] = client_app(lambda message, _: other)
    with pytest.raises(BadRun, match=r"1 of 4 clients are not there: c03 .*examples=7.* this run has .*examples=30"):
        clients.engine().connect()


def test_a_dead_grid_is_an_error_and_no_endless_wait(clients):
    def dead():
        raise BadRun("Flower's simulation has stopped")

    engine = clients.engine(check=dead)
    with pytest.raises(BadRun, match="has stopped"):
        engine.connect()
