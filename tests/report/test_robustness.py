"""Sentences about undone rounds and about experts with too few contributors."""

from dataclasses import replace
from types import SimpleNamespace

from fedexperts.report import robustness
from fedexperts.report.read import Round

RUN = """
[federation]
robust = { name = "median", attackers = 0.25 }
"""
EXPERTS = {"a": (0, 1), "b": (0, 1), "c": (0, 2), "d": (0,)}


def run_with(*rounds, run_file=RUN):
    return SimpleNamespace(rounds=rounds, run_file=run_file)


def round_with(**fields):
    return Round(1, clients=tuple(EXPERTS), holds={client: {"layer": ids} for client, ids in EXPERTS.items()}, **fields)


def test_experts_that_too_few_clients_sent_are_counted():
    """Four clients, f = 1: the median needs more than two; expert 0 has four, 1 has two, 2 has one."""
    assert robustness.counted(run_with(round_with())) == (2, 3)
    assert "fedmoe 2 of 3 (66.7 %)" in robustness.warning({"fedmoe": [run_with(round_with())]})


def test_clients_that_failed_contribute_nothing():
    """Three clients, f = 0: more than one is enough; expert 0 has three, 1 two, 2 one."""
    assert robustness.counted(run_with(round_with(failed={"d": "it died"}))) == (1, 3)


def test_experts_that_were_not_sent_do_not_count():
    """c sends expert 0 alone of its two."""
    assert robustness.counted(run_with(round_with(sends={"c": {"layer": (0,)}}))) == (1, 2)


def test_without_a_rule_that_needs_contributors_nothing_is_said():
    for run_file in ("", "[federation]\nrobust = 'clip'", "no TOML ["):
        assert robustness.warning({"fedmoe": [run_with(round_with(), run_file=run_file)]}) == ""


def test_undone_rounds_are_said_with_their_suspects():
    rounds = [round_with(undone="loss", suspects=("b",)), replace(round_with(undone="loss", suspects=("a", "b")), round=2)]
    said = robustness.warning({"fedavg": [run_with(*rounds, run_file="")], "flex": [run_with(round_with(), run_file="")]})
    assert said == "Warning: rounds were undone (federation.undo): fedavg 2 (suspects: a 1 times, b 2 times)."
    alone = {"fedavg": [run_with(round_with(undone="loss"), run_file="")]}
    assert robustness.undone(alone).endswith("fedavg 1 (no client stood out).")
