"""FedProx, equation 2 of Li et al."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.federation import jobs_for
from fedexperts.io.toml import checked
from fedexperts.methods.fedavg import FedAvg
from fedexperts.methods.fedprox import FedProx, sum_of_squares
from fedexperts.moe.tuning import Tuning, trainable
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Training

CLIENT = Client("a", 8)
SGD = Training(batch_size=4, local_steps=2, lr=0.5, optimizer="sgd", max_grad_norm=0.0)
FEW_STEPS = Training(batch_size=4, local_steps=3)


def trained(method, training, family="olmoe"):
    """What the client received, and its update."""
    model = tiny_model(family)
    server = tiny_server(model, [CLIENT], training)
    (job,) = jobs_for(server, method, [CLIENT])
    return job.patch.tensors, method.train(job, tiny_context(model, CLIENT, training))


def distance(one, other):
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


def test_the_distance_by_hand():
    model = nn.ParameterDict({"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.tensor([[3.0]]))})
    model["frozen"] = nn.Parameter(torch.tensor([9.0]), requires_grad=False)
    anchors = list(zip(trainable(model), [torch.tensor([0.0, 4.0]), torch.tensor([[3.5]])], strict=True))
    assert float(sum_of_squares(anchors)) == 1.0 + 4.0 + 0.25


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
@pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", rank=4)], ids=["full", "lora"])
def test_the_second_step_is_fedavgs_minus_mu_times_the_distance_so_far(family, tuning):
    """y₂ = y₁ − η (g(y₁) + μ (y₁ − x)); the first step is FedAvg's, since there the distance is 0."""
    training, mu = replace(SGD, **vars(tuning)), 0.25
    x, one = trained(FedAvg(), replace(training, local_steps=1), family)
    _, first = trained(FedProx(mu), replace(training, local_steps=1), family)
    _, two = trained(FedAvg(), training, family)
    _, drawn = trained(FedProx(mu), training, family)
    moved = 0
    for name, start in x.items():
        y1, y2 = one.patch.tensors[name], two.patch.tensors[name]
        assert torch.equal(first.patch.tensors[name], y1)
        expected = y2 - training.lr * mu * (y1 - start)
        torch.testing.assert_close(drawn.patch.tensors[name], expected, rtol=1e-5, atol=1e-6)
        moved += float((y2 - expected).abs().max()) > 1e-4
    assert moved > len(x) / 4


def test_with_mu_near_zero_it_is_fedavg_bit_for_bit():
    _, plain = trained(FedAvg(), FEW_STEPS)
    _, proximal = trained(FedProx(mu=1e-38), FEW_STEPS)
    assert all(torch.equal(proximal.patch.tensors[name], tensor) for name, tensor in plain.patch.tensors.items())


def test_a_larger_mu_keeps_a_client_closer_to_the_received_weights():
    runs = [trained(FedProx(mu), SGD) for mu in (1e-3, 0.5, 1.5)]
    far, nearer, nearest = (distance(x, update.patch.tensors) for x, update in runs)
    assert far > nearer > nearest
    assert far > 1.05 * nearest


def test_the_loss_that_is_reported_includes_the_penalty():
    _, plain = trained(FedAvg(), SGD)
    x, one = trained(FedAvg(), replace(SGD, local_steps=1))
    _, proximal = trained(FedProx(mu=0.25), SGD)
    penalty = 0.25 / 2 * distance(x, one.patch.tensors) ** 2  # of the second of two steps
    assert proximal.metrics["loss"] - plain.metrics["loss"] == pytest.approx(penalty / 2, rel=1e-3)


def test_its_additional_memory_is_the_received_weights_and_little_more():
    x, plain = trained(FedAvg(), FEW_STEPS)
    _, proximal = trained(FedProx(), FEW_STEPS)
    received, largest = sum(tensor.nbytes for tensor in x.values()), max(tensor.nbytes for tensor in x.values())
    assert received <= proximal.cost.peak_bytes - plain.cost.peak_bytes <= received + 2 * largest


@pytest.mark.parametrize("mu", [0, -1.0, float("inf"), float("nan"), "much"])
def test_a_mu_that_is_no_positive_number_is_refused(mu):
    tree = {"method": {"name": "fedprox", "mu": mu}, "data": {"sources": ["synthetic/double"], "clients": 2}}
    with pytest.raises(BadValue, match=r"^method\.mu = "):
        checked(RunConfig, tree)
