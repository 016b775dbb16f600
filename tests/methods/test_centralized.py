"""Centralized training in whole runs: its participant is created before the run."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fedexperts.config import RunConfig
from fedexperts.experiment import checkpoint
from fedexperts.experiment.plan import plan
from fedexperts.experiment.runner import engine_for, run
from fedexperts.experiment.setup import prepare_run
from fedexperts.io.toml import checked
from fedexperts.methods.base import patch_for
from fedexperts.methods.centralized import Centralized
from fedexperts.methods.contract import Method
from fedexperts.types import Assignment, ClientContext, Job


def config(tree, method="centralized", **tables):
    return checked(
        RunConfig, {**tree, "method": {"name": method}, **{key: {**tree.get(key, {}), **tables[key]} for key in tables}}
    )


def lines(path):
    """Without what the clock says."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in entries]


def weights(out):
    return load_file(checkpoint.latest(out) / "weights.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_one_participant_has_all_examples_in_the_order_of_the_clients(tiny_tree):
    prepared = prepare_run(config(tiny_tree))
    (name,) = prepared.participants
    whole, parts = prepared.data[name], [prepared.clients[client] for client in prepared.server.clients]
    assert name == "c01-c04"
    assert list(whole.train) == [example for part in parts for example in part.train]
    assert list(whole.validation) == [example for part in parts for example in part.validation]
    assert prepared.participants[name].examples == sum(client.examples for client in prepared.server.clients.values())


@pytest.mark.parametrize(("each", "clients"), [(1, 1), (2, 2), (None, 4), (9, 4)])
def test_it_takes_as_many_steps_as_the_sampled_clients_together(tiny_tree, each, clients):
    tree = {**tiny_tree, "federation": {} if each is None else {"clients_per_round": each}}
    assert prepare_run(config(tree)).training.local_steps == 2 * clients
    assert prepare_run(config(tree, "fedavg")).training.local_steps == 2


def test_a_run_trains_on_all_clients_examples_and_is_scored_on_each_clients_own(tiny_tree, tmp_path):
    settings = config(tiny_tree, federation={"rounds": 1}, devices={"memory_gb": 1e-6})
    out, prepared = run(settings, tmp_path / "out"), prepare_run(settings)

    whole = prepared.server.anatomy.all_experts
    job = Job("c01-c04", 1, "train", "0/1/train/c01-c04", whole, patch_for(prepared.server, Assignment(whole)))
    runtime = engine_for(prepared, tmp_path).runtime
    data = prepared.clients.as_one_client()["c01-c04"]
    context = ClientContext(runtime.clients["c01-c04"], runtime.model, data, runtime.encoder, runtime.training, {})
    assert context.training.local_steps == 4
    assert equal(weights(out), Method().train(job, context).patch.tensors)

    (entry,) = [entry for entry in lines(out / "ledger.jsonl") if entry["task"] == "train"]
    sent = sum(tensor.nbytes for tensor in job.patch.tensors.values())
    assert (entry["client"], entry["failed"]) == ("c01-c04", None)
    assert min(entry["bytes_down"], entry["bytes_up"]) >= sent
    assert lines(out / "rounds.jsonl")[0]["clients"] == ["c01-c04"]
    scored = {line["client"]: line["examples"] for line in lines(out / "evals.jsonl") if line["round"] == 1 and line["client"]}
    assert scored == {name: len(prepared.clients[name].test) for name in ("c01", "c02", "c03", "c04")}


def test_with_one_client_it_is_fedavg_bit_for_bit(tiny_tree, tmp_path):
    data = {"clients": 1, "sources": ["synthetic/double"]}
    one, other = (run(config(tiny_tree, name, data=data), tmp_path / name) for name in ("centralized", "fedavg"))
    assert equal(weights(one), weights(other))
    for name in ("rounds.jsonl", "evals.jsonl", "ledger.jsonl"):
        assert lines(one / name) == lines(other / name)
    assert len(lines(one / "rounds.jsonl")) == 3


def test_a_resumed_run_gives_the_same_bits(tiny_tree, tmp_path, monkeypatch):
    whole = run(config(tiny_tree), tmp_path / "whole")
    train, trained_rounds = Centralized.train, []

    def interrupted(self, job, context):
        trained_rounds.append(job.round)
        if trained_rounds == [1, 2]:
            raise KeyboardInterrupt
        return train(self, job, context)

    monkeypatch.setattr(Centralized, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config(tiny_tree), tmp_path / "stopped")
    stopped = run(config(tiny_tree), tmp_path / "stopped", resume=True)
    assert trained_rounds == [1, 2, 2, 3]
    assert equal(weights(stopped), weights(whole))
    assert lines(stopped / "evals.jsonl") == lines(whole / "evals.jsonl")


def test_the_plan_lists_the_clients_although_none_of_them_trains(tiny_tree):
    memory = {"devices": {"memory_gb": 1e-6}}
    centralized, usual = (plan(prepare_run(config({**tiny_tree, **memory}, name))) for name in ("centralized", "fedavg"))
    shown = [{key: value for key, value in client.items() if not key.startswith("first_")} for client in centralized["clients"]]
    assert shown == [{key: client[key] for key in shown[0]} for client in usual["clients"]]
    assert [(client["first_experts"], client["first_bytes_down"]) for client in centralized["clients"]] == [(0, 0)] * 4
    of_memory = [[each for each in planned["warnings"] if "less memory" in each] for planned in (centralized, usual)]
    assert list(map(len, of_memory)) == [0, 1]
    assert centralized["round_flops_estimated"] == 2 * usual["round_flops_estimated"]
