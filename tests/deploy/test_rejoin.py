"""Clients that go and come back, as the engine sees them."""

from dataclasses import replace

from test_engine import CLIENTS, ClientContext, identity, jobs  # noqa: F401  # a fixture among them

from fedexperts.engines.flower.client_app import client_app
from fedexperts.engines.remote import Greeting, greeting_message
from fedexperts.types import Failure, Update


def outcomes(answers):
    return {answer.client: answer.reason if isinstance(answer, Failure) else "answered" for answer in answers}


def test_a_client_that_connects_anew_in_the_middle_of_its_job_fails_in_it_and_answers_the_next(tmp_path):
    context = ClientContext(tmp_path)
    since = dict.fromkeys(context.grid.get_node_ids(), "first")
    engine = context.engine(since=lambda: dict(since), poll_seconds=0)
    engine.connect()

    def lose(reply):
        since[2] = "second"
        return []

    context.grid.change[2] = lose
    answered = dict.fromkeys(CLIENTS, "answered")
    assert outcomes(engine.run(jobs())) == {**answered, "c02": "it connected anew in the middle of its job"}
    del context.grid.change[2]
    again = list(engine.run(jobs(round=2)))
    assert outcomes(again) == answered
    (second,) = (answer for answer in again if answer.client == "c02")
    assert isinstance(second, Update) and second.metrics["before"] == 0  # what it kept of the lost job is gone


def test_a_client_that_was_away_is_asked_again_who_it_is_and_what_it_says_is_told_once(tmp_path):
    context, said = ClientContext(tmp_path), []
    engine = context.engine(tell=said.append, poll_seconds=0)
    engine.connect()
    assert sorted(said[-4:]) == [f"{name} is there" for name in CLIENTS]
    app = context.grid.apps.pop(3)
    engine.greet()
    context.grid.apps[3] = app
    before = len(said)
    engine.greet()
    engine.greet()
    assert said[before:] == ["c03 is there"]


def test_a_client_that_was_refused_and_connects_anew_is_asked_again_though_nobody_saw_it_go(tmp_path):
    """One that is killed is taken for connected for some time."""
    context, since = ClientContext(tmp_path), {}
    honest, other = context.grid.apps[3], greeting_message(Greeting(replace(CLIENTS["c03"], examples=7), None, {}))
    context.grid.apps[3] = client_app(lambda message, _: other)
    engine = context.engine(since=lambda: dict(since), poll_seconds=0)
    engine.connect(seconds=0, fewest=3)
    assert set(engine.refused) == {3}
    context.grid.apps[3] = honest
    engine.greet()
    assert "c03" not in engine.nodes
    since[3] = "anew"
    engine.greet()
    assert engine.nodes["c03"] == 3 and not engine.refused


def test_nodes_whose_keys_are_known_are_their_clients_and_no_others(tmp_path):
    context, said = ClientContext(tmp_path), []
    names = dict(enumerate(["c02", "c01", "c03", "c04"], 1))
    engine = context.engine(names=names, tell=said.append, poll_seconds=0)
    engine.connect(seconds=0, fewest=0)
    while len(engine.refused) + len(engine.nodes) < 4:
        engine.greet()
    assert set(engine.nodes) == {"c03", "c04"}
    assert "refused: c02: a node with the key of c02 says it is c01; give each client its own keys" in said
