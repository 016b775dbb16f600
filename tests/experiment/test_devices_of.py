"""The devices of a run: refused before anything runs, and of one kind from its start to its end."""

import json

import pytest
import torch
from older import without_hashes

from fedexperts.config import RunConfig
from fedexperts.deploy.client import ClientWorker
from fedexperts.deploy.server import deployed
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment import flower, runner
from fedexperts.experiment.runtime import devices_of
from fedexperts.io.toml import checked


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def one_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "NVIDIA H200")


def config(tree, device="auto", **federation):
    training = {**tree["training"], "device": device}
    return checked(RunConfig, {**tree, "training": training, "federation": {**tree["federation"], "rounds": 1, **federation}})


def test_a_device_that_the_machine_lacks_is_refused_before_anything_runs(tiny_tree, tmp_path):
    with pytest.raises(BadValue, match=r"^training\.device names cuda:1, and this machine has cpu"):
        runner.run(config(tiny_tree, ["cuda:1"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_setting_that_is_no_device_is_a_sentence(tiny_tree):
    with pytest.raises(BadValue, match=r"^training\.device = \'gpu\' is no device; give \"auto\""):
        config(tiny_tree, "gpu")


def test_a_list_is_kept_as_a_list_in_the_resolved_run_file(tiny_tree):
    resolved = config(tiny_tree, ["cuda:0", "cuda:1"]).resolved()
    assert resolved["training"]["device"] == ["cuda:0", "cuda:1"]
    assert checked(RunConfig, resolved).training.device == ("cuda:0", "cuda:1")


def test_a_run_goes_on_on_the_kind_of_device_on_which_it_began(tiny_tree, tmp_path, one_card, monkeypatch):
    out = runner.run(config(tiny_tree, "cpu"), tmp_path / "out")
    assert json.loads((out / "versions.json").read_text())["device"] == "cpu"
    with pytest.raises(BadRun, match=r"began on cpu, and would go on on cuda \(NVIDIA H200\), which gives other bits"):
        runner.run(config(tiny_tree), out, resume=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runner.run(config(tiny_tree), out, resume=True)  # "auto" is the CPU here


def test_a_run_from_before_the_setting_began_on_the_cpu(tiny_tree, tmp_path, one_card):
    out = without_hashes(runner.run(config(tiny_tree, "cpu"), tmp_path / "out"))
    for name, table in (("resolved.json", "training"), ("versions.json", None)):
        content = json.loads((out / name).read_text())
        del (content[table] if table else content)["device"]
        (out / name).write_text(json.dumps(content))
    runner.run(config(tiny_tree, "cpu"), out, resume=True)
    with pytest.raises(BadRun, match="began on cpu, and would go on on cuda"):
        runner.run(config(tiny_tree), out, resume=True)


def test_a_simulations_workers_compute_on_cards_that_ray_reserves_for_them(tiny_tree, one_card):
    assert devices_of(config(tiny_tree)) == ("cuda:0",)
    for device in ("auto", "cpu"):
        without = config(tiny_tree, device, engine="flower")
        assert devices_of(without) == ("cpu",)
        assert flower.seen_by_workers(without).training.device == "cpu"
    with_card = config(tiny_tree, engine="flower", gpus_per_worker=0.5)
    assert devices_of(with_card) == ("cuda:0",) and flower.seen_by_workers(with_card) == with_card
    with pytest.raises(BadValue, match=r"set federation\.gpus_per_worker above 0"):
        devices_of(config(tiny_tree, "cuda", engine="flower"))
    for device in ("cuda:0", ["cuda:0"]):
        with pytest.raises(BadValue, match=r"names cards, but with federation\.engine"):
            devices_of(config(tiny_tree, device, engine="flower", gpus_per_worker=1))


def test_in_a_deployment_each_side_computes_on_its_own_devices(tiny_tree, tmp_path, one_card):
    server = deployed(config(tiny_tree, ["cuda:4", "cuda:5"])).resolved()
    assert server["training"]["device"] == "cpu"
    worker = ClientWorker("c01", config(tiny_tree, "cuda"), tmp_path)
    assert worker.agreed(server)["training"] == {**server["training"], "device": "cuda"}
    with pytest.raises(BadValue, match="names cuda:4, and this machine has cpu, cuda:0"):
        ClientWorker("c01", config(tiny_tree, "cuda:4"), tmp_path)
