"""What `prepare` trains, what it leaves alone, and what it refuses."""

import pytest
import torch

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.footprint import next_token_loss
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import PARTS, Tuning, parts, prepare, trainable
from fedexperts.testing import FAMILIES, tiny_batch, tiny_experts, tiny_model

FULL = Tuning()
LORA = Tuning(train="lora", rank=4)


def unchecked(**fields):
    """A Tuning with values that its types do not allow, as a caller without a type checker may make one."""
    tuning = Tuning()
    for name, value in fields.items():
        object.__setattr__(tuning, name, value)
    return tuning


def train_one_step(model, family):
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, weight_decay=0.1)
    next_token_loss(model.train(), tiny_batch(family)).backward()
    optimizer.step()


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_a_shrunk_model_leaves_its_base_as_it_was(family, tuning):
    base = tiny_model(family)
    before, trained_before = state_of(base), [parameter.requires_grad for parameter in base.parameters()]
    small = prepare(shrink(base, tiny_experts(base)), tuning, seed="0")
    start = [parameter.detach().clone() for parameter in trainable(small)]
    train_one_step(small, family)
    moved = sum(not torch.equal(old, new) for old, new in zip(start, trainable(small), strict=True))
    assert moved > len(start) / 2
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in base.parameters()] == trained_before
    assert base.get_experts_implementation() == tiny_model(family).get_experts_implementation()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_named_part_is_trained_and_the_rest_is_shared(family, part):
    base = tiny_model(family)
    small = prepare(shrink(base, {}), Tuning(parts=(part,)), seed="0")
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    part_of = parts(small)
    assert any(parameter.requires_grad for parameter in small.parameters())
    for name, parameter in small.named_parameters():
        learns = part_of[name] == part and not name.endswith("e_score_correction_bias")
        assert parameter.requires_grad == learns, name
        assert (parameter.data_ptr() in shared) != learns, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_all_four_parts(family):
    assert set(parts(tiny_model(family)).values()) == set(PARTS)


def test_tied_weights_stay_one_parameter_when_they_are_trained():
    model = prepare(tiny_model("switch_transformers"), FULL, seed="0")
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    assert model.shared.weight.requires_grad


def test_lora_trains_adapters_and_the_whole_router_and_nothing_else():
    model = prepare(tiny_model("olmoe"), LORA, seed="0")
    trained = {name.split(".")[-1] if "lora" not in name else "lora" for name, p in model.named_parameters() if p.requires_grad}
    routers = [name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name]
    assert trained == {"lora", "weight"}
    assert routers == [f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)]


@pytest.mark.parametrize("part, fragment", [("attention", "self_attn"), ("experts", "experts.lora"), ("router", "gate.weight")])
def test_each_part_of_lora_can_stand_alone(part, fragment):
    model = prepare(tiny_model("qwen2_moe"), Tuning(train="lora", parts=(part,), rank=4), seed="0")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(fragment in name for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing(family):
    model, batch = tiny_model(family), tiny_batch(family)
    with torch.no_grad():
        before = model(**batch).logits
        after = prepare(model, LORA, seed="0").eval()(**batch).logits
    assert torch.allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_an_expert_starts_with_the_same_adapter_in_the_full_and_a_shrunk_model(family):
    base = tiny_model(family)
    kept_ids = dict.fromkeys(anatomy(base).blocks, (2, 5))
    full = prepare(shrink(base, {}), LORA, seed="round 1")
    small = prepare(shrink(base, kept_ids), LORA, seed="round 1")
    seen = 0
    for (_, small_block), (_, full_block) in zip(blocks(small).items(), blocks(full).items(), strict=True):
        if small_block.is_switch:
            for index, expert in enumerate((2, 5)):
                own, same = small_block.experts[f"expert_{index}"], full_block.experts[f"expert_{expert}"]
                assert torch.equal(own.wi.lora_A["default"].weight, same.wi.lora_A["default"].weight)
        else:
            own, same = small_block.experts.lora["down_proj"], full_block.experts.lora["down_proj"]
            assert torch.equal(own.a, same.a[[2, 5]])
            assert not torch.equal(own.a[0], own.a[1])
        seen += 1
    assert seen == len(anatomy(base).blocks)


def test_preparing_draws_nothing_from_the_global_generator():
    state = torch.random.get_rng_state()
    first, second = (prepare(tiny_model("mixtral"), LORA, seed="a") for _ in range(2))
    other = prepare(tiny_model("mixtral"), LORA, seed="b")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one, two) for one, two in zip(trainable(first), trainable(second), strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(trainable(first), trainable(other), strict=True))


@pytest.mark.parametrize(
    "family, names",
    [
        ("mixtral", {"q_proj", "v_proj"}),
        ("switch_transformers", {"q", "v"}),
        ("deepseek_v2", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}),
    ],
)
def test_attention_modules_are_found_under_the_names_of_the_family(family, names):
    tuning = Tuning(train="lora", parts=("attention",), rank=4, attention_modules=("q_proj", "v_proj"))
    model = prepare(tiny_model(family), tuning, seed="0")
    adapted = {name.split(".")[-4] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapted == names


@pytest.mark.parametrize(
    "tuning, sentence",
    [
        (
            Tuning(train="lora", parts=("attention", "dense")),
            r"^training\.parts has 'dense', but LoRA adapts attention and experts only",
        ),
        (unchecked(parts=("expert",)), r"^training\.parts has 'expert', .*did you mean experts"),
        (Tuning(parts=()), r"^training\.parts is empty, so nothing would be trained"),
        (unchecked(train="lroa"), r"^training\.train = 'lroa' .*did you mean lora"),
        (Tuning(train="lora", rank=0), r"^training\.rank = 0 .*above zero"),
        (Tuning(train="lora", rank=6), r"^training\.rank = 6, .*need a multiple of 4; try 8"),
        (
            Tuning(train="lora", attention_modules=("query",)),
            r"^training\.attention_modules = query, but this model's attention has k_proj, o_proj, .*training\.parts$",
        ),
        (
            Tuning(train="lora", attention_modules=("q_proj", "k_porj", "v")),
            r"^training\.attention_modules = k_porj, but this model's attention has k_proj, o_proj, ",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(tuning, sentence):
    with pytest.raises(BadValue, match=sentence):
        prepare(tiny_model("olmoe"), tuning, seed="0")
