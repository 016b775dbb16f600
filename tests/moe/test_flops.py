"""FLOPs that are counted from shapes, against arithmetic."""

import pytest

from fedexperts.moe.flops import flops_estimated, per_step
from fedexperts.moe.footprint import checkpoint_activations
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import FAMILIES, tiny_batch, tiny_model

FULL = Tuning()
LORA = Tuning(train="lora", rank=4)


def one_layer(**overrides):
    return tiny_model("olmoe", num_hidden_layers=1, **overrides)


def test_flops_of_full_training_are_six_a_weight_and_token_and_the_scores():
    model = one_layer()
    attention = 32 * (32 + 16 + 16 + 32)  # q, k, v, o; two of the four heads have keys and values
    weights = attention + 8 * 32 + 2 * 3 * 16 * 32 + 64 * 32  # router, two experts, head
    scores = 32 + 32  # width of the queries and of the values
    assert per_step(prepare(model, FULL, "0"))([10], [10]) == 6 * 10 * weights + 6 * 100 * scores


def test_a_layer_whose_activations_are_checkpointed_runs_forward_twice():
    model = prepare(one_layer(), FULL, "0")
    plain = per_step(model)([10], [10])
    checkpoint_activations(model)
    attention = 32 * (32 + 16 + 16 + 32)
    weights = attention + 8 * 32 + 2 * 3 * 16 * 32  # all but the head, which is in no layer
    assert per_step(model)([10], [10]) - plain == 2 * 10 * weights + 2 * 100 * (32 + 32)


def test_frozen_weights_need_no_gradient_of_their_own():
    whole, frozen = prepare(one_layer(), FULL, "0"), prepare(one_layer(), Tuning(parts=("attention", "router", "dense")), "0")
    assert per_step(whole)([10], [10]) - per_step(frozen)([10], [10]) == 2 * 10 * (2 * 3 * 16 * 32)


def test_an_adapter_costs_its_own_weights():
    plain, adapted = prepare(one_layer(), Tuning(parts=("router",)), "0"), prepare(one_layer(), LORA, "0")
    attention = 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))
    experts = 2 * 4 * ((32 + 32) + (16 + 32))  # top 2; gate and up as one, down
    assert per_step(adapted)([10], [10]) - per_step(plain)([10], [10]) == 6 * 10 * (attention + experts)


def test_fewer_experts_save_no_compute_but_the_router_and_fewer_per_token_do():
    eight, four, one = one_layer(), one_layer(num_experts=4), one_layer(top_k=1)
    assert per_step(eight)([1], [1]) - per_step(four)([1], [1]) == 6 * 4 * 32
    assert per_step(eight)([1], [1]) - per_step(one)([1], [1]) == 6 * 3 * 16 * 32


@pytest.mark.parametrize(("share", "each"), [(0.0, 2), (0.25, 3), (1.0, 6)])
def test_backward_takes_the_share_of_the_experts_that_it_reaches(share, each):
    model = prepare(one_layer(), FULL, "0")
    batch = tiny_batch("olmoe", 1, 10, padding=0)
    full, partial = flops_estimated(model)(batch), flops_estimated(model)(batch, {"model.layers.0.mlp": share})
    assert full - partial == 10 * (2 * 3 * 16 * 32) * (6 - each)  # 2 forward; 2 + 2 backward of those reached


def test_frozen_experts_that_backward_reaches_need_no_gradient_of_their_own_and_adapters_are_computed_again():
    frozen, adapted = prepare(one_layer(), Tuning(parts=("router",)), "0"), prepare(one_layer(), LORA, "0")
    experts, adapters = 2 * 3 * 16 * 32, 2 * 4 * ((32 + 32) + (16 + 32))
    saved = [per_step(each)([10], [10]) - per_step(each)([10], [10], {"model.layers.0.mlp": 0.25}) for each in (frozen, adapted)]
    assert saved == [10 * experts * (4 - 2.5), 10 * experts * (4 - 2.5) + 10 * adapters * (6 - 3.5)]


def test_switchs_experts_that_backward_reaches_are_computed_again():
    flops = per_step(prepare(tiny_model("switch_transformers"), FULL, "0"))
    reached = {"encoder.block.1.layer.1.mlp": 1.0}
    assert flops([10], [6], reached) - flops([10], [6]) == 2 * 10 * (32 * 24 + 24 * 32)


def test_blocks_of_whose_reach_nothing_is_said_cost_the_full_backward():
    flops = per_step(prepare(tiny_model("olmoe"), FULL, "0"))
    first, second = "model.layers.0.mlp", "model.layers.1.mlp"
    full = flops([10], [10])
    assert flops([10], [10], {}) == full
    assert full - flops([10], [10], {first: 0.0}) == 10 * (2 * 3 * 16 * 32) * 4
    assert full - flops([10], [10], {first: 0.0, second: 0.0}) == 2 * 10 * (2 * 3 * 16 * 32) * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_costs_nothing(family):
    model = tiny_model(family)
    assert flops_estimated(model)(tiny_batch(family, padding=3)) < flops_estimated(model)(tiny_batch(family, padding=0))
