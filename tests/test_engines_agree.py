"""The local engine and Flower's simulation end with the same bits and the same ledger, whatever the method. So does a deployment,
with the methods whose messages differ: test_deployment.py.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedexperts.experiment import checkpoint
from fedexperts.methods import METHODS

KILLED, INTERRUPTED = "a worker dies", "a client hangs"
ROUNDED = "fedmoe in int8"
POOLED = "fedavg, evaluated in one pass"
PATIENCE = 900  # seconds for all runs
every_method = pytest.mark.parametrize("method", [*METHODS, ROUNDED, POOLED])


@pytest.fixture(scope="module")
def runs(method_trees, tmp_path_factory):
    """Results of a run of each method on each engine, and what was said of them all."""
    folder = tmp_path_factory.mktemp("engines")
    short = {"federation": {"rounds": 2, "clients_per_round": 2}, "evaluation": {"every": 2, "generate_tokens": 2}}
    trees = {name: {**tree, **short} for name, tree in method_trees.items()}
    trees[KILLED] = {**trees["ditto"], "federation": {"rounds": 2, "clients_per_round": 4}, "kill": "c03"}
    trees[ROUNDED] = {**trees["fedmoe"], "federation": {**trees["fedmoe"]["federation"], "wire_dtype": "int8"}}
    trees[POOLED] = {**trees["fedavg"], "evaluation": {**trees["fedavg"]["evaluation"], "pooled": True}}
    trees[INTERRUPTED] = {**trees["fedavg"], "federation": {"rounds": 2, "clients_per_round": 4}, "hang": "c04"}
    (folder / "trees.json").write_text(json.dumps(trees))
    command = [sys.executable, Path(__file__).with_name("agreeing.py"), folder / "trees.json", folder / "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, error = process.communicate(timeout=PATIENCE)
        finally:
            end(process.pid)
    assert process.returncode == 0, error[-3000:]
    return folder / "out"


def end(group):
    """Kills whoever is left of the process group: Ray's processes too, when their parent could not."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.fixture(scope="module")
def said(runs):
    return json.loads((runs / "said.json").read_text())


def lines(path):
    """Without what was measured in seconds."""
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in path.read_text().splitlines()]


def tensors(path):
    return {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in load_file(path).items()}


def kept(out):
    return {str(path.relative_to(out)): tensors(path) for path in sorted((out / "clients").glob("*/*"))}


@every_method
def test_local_and_simulation_end_with_the_same_bits(runs, said, method):
    assert method not in said["stopped"], said["stopped"][method]
    local, flower = runs / "local" / method, runs / "flower" / method
    newest = checkpoint.latest(local).relative_to(local)
    assert newest == checkpoint.latest(flower).relative_to(flower) == Path("checkpoint/000002-train")
    for name in ("weights", "method_state"):
        assert tensors(local / newest / f"{name}.safetensors") == tensors(flower / newest / f"{name}.safetensors")
    assert kept(local) == kept(flower)


@every_method
def test_local_and_simulation_tell_the_same_ledger_but_for_measured_seconds(runs, said, method):
    assert method not in said["stopped"], said["stopped"][method]
    local, flower = runs / "local" / method, runs / "flower" / method
    for name in ("ledger.jsonl", "rounds.jsonl", "evals.jsonl", "predictions.jsonl"):
        assert lines(local / name) == lines(flower / name)
    trained = [line for line in lines(local / "ledger.jsonl") if line["task"] == "train"]
    assert len(trained) == (2 if method == "centralized" else 4)
    assert any(line["failed"] is None and line["tokens"] > 0 for line in trained)


def test_the_runs_do_train_and_keep(runs):
    """Or there would be nothing to agree on."""
    changed = {name for name in METHODS if tensors(weights(runs, name)) != tensors(weights(runs, "local"))}
    assert len(changed) > 15
    assert {name for name in METHODS if kept(runs / "flower" / name)} >= {"local", "scaffold", "fedper", "ditto", "flex"}


def weights(runs, name):
    return checkpoint.latest(runs / "flower" / name) / "weights.safetensors"


def test_each_worker_loads_the_base_once_for_all_runs(said):
    assert len(said["played"]) > 10 * len(METHODS)
    assert (
        len(set(said["loads"])) == len(said["loads"]) == len(set(said["played"])) == 3
    )  # two, and one in the place of the killed


def test_a_worker_that_is_killed_is_replaced_and_its_job_is_done_again_with_the_same_bits(runs, said):
    assert KILLED not in said["stopped"]
    local, flower = runs / "local" / KILLED, runs / "flower" / KILLED
    assert lines(local / "ledger.jsonl") == lines(flower / "ledger.jsonl")
    assert not any(line["failed"] for line in lines(flower / "ledger.jsonl"))
    assert kept(flower) == kept(local) != {}
    newest = checkpoint.latest(local).relative_to(local)
    assert tensors(local / newest / "weights.safetensors") == tensors(flower / newest / "weights.safetensors")


def test_an_interrupted_run_ends_though_a_client_is_still_at_work(said):
    """Or the program would not have come to say so."""
    assert said["stopped"] == {INTERRUPTED: ""}
