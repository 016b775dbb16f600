"""Whole runs over a grid: quorums, failures in the results folder, and settings that go together with no other."""

import json

import pytest
import torch
from fakegrid import CLIENTS, SOON, FakeGrid, reply_to
from flwr.app import Error
from flwr.app import Message as FlowerMessage

from fedexperts.config import RunConfig
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment import checkpoint, flower, runner
from fedexperts.io.toml import checked


def config(tiny_tree, **federation):
    return checked(RunConfig, {**tiny_tree, "federation": {**tiny_tree["federation"], "engine": "flower", **federation}})


def play(message, name):
    return flower.play(message, {"partition-id": int(name[1:]) - 1})


def saved(out):
    return checkpoint.latest(out).name, (checkpoint.latest(out) / "weights.safetensors").read_bytes()


def test_below_the_quorum_a_run_stops_and_resumed_it_ends_with_the_bits_of_one_that_never_did(tiny_tree, tmp_path):
    grid, two = FakeGrid(play, CLIENTS), config(tiny_tree, min_clients=2)
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    runner.run(two, undisturbed, engine=flower.over(grid))

    grid.pushed = []
    lost = 4 + 2 + 2 + 4 + 1  # the answer to this job: evaluations before the first and after the second round ask all four
    grid.change = dict.fromkeys(grid.apps, lambda reply: [] if len(grid.pushed) == lost else [reply])
    late = config(tiny_tree, min_clients=2, round_seconds=SOON)
    with pytest.raises(
        BadRun,
        match=r"^round 3: 1 of 2 clients failed, .*round_seconds = 0\.2, and federation\.min_clients = 2 must answer; .*--resume",
    ):
        runner.run(late, out, engine=flower.over(grid))
    assert checkpoint.latest(out).name == "000002-train"

    grid.change = {}
    runner.run(two, out, resume=True, engine=flower.over(grid))
    assert saved(out) == saved(undisturbed)
    assert saved(out)[0] == "000003-train"


def test_above_the_quorum_a_run_goes_on_without_those_that_failed(tiny_tree, tmp_path):
    grid = FakeGrid(play, CLIENTS)
    grid.change = {1: lambda reply: [FlowerMessage(Error(1, "no"), reply_to=reply_to(reply))]}
    out = runner.run(config(tiny_tree, clients_per_round=4, min_clients=3), tmp_path / "out", engine=flower.over(grid))
    assert checkpoint.latest(out).name == "000003-train"
    assert '"failed": {"c01": "no"}' in (out / "rounds.jsonl").read_text()


def test_answers_that_come_twice_and_failures_are_in_the_results_folder(tiny_tree, tmp_path):
    grid = FakeGrid(play, CLIENTS)
    grid.change = {1: lambda reply: [reply, reply], 2: lambda reply: [KeyError("Strange")]}
    everyone = config(tiny_tree, rounds=1, clients_per_round=4)
    out = runner.run(everyone, tmp_path / "out", engine=flower.over(grid))
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {"client": "c01", "round": 1, "task": "train"} in dropped
    assert {line["client"] for line in dropped} == {"c01"}
    (line,) = map(json.loads, (out / "rounds.jsonl").read_text().splitlines())
    assert line["failed"] == {"c02": "its answer cannot be read (KeyError: 'Strange')"}


@pytest.mark.parametrize(
    ("federation", "sentence"),
    [
        ({"clients_per_round": 2, "min_clients": 3}, "federation.min_clients = 3 is larger than .* = 2; lower min_clients"),
        ({"engine": "local", "gpus_per_worker": 0.5}, 'federation.gpus_per_worker = 0.5 needs federation.engine = "flower"'),
    ],
)
def test_settings_that_go_together_with_no_other_are_refused(tiny_tree, federation, sentence):
    with pytest.raises(BadValue, match=sentence):
        config(tiny_tree, **federation)


def test_without_flower_the_error_says_how_to_install_it(tiny_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(BadValue, match=r'^federation\.engine = "flower" needs Flower.*pip install "fedexperts\[flower\]"'):
        runner.run(config(tiny_tree), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_graphics_cards_than_the_machine_has_are_refused(tiny_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BadValue, match=r"federation\.gpus_per_worker = 0\.25, but this machine has 0; lower it"):
        runner.run(config(tiny_tree, gpus_per_worker=0.25), tmp_path / "out")
