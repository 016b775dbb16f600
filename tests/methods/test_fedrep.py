"""FedRep, Algorithm 1 of Collins et al."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from fedexperts.config import RunConfig
from fedexperts.core.training import fit
from fedexperts.errors import BadValue
from fedexperts.federation import jobs_for
from fedexperts.io.toml import checked
from fedexperts.methods.fedper import FedPer
from fedexperts.methods.fedrep import FedRep
from fedexperts.methods.personal import parts
from fedexperts.moe import rows
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Training

CLIENT = Client("a", 8)
SGD = Training(batch_size=4, local_steps=3, lr=0.5, optimizer="sgd", max_grad_norm=0.0)
every_family = pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])


class Alone:
    """A client with its job, once trained."""

    def __init__(self, method, training, family="olmoe"):
        self.model = tiny_model(family)
        self.server = tiny_server(self.model, [CLIENT], training)
        (self.job,) = jobs_for(self.server, method, [CLIENT])
        self.context = tiny_context(self.model, CLIENT, training)
        self.update = method.train(self.job, self.context)


def part_trained(model, context, only, seed, steps):
    """What training of the parts `only` makes of them, and nothing of the rest."""
    model = prepare(shrink(model, anatomy(model).all_experts), Tuning(parts=only), seed="")
    fit(model, context, seed=seed, steps=steps)
    return rows.read(model)


@every_family
def test_the_head_is_trained_on_the_received_representation_then_the_representation_with_that_head(family):
    """One step of three for the head: h¹ = h⁰ − α ∇_h F(φ⁰, h⁰); then two of φ, from φ⁰, with h¹ standing still."""
    alone = Alone(FedRep(head_share=0.4), SGD, family)
    head = part_trained(alone.model, alone.context, ("router",), f"{alone.job.seed}/head", 1)
    with_head = deepcopy(alone.model)
    rows.write(with_head, head)
    body = part_trained(with_head, alone.context, ("attention", "experts", "dense"), alone.job.seed, 2)

    assert alone.context.client_state.keys() == head.keys()
    assert alone.update.patch.tensors.keys() == body.keys()
    for name, tensor in {**alone.context.client_state, **alone.update.patch.tensors}.items():
        torch.testing.assert_close(tensor, {**head, **body}[name], rtol=1e-5, atol=1e-6)
    moved = [name for name, tensor in {**head, **body}.items() if not torch.equal(tensor, alone.server.weights[name])]
    assert len(moved) > len(alone.server.weights) / 2


@pytest.mark.parametrize(
    ("share", "steps", "expected"),
    [(0.5, 20, 10), (0.5, 5, 2), (0.5, 3, 1), (0.9, 2, 1), (0.01, 20, 1), (0.99, 20, 19), (0.5, 1, 0)],
)
def test_the_number_of_head_steps(share, steps, expected):
    assert FedRep(head_share=share).head_steps(steps) == expected


def test_a_single_step_trains_the_representation():
    alone = Alone(FedRep(), replace(SGD, local_steps=1))
    start = alone.server.weights
    assert all(torch.equal(tensor, start[name]) for name, tensor in alone.context.client_state.items())
    assert not all(torch.equal(tensor, start[name]) for name, tensor in alone.update.patch.tensors.items())


@every_family
@pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("personal", [("router",), ("attention", "router")])
def test_the_head_never_leaves_and_nothing_else_is_kept(family, tuning, personal):
    alone = Alone(FedRep(personal), replace(SGD, **vars(tuning)), family)
    client_state, sent, start = alone.context.client_state, alone.update.patch.tensors, alone.server.weights
    assert {name for name, part in parts(alone.server.layout).items() if part in personal} == client_state.keys()
    assert sent.keys() == alone.job.patch.tensors.keys() == start.keys() - client_state.keys()
    assert not alone.update.extra
    moved = [tensor for name, tensor in client_state.items() if tensor.any() and not torch.equal(tensor, start[name])]
    assert len(moved) > len(client_state) / 3
    assert not [
        tensor for tensor in moved for other in sent.values() if tensor.shape == other.shape and torch.equal(tensor, other)
    ]


def test_the_next_round_continues_with_the_clients_head():
    """With φ as it came the first time, so a head that starts afresh would end with the same bits."""
    alone = Alone(FedRep(), SGD)
    first = dict(alone.context.client_state)
    FedRep().train(alone.job, alone.context)
    assert not any(torch.equal(alone.context.client_state[name], tensor) for name, tensor in first.items())


def test_its_costs_are_those_of_its_steps_and_its_peak_is_at_most_fedpers():
    one, other = (Alone(method, replace(SGD, optimizer="adamw", lr=1e-3)) for method in (FedRep(), FedPer()))
    assert one.update.nbytes == pytest.approx(other.update.nbytes, abs=20)  # the loss is told in more or fewer digits
    assert one.update.cost.peak_bytes <= other.update.cost.peak_bytes
    assert 0 < one.update.cost.flops_estimated < other.update.cost.flops_estimated * 1.5
    assert one.update.cost.tokens > 3 * 4  # three steps of four examples, of more than one token each


@pytest.mark.parametrize("share", [0, 1, -1, "half"])
def test_a_head_share_of_0_or_1_is_refused(share):
    tree = {"method": {"name": "fedrep", "head_share": share}, "data": {"sources": ["synthetic/double"], "clients": 2}}
    with pytest.raises(BadValue, match=r"^method\.head_share = "):
        checked(RunConfig, tree)
