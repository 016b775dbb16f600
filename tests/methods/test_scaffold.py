"""SCAFFOLD, Algorithm 1 of Karimireddy et al."""

from dataclasses import dataclass, replace

import pytest
import torch

from fedexperts.config import RunConfig
from fedexperts.core.ledger import Ledger
from fedexperts.experiment.runner import engine_for
from fedexperts.experiment.setup import prepare_run
from fedexperts.federation import federate, jobs_for
from fedexperts.io.toml import checked
from fedexperts.methods.base import entries
from fedexperts.methods.contract import Method
from fedexperts.methods.fedavg import FedAvg
from fedexperts.methods.scaffold import Scaffold, controls
from fedexperts.moe import rows
from fedexperts.moe.anatomy import Anatomy, BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.moe.tuning import Tuning
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Patch, Server, Training, Update

CLIENTS = [Client("a", 8), Client("b", 12)]
ADAMW = Training(batch_size=4, local_steps=3)
SGD = Training(batch_size=4, local_steps=3, lr=0.2, optimizer="sgd", max_grad_norm=0.0, router_aux_loss_coef=0.0)
every_family = pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
every_tuning = pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", rank=4)], ids=["full", "lora"])


def at_random(tensors, seed, size):
    """Control variates for `tensors`, none of them zero."""
    chance = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(tensor.shape, generator=chance) for name, tensor in tensors.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Alone:
    """A client that has received x and c, and kept c_k, before it trains."""

    def __init__(self, family, training, size=0.01):
        self.model = tiny_model(family)
        server = tiny_server(self.model, CLIENTS, training)
        self.x = server.weights
        self.c, self.own = at_random(self.x, 1, size), at_random(self.x, 2, size)
        (self.job,) = jobs_for(replace(server, method_state=controls(self.c)), Scaffold(), CLIENTS[:1])
        self.context = tiny_context(self.model, CLIENTS[0], training)
        self.context.client_state.update(controls(self.own))

    def fedavg(self, **training):
        """What FedAvg makes of x, with the same batches."""
        context = replace(self.context, training=replace(self.context.training, **training))
        return FedAvg().train(self.job, context).patch.tensors


@every_tuning
@every_family
def test_under_sgd_the_control_variate_is_the_papers_option_two(family, tuning):
    """c_k⁺ = (x − y_k) / (K·η) − c + c_k."""
    alone = Alone(family, replace(SGD, **vars(tuning)))
    update = Scaffold().train(alone.job, alone.context)
    controls, moved, far = entries("control", alone.context.client_state), entries("control", update.extra), 0
    assert controls.keys() == moved.keys() == alone.x.keys()
    for name, x in alone.x.items():
        expected = (x - update.patch.tensors[name]) / (SGD.local_steps * SGD.lr) - alone.c[name] + alone.own[name]
        torch.testing.assert_close(controls[name], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(moved[name], expected - alone.own[name], rtol=1e-3, atol=1e-5)
        far += float((expected - alone.own[name]).abs().max()) > 1e-3
    assert far == len(alone.x)


@every_tuning
@every_family
def test_a_step_of_sgd_is_fedavgs_plus_the_correction(family, tuning):
    """y = x − η (g + c − c_k)."""
    alone = Alone(family, replace(SGD, **vars(tuning), local_steps=1))
    update, plain = Scaffold().train(alone.job, alone.context), alone.fedavg()
    for name, tensor in update.patch.tensors.items():
        torch.testing.assert_close(tensor, plain[name] - SGD.lr * (alone.c[name] - alone.own[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_the_control_variate_is_the_mean_gradient_before_correction_and_clipping(training):
    """So a correction that takes no effect, because η is 0 as good as, leaves the mean of the gradients at x."""
    training = replace(training, lr=1e-30, local_steps=1, max_grad_norm=1e-3)
    alone, other = Alone("olmoe", training), Alone("olmoe", training, size=0.5)
    for each in (alone, other):
        Scaffold().train(each.job, each.context)
    controls, again = entries("control", alone.context.client_state), entries("control", other.context.client_state)
    assert sum(float(tensor.square().sum()) for tensor in controls.values()) > 1e-2  # far more than what it is clipped to
    for name in controls:
        torch.testing.assert_close(controls[name], again[name], rtol=1e-4, atol=1e-6)


@every_family
@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_if_c_equals_c_k_it_trains_bit_for_bit_as_fedavg(family, training):
    alone = Alone(family, training)
    alone.context.client_state.update(controls(alone.c))
    assert equal(Scaffold().train(alone.job, alone.context).patch.tensors, alone.fedavg())


@every_family
def test_a_federation_of_one_client_is_fedavg_bit_for_bit_in_every_round(family):
    model, (client, _) = tiny_model(family), CLIENTS
    context = tiny_context(model, client, ADAMW)
    plain = corrected = tiny_server(model, [client], ADAMW)
    for number in (1, 2, 3):
        plain, corrected = (replace(server, round=number, task="train") for server in (plain, corrected))
        (job,) = jobs_for(plain, FedAvg(), [client])
        plain = FedAvg().merge(plain, iter([FedAvg().train(job, replace(context, client_state={}))]))
        (job,) = jobs_for(corrected, Scaffold(), [client])
        assert equal(rows.read(Method().build_model(job, context)), job.patch.tensors), "what it keeps is no weight"
        corrected = Scaffold().merge(corrected, iter([Scaffold().train(job, context)]))
        assert equal(corrected.weights, plain.weights)
        assert equal(corrected.method_state, context.client_state)
    assert len(corrected.method_state) == len(plain.weights)


def column(*values):
    return torch.tensor(values)[:, None]


def test_c_changes_by_the_participants_sum_over_the_number_of_all_clients():
    """Four experts and a dense parameter; four clients, two of which take part, of which one has experts 1 and 3 only."""
    weights = {"experts": column(10.0, 20.0, 30.0, 40.0), "norm": column(5.0), "new": column(0.0)}
    layout = {"experts": "0", "norm": None, "new": None}
    method_state = {"control/experts": column(1.0, 2.0, 3.0, 4.0), "control/norm": column(-1.0), "another": column(7.0)}
    clients = {name: Client(name, 1) for name in "abcd"}
    server = Server(
        weights, layout, Anatomy({"0": BlockShape(4, 1)}), Footprint(0, {"0": 1}, 0), clients, method_state=method_state
    )
    ids = torch.tensor([1, 3])
    sent = [
        Update("a", 1, "train", Patch(weights), 3, controls({"experts": column(4.0, 8.0, 0.0, 0.0), "norm": column(2.0)})),
        Update(
            "b",
            1,
            "train",
            Patch({"experts": column(24.0, 44.0)}, {"experts": ids}),
            1,
            controls({"experts": column(4.0, 8.0), "new": column(-6.0)}),
        ),
    ]
    merged = Scaffold().merge(server, iter(sent))
    assert {name: tensor.flatten().tolist() for name, tensor in merged.method_state.items()} == {
        "control/experts": [1 + 4 / 4, 2 + (8 + 4) / 4, 3.0, 4 + 8 / 4],
        "control/norm": [-1 + 2 / 4],
        "control/new": [-6 / 4],
        "another": [7.0],
    }
    # The weights as in FedAvg: (3 · 20 + 1 · 24) / 4 and (3 · 40 + 1 · 44) / 4.
    assert merged.weights["experts"].flatten().tolist() == [10.0, 21.0, 30.0, 41.0]
    assert server.method_state["control/norm"].item() == -1.0


def test_the_order_of_updates_does_not_matter():
    model = tiny_model("olmoe", num_hidden_layers=1)
    clients = [Client(name, 8) for name in "abc"]
    server = tiny_server(model, clients, SGD)
    updates = [
        Scaffold().train(job, tiny_context(model, client, SGD))
        for job, client in zip(jobs_for(server, Scaffold(), clients), clients, strict=True)
    ]
    one, other = (Scaffold().merge(server, iter(order)) for order in (updates, updates[::-1]))
    assert equal(one.method_state, other.method_state)
    assert len(one.method_state) == len(server.weights)


@every_tuning
@pytest.mark.parametrize("experts_per_layer", [None, 3])
def test_it_sends_twice_what_fedavg_sends_both_ways(tuning, experts_per_layer):
    """Down from the second round on: c is zero before, and zeros are not sent."""
    training = replace(SGD, **vars(tuning), local_steps=1)
    model = tiny_model("olmoe")
    server = tiny_server(model, CLIENTS, training)
    method, plain = Scaffold(experts_per_layer), FedAvg(experts_per_layer)
    contexts = [tiny_context(model, client, training) for client in CLIENTS]
    weights = sum(tensor.nbytes for tensor in next(jobs_for(server, plain, CLIENTS)).patch.tensors.values())
    counted = []
    for number in (1, 2):
        server = replace(server, round=number, task="train")
        jobs = list(jobs_for(server, method, CLIENTS))
        updates = [method.train(job, context) for job, context in zip(jobs, contexts, strict=True)]
        for job, update, usual, context in zip(jobs, updates, jobs_for(server, plain, CLIENTS), contexts, strict=True):
            sent = plain.train(usual, replace(context, client_state={}))
            counted.append((job.nbytes - usual.nbytes, without_metrics(update) - without_metrics(sent)))
        server = method.merge(server, iter(updates))
    assert counted == [(0, weights)] * 2 + [(weights, weights)] * 2


def without_metrics(update):
    return replace(update, metrics={}).nbytes


def test_c_of_experts_that_no_client_has_stays_zero_and_is_not_sent():
    model = tiny_model("olmoe")
    server, method = tiny_server(model, CLIENTS, SGD), Scaffold(experts_per_layer=3)
    for number in (1, 2):
        server = replace(server, round=number, task="train")
        jobs = list(jobs_for(server, method, CLIENTS))
        updates = [method.train(job, tiny_context(model, client, SGD)) for job, client in zip(jobs, CLIENTS, strict=True)]
        server = method.merge(server, iter(updates))
    checked = 0
    for name, block in server.layout.items():
        assert jobs[0].extra[f"control/{name}"].shape == jobs[0].patch.tensors[name].shape
        if block is not None:
            assigned = list(jobs[0].experts[block])
            assert len(assigned) == 3
            control = server.method_state[f"control/{name}"]
            assert control[assigned].abs().sum() > 0
            assert not control[[expert for expert in range(8) if expert not in assigned]].any()
            checked += 1
    assert checked == 3 * 3


@dataclass(frozen=True)
class Ailing(Scaffold):
    """From round 2 on c01 fails before it ends, and c02 sends a weight that is no number with a Δc_k that is."""

    def train(self, job, context):
        update = super().train(job, context)
        if job.round >= 2 and job.client == "c01":
            raise RuntimeError("out of memory")
        if job.round >= 2 and job.client == "c02":
            next(iter(update.patch.tensors.values())).fill_(float("nan"))
        return update


def test_c_is_the_mean_of_all_clients_c_k_with_partial_participation_and_failures(tiny_tree, tmp_path):
    prepared = replace(prepare_run(checked(RunConfig, {**tiny_tree, "method": {"name": "scaffold"}})), method=Ailing())
    engine, ledger = engine_for(prepared, tmp_path), Ledger()
    seen, failed = set(), []
    for server in federate(prepared.server, Ailing(), engine, ledger, rounds=4, clients_per_round=3):
        seen |= {entry.client for entry in ledger.entries}
        failed += [entry.client for entry in ledger.entries if entry.failed]
        ledger.clear()
        jobs = jobs_for(replace(server, round=server.round + 1), Scaffold(), server.clients.values())
        controls = [entries("control", engine.runtime.client_store.load(job)) for job in jobs]
        for name, control in entries("control", server.method_state).items():
            zero = torch.zeros_like(control)
            expected = sum(each.get(name, zero) for each in controls) / len(server.clients)
            torch.testing.assert_close(control, expected, rtol=1e-4, atol=1e-6)
    assert seen == set(server.clients)
    assert set(failed) == {"c01", "c02"}
    assert len(server.method_state) == len(server.weights)
