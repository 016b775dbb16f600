"""Evaluations by clients in whole runs: scores before aggregation, retained examples, drift."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from older import without_hashes

from fedexperts.config import RunConfig
from fedexperts.core import evaluation
from fedexperts.data.pool import duplicate_key
from fedexperts.errors import BadRun
from fedexperts.experiment.client_task import apply_update, bits
from fedexperts.experiment.runner import run
from fedexperts.experiment.setup import prepare_run
from fedexperts.io.toml import checked
from fedexperts.report import write
from fedexperts.types import Job, Patch, Update


class Killed(Exception):
    """A run ends here."""


@pytest.fixture(scope="module")
def quiz(tmp_path_factory):
    """A set of multiple choice with a test file beside it."""
    folder = tmp_path_factory.mktemp("quiz")
    for side in ("train", "test"):
        rows = [
            {"instruction": "Choose.", "input": f"{n}{side}\nA. x\nB. y\nC. z", "choices": ["x", "y", "z"], "gold": n % 3}
            for n in range(9)
        ]
        (folder / f"quiz.{side}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return {"name": str(folder / "quiz.train.jsonl"), "limit": 6}


def config(tree, method="fedavg", each=2, rounds=3, every=1, **evaluation):
    federation = {"rounds": rounds, "clients_per_round": each}
    settings = {**tree["evaluation"], "every": every, **evaluation}
    return checked(RunConfig, {**tree, "method": {"name": method}, "federation": federation, "evaluation": settings})


def lines(out, name="evals"):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def of(rows, **fields):
    return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


@pytest.fixture(scope="module")
def measured(tiny_tree, quiz, tmp_path_factory):
    """A run that measures all there is at its end, and how often models were scored on what is retained."""
    scored = []
    original = evaluation.by_example
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "by_example", lambda model, *rest: scored.append(model) or original(model, *rest))
        settings = config(tiny_tree, retained=[quiz, {"name": "synthetic/sort", "limit": 3}], drift=True)
        out = run(settings, tmp_path_factory.mktemp("measured") / "out")
    return settings, out, len(scored)


def test_without_perplexity_scores_are_the_same_but_for_it(measured, tiny_tree, tmp_path):
    _, out, _ = measured
    own = run(config(tiny_tree, perplexity=False), tmp_path / "out")
    metrics, fewer = ([row["metrics"] for row in lines(folder) if row.get("metrics")] for folder in (out, own))
    assert fewer == [{name: value for name, value in each.items() if name != "perplexity"} for each in metrics] != metrics


def test_the_base_is_scored_once_before_the_first_round_and_every_client_after_the_last(measured):
    _, out, _ = measured
    rows = [row for row in lines(out) if "retained" in row]
    assert [(row["round"], row["client"]) for row in rows] == [(0, None), *((3, f"c0{n}") for n in (1, 2, 3, 4))]
    for row in rows:
        assert (row["task"], row["value"], row["examples"]) == (None, None, 9)
        quiz, sort = row["retained"]["quiz"], row["retained"]["sort"]
        assert (quiz["metric"], quiz["examples"], sort["metric"], sort["examples"]) == ("likelihood", 6, "verbatim", 3)
        assert quiz["value"] == pytest.approx(sum(quiz["values"]) / 6) and len(quiz["values"]) == 6
    assert lines(out)[0] == rows[0]


def test_a_model_that_all_clients_share_is_measured_once(measured):
    _, out, scored = measured
    rows = [row for row in lines(out) if row.get("drift")]
    assert scored == 2  # the base, and the server's model
    assert len(rows) == 4 and all(row["retained"] == rows[0]["retained"] for row in rows)


def test_drift_is_reported_per_layer_and_is_above_zero_after_training(measured):
    drift = lines(measured[1])[-1]["drift"]
    assert list(drift) == [f"model.layers.{n}.mlp" for n in range(3)]
    assert all(each > 0 for each in drift.values())


def test_a_method_that_trains_nothing_retains_what_the_base_knows_and_does_not_drift(tiny_tree, quiz, tmp_path):
    settings = config(tiny_tree, rounds=1, retained=[quiz], drift=True)
    still = settings.model_copy(update={"training": replace(settings.training, lr=1e-12, optimizer="sgd")})
    base, *clients = [row for row in lines(run(still, tmp_path / "out")) if "retained" in row]
    assert len(clients) == 4
    for row in clients:
        assert row["retained"] == base["retained"]
        assert all(abs(each) < 1e-9 for each in row["drift"].values())


def test_clients_with_personal_models_are_measured_individually(tiny_tree, quiz, tmp_path):
    out = run(config(tiny_tree, "local", each=4, rounds=1, retained=[quiz], drift=True), tmp_path / "out")
    drift = [row["drift"]["model.layers.0.mlp"] for row in lines(out) if "drift" in row]
    assert len(drift) == len(set(drift)) == 4


def test_without_retained_examples_drift_is_measured_on_each_clients_examples(tiny_tree, tmp_path):
    out = run(config(tiny_tree, rounds=1, drift=True), tmp_path / "out")
    drift = [row["drift"]["model.layers.0.mlp"] for row in lines(out) if "drift" in row]
    assert len(drift) == len(set(drift)) == 4  # one model, four texts
    assert not any("retained" in row for row in lines(out))


def test_a_sub_model_is_compared_with_the_base_cut_to_the_same_experts(tiny_tree, tmp_path):
    settings = config(tiny_tree, "random_moe", rounds=1, drift=True)
    tree = settings.model_dump(mode="json", exclude_none=True)
    half = checked(RunConfig, {**tree, "devices": {"memory_share": 0.9}})
    out = run(half, tmp_path / "out")
    rows = [row for row in lines(out) if "drift" in row]
    assert len(rows) == 4 and all(0 <= each < 5 for row in rows for each in row["drift"].values())
    assert {entry["experts"] for entry in of(lines(out, "ledger"), task="evaluate", round=1)} != {24}


def test_nobody_trains_on_a_retained_example(tiny_tree, tmp_path):
    settings = config(tiny_tree)
    pool = prepare_run(settings).clients.pool
    rows = [{"prompt": example.prompt, "response": example.response} for example in pool.train[:4]]
    rows += [{"prompt": f"other {n}", "response": "x"} for n in range(4)]
    for side, some in (("train", rows[4:]), ("test", rows[:4])):
        (tmp_path / f"held.{side}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))
    with_held = prepare_run(config(tiny_tree, retained=[str(tmp_path / "held.train.jsonl")]))
    retained_keys = {duplicate_key(example) for example in with_held.retained.examples}
    trained = {duplicate_key(example) for name in with_held.clients for example in with_held.clients[name].train}
    assert len(retained_keys) == 4 and retained_keys == {duplicate_key(example) for example in pool.train[:4]}
    assert not retained_keys & trained and len(with_held.clients.pool.train) == len(pool.train) - 4


@pytest.mark.parametrize("score", ["after_aggregation", "before_aggregation"])
def test_a_run_killed_before_its_last_checkpoint_writes_nothing_twice(tiny_tree, quiz, tmp_path, monkeypatch, score):
    settings = config(tiny_tree, score=score, retained=[quiz], drift=True)
    whole = run(settings, tmp_path / "whole")
    from fedexperts.experiment import checkpoint

    original = checkpoint.save

    def save(out, server, keep, score):
        if server.round == 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise Killed
        original(out, server, keep, score)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Killed):
        run(settings, tmp_path / "out")
    assert lines(run(settings, tmp_path / "out", resume=True)) == lines(whole)


@pytest.mark.parametrize("method", ["fedavg", "flex", "flora", "hetlora", "ditto"])
def test_a_client_alone_in_its_round_scores_before_aggregation_what_it_does_after(tiny_tree, tmp_path, method):
    adapters = {"train": "lora", "parts": ["attention"], "rank": 4, "lr": 1e-2}
    tree = tiny_tree if method == "fedavg" else {**tiny_tree, "training": {**tiny_tree["training"], **adapters}}
    after = run(config(tree, method, each=1), tmp_path / "after")
    before = run(config(tree, method, each=1, score="before_aggregation"), tmp_path / "before")
    rows = [row for row in lines(before) if row["client"] and row["round"]]
    assert len(rows) == 3
    for row in rows:
        (same,) = of(lines(after), client=row["client"], round=row["round"])
        assert {**row, "sums": 0} == {**same, "sums": 0}
    trained = [entry["client"] for entry in lines(before, "ledger") if entry["task"] == "train"]
    assert [row["client"] for row in rows] == trained


def test_before_aggregation_clients_of_one_round_differ_and_the_last_scores_of_all_count(tiny_tree, tmp_path):
    out = run(config(tiny_tree, each=2, every=2, score="before_aggregation"), tmp_path / "out")
    rows = lines(out)
    chosen = {row["round"]: row["clients"] for row in lines(out, "rounds")}
    assert Counter(row["round"] for row in rows if row["client"]) == {0: 4, 2: 2, 3: 2}  # evaluated are rounds 2 and 3
    for round in (2, 3):
        assert {row["client"] for row in of(rows, round=round) if row["client"]} == set(chosen[round])
    latest = {row["client"]: row for row in rows if row["client"]}
    (whole,) = of(rows, round=3, client=None, metric="overall")
    assert whole["examples"] == 8  # of all four clients
    for row in of(rows, round=3, client=None):
        if row["task"]:
            parts = [each for each in latest.values() if each["task"] == row["task"]]
            total = sum(each["value"] * each["examples"] for each in parts)
            assert row["value"] == pytest.approx(total / sum(each["examples"] for each in parts))
    assert not of(lines(out, "ledger"), task="evaluate", round=3)  # nothing is asked twice


def test_centralized_training_is_always_scored_after_aggregation(tiny_tree, tmp_path):
    out = run(config(tiny_tree, "centralized", rounds=1, score="before_aggregation"), tmp_path / "out")
    assert {row["client"] for row in of(lines(out), round=1)} == {None, "c01", "c02", "c03", "c04"}


def test_sent_rows_replace_received_rows():
    received = Patch({"w": torch.tensor([[1.0], [2.0], [3.0]]), "dense": torch.tensor([[5.0]])}, {"w": torch.tensor([1, 4, 6])})
    job = Job("a", 1, "train", "s", {}, received)
    back = Patch({"w": torch.tensor([[9.0]]), "dense": torch.tensor([[7.0]])}, {"w": torch.tensor([4])})
    evaluation = apply_update(job, Update("a", 1, "train", back, examples=1))
    assert evaluation.task == "evaluate"
    assert evaluation.patch.tensors["w"].flatten().tolist() == [1.0, 9.0, 3.0]
    assert evaluation.patch.tensors["dense"].item() == 7.0
    assert received.tensors["w"].flatten().tolist() == [1.0, 2.0, 3.0]
    everything = Update("a", 1, "train", Patch({"w": -received.tensors["w"]}, received.rows), examples=1)
    assert apply_update(job, everything).patch.tensors["w"].flatten().tolist() == [-1.0, -2.0, -3.0]


def test_different_models_have_different_hashes():
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert bits(one) != bits(other)
    other.load_state_dict(one.state_dict())
    assert bits(one) == bits(other)
    assert bits(one.bfloat16()) != bits(other)


def test_a_run_from_before_these_settings_is_resumed_unchanged_and_is_reported(tiny_tree, quiz, tmp_path):
    out = without_hashes(run(config(tiny_tree, rounds=1), tmp_path / "out"))
    resolved = json.loads((out / "resolved.json").read_text())
    for setting in ("score", "retained", "drift"):
        del resolved["evaluation"][setting]
    (out / "resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(BadRun, match=r"other settings: evaluation\.retained changed"):
        run(config(tiny_tree, rounds=1, retained=[quiz]), out, resume=True)
    assert run(config(tiny_tree, rounds=1), out, resume=True) == out
    assert write([out], html=tmp_path / "r.html").written


def test_a_run_is_resumed_only_with_the_public_text_it_started_with(tiny_tree, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text that everybody has")
    method = {"name": "flex", "select": "shared", "public_text": str(text)}
    training = {**tiny_tree["training"], "train": "lora", "parts": ["attention"]}
    settings = checked(RunConfig, {**tiny_tree, "method": method, "training": training, "federation": {"rounds": 1}})
    out = run(settings, tmp_path / "out")
    text.write_text("another text")
    with pytest.raises(BadRun, match="began with other files: a file that the method names changed"):
        run(settings, out, resume=True)
    without_hashes(out)
    recorded = json.loads((out / "versions.json").read_text())
    before = {name: each for name, each in recorded.items() if name not in ("text_hash", "config_hash")}
    (out / "versions.json").write_text(json.dumps(before))
    assert run(settings, out, resume=True) == out, "a run from before these were noted"


def test_a_finished_run_is_read_as_one_that_measured_nothing_where_these_lines_are_taken_out(measured, tmp_path):
    """What a reader that does not know the lines sees is what it saw before."""
    out = tmp_path / "out"
    shutil.copytree(measured[1], out)
    known = {"round", "client", "task", "examples", "metric", "value", "metrics"}
    plain = [row for row in lines(out) if row.keys() <= known]
    assert len(plain) < len(lines(out)) and all(row["value"] is not None for row in plain)
    extra = [row for row in lines(out) if row not in plain]
    assert all(row["task"] is None and row["value"] is None for row in extra)
