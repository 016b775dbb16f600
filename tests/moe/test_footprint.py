"""Bytes that are counted from shapes, against real training steps."""

import pytest
import torch

from fedexperts.moe import graft
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.footprint import Footprint, checkpoint_activations, footprint, next_token_loss
from fedexperts.moe.logits import IGNORED
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.parameters import expert_sides
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare, trainable
from fedexperts.testing import FAMILIES, tiny_batch, tiny_experts, tiny_model

FULL = Tuning()
LORA = Tuning(train="lora", rank=4)
LORA8 = Tuning(train="lora", rank=8)  # which bfloat16 needs
EXAMPLES, TOKENS = 4, 32


def one_layer(**overrides):
    return tiny_model("olmoe", num_hidden_layers=1, **overrides)


def measured(model, batch):
    """The peak of the second training step, during which the optimizer state exists."""
    optimizer = torch.optim.AdamW(trainable(model), fused=True)
    for _ in range(2):
        with MemoryMeter(model, optimizer) as meter:
            next_token_loss(model.train(), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return meter.peak_bytes


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "gpt_oss", "switch_transformers"])
def test_the_footprint_holds_for_a_real_step_of_a_sub_model(family, tuning):
    model = tiny_model(family)
    experts = tiny_experts(model)
    estimated = footprint(model, tuning, (EXAMPLES, TOKENS)).of(experts)
    small = prepare(shrink(model, experts), tuning, seed="0")
    peak = measured(small, tiny_batch(family, EXAMPLES, TOKENS))
    assert peak <= estimated * 1.01  # Switch's capacity and its experts' small index tensors
    assert peak >= estimated * 0.7  # gradients arrive while activations go, so they are not all alive at once


def activations(model, batch):
    """The most that is alive in forward and backward beside the parameters and their gradients."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with MemoryMeter(model, batch.values()) as meter:
        parameter_bytes = meter.bytes - sum(tensor.nbytes for tensor in batch.values())
        next_token_loss(model, batch).backward()
    return meter.peak_bytes - parameter_bytes


@pytest.mark.parametrize("positions", [None, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_of_a_real_forward_and_backward(family, positions):
    model = tiny_model(family).train()
    estimated = footprint(model, FULL, (EXAMPLES, TOKENS), target_positions=positions).activation_bytes
    batch = tiny_batch(family, EXAMPLES, TOKENS)
    if positions and family == "switch_transformers":
        batch["labels"] = batch["labels"][:, :positions].contiguous()
    elif positions:
        batch["labels"][:, :-positions] = IGNORED
    assert estimated == pytest.approx(activations(model, batch), rel=0.05 if family == "switch_transformers" else 0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "granitemoe"])
def test_activations_in_half_precision_and_checkpointed_ones_are_those_of_a_real_step(family, checkpointing, dtype):
    base = tiny_model(family).to(dtype)
    estimated = footprint(base, LORA8, (EXAMPLES, TOKENS), gradient_checkpointing=checkpointing).activation_bytes
    model = prepare(shrink(base, {}), LORA8, seed="0").train()
    if checkpointing:
        checkpoint_activations(model)
    assert estimated == pytest.approx(activations(model, tiny_batch(family, EXAMPLES, TOKENS)), rel=0.02)


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "gpt_oss", "switch_transformers"])
def test_of_personal_experts_the_footprint_is_that_of_a_real_step(family, train):
    tuning = Tuning(train, parts=("attention",), rank=4)
    plain, model = (prepare(shrink(tiny_model(family), {}), tuning, seed="0") for _ in "ab")
    graft.attach(model, dict.fromkeys(blocks(model), (3, 5)), tuning, seed="0")
    estimated, without = (footprint(tiny_model(family), tuning, (EXAMPLES, TOKENS), grafts=grafts) for grafts in (2, 0))
    assert estimated.dense_bytes - without.dense_bytes == training_bytes(model) - training_bytes(plain)
    assert estimated.expert_bytes == without.expert_bytes
    real = activations(model.train(), tiny_batch(family, EXAMPLES, TOKENS))
    assert estimated.activation_bytes == pytest.approx(real, rel=0.05 if family == "switch_transformers" else 0.001)


def training_bytes(model):
    """Bytes of the parameters with their gradients and AdamW's moments."""
    return sum(parameter.nbytes * (4 if parameter.requires_grad else 1) for parameter in model.parameters())


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_where_experts_are_computed_one_by_one_activations_are_those_of_that_way(family):
    """As experts of odd width are."""
    model = tiny_model(family, intermediate_size=66).train()
    model.set_experts_implementation("eager")
    estimated = footprint(model, FULL, (EXAMPLES, TOKENS)).activation_bytes
    real = activations(model, tiny_batch(family, EXAMPLES, TOKENS))
    assert estimated == pytest.approx(real, rel=0.05)  # shares are not quite equal
    assert model.get_experts_implementation() == {"": "eager"}


def test_a_trained_parameter_takes_16_bytes_and_a_frozen_one_4():
    model = one_layer()
    expert = 3 * 16 * 32
    assert footprint(model, FULL, (1, 4)).expert_bytes == {"model.layers.0.mlp": 16 * (expert + 32)}
    assert footprint(model, FULL, (1, 4), optimizer="sgd").expert_bytes == {"model.layers.0.mlp": 8 * (expert + 32)}
    frozen = footprint(model, Tuning(parts=("attention",)), (1, 4))
    assert frozen.expert_bytes == {"model.layers.0.mlp": 4 * (expert + 32)}
    adapted = footprint(model, Tuning(train="lora", parts=("experts",), rank=4), (1, 4))
    assert adapted.expert_bytes == {"model.layers.0.mlp": 4 * (expert + 32) + 16 * 4 * ((32 + 32) + (16 + 32))}


def test_an_expert_that_is_reached_takes_its_gradient_and_the_optimizer_state_and_none_of_its_router_row():
    model, expert, adapter = one_layer(), 3 * 16 * 32, 4 * ((32 + 32) + (16 + 32))
    lora = Tuning(train="lora", parts=("experts", "router"), rank=4)
    for tuning, trained in ((FULL, expert), (lora, adapter), (Tuning(parts=("attention", "router")), 0)):
        assert footprint(model, tuning, (1, 4)).update_bytes == {"model.layers.0.mlp": 12 * trained}  # and two moments
        assert footprint(model, tuning, (1, 4), optimizer="sgd").update_bytes == {"model.layers.0.mlp": 4 * trained}


def test_training_while_backward_reaches_no_expert_takes_their_weights_and_all_else_in_full():
    cost = footprint(one_layer(), FULL, (1, 4))
    assert cost.fixed_bytes == cost.dense_bytes + 8 * (16 * 32 + 4 * 3 * 16 * 32) + cost.activation_bytes
    assert cost.reaching(3) == cost.fixed_bytes + 3 * 12 * 3 * 16 * 32


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_reaching_every_expert_is_training_the_whole_model_and_what_takes_n_experts_holds_n(tuning, optimizer):
    model = tiny_model("olmoe")
    cost = footprint(model, tuning, (1, 4), optimizer=optimizer)
    assert cost.reaching(24) == cost.of(anatomy(model).all_experts)
    assert [cost.reached_within(cost.reaching(number)) for number in range(25)] == list(range(25))
    assert [cost.reached_within(cost.reaching(number) - 1) for number in range(25)] == [0, *range(24)]


def test_where_experts_differ_in_size_each_counts_as_the_largest_and_never_more_than_all_are_reached():
    cost = Footprint(100, {"a": 10, "b": 20}, 50, num_experts={"a": 2, "b": 2}, update_bytes={"a": 6, "b": 12})
    assert cost.fixed_bytes == 100 + 2 * (10 - 6) + 2 * (20 - 12) + 50
    assert [cost.reaching(number) for number in (0, 1, 4, 5)] == [174, 186, 222, 222]
    assert cost.reaching(4) > cost.of({"a": (0, 1), "b": (0, 1)})
    assert [cost.reached_within(memory) for memory in (0, 174, 185, 186, 10**9)] == [0, 0, 0, 1, 4]


def test_frozen_experts_take_nothing_more_when_they_are_reached():
    cost = Footprint(100, {"a": 10}, 50, num_experts={"a": 2}, update_bytes={"a": 0})
    assert (cost.reached_within(169), cost.reached_within(170)) == (0, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapting_every_expert_takes_the_frozen_model_and_16_bytes_a_parameter_of_the_adapters(family):
    model = tiny_model(family)
    costs = Footprint(0, {}, 0, frozen_bytes=1, sides=expert_sides(model))
    adapters = sum(each.numel() for each in trainable(prepare(model, Tuning(train="lora", parts=("experts",), rank=4), "0")))
    assert costs.lora_training_bytes(4) == 1 + 16 * adapters


def test_a_footprint_leaves_the_model_as_it_was():
    model = tiny_model("qwen2_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    footprint(model, LORA, (2, 8))
    assert not model.training
    assert model.get_experts_implementation() == tiny_model("qwen2_moe").get_experts_implementation()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_longer_batches_hold_more_activations_and_the_same_weights():
    model = one_layer()
    short, long = (footprint(model, FULL, (2, length)) for length in (8, 16))
    assert short.activation_bytes < long.activation_bytes
    assert short.dense_bytes == long.dense_bytes
    everything = anatomy(model).all_experts
    assert long.of(everything) - short.of(everything) == long.activation_bytes - short.activation_bytes


def test_where_a_vocabulary_is_large_the_logits_of_every_target_position_count():
    """Logits, their gradient and what the loss takes of each of the positions' rows of 4096 float32."""
    model = tiny_model("olmoe", vocab_size=4096, num_hidden_layers=1).train()
    batch = tiny_batch("olmoe", EXAMPLES, TOKENS)
    batch["labels"][:, :-5] = IGNORED
    estimated = [footprint(model, FULL, (EXAMPLES, TOKENS), target_positions=each).activation_bytes for each in (5, 6)]
    assert estimated[0] == pytest.approx(activations(model, batch), rel=0.001)
    assert estimated[1] - estimated[0] >= 2 * EXAMPLES * 4096 * 4
