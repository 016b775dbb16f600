"""A run that is killed at any moment and resumed ends with the bits of one that never was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
from safetensors.torch import load_file

from fedexperts import config
from fedexperts.experiment import checkpoint, runner

LOGS = {"rounds.jsonl": 4, "evals.jsonl": 1, "ledger.jsonl": 8}
"""With the fewest lines that each has."""
OF_LOGS = ("logs", "log_sha256", "sha256")  # keys of state.json about them: they say seconds
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PATIENCE = 120  # seconds for a process to get where it is waited for


@pytest.fixture(scope="module")
def fedmoe_tree(tiny_tree):
    """Profiles, adjusts with the least patience, and remembers the most."""
    return {
        **tiny_tree,
        "method": {"name": "fedmoe", "patience": 1, "profile_rounds": 1},
        "federation": {"rounds": 4, "clients_per_round": 3},
        "devices": {"memory_share": {"uniform": [0.6, 1.2]}, "profile": {"mix": {"phone": 1, "laptop_gpu": 1}}},
    }


def write(tree, path):
    path.write_text(tomli_w.dumps(tree))
    return path


def driven(run_file, out, *seed):
    """What resuming.py says after it ran, killed and resumed `run_file`."""
    command = [sys.executable, Path(__file__).with_name("resuming.py"), run_file, out, *seed]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def rows(path):
    """Its lines, without what the clock says."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def tensors(path):
    return {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in load_file(path).items()}


def saved(out):
    """All that a run leaves behind that does not depend on the clock."""
    newest = checkpoint.latest(out)  # a kill right after it was written leaves the one before, too
    kept = {folder.name: max(folder.glob("*.safetensors")) for folder in sorted((out / "clients").glob("*"))}
    return {
        "state": {key: value for key, value in json.loads((newest / "state.json").read_text()).items() if key not in OF_LOGS},
        "weights": tensors(newest / "weights.safetensors"),
        "method_state": tensors(newest / "method_state.safetensors"),
        "kept": {client: (path.name, tensors(path)) for client, path in kept.items()},
        "logs": {name: rows(out / name) for name in LOGS},
        "start": {name: json.loads((out / name).read_text()) for name in ("plan.json", "resolved.json", "partition.json")},
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for part in one:
        assert one[part] == other[part], f"the {part} differ"


@pytest.fixture(scope="module")
def undisturbed(fedmoe_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    said = driven(write(fedmoe_tree, folder / "run.toml"), folder / "out")
    assert said["kills"] == 0
    assert said["touches"] > 60  # so that a kill before the 60th, at the latest, is one in the middle
    return saved(folder / "out")


def test_a_run_leaves_something_to_compare(undisturbed):
    assert all(len(undisturbed["logs"][name]) >= fewest for name, fewest in LOGS.items())
    state = undisturbed["state"]
    assert (state["round"], state["task"], state["kept"]) == (4, "train", {})
    assert state["accepted"].keys() == {"c01", "c02", "c03", "c04"}
    assert any(name.startswith("held/") for name in undisturbed["method_state"])
    assert len(undisturbed["weights"]) > 10
    assert all(line["clock_seconds"] > 0 for line in undisturbed["logs"]["rounds.jsonl"])


def test_fedmoe_killed_again_and_again_ends_with_the_same_bits(fedmoe_tree, undisturbed, tmp_path):
    said = driven(write(fedmoe_tree, tmp_path / "run.toml"), tmp_path / "out", "a")
    assert said["kills"] >= 3
    assert_same(saved(tmp_path / "out"), undisturbed)


@pytest.mark.parametrize("method", ["flora", "flex"])
def test_clients_that_keep_something_to_themselves_are_resumed_with_the_same_bits(tiny_tree, tmp_path, method):
    parts = {"flex": {"parts": ["attention"]}}
    training = {**tiny_tree["training"], "train": "lora", "dropout": 0.1, **parts.get(method, {})}
    run_file = write({**tiny_tree, "method": {"name": method}, "training": training}, tmp_path / "run.toml")
    runner.run(config.read(run_file), tmp_path / "whole")
    said = driven(run_file, tmp_path / "killed", "c")
    assert said["kills"] >= 3
    whole = saved(tmp_path / "whole")
    assert len(whole["kept"]) >= 2
    assert_same(saved(tmp_path / "killed"), whole)


def test_a_server_optimizer_a_schedule_and_personal_models_are_resumed_with_the_same_bits(tiny_tree, tmp_path):
    tree = {
        **tiny_tree,
        "method": {"name": "ditto"},
        "training": {**tiny_tree["training"], "schedule": "cosine"},
        "federation": {**tiny_tree["federation"], "server_optimizer": {"name": "fedadam"}},
    }
    run_file = write(tree, tmp_path / "run.toml")
    runner.run(config.read(run_file), tmp_path / "whole")
    said = driven(run_file, tmp_path / "killed", "d")
    assert said["kills"] >= 3
    whole = saved(tmp_path / "whole")
    assert len(whole["kept"]) >= 2
    assert {name.split("/")[1] for name in whole["method_state"]} == {"m", "v"}
    assert_same(saved(tmp_path / "killed"), whole)


def test_hfedmoe_killed_and_resumed_or_with_two_workers_ends_with_the_same_bits(tiny_tree, tmp_path):
    tree = {**tiny_tree, "method": {"name": "hfedmoe", "budget": 0.5, "usage_floor": 0.5}}
    run_file = write(tree, tmp_path / "run.toml")
    runner.run(config.read(run_file), tmp_path / "whole")
    whole = saved(tmp_path / "whole")
    told = [line["metrics"] for line in whole["logs"]["ledger.jsonl"] if line["task"] == "train"]
    assert len(told) == 6 and all(each["sent"] > 0 and sum(each["reached"]) <= 12 for each in told)

    said = driven(run_file, tmp_path / "killed", "e")
    assert said["kills"] >= 3
    assert_same(saved(tmp_path / "killed"), whole)

    two_workers = write({**tree, "federation": {**tree["federation"], "workers": 2}}, tmp_path / "two.toml")
    runner.run(config.read(two_workers), tmp_path / "two")
    two = saved(tmp_path / "two")
    two["start"]["resolved.json"]["federation"]["workers"] = 1
    assert_same(two, whole)


def started(run_file, out, *options):
    command = [sys.executable, "-m", "fedexperts", "run", run_file, "--out", out, "--quiet", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, preexec_fn=heeding_interrupts)


def heeding_interrupts():
    """What a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_lines(process, path, number):
    until = time.monotonic() + PATIENCE
    while not path.exists() or path.read_text().count("\n") < number:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)


def interrupted(run_file, out, before):
    """What a resumed run says when it is interrupted; where it ended before the signal came, it is tried again."""
    shutil.copytree(out, before)
    there = (out / "rounds.jsonl").read_text().count("\n")
    for _ in range(10):
        process = started(run_file, out, "--resume")
        wait_for_lines(process, out / "rounds.jsonl", there + 1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
        if process.returncode:
            break
        shutil.rmtree(out)
        shutil.copytree(before, out)
    assert process.returncode == 130, said
    return said


def test_the_command_killed_and_interrupted_and_resumed_with_two_workers_ends_with_the_same_bits(
    fedmoe_tree, undisturbed, tmp_path
):
    run_file, out = write(fedmoe_tree, tmp_path / "run.toml"), tmp_path / "out"

    killed = started(run_file, out)
    wait_for_lines(killed, out / "rounds.jsonl", 1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL

    said = interrupted(run_file, out, tmp_path / "before")
    assert said.startswith("fedexperts: interrupted; ")
    assert "--resume" in said
    assert said.count("\n") == 1

    last = started(run_file, out, "--resume", "--set", "federation.workers=2")
    shown, said = last.communicate(timeout=PATIENCE)
    assert last.returncode == 0, said
    assert "report.html" in shown
    resumed = saved(out)
    resumed["start"]["resolved.json"]["federation"]["workers"] = 1  # it may change: no bit depends on it
    assert_same(resumed, undisturbed)
