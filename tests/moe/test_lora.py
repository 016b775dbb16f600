"""Our adapters of stacked experts, against peft's and against the weights they stand for."""

import peft
import pytest
import torch

from fedexperts.errors import BadValue
from fedexperts.moe import graft, lora
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare, trainable
from fedexperts.testing import FAMILIES, tiny_batch, tiny_experts, tiny_model

RANK = 4
LORA = Tuning(train="lora", rank=RANK, alpha=8.0)
EXPERTS = Tuning(train="lora", parts=("experts",), rank=RANK, alpha=8.0)
STACKED = [family for family in FAMILIES if family != "switch_transformers"]


@torch.no_grad()
def stir(model, seed=0):
    """Gives every adapter some weight."""
    chance = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=chance) / 4)
    return model


def logits(model, family):
    with torch.no_grad():
        return model.eval()(**tiny_batch(family)).logits


def adapters(model):
    """(block, matrix, adapter) of every stacked matrix."""
    return [
        (name, matrix, adapter)
        for name, block in blocks(model).items()
        if not block.is_switch
        for matrix, adapter in block.experts.lora.items()
    ]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_it_equals_peft_with_the_same_weights(family):
    ours = stir(prepare(tiny_model(family), EXPERTS, seed="0"))
    experts_path = next(iter(blocks(ours))).split(".")[-1] + ".experts"
    matrices = lora.matrices(next(iter(blocks(ours).values())).experts)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=8, target_modules=[], target_parameters=[f"{experts_path}.{matrix}" for matrix in matrices]
    )
    theirs = tiny_model(family)
    peft.inject_adapter_in_model(config, theirs)
    wrappers = {
        (name.split(".experts")[0], module.parameter_name): module
        for name, module in theirs.named_modules()
        if hasattr(module, "parameter_name")
    }
    with torch.no_grad():
        for name, matrix, adapter in adapters(ours):
            wrapper = wrappers.pop((name, matrix))
            wrapper.lora_A["default"].weight.copy_(lora.a_to_peft(adapter.a))
            wrapper.lora_B["default"].weight.copy_(lora.b_to_peft(adapter.b))
    assert not wrappers
    batch = tiny_batch(family)
    out, reference = ours.eval()(**batch), theirs.eval()(**batch)
    assert not torch.equal(out.logits, logits(tiny_model(family), family))
    # Sums are in another order, and how far they differ depends on the processor.
    assert (out.logits - reference.logits).abs().max() <= 3e-6 * max(1.0, float(reference.logits.detach().abs().max()))
    out.loss.backward()
    reference.loss.backward()
    name, matrix, adapter = adapters(ours)[0]
    wrapper = next(m for _, m in theirs.named_modules() if getattr(m, "parameter_name", None) == matrix)
    assert torch.allclose(lora.b_from_peft(wrapper.lora_B["default"].weight.grad, 8), adapter.b.grad, atol=1e-6)


def test_the_layout_of_peft_can_be_read_back():
    a, b = torch.arange(24.0).view(2, 3, 4), torch.arange(30.0).view(2, 5, 3)
    assert torch.equal(lora.a_from_peft(lora.a_to_peft(a), 2), a)
    assert torch.equal(lora.b_from_peft(lora.b_to_peft(b), 2), b)


def test_in_peft_rows_of_a_go_by_expert_and_columns_of_b_by_rank():
    a, b = torch.zeros(2, 3, 1), torch.zeros(2, 1, 3)
    a[1], b[1] = 1, 1
    assert lora.a_to_peft(a).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert lora.b_to_peft(b).flatten().tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_one_expert_changes_one_expert(family):
    model = prepare(tiny_model(family), EXPERTS, seed="0")
    plain = tiny_model(family)
    name, block = next(iter(blocks(model).items()))
    with torch.no_grad():
        if block.is_switch:
            block.experts["expert_3"].wo.lora_B["default"].weight.fill_(0.1)
        else:
            block.experts.lora["down_proj"].b[3].fill_(0.1)
    lora.merge(model)
    changed = set()
    for key, after in model.state_dict().items():
        before = plain.state_dict()[key]
        if key.startswith(f"{name}.experts.expert_") and not torch.equal(before, after):
            changed.add(int(key.split("expert_")[1].split(".")[0]))
        elif not torch.equal(before, after):
            assert key == f"{name}.experts.down_proj"
            changed |= {expert for expert in range(8) if not torch.equal(before[expert], after[expert])}
    assert changed == {3}


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_changes_the_model_into_a_plain_one_with_the_same_output(family):
    base = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = stir(prepare(shrink(base, tiny_experts(base)), LORA, seed="0"))
    adapted = logits(model, family)
    merged = lora.merge(model)
    assert torch.allclose(logits(merged, family), adapted, atol=1e-4)  # sums in another order
    assert merged.config._experts_implementation != lora.IMPLEMENTATION
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_only_some_experts_can_be_adapted(family):
    whole, part = tiny_model(family), tiny_model(family)
    adapt = dict.fromkeys(blocks(part), (1, 4, 6))
    for model in (whole, part):
        model.requires_grad_(False)
    lora.attach_experts(part, RANK, 8.0, "0", adapt)
    lora.attach_experts(whole, RANK, 8.0, "0")
    stir(part)
    with torch.no_grad():
        for (_, _, few), (_, _, all_of_them) in zip(adapters(part), adapters(whole), strict=True):
            all_of_them.a[few.ids], all_of_them.b[few.ids] = few.a, few.b
    assert torch.allclose(logits(part, family), logits(whole, family), atol=1e-6)
    part(**tiny_batch(family)).loss.backward()
    assert len(trainable(part)) == 4 * len(blocks(part))
    assert all(parameter.shape[0] == 3 and parameter.grad.any() for parameter in trainable(part))


def test_a_width_without_a_grouped_product_falls_back_to_one_per_expert():
    odd = tiny_model("olmoe", intermediate_size=18)
    odd.set_experts_implementation("eager")
    before = logits(odd, "olmoe")
    model = prepare(odd, EXPERTS, seed="0")
    assert torch.allclose(logits(model, "olmoe"), before, atol=1e-6)
    stir(model)(**tiny_batch("olmoe")).loss.backward()
    assert all(parameter.grad.any() for parameter in trainable(model))
    adapted = logits(model, "olmoe")
    assert torch.allclose(logits(lora.merge(model), "olmoe"), adapted, atol=1e-5)
    assert model.config._experts_implementation == "eager"


def test_a_rank_must_suit_the_dtype():
    assert lora.check_rank(4, torch.float32) is None
    assert lora.check_rank(8, torch.bfloat16) is None
    with pytest.raises(BadValue, match=r"rank = 4, .* bfloat16 need a multiple of 8; try 8"):
        lora.check_rank(4, torch.bfloat16)


def test_a_step_never_holds_a_second_copy_of_a_stack():
    model = prepare(tiny_model("mixtral", num_experts=64, intermediate_size=96, num_hidden_layers=1), EXPERTS, seed="0")
    stack = blocks(model)["model.layers.0.mlp"].experts.gate_up_proj.nbytes
    batch = {name: tensor[:, :4] for name, tensor in tiny_batch("mixtral").items()}
    with MemoryMeter(model) as meter:
        before = meter.bytes
        model(**batch).loss.backward()
    assert meter.peak_bytes - before < stack


def test_dropout_lets_a_share_of_what_an_adapter_reads_pass_in_training_and_all_of_it_else():
    one = torch.eye(4).unsqueeze(0)
    adapter = lora.ExpertLoRA(one.clone(), one.clone(), scale=1.0, ids=[0], num_experts=1, dropout=0.5)
    rows, expert, ends = torch.ones(1000, 4), torch.zeros(1000, dtype=torch.int64), torch.tensor([1000], dtype=torch.int32)
    with torch.no_grad():
        dropped = adapter.add(torch.zeros(1000, 4), rows, expert, ends)
        assert set(dropped.flatten().tolist()) == {0.0, 2.0}
        assert 0.4 < dropped.bool().float().mean() < 0.6
        assert torch.equal(adapter.eval().add(torch.zeros(1000, 4), rows, expert, ends), rows)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "switch_transformers"])
@pytest.mark.parametrize("grafted", [False, True])
def test_every_adapter_has_the_dropout_that_is_asked_for(family, grafted):
    tuning = Tuning("lora", ("attention",) if grafted else ("attention", "experts"), rank=4, dropout=0.25)
    model = prepare(tiny_model(family), tuning, seed="0")
    if grafted:
        graft.attach(model, dict.fromkeys(blocks(model), (2,)), tuning, seed="0")
    adapted = [layer.lora_dropout["default"].p for layer in model.modules() if lora.is_adapted(layer)]
    adapted += [layer.dropout.p for layer in model.modules() if isinstance(layer, lora.ExpertLoRA)]
    assert len(adapted) > 2 * len(blocks(model))
    assert set(adapted) == {0.25}
    first, again, other, whole = (answers(stir(model), family, seed) for seed in (1, 1, 2, None))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(whole, logits(model, family))


@torch.no_grad()
def answers(model, family, seed):
    """In training with the dropout of a seed; without one, in use."""
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        return model.train(seed is not None)(**tiny_batch(family)).logits


@pytest.mark.parametrize(("rank", "nearest"), [(0, 4), (1, 4), (5, 4), (6, 8), (7, 8), (-3, 4)])
def test_a_rank_that_does_not_suit_is_refused_with_one_that_does(rank, nearest):
    with pytest.raises(BadValue, match=rf"method\.ranks = {rank}, .* float32 need a multiple of 4; try {nearest}$"):
        lora.check_rank(rank, torch.float32, "method.ranks")


def test_a_factor_of_some_experts_is_zero_for_the_others():
    adapter = lora.ExpertLoRA(torch.ones(2, 4, 3), torch.ones(2, 5, 4), scale=1.0, ids=[1, 3], num_experts=4)
    whole = lora.expand_to_all_experts(adapter.a, adapter)
    assert whole.shape == (4, 4, 3) and whole.flatten(1).any(1).tolist() == [False, True, False, True]


def test_peft_cannot_have_adapters_of_two_ranks(tmp_path):
    model = prepare(tiny_model("olmoe"), LORA, seed="0")
    attention = [name for name, _, _ in lora.linears(model)][:1]
    layer = model.get_submodule(attention[0])
    layer.r["default"] = 8
    with pytest.raises(BadValue, match="no adapters, or adapters of several ranks, but an adapter of peft has one rank"):
        lora.save_adapter(model, tiny_model("olmoe"), tmp_path, "base")
    with pytest.raises(BadValue, match="leave out --adapter"):
        lora.save_adapter(tiny_model("olmoe"), tiny_model("olmoe"), tmp_path, "base")


def test_what_was_trained_before_linear_adapters_were_attached_is_trained_afterwards():
    model = tiny_model("olmoe").requires_grad_(False)
    norm = model.model.norm.weight.requires_grad_(True)
    name = "model.layers.0.self_attn.q_proj"
    lora.attach_linears(model, {name: name}, 4, 8.0, "0")
    assert norm.requires_grad
    assert {each.split(".lora")[0] for each, parameter in model.named_parameters() if parameter.requires_grad} == {
        name,
        "model.norm.weight",
    }


def test_an_a_starts_within_one_over_the_root_of_its_width_and_fills_that_range():
    a = lora.uniform((4, 64), "seed", torch.empty(1))
    assert 0.9 / 8 < float(a.abs().max()) <= 1 / 8
    assert torch.equal(a, lora.uniform((4, 64), "seed", torch.empty(1))) and abs(float(a.mean())) < 0.02
    assert lora.uniform((4, 64), "seed", torch.empty(1, dtype=torch.bfloat16)).dtype == torch.float32  # trained


def test_experts_to_adapt_may_come_in_any_order():
    models = []
    for ids in ((1, 4, 6), (6, 1, 4)):
        model = tiny_model("olmoe").requires_grad_(False)
        lora.attach_experts(model, RANK, 8.0, "0", dict.fromkeys(blocks(model), ids))
        models.append(stir(model))
    assert torch.equal(*(logits(model, "olmoe") for model in models))
    assert adapters(models[1])[0][2].ids.tolist() == [1, 4, 6]
