"""Robust merging: each rule against values computed by hand, what attacks can do with and without it, and its refusals."""

from dataclasses import replace

import pytest
import torch

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.experiment.setup import prepare_run
from fedexperts.io.toml import checked
from fedexperts.methods.fedavg import FedAvg
from fedexperts.methods.robust import (
    RobustMerging,
    WithRobustMerging,
    coordinate_median,
    geometric_median,
    krum,
    multi_krum,
    trimmed_mean,
)
from fedexperts.moe.anatomy import Anatomy, BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.types import Patch, Server, Update

RULES = ("clip", "trimmed_mean", "median", "krum", "multi_krum", "geometric_median")


def voices(*rows):
    """Voices of a single row."""
    return torch.tensor(rows, dtype=torch.float64)[:, None]


def server():
    """A server with a dense weight and three experts."""
    weights = {"dense": torch.zeros(1, 4), "experts": torch.ones(3, 2)}
    return Server(
        weights,
        {"dense": None, "experts": "block"},
        Anatomy({"block": BlockShape(3, 1)}),
        Footprint(0, {}, 0),
        {},
        "0",
        task="train",
        round=1,
    )


def update(client, dense, experts=None, ids=None, examples=10):
    tensors = {"dense": torch.as_tensor(dense, dtype=torch.float32).reshape(1, -1)}
    rows = {}
    if experts is not None:
        tensors["experts"], rows["experts"] = torch.tensor(experts, dtype=torch.float32), torch.tensor(ids)
    return Update(client, 1, "train", Patch(tensors, rows), examples)


def merged(updates, **settings):
    return WithRobustMerging(FedAvg(), RobustMerging(**settings)).merge(server(), iter(updates)).weights


def test_rules_by_hand():
    x = voices([1.0, 0.0], [2.0, 9.0], [3.0, 1.0], [100.0, 2.0], [4.0, -50.0])
    assert trimmed_mean(x, 1).tolist() == [[3.0, 1.0]]
    assert coordinate_median(x, 1).tolist() == [[3.0, 1.0]]
    assert coordinate_median(x[:4], 1).tolist() == [[2.5, 1.5]]
    y = voices([0.0], [1.0], [3.0], [7.0], [100.0])  # of 5, with f = 1, each counts its 2 closest: 10, 5, 13, 52, … squared
    assert krum(y, 1).tolist() == [[1.0]]
    assert multi_krum(y, 1).tolist() == [[(0 + 1 + 3 + 7) / 4]]
    assert geometric_median(voices([0.0], [1.0], [50.0]), 1).item() == pytest.approx(1.0, abs=1e-3)  # on a line it is the median
    triangle = voices([0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2])
    assert geometric_median(triangle, 1)[0].tolist() == pytest.approx([0.5, 3**0.5 / 6])
    right = voices([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])  # the median of each coordinate is a voice, but not the geometric median
    assert geometric_median(right, 1)[0].tolist() == pytest.approx([(3 - 3**0.5) / 6] * 2, abs=1e-3)


def test_a_change_is_clipped_to_a_multiple_of_the_median_norm():
    updates = [update("a", [1.0] * 4), update("b", [-1.0] * 4), update("c", [-100.0] * 4)]
    assert merged(updates, name="clip", multiple=2.0)["dense"].tolist() == [pytest.approx([-2 / 3] * 4)]
    honest = updates[:2]
    plain = FedAvg().merge(server(), iter(honest)).weights["dense"]
    assert torch.equal(merged(honest, name="clip", multiple=1.0)["dense"], plain), "what is within the limit keeps its bits"


def test_examples_count_up_to_a_multiple_of_the_median():
    updates = [update("a", [1.0] * 4), update("b", [1.0] * 4), update("c", [2.0] * 4, examples=10_000)]
    assert merged(updates, name="clip", examples=2.0)["dense"].tolist() == [pytest.approx([(1 + 1 + 2 * 2) / 4] * 4)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("attack", [-10.0, -1.0, 1e30], ids=["sign flip x10", "sign flip", "1e30"])
def test_one_attacker_of_six_moves_the_weights_by_no_more_than_an_honest_client(name, attack):
    change = torch.tensor([1.0, 2.0, -1.0, 0.5])
    honest = [update(f"c{number}", change * (1 + 0.1 * number)) for number in range(5)]
    attacked = [*honest, update("bad", change * attack)]
    mean = torch.stack([each.patch.tensors["dense"] for each in honest]).mean(0)
    distance = (merged(attacked, name=name)["dense"] - mean).norm() / mean.norm()
    assert distance < (0.7 if name == "clip" else 0.25)  # a clipped attacker still has a voice
    plain = FedAvg().merge(server(), iter(attacked)).weights["dense"]
    assert distance <= (plain - mean).norm() / mean.norm() + 1e-6


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_clients_changes_nothing_and_equal_updates_stay(name):
    many = [update(f"c{number}", torch.linspace(number, 2 + number, 4)) for number in range(6)]
    assert torch.allclose(merged(many, name=name)["dense"], merged(many[::-1], name=name)["dense"], atol=1e-6)
    same = [update(f"c{number}", [0.5, -1.0, 2.0, 3.0]) for number in range(5)]
    assert torch.allclose(merged(same, name=name)["dense"], same[0].patch.tensors["dense"])


@pytest.mark.parametrize("name", [name for name in RULES if name != "clip"])
def test_an_expert_that_few_train_keeps_the_servers_voice(name):
    trained = [update(f"c{number}", [1.0] * 4, [[1.1, 1.1]], [0]) for number in range(5)]
    weights = merged([*trained, update("bad", [1.0] * 4, [[1.1, 1.1], [500.0, 500.0]], [0, 2])], name=name)
    assert torch.allclose(weights["experts"][0], torch.tensor([1.1, 1.1]))
    assert torch.equal(weights["experts"][1], torch.ones(2)), "nobody sent it"
    typical = (2 * 0.1**2) ** 0.5
    assert (weights["experts"][2] - 1).norm() <= 2 * typical / 2 + 1e-6, "at most twice a typical change, and half a voice"


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("honest", [1, 2, 3, 4])
def test_one_attacker_among_few_clients_is_limited_too(name, honest):
    sent = [update(f"c{number}", [1.0] * 4) for number in range(honest)]
    weights = merged([*sent, update("bad", [1e4] * 4, examples=10**7)], name=name)
    assert weights["dense"].abs().max() <= 2.0


@pytest.mark.parametrize("name", [name for name in RULES if name != "clip"])
def test_who_sends_many_experts_does_not_set_what_is_typical(name):
    honest = [update(f"c{number}", [1.0] * 4, [[1.1, 1.1]], [0]) for number in range(4)]
    weights = merged([*honest, update("bad", [1.0] * 4, [[1e4, 1e4]] * 3, [0, 1, 2])], name=name)
    assert (weights["experts"] - 1).norm(dim=1).max() <= 2 * (2 * 0.1**2) ** 0.5


def test_setup_tasks_and_runs_without_it_are_as_they_were(tiny_tree):
    profile = replace(server(), task="profile")
    assert WithRobustMerging(FedAvg(), RobustMerging()).merge(profile, iter([])).weights.keys() == profile.weights.keys()
    config = checked(RunConfig, tiny_tree)
    assert isinstance(config.build_method(), FedAvg) and "robust" not in config.resolved()["federation"]


def test_it_is_set_by_name_or_table_and_refused_where_it_cannot_be(tiny_tree):
    def config(robust, **more):
        return checked(RunConfig, {**tiny_tree, **more, "federation": {"rounds": 1, "robust": robust}})

    assert config("median").build_method().robust == RobustMerging("median")
    assert config({"name": "krum", "attackers": 0.3}).resolved()["federation"]["robust"]["attackers"] == 0.3
    assert config("none").federation.robust is None
    for wrong in ("mean", {"name": "krum", "attackers": 0.5}, {"name": "krum", "f": 2}):
        with pytest.raises(BadValue):
            config(wrong)
    lora = {**tiny_tree["training"], "train": "lora", "rank": 4}
    for method in ("flora", "hetlora"):
        with pytest.raises(BadValue, match=r"federation\.robust needs a merge that is a mean"):
            prepare_run(config("median", method={"name": method}, training=lora))


def test_no_file_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    merged([update("a", [1.0] * 4), update("b", [2.0] * 4)], name="median")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RULES)
def test_a_client_may_send_no_expert_of_a_block(name):
    honest = [update(f"c{number}", [1, 1, 1, 1], [[2, 2]] * 3, [0, 1, 2]) for number in range(5)]
    dense, no_rows = torch.ones(1, 4), {"experts": torch.zeros(0, dtype=torch.int64)}
    none = Update("none", 1, "train", Patch({"dense": dense, "experts": torch.zeros(0, 2)}, no_rows), 10)
    result = merged([*honest, none], name=name)
    torch.testing.assert_close(result["experts"], torch.full((3, 2), 2.0))
    everyone = [replace(none, client=f"c{number}") for number in range(3)]
    torch.testing.assert_close(merged(everyone, name=name)["experts"], torch.ones(3, 2))


@pytest.mark.parametrize("name", RULES)
def test_a_small_share_of_the_examples_leaves_each_client_a_voice(name):
    same = [update(f"c{number}", [1, 2, 3, 4], examples=4) for number in range(3)]
    torch.testing.assert_close(merged(same, name=name, examples=0.1, attackers=0)["dense"], torch.tensor([[1.0, 2, 3, 4]]))
