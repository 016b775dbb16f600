"""Parameters by kind, against models."""

import pytest

from fedexperts.moe.parameters import parameters
from fedexperts.moe.shrink import shrink
from fedexperts.testing import FAMILIES, tiny_experts, tiny_model


def one_layer(**overrides):
    return tiny_model("olmoe", num_hidden_layers=1, **overrides)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_counted_once(family):
    model = tiny_model(family)
    assert parameters(model).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_of_a_sub_model_are_those_it_has_when_cut(family):
    model = tiny_model(family)
    experts = tiny_experts(model)
    assert parameters(model).of(experts) == sum(parameter.numel() for parameter in shrink(model, experts).parameters())


def test_the_kinds_of_parameters_of_one_olmoe_layer():
    counted = parameters(one_layer())
    assert counted.expert == {"model.layers.0.mlp": 3 * 16 * 32}  # gate, up and down
    assert counted.router_row == {"model.layers.0.mlp": 32}
    assert counted.total - counted.active == (8 - 2) * 3 * 16 * 32
