"""FLOPs that are estimated from shapes, against arithmetic and against torch's counter (`flop_counter` of fedexperts.testing)."""

import pytest
import torch

from fedexperts.moe import graft
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.backward import SelectiveBackward
from fedexperts.moe.flops import FlopsEstimate, Size
from fedexperts.moe.footprint import checkpoint_activations, next_token_loss
from fedexperts.moe.routing import Recorder
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import FAMILIES, flop_counter, tiny_batch, tiny_experts, tiny_model

FULL = Tuning()
LORA = Tuning(train="lora", rank=4)
ATTENTION, EXPERT, ROUTER, HEAD = 32 * (32 + 16 + 16 + 32), 3 * 16 * 32, 8 * 32, 64 * 32  # weights of one layer of a tiny OLMoE
ADAPTERS = 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32)), 4 * ((32 + 32) + (16 + 32))  # of attention, of an expert
SCORES = 32 + 32  # width of the queries and of the values
BLOCK = "model.layers.0.mlp"
TEN = Size(examples=1, read=10, written=10)


def one_layer(tuning, **overrides):
    return prepare(tiny_model("olmoe", num_hidden_layers=1, **overrides), tuning, "0")


def step(model, size=TEN, **given):
    return FlopsEstimate(model).step(size, **given)


def test_a_forward_pass_is_two_a_weight_and_token_and_the_scores():
    weights = ATTENTION + ROUTER + 2 * EXPERT + HEAD  # of eight experts two
    assert FlopsEstimate(one_layer(FULL)).forward(TEN) == 2 * 10 * weights + 2 * 100 * SCORES


def test_a_step_of_full_training_is_three_forward_passes_and_the_scores_once_more_without_the_values():
    model = one_layer(FULL)
    assert step(model) == 3 * FlopsEstimate(model).forward(TEN) + 2 * 100 * 32
    model = one_layer(FULL, attn_implementation="eager")
    assert step(model) == 3 * FlopsEstimate(model).forward(TEN)


def test_the_head_counts_only_positions_with_logits():
    model = one_layer(FULL)
    assert step(model) - step(model, Size(1, 10, 4)) == 6 * 6 * HEAD


def test_the_positions_of_a_batch_with_logits_are_those_at_which_an_example_has_a_target():
    estimate, batch = FlopsEstimate(one_layer(FULL)), tiny_batch("olmoe", 2, 12, padding=0)
    batch["labels"][0, :7], batch["labels"][1, :9] = -100, -100
    assert estimate.size(batch) == (2, 12, 5)


def test_padding_counts_as_any_token():
    estimate = FlopsEstimate(one_layer(FULL))
    sizes = [estimate.size(tiny_batch("olmoe", padding=padding)) for padding in (0, 3)]
    assert sizes == [(2, 12, 11), (2, 12, 11)]  # the first example has none


def test_a_layer_whose_activations_are_checkpointed_runs_forward_twice():
    model = one_layer(FULL)
    plain = step(model)
    checkpoint_activations(model)
    weights = ATTENTION + ROUTER + 2 * EXPERT  # all but the head, which is in no layer
    assert step(model) - plain == 2 * 10 * weights + 2 * 100 * SCORES
    assert FlopsEstimate(model).forward(TEN) == plain / 3 - 2 * 100 * 32 / 3  # which has no backward


def test_frozen_weights_need_no_gradient_of_their_own():
    assert step(one_layer(FULL)) - step(one_layer(Tuning(parts=("attention", "router", "dense")))) == 2 * 10 * 2 * EXPERT


def test_what_is_below_the_first_trained_weight_has_no_backward():
    """With a trained router in one layer: its own gradient, and the head's of its inputs, which the experts' weights need."""
    model = one_layer(Tuning(parts=("router",)))
    assert step(model) - FlopsEstimate(model).forward(TEN) == 2 * 10 * ROUTER + 2 * 10 * HEAD


def test_an_adapter_costs_its_own_weights():
    plain, adapted = one_layer(FULL), one_layer(LORA)
    of_attention, of_expert = ADAPTERS
    forward = 2 * 10 * (of_attention + 2 * of_expert)
    assert FlopsEstimate(adapted).forward(TEN) - FlopsEstimate(plain).forward(TEN) == forward


def test_fewer_experts_save_no_compute_but_the_router_and_fewer_per_token_do():
    eight, four, one = (one_layer(FULL, **experts) for experts in ({}, {"num_experts": 4}, {"top_k": 1}))
    assert step(eight) - step(four) == 6 * 10 * 4 * 32
    assert step(eight) - step(one) == 6 * 10 * EXPERT


@pytest.mark.parametrize("number", [0, 2, 8])
def test_backward_takes_the_part_of_the_experts_that_it_reaches(number):
    model = one_layer(FULL)
    missing = step(model) - step(model, chosen={BLOCK: tuple(range(number))})
    assert missing == 4 * 10 * 2 * EXPERT * (8 - number) / 8  # tokens are evenly spread


def test_the_part_of_chosen_experts_is_that_of_the_tokens_that_they_got():
    model, picks = one_layer(FULL), {BLOCK: torch.tensor([13, 0, 0, 0, 0, 0, 3, 4])}
    missing = step(model, picks=picks) - step(model, picks=picks, chosen={BLOCK: (0, 7)})
    assert missing == 4 * 3 * EXPERT


def test_frozen_experts_that_backward_reaches_need_no_gradient_of_their_own_and_adapters_are_computed_again():
    everything = {BLOCK: tuple(range(8))}
    none: dict[str, tuple[int, ...]] = {}
    frozen, adapted = one_layer(Tuning(parts=("attention",))), one_layer(LORA)
    assert step(frozen, chosen=everything) - step(frozen, chosen=none) == 2 * 10 * 2 * EXPERT
    assert step(adapted, chosen=everything) - step(adapted, chosen=none) == 2 * 10 * 2 * EXPERT + 6 * 10 * 2 * ADAPTERS[1]


def test_switchs_experts_that_backward_reaches_are_computed_again():
    model = prepare(tiny_model("switch_transformers"), FULL, "0")
    everything = anatomy(model).all_experts
    again = step(model, Size(1, 10, 6), chosen=everything) - step(model, Size(1, 10, 6))
    assert again == 2 * (10 + 6) * (32 * 24 + 24 * 32)  # one block in the encoder, one in the decoder


TUNINGS = {
    "full": FULL,
    "lora": LORA,
    "router": Tuning(parts=("router",)),
    "adapters of attention": Tuning("lora", ("attention",), rank=4),
    "experts": Tuning(parts=("experts",)),
}


def counted(model, batch, chosen=None, through="chosen"):
    """The estimate of a step, and of a forward pass, over torch's counts."""
    with flop_counter() as count, Recorder(model.train()) as recorder:
        if chosen is None:
            next_token_loss(model, batch).backward()
        else:
            with SelectiveBackward(model, through) as selective:
                loss = next_token_loss(model, batch)
                selective.choose(chosen)
                loss.backward()
    with flop_counter() as forward, torch.no_grad():
        next_token_loss(model.eval(), batch)
    estimate = FlopsEstimate(model)
    size = estimate.size(batch)
    return (
        estimate.step(size, recorder.picks, chosen, through) / count.get_total_flops(),
        estimate.forward(size) / forward.get_total_flops(),
    )


def batch_of(family):
    batch = tiny_batch(family, 3, 14)
    if family != "switch_transformers":
        batch["labels"][:, :5] = -100
    return batch


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_and_a_forward_pass_are_within_one_percent_of_torchs_counter(family, tuning):
    model = prepare(shrink(tiny_model(family), {}), tuning, seed="0")
    assert counted(model, batch_of(family)) == pytest.approx((1, 1), rel=0.01)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "switch_transformers"])
def test_of_personal_experts_too(family, number):
    """torch sums several by a product, and multiplies the output of a single one by its gate."""
    tuning = Tuning("lora", ("attention",), rank=4)
    model = prepare(shrink(tiny_model(family), {}), tuning, seed="0")
    graft.attach(model, dict.fromkeys(blocks(model), (3, 5)[:number]), tuning, seed="0")
    assert counted(model, batch_of(family)) == pytest.approx((1, 1), rel=0.001)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "switch_transformers"])
def test_of_a_sub_model_too(family, shared):
    base = tiny_model(family)
    model = prepare(shrink(base, tiny_experts(base), share_stacks=shared), LORA, seed="0")
    assert counted(model, batch_of(family)) == pytest.approx((1, 1), rel=0.001)


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "switch_transformers"])
def test_of_a_backward_that_reaches_some_experts_and_of_adapters_on_some_experts_too(family, train):
    experts = dict.fromkeys(blocks(tiny_model(family)), (1, 4))
    model = prepare(shrink(tiny_model(family), {}), Tuning(train, rank=4), seed="0")
    for through in ("chosen", "all"):
        assert counted(model, batch_of(family), experts, through) == pytest.approx((1, 1), rel=0.001)
    partly = prepare(shrink(tiny_model(family), {}), LORA, seed="0", only=experts)
    assert counted(partly, batch_of(family))[0] == pytest.approx(1, rel=0.001)


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "switch_transformers"])
def test_of_checkpointed_layers_within_two_percent(family, tuning):
    """Products at the end of a layer that torch need not repeat count twice: in Switch, the second of a dense layer."""
    model = prepare(shrink(tiny_model(family), {}), tuning, seed="0")
    checkpoint_activations(model)
    assert counted(model, batch_of(family)) == pytest.approx((1, 1), rel=0.02)
