"""randomMoE: random experts, FedMoE's aggregation."""

from dataclasses import replace

import pytest

from fedexperts.errors import TooSmall
from fedexperts.methods.fedmoe import FedMoE
from fedexperts.methods.random_moe import RandomMoE
from fedexperts.moe import shrink
from fedexperts.moe.anatomy import BlockShape
from fedexperts.testing import bare_server
from fedexperts.types import Client

SHAPES = [BlockShape(16, 2), BlockShape(16, 2)]


def server(*clients):
    return bare_server(SHAPES, clients)


def test_a_client_has_the_same_experts_in_all_rounds_and_another_client_others():
    one, other = Client("one", 1), Client("other", 1)
    method, start = RandomMoE(experts_per_layer=4), server(one, other)
    experts = [method.assign(replace(start, round=round), one).experts for round in (1, 2, 9)]
    assert experts[0] == experts[1] == experts[2]
    assert experts[0] != method.assign(start, other).experts
    assert experts[0] != method.assign(replace(start, seed="1"), one).experts


def test_the_experts_fill_the_reserve_evenly():
    client = Client("c", 1, memory_bytes=30)
    experts = RandomMoE(reserve=0.7).assign(server(client), client).experts  # 21 bytes: ten in each layer
    assert [len(ids) for ids in experts.values()] == [10, 10]
    shrink.check(server(client).anatomy, experts)


def test_it_draws_the_initial_experts_of_fedmoe_without_stage_one():
    client = Client("c", 1, memory_bytes=30)
    assert RandomMoE().assign(server(client), client) == FedMoE(initial="random").assign(server(client), client)


def test_a_client_too_small_for_any_sub_model_is_named():
    client = Client("c3", 1, memory_bytes=3)
    with pytest.raises(TooSmall, match="client c3"):
        RandomMoE().assign(server(client), client)
