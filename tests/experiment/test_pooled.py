"""Evaluation of clients in one pass, where their models are the same, and of a sample of clients."""

import json
from dataclasses import replace

import pytest

from fedexperts.config import RunConfig
from fedexperts.core import evaluation
from fedexperts.errors import BadValue
from fedexperts.experiment import pooled, runner
from fedexperts.experiment.client_task import each_error
from fedexperts.experiment.pooled import by_client, grouped
from fedexperts.experiment.progress import Quiet
from fedexperts.experiment.runtime import evaluated_clients, task_for
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.io.toml import checked, with_settings

PARTS = Parts()
SHORT = ["federation.rounds=2", "data.clients=6", "data.limit=24", "evaluation.every=1"]


class Noted(Quiet):
    def __init__(self):
        self.sentences = []

    def noted(self, server, sentence):
        self.sentences.append(sentence)


def settings(tree, *changes):
    return checked(RunConfig, with_settings(tree, [*SHORT, *changes]))


def run(tree, out, *changes):
    noted = Noted()
    runner.run(settings(tree, *changes), out, parts=PARTS, progress=noted)
    return noted.sentences


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def groups_of(tree, *changes):
    prepared = prepare_run(settings(tree, *changes), parts=PARTS)
    server = replace(prepared.server, round=1, task="evaluate")
    groups = grouped(prepared, server, task_for(prepared), evaluated_clients(prepared))
    return [[client.name for client in group] for group in groups]


ALONE = [["c01"], ["c02"], ["c03"], ["c04"], ["c05"], ["c06"]]


def test_clients_of_one_model_are_scored_as_one_by_one(tiny_tree, tmp_path):
    """Losses within 1e-5 of each other, the same answers, a line for each client, and one job in place of six."""
    run(tiny_tree, tmp_path / "alone")
    run(tiny_tree, tmp_path / "pooled", "evaluation.pooled=true")
    alone, together = rows(tmp_path / "alone/evals.jsonl"), rows(tmp_path / "pooled/evals.jsonl")
    key = lambda row: (row["round"], row["client"], row["task"], row["metric"])  # noqa: E731
    assert [*map(key, alone)] == [*map(key, together)]
    for one, other in zip(alone, together, strict=True):
        assert other["value"] == pytest.approx(one["value"], rel=1e-5)
    jobs = {
        name: [row["client"] for row in rows(tmp_path / name / "ledger.jsonl") if row["task"] == "evaluate"]
        for name in ("alone", "pooled")
    }
    assert len(jobs["alone"]) == 3 * 6  # before round 1, too
    assert jobs["pooled"] == ["c01"] * 3


def test_two_workers_score_the_same_bits(tiny_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(pooled, "EXAMPLES", 4)  # three passes of two clients with two examples
    logs = []
    for workers in (1, 2):
        run(tiny_tree, tmp_path / str(workers), "evaluation.pooled=true", f"federation.workers={workers}")
        logs.append((tmp_path / str(workers) / "evals.jsonl").read_text())
    assert logs[0] == logs[1]


def test_a_pass_is_full_with_a_number_of_examples(tiny_tree, monkeypatch):
    assert groups_of(tiny_tree, "evaluation.pooled=true") == [["c01", "c02", "c03", "c04", "c05", "c06"]]
    monkeypatch.setattr(pooled, "EXAMPLES", 3)  # a client has 2
    assert groups_of(tiny_tree, "evaluation.pooled=true") == [["c01", "c02"], ["c03", "c04"], ["c05", "c06"]]


def test_evaluations_of_many_clients_are_pooled_by_themselves(tiny_tree, monkeypatch):
    assert groups_of(tiny_tree) == ALONE
    monkeypatch.setattr(pooled, "MANY_CLIENTS", 6)
    assert len(groups_of(tiny_tree)) == 1
    assert groups_of(tiny_tree, "evaluation.pooled=false") == ALONE


@pytest.mark.parametrize("method", ["ditto", "fedper", "flex"])
def test_clients_with_a_model_of_their_own_are_scored_alone(method_trees, method):
    assert groups_of(method_trees[method], "evaluation.pooled=true") == ALONE


def test_clients_with_the_same_experts_are_scored_together(method_trees):
    tree = {**method_trees["fedmoe"], "devices": {}, "method": {"name": "fedmoe", "initial": "random"}}
    prepared = prepare_run(settings(tree, "evaluation.pooled=true"), parts=PARTS)
    for group in grouped(prepared, replace(prepared.server, task="evaluate"), task_for(prepared), evaluated_clients(prepared)):
        experts = [prepared.method.assign(prepared.server, client).experts for client in group]
        assert all(each == experts[0] for each in experts)


def test_a_failed_pass_is_repeated_client_by_client(tiny_tree, tmp_path, monkeypatch):
    """Only the client whose examples cannot be scored is left out, and the repetition is said."""
    whole = evaluation.judged_by_client

    def fails_with_c02(model, examples, *rest):
        if "c02" in examples:
            raise RuntimeError("a broken example")
        return whole(model, examples, *rest)

    monkeypatch.setattr(evaluation, "judged_by_client", fails_with_c02)
    sentences = run(tiny_tree, tmp_path / "run", "evaluation.pooled=true", "federation.rounds=1")
    assert "c01 and 5 more clients are evaluated one by one" in sentences[0]
    assert "a broken example" in sentences[0]
    entries = [row for row in rows(tmp_path / "run/ledger.jsonl") if row["task"] == "evaluate"]
    assert {row["client"]: bool(row["failed"]) for row in entries} == {f"c0{i}": i == 2 for i in range(1, 7)}
    assert {row["client"] for row in rows(tmp_path / "run/evals.jsonl")} == {None, "c01", "c03", "c04", "c05", "c06"}


def test_retained_scores_of_a_pass_are_those_of_each_client(tiny_tree, tmp_path):
    changes = ["evaluation.retained=['synthetic/last']", "federation.rounds=1", "evaluation.drift=true"]
    compared = {}
    for value in ("true", "false"):
        run(tiny_tree, tmp_path / value, *changes, f"evaluation.pooled={value}")
        compared[value] = [row for row in rows(tmp_path / value / "evals.jsonl") if "retained" in row]
    assert compared["true"] == compared["false"]
    assert [row["client"] for row in compared["true"]] == [None, *(f"c0{i}" for i in range(1, 7))]


def test_metrics_of_a_pass_go_to_their_clients():
    metrics = {"scores": {"a": 1, "b": 2}, "retained": 3}
    assert by_client("a", {"a": ("b",)}, metrics) == {"a": {"scores": 1, "retained": 3}, "b": {"scores": 2, "retained": 3}}
    assert by_client("a", {"a": ()}, {"scores": 1}) == {"a": {"scores": 1}}


def test_the_boundary_checks_what_each_client_sends():
    error = lambda examples, value: None if value == len(examples) else f"is {value}"  # noqa: E731
    assert each_error(error, {"a": [1, 2]}, 2) is None
    assert each_error(error, {"a": [1, 2]}, 3) == "is 3"
    assert each_error(error, {"a": [1, 2], "b": [1]}, {"a": 2, "b": 1}) is None
    assert each_error(error, {"a": [1, 2], "b": [1]}, {"a": 2, "b": 2}) == "of client b is 2"
    for value in (2, {"a": 2}, {"a": 2, "b": 1, "c": 1}):
        assert "a value of each of 2 clients, by client" in each_error(error, {"a": [1, 2], "b": [1]}, value)


def test_answers_of_a_pass_are_kept_by_client(tiny_tree, tmp_path):
    kept = {}
    for value in ("true", "false"):
        run(tiny_tree, tmp_path / value, f"evaluation.pooled={value}", "evaluation.predictions=1", "federation.rounds=1")
        kept[value] = [(row["round"], row["client"], row["prompt"]) for row in rows(tmp_path / value / "predictions.jsonl")]
    assert kept["true"] == kept["false"]
    assert len(kept["true"]) == 2 * 6


def test_a_sample_of_clients_is_evaluated(tiny_tree, tmp_path):
    """The same clients at each evaluation; training still takes all."""
    run(tiny_tree, tmp_path / "run", "evaluation.clients=2", "federation.clients_per_round=6")
    scored = {}
    for row in rows(tmp_path / "run/evals.jsonl"):
        if row["client"]:
            scored.setdefault(row["round"], set()).add(row["client"])
    assert len(scored[1]) == 2
    assert scored[0] == scored[1] == scored[2]
    assert len({row["client"] for row in rows(tmp_path / "run/ledger.jsonl") if row["task"] == "train"}) == 6


def test_clients_scored_before_aggregation_are_those_of_the_sample(tiny_tree, tmp_path):
    run(tiny_tree, tmp_path, "evaluation.clients=2", "federation.clients_per_round=6", "evaluation.score=before_aggregation")
    scored = {row["client"] for row in rows(tmp_path / "evals.jsonl") if row["client"] and row["round"]}
    assert len(scored) == 2


def test_the_sample_does_not_depend_on_the_method(method_trees):
    samples = [
        [*evaluated_clients(prepare_run(settings(method_trees[name], "evaluation.clients=3"), parts=PARTS))]
        for name in ("fedavg", "ditto")
    ]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 3


def test_own_data_cannot_be_pooled(tiny_tree):
    tree = {**tiny_tree, "data": {"sources": [{"name": "mine.csv", "task": "t"}], "own": True, "names": ["a", "b"]}}
    with pytest.raises(BadValue, match=r"evaluation\.pooled = true .* leave evaluation\.pooled out"):
        checked(RunConfig, with_settings(tree, ["evaluation.pooled=true"]))
