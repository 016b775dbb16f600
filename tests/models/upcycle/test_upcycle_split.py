"""Neurons into experts, and the router, by hand."""

from random import Random

import torch
from torch.nn.functional import silu

from fedexperts.models.upcycle.parts import FFN, States, Window
from fedexperts.models.upcycle.recipes import Copy
from fedexperts.models.upcycle.split import LOGIT_STD, RIDGE, balanced, cluster, divide, observe, ridge, split


def relu(x):
    return x.clamp(min=0)


def four_neurons():
    """Neurons 0 and 2 see the first input, 1 and 3 the second; each adds to its own output."""
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    return FFN(gate, torch.ones(4, 2), torch.tensor([[1.0, 0, 1, 0], [0, 1.0, 0, 1]]))


def alternating(held_out=False):
    """Tokens that are the first and the second unit vector by turns."""
    return torch.eye(2).repeat(20, 1), Window(tuple(range(40)), 40, held_out)


def states_of(*parts, act=relu):
    return States([inputs for inputs, _ in parts], [window for _, window in parts], act)


def test_neurons_that_are_active_on_the_same_tokens_form_an_expert():
    ffn, inputs = four_neurons(), alternating()[0]
    neurons = observe(ffn, ffn.activations(inputs, relu))
    assert neurons.output[:2].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    shared, experts = divide(neurons, 2, 0, Random(1))
    assert shared.tolist() == []
    assert sorted(ids.tolist() for ids in experts) == [[0, 2], [1, 3]]


def test_each_expert_gets_its_number_of_neurons_by_the_most_similar_pairs():
    similarity = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.0, 0.1]])
    assert balanced(similarity, 2).tolist() == [0, 0, 1, 1]


def test_experts_are_equally_large_however_the_neurons_lie():
    chance = torch.Generator().manual_seed(0)
    output = torch.rand(50, 24, generator=chance)
    assert torch.bincount(cluster(output, 3, Random(0))).tolist() == [8, 8, 8]


def test_sinks_are_shared_first_and_then_the_neurons_that_are_most_on():
    ffn = FFN(torch.ones(4, 1), torch.ones(4, 1), torch.tensor([[2.0, 1.0, 1.0, 1.0]]))
    hidden = torch.tensor([[1.0, 0.5, 0, 0], [1.0, 0, 0.5, 0]] * 10 + [[0.0, 0, 0, 100.0]])
    neurons = observe(ffn, hidden)
    assert neurons.sink.tolist() == [False, False, False, True]
    assert neurons.usual.tolist() == [True] * 20 + [False]
    assert neurons.always_on().argmax() == 0
    assert divide(neurons, 3, 1, Random(0))[0].tolist() == [3]
    assert divide(neurons, 2, 2, Random(0))[0].tolist() == [0, 3]


def test_the_router_is_the_ridge_regression_of_its_targets_with_the_wanted_spread():
    inputs, targets = torch.eye(2), torch.tensor([[3.0, -3.0], [1.0, -1.0]])
    router = ridge(inputs, targets, std=1.0)
    # Gram matrix: the identity; so the solution is the targets by 1 + RIDGE, and only their spread is changed.
    spread = (targets / (1 + RIDGE)).std()
    torch.testing.assert_close(router, (targets / (1 + RIDGE) / spread).T)


def test_a_weight_of_two_counts_as_the_token_twice():
    inputs, targets = torch.tensor([[1.0, 0.5], [0.2, 1.0]]), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    twice = ridge(inputs[[0, 0, 1]], targets[[0, 0, 1]], 1.0)
    weighted = ridge(inputs, targets, 1.0, torch.tensor([2.0, 1.0]))
    direction = torch.nn.functional.normalize
    gram_twice = direction(twice.flatten(), dim=0)
    torch.testing.assert_close(direction(weighted.flatten(), dim=0), gram_twice, atol=1e-5, rtol=1e-5)


def test_the_router_sends_tokens_to_the_neurons_that_they_activate():
    ffn = four_neurons()
    moe, facts = split(ffn, states_of(alternating(), alternating(held_out=True)), 2, 0, 1, Random(0))
    first = next(number for number, expert in enumerate(moe.experts) if expert.gate[0, 0] == 1)
    assert (torch.eye(2) @ moe.router.T).argmax(1).tolist() == [first, 1 - first]
    assert abs(float((alternating()[0] @ moe.router.T).std()) - LOGIT_STD) < 1e-6
    assert facts["error_routed"] == facts["error_oracle"] == 0
    assert 0.2 < facts["error_random"] < 0.8


def test_the_parts_add_up_to_the_network_once_weights_and_the_shared_gate_are_applied():
    chance = torch.Generator().manual_seed(0)
    ffn = FFN(*(torch.randn(shape, generator=chance) for shape in ((16, 8), (16, 8), (8, 16))))
    inputs = torch.randn(60, 8, generator=chance)
    calibration = (inputs, Window(tuple(range(60)), 60, False))
    held_out = (inputs, Window(tuple(range(60)), 60, True))
    moe, _ = split(ffn, states_of(calibration, held_out, act=silu), 3, 4, 2, Random(0))
    parts = sum(expert.output(inputs, silu) for expert in moe.experts) / 2 + moe.shared.output(inputs, silu) / 2
    torch.testing.assert_close(parts, ffn.output(inputs, silu), atol=1e-4, rtol=1e-4)


def test_noise_and_redrawn_neurons_change_as_much_as_they_say():
    chance = torch.Generator().manual_seed(0)
    ffn = FFN(*(torch.randn(shape, generator=chance) for shape in ((200, 50), (200, 50), (50, 200))))
    nothing = states_of()
    first, second = Copy(2, 1, noise=0.1).convert([ffn], nothing, Random(0))[0].experts
    assert 0.09 < (first.gate - ffn.gate).std() / ffn.gate.std() < 0.11
    assert not torch.equal(first.gate, second.gate)
    first, second = Copy(2, 1, reinit=0.25).convert([ffn], nothing, Random(0))[0].experts
    changed = [(expert.gate != ffn.gate).any(1) for expert in (first, second)]
    assert [int(rows.sum()) for rows in changed] == [50, 50]
    assert torch.equal(changed[0], (first.down != ffn.down).any(0))
    assert not torch.equal(*changed)
