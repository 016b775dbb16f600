"""Metrics of a run in TensorBoard, MLflow and W&B: all of them, each once, also after a resume."""

import json
import os
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.experiment import trackers
from fedexperts.experiment.progress import Quiet
from fedexperts.experiment.runner import run
from fedexperts.experiment.sweep import compare, read_variants
from fedexperts.io.toml import checked

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trackers' own code


@pytest.fixture
def tracker(request, monkeypatch):
    """One of them, as the run file names it, and what reads it; where CI runs it must be there."""
    name = request.param
    if not find_spec(name) and not os.environ.get("CI"):
        pytest.skip(f"{name} is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return name, READERS[name]


every_tracker = pytest.mark.parametrize("tracker", list(trackers.TRACKERS), indirect=True)


def read_tensorboard(out):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    events = [event for path in (out / "tensorboard").iterdir() for event in EventFileLoader(str(path)).Load()]
    values = [(value, event.step) for event in events for value in event.summary.value]
    return [(v.tag, step, make_ndarray(v.tensor).item()) for v, step in values if v.metadata.plugin_data.plugin_name == "scalars"]


def read_mlflow(out, together=None):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{(together or out) / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("fedexperts").experiment_id])
    (own,) = (each for each in runs if each.data.tags["fedexperts.id"] == (out / "id").read_text())
    assert own.info.status == "FINISHED"
    histories = [client.get_metric_history(own.info.run_id, name) for name in own.data.metrics]
    return [(metric.key, metric.step, metric.value) for history in histories for metric in history]


def read_wandb(out):
    from wandb.proto.wandb_internal_pb2 import Record

    (folder,) = (out / "wandb").glob("offline-run-*")
    (path,) = folder.glob("*.wandb")
    histories = []
    for written in records(path.read_bytes()):
        items = Record.FromString(written).history.item
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
        histories += [(name, values["_step"], value) for name, value in values.items() if not name.startswith("_")]
    return histories


def records(data):
    """What stands in a file of W&B's: records in the form of LevelDB's logs, after seven bytes."""
    place, record = 7, b""
    while place < len(data):
        if 2**15 - place % 2**15 < 7:  # too little of a block for a head
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its end
            yield record
            record = b""


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}


def logged(out):
    """What the logs say, in the order of names and rounds."""
    logs = [[json.loads(line) for line in (out / name).read_text().splitlines()] for name in trackers.NUMBERS]
    rounds, evals, ledger = logs
    points = trackers.points_of(rounds, ledger, evals)
    return sorted((name, round, value) for round, of_round in points.items() for name, value in of_round.items())


class Stops(Quiet):
    """Stops the run in round 2, after a line of its evaluation was written and before its checkpoint."""

    def scored(self, server, scores):
        if server.round == 2:
            raise KeyboardInterrupt


def assert_same_points(points, expected):
    assert [point[:2] for point in sorted(points)] == [point[:2] for point in expected]
    assert [value for *_, value in sorted(points)] == pytest.approx([value for *_, value in expected], rel=1e-6, nan_ok=True)


@every_tracker
def test_a_resumed_run_has_every_metric_of_its_logs_once(tiny_tree, tmp_path, tracker):
    name, read = tracker
    config, out = checked(RunConfig, {**tiny_tree, "track": {"to": name}}), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(config, out, progress=Stops())
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 2  # that of round 2 will be cut off
    run(config, out, resume=True)
    expected = logged(out)
    assert {round for _, round, _ in expected} == {0, 1, 2, 3}
    names = {name for name, *_ in expected}
    assert {"train/loss", "train/bytes_up", "eval/overall"} <= names
    assert any(name.startswith("clients/c01/") for name in names)
    assert_same_points(read(out), expected)


@every_tracker
def test_a_finished_run_is_written_to_a_tracker_later_and_only_once(tiny_tree, tmp_path, tracker, monkeypatch):
    name, read = tracker
    out = tmp_path / "out"
    run(checked(RunConfig, tiny_tree), out)
    assert not {"tensorboard", "mlflow.db", "wandb", "tracked"} & {path.name for path in out.iterdir()}
    tracked = checked(RunConfig, {**tiny_tree, "track": {"to": name}})
    run(tracked, out, resume=True)
    assert_same_points(read(out), logged(out))
    monkeypatch.delitem(
        trackers.TRACKERS, name
    )  # who is asked again is not found; files' times tell nothing, W&B logs in its own time
    run(tracked, out, resume=True)
    assert_same_points(read(out), logged(out))


@pytest.mark.parametrize("tracker", ["mlflow"], indirect=True)
def test_runs_of_a_comparison_share_one_mlflow_store(tiny_tree, tmp_path, tracker):
    config = checked(RunConfig, {**tiny_tree, "federation": {"rounds": 1}, "track": {"to": "mlflow"}})
    compared = compare({"tiny": config}, read_variants("fedavg,local"), 1, tmp_path)
    assert not compared.failed
    for folder in compared.folders:
        assert_same_points(read_mlflow(folder, tmp_path), logged(folder))


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tiny_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = checked(RunConfig, {**tiny_tree, "track": {"to": "wandb"}})
    with pytest.raises(BadValue, match=r'track\.to = "wandb" needs wandb, which is not installed; install it \(pip install '):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_the_name_of_a_tracker_does_not_count_as_installed(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(BadValue, match="wandb, which is not installed"):
        trackers.require("wandb")


def test_an_unknown_tracker_is_refused(tiny_tree):
    with pytest.raises(BadValue, match=r"track\.to = 'tensorbord'"):
        checked(RunConfig, {**tiny_tree, "track": {"to": "tensorbord"}})


def test_metric_names_are_valid_for_every_tracker():
    assert trackers.name_of("eval", "hub:owner/name", "exact_match") == "eval/hub:owner_name/exact_match"
    assert trackers.name_of("eval", "/data/größe (1).csv", "rougeL") == "eval/_data_größe _1_.csv/rougeL"


def test_points_are_the_values_in_the_logs():
    rounds = [
        {
            "round": 3,
            "task": "train",
            "clients": ["a", "b"],
            "failed": {"b": "late"},
            "loss": 0.5,
            "seconds": 2.0,
            "clock_seconds": None,
        }
    ]
    entry = {"round": 3, "task": "train", "bytes_down": 10, "bytes_up": 5, "tokens": 7, "flops_estimated": 2.0}
    ledger = [
        {**entry, "client": "a", "peak_bytes": 30, "loss": 0.5},
        {**entry, "client": "b", "peak_bytes": 40, "loss": None, "bytes_up": 0},
        {**entry, "client": "a", "task": "evaluate", "peak_bytes": 99, "loss": None},
    ]
    evals = [
        {
            "round": 3,
            "client": "a",
            "task": "x",
            "metric": "accuracy",
            "value": 0.25,
            "metrics": {"accuracy": 0.25, "rouge1": None},
        },
        {"round": 3, "client": None, "task": None, "metric": "overall", "value": 0.75},
        {
            "round": 0,
            "client": None,
            "task": None,
            "metric": None,
            "value": None,
            "retained": {"y": {"metric": "f1", "value": 0.1}},
        },
        {"round": 3, "client": "a", "task": None, "metric": None, "value": None, "drift": {"layers.0": 0.2}},
    ]
    assert trackers.points_of(rounds, ledger, evals) == {
        0: {"base/retained/y/f1": 0.1},
        3: {
            "train/loss": 0.5,
            "train/seconds": 2.0,
            "train/clients": 1,
            "train/failed": 1,
            "train/bytes_down": 20,
            "train/bytes_up": 5,
            "train/tokens": 14,
            "train/flops_estimated": 4.0,
            "train/peak_bytes": 40,
            "clients/a/train/loss": 0.5,
            "clients/a/x/accuracy": 0.25,
            "clients/a/drift/layers.0": 0.2,
            "eval/overall": 0.75,
        },
    }


def test_only_new_complete_rounds_are_written(tmp_path):
    line = {"round": 1, "client": None, "task": None, "metric": "overall", "value": 0.5}
    written = []
    (tmp_path / "evals.jsonl").write_text(json.dumps(line) + "\n")
    reader = trackers.Reader(tmp_path, lambda round, points: written.append((round, points)))
    reader()
    reader()
    with Path(tmp_path / "evals.jsonl").open("a") as file:
        file.write(json.dumps({**line, "round": 2, "value": 0.75}) + "\n")
    reader()
    assert written == [(1, {"eval/overall": 0.5}), (2, {"eval/overall": 0.75})]
