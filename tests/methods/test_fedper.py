"""FedPer, Algorithms 1 and 2 of Arivazhagan et al."""

from dataclasses import replace

import pytest
import torch

from fedexperts.federation import jobs_for
from fedexperts.methods.contract import Method
from fedexperts.methods.fedper import FedPer
from fedexperts.methods.local import Local
from fedexperts.methods.personal import parts
from fedexperts.moe import rows
from fedexperts.moe.tuning import Tuning
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Training

CLIENTS = [Client("a", 8, "x"), Client("b", 12, "y")]
TRAINING = Training(batch_size=4, local_steps=2)
every_family = pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
every_tuning = pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", rank=4)], ids=["full", "lora"])


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Federation:
    """Rounds with everybody, in this process."""

    def __init__(self, method, clients, family="olmoe", training=TRAINING):
        model = tiny_model(family)
        self.method, self.clients = method, clients
        self.server = tiny_server(model, clients, training)
        self.contexts = {client.name: tiny_context(model, client, training) for client in clients}

    def round(self):
        self.server = replace(self.server, round=self.server.round + 1, task="train")
        self.jobs = list(jobs_for(self.server, self.method, self.clients))
        self.updates = [self.method.train(job, self.contexts[job.client]) for job in self.jobs]
        self.server = self.method.merge(self.server, iter(self.updates))


@every_family
@every_tuning
@pytest.mark.parametrize("personal", [("router",), ("router", "attention"), ("experts",)])
def test_personal_weights_are_never_sent(family, tuning, personal):
    federation = Federation(FedPer(personal), CLIENTS, family, replace(TRAINING, **vars(tuning)))
    before = federation.server
    for _ in range(2):
        federation.round()
        for job, update in zip(federation.jobs, federation.updates, strict=True):
            client_state = federation.contexts[job.client].client_state
            assert update.patch.tensors.keys() == job.patch.tensors.keys() == before.weights.keys() - client_state.keys()
            assert {parts(before.layout)[name] for name in client_state} == {*personal}
            assert not update.extra
            sent = [*job.patch.tensors.values(), *update.patch.tensors.values()]
            moved = [
                tensor for name, tensor in client_state.items() if tensor.any() and not torch.equal(tensor, before.weights[name])
            ]
            assert len(moved) > len(client_state) / 3
            assert not [tensor for tensor in moved if any(same(tensor, other) for other in sent)]
    assert all(torch.equal(federation.server.weights[name], before.weights[name]) for name in client_state)
    assert not all(torch.equal(federation.server.weights[name], before.weights[name]) for name in job.patch.tensors)


def same(one, other):
    return one.shape == other.shape and torch.equal(one, other)


@every_family
@pytest.mark.parametrize("personal", [("router",), ("attention", "experts")])
def test_a_federation_of_one_client_is_local_training_bit_for_bit(family, personal):
    """Whatever is personal: what is shared is the mean of one."""
    alone, local = (Federation(method, CLIENTS[:1], family) for method in (FedPer(personal), Local()))
    for _ in range(3):
        alone.round()
        local.round()
        assert equal({**alone.server.weights, **alone.contexts["a"].client_state}, local.contexts["a"].client_state)


def test_clients_share_the_mean_by_examples_and_continue_with_personal_routers():
    federation = Federation(FedPer(), CLIENTS)
    federation.round()
    (one, other), client_states = federation.updates, [federation.contexts[name].client_state for name in "ab"]
    for name in one.patch.tensors:
        mean = (8 * one.patch.tensors[name] + 12 * other.patch.tensors[name]) / 20
        torch.testing.assert_close(federation.server.weights[name], mean)
    assert not any(torch.equal(client_states[0][name], client_states[1][name]) for name in client_states[0])
    evaluated = replace(federation.server, task="evaluate")
    for job in jobs_for(evaluated, FedPer(), CLIENTS):
        scored = rows.read(Method().build_model(job, federation.contexts[job.client]))
        assert equal(scored, {**federation.server.weights, **federation.contexts[job.client].client_state})


def test_a_client_that_has_not_trained_yet_has_the_bases_routers():
    federation = Federation(FedPer(), CLIENTS)
    start = federation.server
    federation.round()
    newcomer = Client("c", 8)
    context = tiny_context(federation.contexts["a"].model, newcomer, TRAINING)
    (job,) = jobs_for(federation.server, FedPer(), [newcomer])
    installed = rows.read(Method().build_model(job, context))
    for name, part in parts(start.layout).items():
        assert torch.equal(installed[name], (start if part == "router" else federation.server).weights[name])
