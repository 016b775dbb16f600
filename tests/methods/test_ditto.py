"""Ditto, Algorithm 1 of Li et al."""

from dataclasses import replace

import pytest
import torch

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.federation import jobs_for
from fedexperts.io.toml import checked
from fedexperts.methods.contract import Method
from fedexperts.methods.ditto import Ditto
from fedexperts.methods.fedavg import FedAvg
from fedexperts.moe import rows
from fedexperts.moe.tuning import Tuning
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Patch, Training

CLIENT = Client("a", 8)
SGD = Training(batch_size=4, local_steps=1, lr=0.5, optimizer="sgd", max_grad_norm=0.0)
ADAMW = Training(batch_size=4, local_steps=3)
every_family = pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
every_tuning = pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", rank=4)], ids=["full", "lora"])


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Alone:
    """A client that has wᵗ, and where it is asked for a v_k that is off from it everywhere."""

    def __init__(self, training, family="olmoe", with_own=True, model=None):
        self.model = model or tiny_model(family)
        self.server = replace(tiny_server(self.model, [CLIENT], training), round=3, task="train")
        (self.job,) = jobs_for(self.server, Ditto(), [CLIENT])
        self.w = self.job.patch.tensors
        self.context = tiny_context(self.model, CLIENT, training)
        chance = torch.Generator().manual_seed(7)
        self.v = {name: t + 0.05 * torch.randn(t.shape, generator=chance) for name, t in self.w.items()} if with_own else {}
        self.context.client_state.update(self.v)

    def fedavg(self, start, seed):
        """What plain training makes of `start` with the batches of `seed`."""
        job = replace(self.job, patch=Patch(start, self.job.patch.rows), seed=seed)
        return FedAvg().train(job, replace(self.context, client_state={}))


@every_family
@every_tuning
@pytest.mark.parametrize("with_own", [True, False])
def test_the_update_is_fedavgs_bit_for_bit_for_any_client_state(family, tuning, with_own):
    alone = Alone(replace(ADAMW, **vars(tuning)), family, with_own)
    update, plain = Ditto().train(alone.job, alone.context), alone.fedavg(alone.w, alone.job.seed)
    assert equal(update.patch.tensors, plain.patch.tensors)
    assert equal(update.patch.rows, plain.patch.rows)
    assert not update.extra


def test_the_update_uses_the_same_dropout_draws_as_fedavg():
    alone = Alone(ADAMW, model=tiny_model("switch_transformers", dropout_rate=0.3))
    torch.manual_seed(1)
    update = Ditto().train(alone.job, alone.context)
    torch.manual_seed(1)
    plain = alone.fedavg(alone.w, alone.job.seed)
    assert equal(update.patch.tensors, plain.patch.tensors)
    torch.manual_seed(2)
    assert not equal(alone.fedavg(alone.w, alone.job.seed).patch.tensors, plain.patch.tensors)
    assert update.metrics == plain.metrics
    assert not equal(alone.context.client_state, alone.v)


@every_family
@every_tuning
def test_a_step_of_the_clients_own_model_by_hand(family, tuning):
    """v ← v − η (∇F(v) + λ (v − wᵗ)): a step of SGD from v, and back along v − wᵗ by η λ."""
    alone, hold = Alone(replace(SGD, **vars(tuning)), family), 0.25
    plain = alone.fedavg(alone.v, f"{alone.job.seed}/personal").patch.tensors
    Ditto(hold).train(alone.job, alone.context)
    assert alone.context.client_state.keys() == alone.w.keys()
    for name, v in alone.v.items():
        expected = plain[name] - SGD.lr * hold * (v - alone.w[name])
        torch.testing.assert_close(alone.context.client_state[name], expected, rtol=1e-5, atol=1e-6)
        assert float((expected - plain[name]).abs().max()) > 1e-3


def test_a_personal_model_is_initialized_with_the_first_received_weights():
    alone = Alone(SGD, with_own=False)
    Ditto().train(alone.job, alone.context)
    assert equal(alone.context.client_state, alone.fedavg(alone.w, f"{alone.job.seed}/personal").patch.tensors)


def test_a_larger_lambda_keeps_the_personal_model_closer_to_the_global_one():
    def distance(hold):
        alone = Alone(replace(SGD, local_steps=4, lr=0.1))
        Ditto(hold).train(alone.job, alone.context)
        return sum(float((alone.context.client_state[name] - t).square().sum()) for name, t in alone.w.items()) ** 0.5

    far, nearer, nearest = map(distance, (1e-3, 1.0, 5.0))  # of the way off, 0.9⁴ and 0.5⁴ would be left but for the loss
    assert far > 1.2 * nearer
    assert nearer > 1.2 * nearest


def test_the_personal_model_is_scored_or_before_its_first_training_the_received_one():
    alone = Alone(ADAMW, with_own=False)
    (job,) = jobs_for(replace(alone.server, task="evaluate"), Ditto(), [CLIENT])
    assert equal(rows.read(Method().build_model(job, alone.context)), dict(alone.w))
    Ditto().train(alone.job, alone.context)
    assert equal(rows.read(Method().build_model(job, alone.context)), dict(alone.context.client_state))


@every_family
def test_no_tensor_of_the_clients_own_model_is_among_those_sent(family):
    alone = Alone(ADAMW, family)
    update = Ditto().train(alone.job, alone.context)
    own = [tensor for name, tensor in alone.context.client_state.items() if not torch.equal(tensor, alone.w[name])]
    assert len(own) == len(alone.w)
    sent = list(update.patch.tensors.values())
    assert not [tensor for tensor in own for other in sent if tensor.shape == other.shape and torch.equal(tensor, other)]


def test_the_costs_of_both_trainings_are_counted():
    alone, again = Alone(ADAMW), Alone(ADAMW)
    update, personal = Ditto().train(alone.job, alone.context), Ditto().personalized(again.job, again.context)
    plain = alone.fedavg(alone.w, alone.job.seed)
    assert update.cost.tokens == personal.cost.tokens + plain.cost.tokens
    assert update.cost.flops_estimated == personal.cost.flops_estimated + plain.cost.flops_estimated
    received = sum(tensor.nbytes for tensor in alone.w.values())
    assert update.cost.peak_bytes == personal.cost.peak_bytes >= plain.cost.peak_bytes + received / 2


@pytest.mark.parametrize("hold", [0, -1.0, float("inf"), "much"])
def test_a_hold_that_is_no_positive_number_is_refused(hold):
    tree = {"method": {"name": "ditto", "hold": hold}, "data": {"sources": ["synthetic/double"], "clients": 2}}
    with pytest.raises(BadValue, match=r"^method\.hold = "):
        checked(RunConfig, tree)
