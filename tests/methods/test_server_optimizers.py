"""FedAvgM of Hsu et al.; FedAdagrad, FedYogi and FedAdam of Algorithm 2 of Reddi et al."""

import json
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.experiment import checkpoint
from fedexperts.experiment.setup import prepare_run
from fedexperts.experiment.sweep import read_variants
from fedexperts.federation import jobs_for
from fedexperts.io.toml import checked, with_settings
from fedexperts.methods.base import by_examples, mean_rows
from fedexperts.methods.contract import Declaration
from fedexperts.methods.fedavg import FedAvg
from fedexperts.methods.fedmoe import FedMoE
from fedexperts.methods.local import Local
from fedexperts.methods.server_optimizers import SERVER_OPTIMIZERS, FedAdagrad, FedAdam, FedAvgM, FedYogi, WithServerOptimizer
from fedexperts.moe.anatomy import Anatomy, BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Patch, Server, Training, Update

every_optimizer = pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
DATA = {"sources": ["synthetic/double"], "clients": 2}


def column(*values):
    return torch.tensor(values)[:, None]


def server_of(*experts, norm=0.0):
    weights = {"experts": column(*experts), "norm": column(norm)}
    return Server(
        weights,
        {"experts": "0", "norm": None},
        Anatomy({"0": BlockShape(len(experts), 1)}),
        Footprint(0, {"0": 1}, 0),
        {"a": Client("a", 1)},
    )


def sent(server, ids, *deltas):
    """The update of a client that holds the experts `ids` and moved them by `deltas`."""
    return Update("a", 1, "train", Patch({"experts": server.weights["experts"][list(ids)] + column(*deltas)}, rows_of(ids)), 1)


def rows_of(ids):
    return {"experts": torch.tensor(ids)}


def after(optimizer, *deltas, start=1.0):
    """The weight after each round in which the clients' mean is off by these, and the last method state."""
    server, path = server_of(start), []
    for number, delta in enumerate(deltas, start=1):
        method, server = WithServerOptimizer(FedAvg(), optimizer), replace(server, round=number, task="train")
        server = method.merge(server, iter([sent(server, (0,), delta)]))
        path.append(float(server.weights["experts"]))
    return path, {key: float(tensor) for key, tensor in server.method_state.items()}


def test_two_rounds_of_fedavgm_by_hand():
    """m: 2, then 0.9 · 2 + 1 = 2.8. x: 1 + 0.5 · 2, then 2 + 0.5 · 2.8."""
    path, method_state = after(FedAvgM(lr=0.5, beta1=0.9), 2.0, 1.0)
    assert path == pytest.approx([2.0, 3.4])
    assert method_state == {"server_optimizer/m/experts": pytest.approx(2.8)}


def test_two_rounds_of_fedadagrad_by_hand():
    """v: 3² + 4² = 5², then 5² + 12² = 13². x: 1 + 2 · 4 / (5 + 3), then 2 + 2 · 12 / (13 + 3)."""
    path, method_state = after(FedAdagrad(lr=2, tau=3), 4.0, 12.0)
    assert path == [2.0, 3.5]
    assert method_state == {"server_optimizer/m/experts": 12.0, "server_optimizer/v/experts": 169.0}


def test_fedadagrad_with_momentum_by_hand():
    """m: 0.5 · 4 = 2, then 0.5 · 2 + 0.5 · 12 = 7; v as without."""
    path, _ = after(FedAdagrad(lr=2, beta1=0.5, tau=3), 4.0, 12.0)
    assert path == [1 + 2 * 2 / 8, 1.5 + 2 * 7 / 16]


def test_two_rounds_of_fedyogi_by_hand():
    """v: 25² − 14² / 4 = 24² as 14 < 25, then 24² + 36² / 4 = 30² as 36 > 24. m: 7, then 3.5 + 18 = 21.5.

    x: 1 + 7 · 7 / (24 + 25), then 2 + 7 · 21.5 / (30 + 25).
    """
    path, method_state = after(FedYogi(lr=7, beta1=0.5, beta2=0.75, tau=25), 14.0, 36.0)
    assert path == pytest.approx([2.0, 2 + 150.5 / 55])
    assert method_state == {"server_optimizer/m/experts": 21.5, "server_optimizer/v/experts": 900.0}


def test_two_rounds_of_fedadam_by_hand():
    """v: (1 + 7²) / 2 = 5², then (5² + 5²) / 2 = 5². m: 3.5, then 1.75 + 2.5 = 4.25.

    x: 1 + 6 · 3.5 / (5 + 1), then 4.5 + 6 · 4.25 / (5 + 1).
    """
    path, method_state = after(FedAdam(lr=6, beta1=0.5, beta2=0.5, tau=1), 7.0, 5.0)
    assert path == [4.5, 8.75]
    assert method_state == {"server_optimizer/m/experts": 4.25, "server_optimizer/v/experts": 25.0}


def test_the_defaults_are_the_papers():
    adaptive = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}
    assert vars(FedAvgM()) == {"lr": 1.0, "beta1": 0.9}
    assert vars(FedAdagrad()) == {"lr": 1e-3, "beta1": 0.0, "tau": 1e-3}
    assert vars(FedYogi()) == vars(FedAdam()) == adaptive
    assert len(SERVER_OPTIMIZERS) == 4


def at_random(server, seed, experts=None):
    """An update that moves the weights a little, each number in its own way."""
    chance = torch.Generator().manual_seed(seed)
    moved = {name: t + 0.1 * torch.randn(t.shape, generator=chance) for name, t in server.weights.items()}
    return Update("ab"[seed % 2], 1, "train", Patch(moved), seed + 1)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_fedavgm_without_momentum_and_a_rate_of_one_is_the_mean_bit_for_bit():
    server = replace(tiny_server(tiny_model("olmoe"), [Client("a", 1), Client("b", 2)], Training()), task="train")
    plain = stepped = server
    for seed in (0, 2):
        plain = FedAvg().merge(plain, iter([at_random(plain, seed), at_random(plain, seed + 1)]))
        updates = [at_random(stepped, seed), at_random(stepped, seed + 1)]
        stepped = WithServerOptimizer(FedAvg(), FedAvgM(lr=1.0, beta1=0.0)).merge(stepped, iter(updates))
        assert equal(stepped.weights, plain.weights)
    assert not equal(plain.weights, server.weights)


@every_optimizer
def test_a_rows_steps_depend_only_on_the_rounds_in_which_it_was_sent(name):
    """Six rounds with one or two of three experts: each goes as if it were the only one, and its rounds all there are."""
    rng, method = Random("rows"), WithServerOptimizer(FedAvg(), SERVER_OPTIMIZERS[name]())
    server = replace(server_of(1.0, 2.0, 3.0, 4.0), task="train")
    moves = {expert: [] for expert in range(4)}
    for _ in range(6):
        ids = sorted(rng.sample(range(3), rng.randint(1, 2)))
        before, deltas = server, [rng.uniform(-1, 1) for _ in ids]
        server = method.merge(server, iter([sent(server, ids, *deltas)]))
        for expert in range(4):
            moved = float(server.weights["experts"][expert] - before.weights["experts"][expert])
            assert bool(moved) == (expert in ids)
        for expert, delta in zip(ids, deltas, strict=True):
            moves[expert].append(delta)
    for expert in range(3):
        assert 0 < len(moves[expert]) < 6
        (*_, end), method_state = after(SERVER_OPTIMIZERS[name](), *moves[expert], start=expert + 1.0)
        assert end == pytest.approx(float(server.weights["experts"][expert]), rel=1e-5)
        assert method_state == {key: pytest.approx(float(t[expert]), rel=1e-3) for key, t in server.method_state.items()}
    assert {key.rpartition("/")[2] for key in server.method_state} == {"experts"}, (
        "of a weight that never moved nothing is remembered"
    )


@dataclass(frozen=True)
class Counts(FedAvg):
    """Remembers every task and round it merged, and wants to see nothing else in its method state."""

    def declare(self):
        return Declaration(setup_tasks=("profile",))

    def assign(self, server, client):
        assert all(key.startswith("seen/") for key in server.method_state)
        return super().assign(server, client)

    def merge(self, server, updates):
        assert all(key.startswith("seen/") for key in server.method_state)
        merged = mean_rows(server, updates, by_examples)
        return replace(merged, method_state={**server.method_state, f"seen/{server.task}{server.round}": torch.tensor(1)})


def test_the_method_state_and_the_optimizers_state_are_separate_and_setup_tasks_are_merged_unchanged():
    method, server = WithServerOptimizer(Counts(), FedAdam()), server_of(1.0, 2.0)
    assert (method.setup_tasks, method.centralized) == (("profile",), False)
    server = replace(server, task="profile")
    server = method.merge(server, iter([sent(server, (0, 1), 0.5, 0.25)]))
    assert server.weights["experts"].flatten().tolist() == [1.5, 2.25]
    assert set(server.method_state) == {"seen/profile0"}
    for number in (1, 2):
        server = replace(server, round=number, task="train")
        method.assign(server, server.clients["a"])
        server = method.merge(server, iter([sent(server, (0, 1), 0.5, 0.25)]))
    ours = {"server_optimizer/m/experts", "server_optimizer/v/experts"}
    assert set(server.method_state) == {"seen/profile0", "seen/train1", "seen/train2"} | ours


def test_without_answers_or_shared_weights_nothing_changes():
    server = replace(server_of(1.0, 2.0), round=1, task="train")
    for method in (FedAvg(), Local()):
        merged = WithServerOptimizer(method, FedAdam()).merge(server, iter([]))
        assert equal(merged.weights, server.weights)
        assert not merged.method_state


@every_optimizer
def test_only_experts_of_some_client_take_a_step_and_a_resumed_run_gives_the_same_bits(name, tmp_path):
    training, clients = Training(batch_size=2, local_steps=1), [Client("a", 4), Client("b", 4)]
    model = tiny_model("olmoe", num_hidden_layers=1)
    method = WithServerOptimizer(FedMoE(initial="random", adjust=False, experts_per_layer=3), SERVER_OPTIMIZERS[name]())
    start = server = tiny_server(model, clients, training)

    def round_of(server, number):
        server, trained_experts = replace(server, round=number, task="train"), set()
        jobs = list(jobs_for(server, method, clients))
        updates = [method.train(job, tiny_context(model, client, training)) for job, client in zip(jobs, clients, strict=True)]
        for job in jobs:
            trained_experts |= {*next(iter(job.experts.values()))}
        return method.merge(server, iter(updates)), trained_experts

    server, trained_experts = round_of(server, 1)
    assert 3 <= len(trained_experts) < 8
    checkpoint.save(tmp_path, server)
    resumed = checkpoint.load(tmp_path, start)
    (on, _), (again, _) = round_of(server, 2), round_of(resumed, 2)
    assert equal(on.weights, again.weights) and equal(on.method_state, again.method_state)
    seen = 0
    for key, block in start.layout.items():
        assert on.weights[key].dtype == start.weights[key].dtype
        if block is not None:
            same = [torch.equal(*rows) for rows in zip(on.weights[key], start.weights[key], strict=True)]
            assert all(same[expert] for expert in range(8) if expert not in trained_experts)
            assert (
                not any(same[expert] for expert in trained_experts) or "experts" in key
            )  # one that no token reached stands still
            seen += sum(not each for each in same)
    assert seen > 8
    assert any(key.startswith("p/") for key in on.method_state)
    assert any(key.startswith("server_optimizer/m/") for key in on.method_state)


def config(*settings, **federation):
    return checked(RunConfig, with_settings({"method": {"name": "fedavg"}, "federation": federation, "data": DATA}, settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("fedadam", FedAdam()),
        ({"name": "fedyogi"}, FedYogi()),
        ({"name": "fedavgm", "lr": 0.5, "beta1": 0}, FedAvgM(0.5, 0.0)),
        ({"name": "fedadam", "lr": 0.1, "beta1": 0.8, "beta2": 0.9, "tau": 0.2}, FedAdam(0.1, 0.8, 0.9, 0.2)),
    ],
)
def test_a_run_file_names_an_optimizer_and_the_resolved_run_has_all_its_fields(settings, expected):
    run_config = config(server_optimizer=settings)
    assert run_config.build_method() == WithServerOptimizer(FedAvg(), expected)
    resolved = run_config.resolved()
    assert resolved["federation"]["server_optimizer"].keys() - {"name"} == vars(expected).keys()
    again = checked(RunConfig, json.loads(json.dumps(resolved)))
    assert again.build_method() == run_config.build_method()
    assert again.resolved() == resolved


@pytest.mark.parametrize("settings", [None, "none", {"name": "none"}, {"name": "none", "lr": 1.0}])
def test_none_is_the_method_itself_and_is_not_in_the_resolved_run(settings):
    run_config = config(server_optimizer=settings)
    assert run_config.build_method() == FedAvg()
    assert "server_optimizer" not in run_config.resolved()["federation"]


def test_methods_of_a_comparison_may_differ_in_the_optimizer():
    plain, adam, yogi, none = read_variants(
        "FedAvg=fedavg,FedAdam=fedavg:federation.server_optimizer.name=fedadam,"
        "FedYogi=fedprox:federation.server_optimizer=fedyogi:federation.server_optimizer.tau=0.5,"
        "none=fedavg:federation.server_optimizer.name=none"
    )
    run = config()
    assert plain.of(run).build_method() == FedAvg()
    assert adam.of(run).build_method() == WithServerOptimizer(FedAvg(), FedAdam())
    with_rate = config(server_optimizer={"name": "fedyogi", "lr": 0.1})
    assert adam.of(with_rate).build_method() == WithServerOptimizer(FedAvg(), FedAdam(lr=0.1))
    assert none.of(with_rate).build_method() == FedAvg()
    with pytest.raises(BadValue, match=r"^federation\.server_optimizer\.name = None is not one of fedavgm"):
        yogi.of(run)  # the key takes the place of the name


def test_a_method_that_gives_nothing_to_go_on_from_is_refused():
    for method in ("flora", "flexlora", "local"):
        settings = config(f"method.name={method}", server_optimizer="fedadam")
        with pytest.raises(BadValue, match=f"server_optimizer goes on from the weights .* {method} gives none"):
            prepare_run(settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("fedadm", "federation.server_optimizer.name = 'fedadm' is not one of fedavgm, fedadagrad, fedyogi, fedadam; did you"),
        ({"lr": 1}, "federation.server_optimizer.name = None is not one of"),
        ({"name": "fedavgm", "tau": 1}, "federation.server_optimizer.tau is not a setting of fedavgm, which has lr, beta1"),
        ({"name": "fedadam", "beta3": 1}, "federation.server_optimizer.beta3 is not a setting of fedadam, which has lr, beta1"),
        ({"name": "fedadam", "lr": 0}, "federation.server_optimizer.lr = 0 should be greater than 0"),
        ({"name": "fedadam", "beta2": 1}, "federation.server_optimizer.beta2 = 1 should be less than 1"),
        ({"name": "fedadam", "tau": "some"}, "federation.server_optimizer.tau = 'some' should be a valid number"),
        (3, "federation.server_optimizer = 3 should be a valid dictionary"),
    ],
)
def test_an_unknown_or_invalid_server_optimizer_is_refused(settings, said):
    with pytest.raises(BadValue) as refused:
        config(server_optimizer=settings)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)
