"""Clients that go and come back, as the engine sees them."""

from dataclasses import replace

from fakegrid import CLIENTS, FakeClients, identity, jobs  # noqa: F401  # a fixture among them

from fedexperts.engines.flower.client_app import client_app
from fedexperts.engines.remote import Greeting, greeting_message
from fedexperts.types import Failure, Update


def outcomes(answers):
    return {answer.client: answer.reason if isinstance(answer, Failure) else "answered" for answer in answers}


def test_a_client_that_reconnects_in_the_middle_of_its_job_fails_in_it_and_answers_the_next(tmp_path):
    clients = FakeClients(tmp_path)
    connections = dict.fromkeys(clients.grid.get_node_ids(), "first")
    engine = clients.engine(connections=lambda: dict(connections), poll_seconds=0)
    engine.connect()

    def lose(reply):
        connections[2] = "second"
        return []

    clients.grid.change[2] = lose
    answered = dict.fromkeys(CLIENTS, "answered")
    assert outcomes(engine.run(jobs())) == {**answered, "c02": "it reconnected in the middle of its job"}
    del clients.grid.change[2]
    again = list(engine.run(jobs(round=2)))
    assert outcomes(again) == answered
    (second,) = (answer for answer in again if answer.client == "c02")
    assert isinstance(second, Update) and second.metrics["before"] == 0  # its client state of the lost job is gone


def test_a_client_that_was_away_is_asked_again_who_it_is_and_is_announced_once(tmp_path):
    clients, announced = FakeClients(tmp_path), []
    engine = clients.engine(announce=announced.append, poll_seconds=0)
    engine.connect()
    assert sorted(announced[-4:]) == [f"{name} is there" for name in CLIENTS]
    app = clients.grid.apps.pop(3)
    engine.greet()
    clients.grid.apps[3] = app
    before = len(announced)
    engine.greet()
    engine.greet()
    assert announced[before:] == ["c03 is there"]


def test_a_client_that_was_refused_and_reconnects_is_asked_again_though_nobody_saw_it_go(tmp_path):
    """One that is killed is taken for connected for some time."""
    clients, connections = FakeClients(tmp_path), {}
    honest, other = clients.grid.apps[3], greeting_message(Greeting(replace(CLIENTS["c03"], examples=7), None, {}))
    clients.grid.apps[3] = client_app(lambda message, _: other)
    engine = clients.engine(connections=lambda: dict(connections), poll_seconds=0)
    engine.connect(seconds=0, fewest=3)
    assert set(engine.refused) == {3}
    clients.grid.apps[3] = honest
    engine.greet()
    assert "c03" not in engine.nodes
    connections[3] = "another"
    engine.greet()
    assert engine.nodes["c03"] == 3 and not engine.refused


def test_nodes_whose_keys_are_known_are_their_clients_and_no_others(tmp_path):
    clients, announced = FakeClients(tmp_path), []
    names = dict(enumerate(["c02", "c01", "c03", "c04"], 1))
    engine = clients.engine(names=names, announce=announced.append, poll_seconds=0)
    engine.connect(seconds=0, fewest=0)
    while len(engine.refused) + len(engine.nodes) < 4:
        engine.greet()
    assert set(engine.nodes) == {"c03", "c04"}
    assert "refused: c02: a node with the key of c02 says it is c01; give each client its own keys" in announced


def test_a_client_whose_key_was_removed_is_not_waited_for(tmp_path):
    clients, announced = FakeClients(tmp_path), []
    names = dict(enumerate(["c01", "c02", "c03"], 1))
    revoked = clients.grid.apps.pop(4)
    engine = clients.engine(names=names, announce=announced.append, poll_seconds=0)
    engine.connect(seconds=60)
    assert set(engine.nodes) == {"c01", "c02", "c03"} and revoked is not None
    assert announced[0] == "not waited for, since no key of theirs is registered here: c04"
