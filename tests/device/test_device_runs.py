"""Whole runs with the base on another device: their logs, weights and exports are those of the CPU."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fedexperts.config import RunConfig
from fedexperts.engines.local import LocalEngine
from fedexperts.experiment import checkpoint, runner
from fedexperts.experiment.runtime import runtime_for
from fedexperts.export import export, load
from fedexperts.io.toml import checked
from fedexperts.moe.device import device_of

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
METHODS = {
    "fedmoe": {},
    "hfedmoe": {"budget": 0.5, "usage_floor": 0.5},
    "flex": {"num_grafted": 1},
}
LORA = {"train": "lora", "parts": ["attention"], "rank": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def trees(tiny_tree):
    def tree(name, settings):
        training = {**tiny_tree["training"], "optimizer": "sgd", "lr": 0.05, **(LORA if name == "flex" else {})}
        retained = [{"name": "synthetic/copy", "limit": 4}]
        evaluation = {**tiny_tree["evaluation"], "retained": retained, "drift": True}
        return {**tiny_tree, "method": {"name": name, **settings}, "training": training, "evaluation": evaluation}

    return {name: tree(name, settings) for name, settings in METHODS.items()}


def on(device, engines):
    """An engine for `runner.run` with clients on `device`, which no run file may name if it is twin."""

    def engine(prepared, out):
        engines.append(LocalEngine(replace(runtime_for(prepared, out), device=device)))
        return engines[-1]

    return engine


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_gives_the_logs_weights_and_exports_of_the_cpu(name, trees, device, near, tmp_path):
    config, engines = checked(RunConfig, {**trees[name], "training": {**trees[name]["training"], "device": "cpu"}}), []
    here, there = (
        runner.run(config, tmp_path / each, engine=on(where, engines)) for each, where in (("a", "cpu"), ("b", device))
    )
    assert [str(device_of(engine.runtime.base)) for engine in engines] == ["cpu", device]
    for file in ("weights.safetensors", "method_state.safetensors"):
        assert near(*(load_file(checkpoint.latest(run) / file) for run in (here, there)))
    assert [line["failed"] for line in lines(there, "rounds.jsonl")] == [{}] * len(lines(here, "rounds.jsonl"))
    ours, theirs = (lines(run, "evals.jsonl") for run in (here, there))
    assert len(ours) > 10
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine["client"], mine["task"], mine["metric"]) == (its["client"], its["task"], its["metric"])
        assert mine["value"] == pytest.approx(its["value"], abs=1e-4)
        assert mine.get("drift") == pytest.approx(its.get("drift"), abs=1e-5)
    for client in (None, "c01"):
        for run in (here, there):
            export(run, run.with_name(f"{run.name}-{client}"), client)
        one, other = (load(run.with_name(f"{run.name}-{client}")) for run in (here, there))
        assert near(one.state_dict(), other.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
def test_a_card_that_is_named_is_computed_on_by_several_workers_with_the_same_bits(trees, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        tree = {**trees["hfedmoe"], "training": {**trees["hfedmoe"]["training"], "device": "cuda"}}
        tree["federation"] = {**tree["federation"], "workers": workers}
        runner.run(checked(RunConfig, tree), tmp_path / name)
    one, two = (load_file(checkpoint.latest(tmp_path / name) / "weights.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert json.loads((tmp_path / "one" / "versions.json").read_text())["device"].startswith("cuda (")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
def test_a_card_that_runs_out_of_memory_fails_its_client_and_goes_on(trees, tmp_path):
    tree = {**trees["hfedmoe"], "training": {**trees["hfedmoe"]["training"], "device": "cuda"}}
    tree["federation"] = {**tree["federation"], "min_clients": 0}

    def short(prepared, out):
        running = LocalEngine(runtime_for(prepared, out))
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1] + 1e-9)
        return running

    try:
        out = runner.run(checked(RunConfig, tree), tmp_path / "short", engine=short)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    reasons = [reason for line in lines(out, "rounds.jsonl") for reason in line["failed"].values()]
    assert reasons and all(reason.startswith("out of memory on cuda:0: ") for reason in reasons)
