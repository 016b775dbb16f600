"""The course of a run: more rounds, the best checkpoint, early stops, and schedules that train in the last round."""

import json
from math import cos, pi

import pytest

from fedexperts.config import RunConfig, StopSettings
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment import checkpoint, control, runner
from fedexperts.experiment.control import reason_to_stop
from fedexperts.experiment.progress import Quiet
from fedexperts.experiment.setup import Parts
from fedexperts.export import export, round_of
from fedexperts.io.manifest import digest
from fedexperts.io.toml import checked, with_settings
from fedexperts.report import progress, read
from fedexperts.types import Training

PARTS = Parts()


class Said(Quiet):
    def __init__(self):
        self.sentences = []

    def say(self, sentence):
        self.sentences.append(sentence)


@pytest.fixture
def config(tiny_tree):
    tree = {**tiny_tree, "evaluation": {"every": 1, "generate_tokens": 2}}
    return lambda *settings: checked(RunConfig, with_settings(tree, ["federation.rounds=2", *settings]))


def run(config, out, resume=False):
    said = Said()
    runner.run(config, out, resume=resume, progress=said, parts=PARTS)
    return said.sentences


def rows(path):
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in path.read_text().splitlines()]


def results(out):
    logs = {name: rows(out / name) for name in ("rounds.jsonl", "evals.jsonl", "ledger.jsonl")}
    return {**logs, **{path.name: digest(path) for path in checkpoint.latest(out).glob("*.safetensors")}}


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_a_finished_run_goes_on_with_more_rounds_to_the_bits_of_a_long_one(config, tmp_path, method):
    settings = [f"method.name={method}", "federation.server_optimizer=fedadam"]
    assert run(config(*settings), tmp_path / "short") == []
    assert run(config(*settings, "federation.rounds=4"), tmp_path / "short", resume=True) == []
    assert run(config(*settings, "federation.rounds=4"), tmp_path / "long") == []
    assert results(tmp_path / "short") == results(tmp_path / "long")
    assert [line["round"] for line in rows(tmp_path / "short/rounds.jsonl")] == [1, 2, 3, 4]
    assert progress.rounds_planned(read.read(tmp_path / "short")) == 4


def test_more_rounds_of_a_schedule_over_all_rounds_are_named_and_fewer_are_refused(config, tmp_path):
    run(config("training.schedule=cosine"), tmp_path / "out")
    (said,) = run(config("training.schedule=cosine", "federation.rounds=3"), tmp_path / "out", resume=True)
    assert "began with 2 rounds and now has 3: its cosine of the learning rate goes by their number" in said
    with pytest.raises(BadRun, match=r"holds a run with other settings: federation\.rounds changed"):
        run(config("training.schedule=cosine"), tmp_path / "out", resume=True)


def test_the_best_checkpoint_by_validation_stays_and_is_exported(config, tmp_path, monkeypatch):
    values = {0: 0.9, 1: 0.2, 2: 0.5, 3: 0.5, 4: 0.1}
    rounds = iter(values)
    monkeypatch.setattr(control, "overall", lambda scores: {"value": values[next(rounds)], "falling": False})
    out = tmp_path / "out"
    run(config("checkpoint.best=true", "checkpoint.keep=1", "federation.rounds=4"), out)
    assert sorted(saved.name for saved in (out / "checkpoint").iterdir()) == ["000002-train", "000004-train"]
    assert checkpoint.best(out).name == "000002-train"
    written = []
    for number in ("best", 2, 4, None):
        export(out, tmp_path / f"model-{number}", round=number)
        written.append([digest(path) for path in sorted((tmp_path / f"model-{number}").glob("*.safetensors"))])
    assert written[0] == written[1] != written[2] == written[3]
    with pytest.raises(BadRun, match=r"has no checkpoint of round 3, only of 2, 4; give --round with one of these$"):
        export(out, tmp_path / "model", round=3)


def test_an_older_checkpoint_has_the_client_states_of_its_round(config, tmp_path):
    settings = ["method.name=ditto", "federation.clients_per_round=4", "federation.rounds=3"]
    for rounds in (2, 3):
        run(config(*settings, f"federation.rounds={rounds}"), tmp_path / str(rounds))
    models = [tmp_path / "of two", tmp_path / "of three"]
    export(tmp_path / "2", models[0], client="c01")
    export(tmp_path / "3", models[1], client="c01", round=2)
    two, three = ([digest(path) for path in model.glob("*.safetensors")] for model in models)
    assert two == three != []


def test_a_run_without_a_best_checkpoint_says_how_to_get_one(config, tmp_path):
    run(config(), tmp_path / "out")
    with pytest.raises(BadRun, match=r"no checkpoint of round best, only of 1, 2; .* needs checkpoint\.best = true$"):
        export(tmp_path / "out", tmp_path / "model", round="best")
    assert [round_of(text) for text in (None, "best", "12")] == [None, "best", 12]
    with pytest.raises(BadValue, match="--round last is no round"):
        round_of("last")


def test_a_run_that_reached_its_target_stops_and_is_finished(config, tmp_path):
    out = tmp_path / "out"
    (said,) = run(config("federation.stop.target=0.0", "federation.rounds=5"), out)
    assert said.startswith("fedavg, seed 0: stopped after round 1 reached 0") and "federation.stop.target = 0)" in said
    before = results(out)
    assert [line["round"] for line in before["rounds.jsonl"]] == [1]
    assert run(config("federation.stop.target=0.0", "federation.rounds=5"), out, resume=True) == []
    assert results(out) == before
    assert progress.finished(read.read(out)) and progress.stopped(read.read(out))
    run(config("federation.stop.target=2.0", "federation.rounds=3"), tmp_path / "other")
    assert not progress.stopped(read.read(tmp_path / "other"))
    run(config("federation.rounds=5"), out, resume=True)  # without a target it goes on
    assert [line["round"] for line in rows(out / "rounds.jsonl")] == [1, 2, 3, 4, 5]


def test_validation_scores_are_of_validation_examples_and_change_no_other_line(config, tmp_path):
    run(config(), tmp_path / "plain")
    run(config("checkpoint.best=true"), tmp_path / "best")
    plain, best = (rows(tmp_path / name / "evals.jsonl") for name in ("plain", "best"))
    validated = [line for line in best if line.get("validation")]
    assert [line["round"] for line in validated] == [0, 1, 2]
    assert [{key: value for key, value in line.items() if key not in ("validation", "stopped")} for line in best] == plain
    assert all(not line["validation"]["falling"] and 0 <= line["validation"]["value"] <= 1 for line in validated)
    run(config("checkpoint.best=true", "evaluation.split=validation"), tmp_path / "split")
    split = [line for line in rows(tmp_path / "split/evals.jsonl") if line.get("validation")]
    assert [line["validation"]["value"] for line in split] == [line["value"] for line in split]
    assert [line["validation"] for line in split] == [line["validation"] for line in validated]


def course(*values, falling=False):
    return [{"round": round, "value": value, "falling": falling} for round, value in enumerate(values)]


@pytest.mark.parametrize(
    ("scores", "stop", "stops"),
    [
        (course(), {"patience": 1}, False),
        (course(0.5), {"target": 0.1}, False),  # before the first round
        (course(0.5, 0.6, 0.6), {"patience": 2}, False),
        (course(0.5, 0.6, 0.6, 0.55), {"patience": 2}, True),
        (course(0.5, 0.6, 0.6, 0.7), {"patience": 2}, False),
        (course(0.5, 0.6, 0.7), {"patience": 2, "min_delta": 0.3}, True),
        (course(9.0, 8.0, 8.5, 7.5, falling=True), {"patience": 2}, False),
        (course(9.0, 8.0, 8.5, 8.0, falling=True), {"patience": 2}, True),
        (course(9.0, 8.0, falling=True), {"target": 8.0}, True),
        (course(9.0, 8.1, falling=True), {"target": 8.0}, False),
        (course(0.1, 0.8), {"target": 0.8}, True),
        (course(0.1, None, None), {"patience": 2}, True),  # NaN in the log
        (course(0.1, 0.2), {}, False),
    ],
)
def test_when_a_run_stops(scores, stop, stops):
    assert bool(reason_to_stop(scores, StopSettings(**stop))) is stops


def test_scores_before_aggregation_choose_nothing(config):
    for setting in ("checkpoint.best=true", "federation.stop.patience=2"):
        with pytest.raises(BadValue, match=r"goes by the score of the aggregated weights on validation examples"):
            config(setting, "evaluation.score=before_aggregation")


def test_schedules_that_train_in_the_last_round_by_hand():
    """Four rounds from 0.5 to 0.1: steps of (1 − 0, 1/4, 2/4, 3/4) of the way, and the cosine of these."""
    linear, annealed = (Training(lr=0.5, schedule=name, final_lr=0.1) for name in ("linear", "cosine_annealing"))
    assert [linear.lr_in(round, 4) for round in (0, 1, 2, 3, 4)] == pytest.approx([0.5, 0.5, 0.4, 0.3, 0.2])
    expected = [0.1 + 0.4 * (1 + cos(pi * share)) / 2 for share in (0, 1 / 4, 2 / 4, 3 / 4)]
    assert [annealed.lr_in(round, 4) for round in (1, 2, 3, 4)] == pytest.approx(expected)
    assert annealed.lr_in(1, 1) == linear.lr_in(1, 1) == 0.5
    with pytest.raises(BadValue, match=r"the linear falls from lr to final_lr; lower it"):
        checked(RunConfig, {"data": {"sources": ["synthetic/copy"]}, "training": {"schedule": "linear", "final_lr": 1.0}})
