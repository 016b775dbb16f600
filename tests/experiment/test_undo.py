"""Rounds that are undone because the clients' validation loss explodes."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.experiment import checkpoint, runner
from fedexperts.experiment.progress import Quiet
from fedexperts.experiment.setup import Parts
from fedexperts.experiment.undo import loss_of, sketch, suspects
from fedexperts.io.manifest import digest
from fedexperts.io.toml import checked, with_settings
from fedexperts.types import Patch, Update

PARTS = Parts()
SETTINGS = ["federation.rounds=3", "federation.clients_per_round=4", "evaluation.every=2", "training.validation_examples=2"]


class Attacked:
    """The engine, with the change of c02 in round 2 multiplied."""

    def __init__(self, engine, factor):
        self.engine, self.factor = engine, factor

    def run(self, jobs):
        sent = {}

        def noted():
            for job in jobs:
                sent[job.client] = job
                yield job

        for update in self.engine.run(noted()):
            if isinstance(update, Update) and update.client == "c02" and update.round == 2 and update.task == "train":
                before = sent["c02"].patch.tensors
                tensors = {
                    name: before[name] + self.factor * (each - before[name]) for name, each in update.patch.tensors.items()
                }
                update = replace(update, patch=replace(update.patch, tensors=tensors))
            yield update


class Noted(Quiet):
    def __init__(self):
        self.sentences = []

    def noted(self, server, sentence):
        self.sentences.append(sentence)


def run(tree, out, *changes, factor=1.0, resume=False):
    @contextmanager
    def engine(prepared, folder):
        with runner.engine_for(prepared, folder) as running:
            yield Attacked(running, factor)

    noted = Noted()
    config = checked(RunConfig, with_settings(tree, [*SETTINGS, *changes]))
    runner.run(config, out, parts=PARTS, progress=noted, engine=engine, resume=resume)
    return noted.sentences


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(out):
    return digest(checkpoint.latest(out) / "weights.safetensors")


def test_a_round_that_ruins_the_model_is_undone_and_its_attacker_named(tiny_tree, tmp_path):
    sentences = run(tiny_tree, tmp_path, "federation.undo=1.5", factor=-3000.0)
    assert len(sentences) == 1
    assert sentences[0].startswith("the round is undone, since the clients' validation loss is")
    assert sentences[0].endswith("above federation.undo = 1.5; suspects: c02")
    one, two, three = rows(tmp_path / "rounds.jsonl")
    assert "undone" not in one and "undone" not in three
    assert two["suspects"] == ["c02"]
    assert set(one["validation_losses"]) == {"c01", "c02", "c03", "c04"}
    last = rows(tmp_path / "evals.jsonl")[-1]
    assert last["round"] == 3


def test_an_undone_round_leaves_the_weights_as_they_were(tiny_tree, tmp_path):
    run(tiny_tree, tmp_path / "one", "federation.undo=1.5", "federation.rounds=1", factor=-3000.0)
    run(tiny_tree, tmp_path / "two", "federation.undo=1.5", "federation.rounds=2", factor=-3000.0)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_a_run_in_which_nothing_explodes_has_the_same_bits(tiny_tree, tmp_path, method):
    run(tiny_tree, tmp_path / "off", f"method.name={method}")
    run(tiny_tree, tmp_path / "on", f"method.name={method}", "federation.undo=1000")
    assert weights(tmp_path / "off") == weights(tmp_path / "on")
    values = [[(row["client"], row["value"]) for row in rows(tmp_path / name / "evals.jsonl")] for name in ("off", "on")]
    assert values[0] == values[1]
    kept = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("off", "on")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_resumed_after_an_undone_round_it_ends_with_the_same_bits(tiny_tree, tmp_path, method):
    settings = [f"method.name={method}", "federation.undo=1.5"]
    run(tiny_tree, tmp_path / "whole", *settings, factor=-3000.0)
    run(tiny_tree, tmp_path / "parts", *settings, "federation.rounds=2", factor=-3000.0)
    run(tiny_tree, tmp_path / "parts", *settings, factor=-3000.0, resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    kept = [
        sorted((path.name, digest(path)) for path in (tmp_path / name / "clients").rglob("*.safetensors"))
        for name in ("whole", "parts")
    ]
    assert kept[0] == kept[1]


def test_a_round_without_answers_repeats_nothing_of_the_round_before(tiny_tree, tmp_path, monkeypatch):
    from fedexperts.methods.fedavg import FedAvg

    train = FedAvg.train

    def fails(self, job, context):
        if job.round == 2:
            raise RuntimeError("out of order")
        return train(self, job, context)

    monkeypatch.setattr(FedAvg, "train", fails)
    run(tiny_tree, tmp_path, "federation.undo=2", "federation.min_clients=0")
    lines = rows(tmp_path / "rounds.jsonl")
    assert ["validation_losses" in line for line in lines] == [True, False, True]


def test_weights_that_are_not_finite_undo_the_round(tiny_tree, tmp_path, monkeypatch):
    from fedexperts.methods.fedavg import FedAvg

    merge = FedAvg.merge

    def broken(self, server, updates):
        merged = merge(self, server, updates)
        first = min(merged.weights)
        return (
            replace(merged, weights={**merged.weights, first: torch.full_like(merged.weights[first], torch.nan)})
            if server.round == 2
            else merged
        )

    monkeypatch.setattr(FedAvg, "merge", broken)
    sentences = run(tiny_tree, tmp_path, "federation.undo=2")
    assert "the merged weights hold NaN or infinity in" in sentences[0]
    assert len(rows(tmp_path / "rounds.jsonl")) == 3


def update_of(client, change):
    return Update(client, 1, "train", Patch({"w": torch.tensor(change)}), 1)


def test_suspects_are_large_or_point_away(tiny_tree):
    server = SimpleNamespace(weights={"w": torch.zeros(3)})
    changes = {"a": [1.0, 1.0, 0.0], "b": [1.0, 0.9, 0.1], "c": [0.9, 1.0, 0.0], "d": [-1.0, -1.0, 0.0], "e": [90.0, 90.0, 0.0]}
    sketches = {client: sketch(server, update_of(client, change)) for client, change in changes.items()}
    assert suspects(sketches) == ["d", "e"]
    assert suspects({client: sketches[client] for client in ("a", "d")}) == []  # of two nobody can say


def test_inner_products_of_sketches_are_near_those_of_changes():
    server = SimpleNamespace(weights={"w": torch.zeros(40_000)})
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40_000, generator=generator), torch.randn(40_000, generator=generator)
    similar = a + 0.3 * b
    of = lambda tensor: sketch(server, Update("a", 1, "train", Patch({"w": tensor}), 1))  # noqa: E731
    cosine = lambda x, y: float(torch.nn.functional.cosine_similarity(x, y, dim=0))  # noqa: E731
    assert cosine(of(a), of(similar)) == pytest.approx(cosine(a, similar), abs=0.1)
    assert cosine(of(a), of(-similar)) == pytest.approx(-cosine(of(a), of(similar)))


def test_a_loss_that_is_not_finite_is_infinite():
    assert loss_of({"t": {"nll": 6.0, "tokens": 3}, "u": {"nll": 2.0, "tokens": 1}}) == 2.0
    assert loss_of({"t": {"nll": float("nan"), "tokens": 3}}) == float("inf")
    assert loss_of({}) == float("inf")


def test_undo_goes_by_aggregated_weights(tiny_tree):
    with pytest.raises(BadValue, match=r"federation\.undo goes by the score of the aggregated weights"):
        checked(RunConfig, with_settings(tiny_tree, ["federation.undo=2", "evaluation.score=before_aggregation"]))
