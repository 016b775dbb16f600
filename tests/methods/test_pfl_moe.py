"""PFL-MoE: a fixed random subset of the shared experts for each client."""

from dataclasses import replace

import pytest
import torch

from fedexperts.errors import BadValue
from fedexperts.federation import jobs_for
from fedexperts.methods.fedavg import FedAvg
from fedexperts.methods.pfl_moe import PFLMoE
from fedexperts.methods.submodel import unmask
from fedexperts.moe import rows
from fedexperts.moe.anatomy import BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.testing import bare_server, tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Patch, Training, Update

TRAINING = Training(batch_size=4, local_steps=2)
CLIENTS = [Client("a", 8), Client("b", 12)]


def server(*clients):
    """Two layers of sixteen experts of 10 bytes, 6 of them to train it."""
    cost = Footprint(0, {"0": 10, "1": 10}, 0, num_experts={"0": 16, "1": 16}, update_bytes={"0": 6, "1": 6})
    return replace(bare_server([BlockShape(16, 2), BlockShape(16, 2)], clients), footprint=cost)


def subset(method, start, client):
    return unmask(start.anatomy, method.assign(start, client).extra["subset"])


def test_a_client_trains_the_same_experts_in_all_rounds_another_client_others():
    one, other = Client("one", 1), Client("other", 1)
    method, start = PFLMoE(budget=8), server(one, other)
    drawn = [subset(method, replace(start, round=round), one) for round in (1, 2, 9)]
    assert drawn[0] == drawn[1] == drawn[2]
    assert sum(len(ids) for ids in drawn[0].values()) == 8
    assert drawn[0] != subset(method, start, other)
    assert drawn[0] != subset(method, replace(start, seed="1"), one)


@pytest.mark.parametrize(("memory", "number"), [(None, 32), (320, 32), (319, 31), (128 + 30, 5), (128, 2), (1, 2)])
def test_the_subset_is_as_large_as_fits_the_memory_and_has_an_expert_of_each_layer(memory, number):
    client = Client("c", 1, memory_bytes=memory)
    assignment = PFLMoE().assign(server(client), client)
    subset = unmask(server(client).anatomy, assignment.extra["subset"])
    assert sum(len(ids) for ids in subset.values()) == int(assignment.extra["budget"]) == number
    assert all(subset.values())


def test_a_budget_below_one_expert_a_layer_is_refused():
    with pytest.raises(BadValue, match="give at least 2"):
        PFLMoE(budget=1).assign(server(CLIENTS[0]), CLIENTS[0])


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "switch_transformers"])
def test_it_sends_its_subset_and_changes_no_other_expert(family):
    model = tiny_model(family)
    start, method = tiny_server(model, CLIENTS, TRAINING), PFLMoE(budget=6)
    (job,) = jobs_for(start, method, CLIENTS[:1])
    update, own, moved, seen = (
        method.train(job, tiny_context(model, CLIENTS[0], TRAINING)),
        subset(method, start, CLIENTS[0]),
        0,
        0,
    )
    for name, tensor in update.patch.tensors.items():
        block = start.layout[name]
        if block is None or rows.router_of(name, start.layout):
            assert tensor.shape == start.weights[name].shape
        else:
            assert update.patch.rows[name].tolist() == list(own[block])
            moved += int((tensor != start.weights[name][list(own[block])]).flatten(1).any(1).sum())
            seen += 1
    assert moved and seen >= 4
    after = method.merge(start, iter([update])).weights
    left = [expert for expert in range(8) if expert not in own[next(iter(own))]]
    expert_ids = next(
        name for name, block in start.layout.items() if block == next(iter(own)) and not rows.router_of(name, start.layout)
    )
    assert torch.equal(after[expert_ids][left], start.weights[expert_ids][left])


def test_a_client_with_all_experts_in_its_subset_trains_bit_for_bit_as_in_fedavg():
    model = tiny_model("olmoe", num_hidden_layers=2)
    start, context = tiny_server(model, CLIENTS, TRAINING), tiny_context(model, CLIENTS[0], TRAINING)
    (plain,), (ours,) = (jobs_for(start, method, CLIENTS[:1]) for method in (FedAvg(), PFLMoE()))
    one, other = FedAvg().train(plain, context), PFLMoE().train(ours, context)
    assert one.patch.tensors.keys() == other.patch.tensors.keys()
    assert all(torch.equal(one.patch.tensors[name], other.patch.tensors[name]) for name in one.patch.tensors)


def test_an_expert_is_the_mean_over_the_clients_that_have_it_in_their_subset():
    weights = {"0.experts.w": torch.tensor([[10.0], [20.0], [30.0]]), "0.router.w": torch.zeros(3, 1)}
    start = replace(bare_server([BlockShape(3, 1)], CLIENTS), weights=weights, layout=dict.fromkeys(weights, "0"))
    everything = torch.arange(3)
    sent = [
        Update(name, 1, "train", Patch({"0.experts.w": torch.tensor(new), "0.router.w": router}, rows), examples)
        for name, examples, new, router, rows in [
            ("a", 1, [[1.0], [2.0]], torch.ones(3, 1), {"0.experts.w": torch.tensor([0, 1]), "0.router.w": everything}),
            ("b", 3, [[4.0]], torch.full((3, 1), 5.0), {"0.experts.w": torch.tensor([1]), "0.router.w": everything}),
        ]
    ]
    merged = PFLMoE().merge(start, iter(sent)).weights
    assert merged["0.experts.w"].flatten().tolist() == [1.0, 3.5, 30.0]  # (2 + 3 · 4) / 4
    assert merged["0.router.w"].flatten().tolist() == [4.0] * 3
