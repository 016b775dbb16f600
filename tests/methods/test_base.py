"""The shared parts of methods: row-wise aggregation by hand."""

from itertools import permutations

import pytest
import torch
from torch import nn

from fedexperts.methods.base import (
    add_gradient,
    all_experts,
    by_examples,
    entries,
    mean_rows,
    patch_for,
    tee_without_weights,
)
from fedexperts.methods.contract import Method
from fedexperts.moe.anatomy import Anatomy, BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Assignment, Client, Job, Patch, Server, Training, Update

EXPERTS, ROUTER, NORM = "0.experts", "0.gate", "norm"


def column(*values):
    return torch.tensor(values)[:, None]


def server():
    """Four experts that are 10, 20, 30 and 40, their router rows 1, 2, 3 and 4, and a dense parameter that is 5."""
    weights = {EXPERTS: column(10.0, 20.0, 30.0, 40.0), ROUTER: column(1.0, 2.0, 3.0, 4.0), NORM: column(5.0)}
    layout = {EXPERTS: "0", ROUTER: "0", NORM: None}
    return Server(weights, layout, Anatomy({"0": BlockShape(4, 1)}), Footprint(0, {"0": 1}, 0), {})


def sent(client, examples, ids, experts, router, norm):
    rows = torch.tensor(ids)
    patch = Patch({EXPERTS: column(*experts), ROUTER: column(*router), NORM: column(norm)}, {EXPERTS: rows, ROUTER: rows})
    return Update(client, 1, "train", patch, examples)


UPDATES = [sent("a", 1, [0, 1], [11.0, 24.0], [1.5, 4.0], 9.0), sent("b", 3, [1, 2], [28.0, 33.0], [8.0, 3.5], 1.0)]


def test_modular_aggregation():
    merged = mean_rows(server(), UPDATES, by_examples).weights
    # Expert 0: only a's. Expert 1: (1 · 24 + 3 · 28) / 4. Expert 2: only b's. Expert 3: nobody's. Router rows alike.
    assert merged[EXPERTS].flatten().tolist() == [11.0, 27.0, 33.0, 40.0]
    assert merged[ROUTER].flatten().tolist() == [1.5, 7.0, 3.5, 4.0]
    assert merged[NORM].flatten().tolist() == [3.0]  # (1 · 9 + 3 · 1) / 4


def test_the_order_of_updates_does_not_matter():
    updates = [
        sent(name, n, [0, 2], [0.1 * n, 0.7], [0.3, 1 / n], 0.1) for name, n in (("a", 3), ("b", 7), ("c", 11), ("d", 1000))
    ]
    ends = [mean_rows(server(), order, by_examples).weights for order in permutations(updates)]
    assert len(ends) == 24
    assert all(torch.equal(end[name], ends[0][name]) for end in ends for name in end)


def test_a_single_client_is_taken_at_its_word():
    values = [0.1, 1 / 3]
    merged = mean_rows(server(), [sent("a", 7, [1, 3], values, values, 0.7)], by_examples).weights
    assert torch.equal(merged[EXPERTS], column(10.0, 0.1, 30.0, 1 / 3))
    assert torch.equal(merged[NORM], column(0.7))


def test_a_missing_gradient_is_created_only_if_the_addition_is_not_zero():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    add_gradient(parameter, torch.zeros(2))
    assert parameter.grad is None
    added = torch.tensor([0.0, 3.0])
    add_gradient(parameter, added)
    add_gradient(parameter, added)
    assert parameter.grad.tolist() == [0.0, 6.0]
    assert added.tolist() == [0.0, 3.0]


def test_entries_under_a_prefix_are_returned_without_it():
    one, other = torch.ones(1), torch.zeros(1)
    method_state = {"control/a.b": one, "controls/a.b": other, "held/control/c": other, "control": other}
    assert entries("control", method_state) == {"a.b": one}


def test_without_updates_the_weights_stay_and_the_old_server_is_never_changed():
    old = server()
    assert mean_rows(old, [], by_examples).weights == old.weights
    mean_rows(old, UPDATES, by_examples)
    assert all(torch.equal(old.weights[name], tensor) for name, tensor in server().weights.items())


def test_updates_are_read_once_and_one_at_a_time():
    alive = []

    def stream():
        for update in UPDATES:
            alive.append(update.client)
            yield update

    notes = []
    merged = mean_rows(server(), tee_without_weights(stream(), notes), by_examples)
    assert alive == ["a", "b"]
    assert [(note.client, note.examples, len(note.patch.tensors)) for note in notes] == [("a", 1, 0), ("b", 3, 0)]
    assert merged.weights[NORM].item() == 3.0


def test_a_patch_has_the_rows_of_the_assigned_experts_and_one_id_tensor_for_each_block():
    patch = patch_for(server(), Assignment({"0": (1, 3)}))
    assert {name: tensor.flatten().tolist() for name, tensor in patch.tensors.items()} == {
        EXPERTS: [20.0, 40.0],
        ROUTER: [2.0, 4.0],
        NORM: [5.0],
    }
    assert patch.rows[EXPERTS] is patch.rows[ROUTER]
    assert patch.nbytes == 4 * (2 + 2 + 1) + 8 * 2, "ids are counted once"


def test_a_patch_of_no_names_is_empty():
    assert patch_for(server(), Assignment({"0": (1, 3)}, names=frozenset())).nbytes == 0


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_training_sends_back_the_rows_of_the_job_with_new_values(family):
    model, training = tiny_model(family), Training(batch_size=4, local_steps=1)
    client = Client("a", 8)
    server = tiny_server(model, [client], training)
    experts = dict.fromkeys(server.anatomy.blocks, (1, 2, 5))
    patch = patch_for(server, Assignment(experts))
    update = Method().train(Job("a", 1, "train", "seed", experts, patch), tiny_context(model, client, training))
    assert {name: tensor.shape for name, tensor in update.patch.tensors.items()} == {n: t.shape for n, t in patch.tensors.items()}
    assert all(torch.equal(update.patch.rows[name], patch.rows[name]) for name in patch.rows)
    moved = [name for name, tensor in update.patch.tensors.items() if not torch.equal(tensor, patch.tensors[name])]
    assert len(moved) > 0.8 * len(patch.tensors)
    assert all_experts(server).experts == server.anatomy.all_experts
    assert update.examples == 8
