"""Personal experts on every family: what they add, what they leave alone, and what of them is trained."""

import pytest
import torch
from torch import nn

from fedexperts.errors import BadValue
from fedexperts.moe import graft, lora, rows
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import FAMILIES, tiny_batch, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)
LORA = Tuning("lora", ("attention",), rank=4)
FULL = Tuning("full", ("attention",))


def grafted(family, tuning=LORA, grafts=(5, 2)):
    base = tiny_model(family)
    shape = anatomy(base)
    model = prepare(shrink(base, shape.all_experts), tuning, seed="0")
    ids = dict.fromkeys(shape.blocks, grafts)
    graft.attach(model, ids, tuning, seed="0")
    return base, model, ids


def logits(model, family):
    with torch.no_grad():
        return model(**tiny_batch(family)).logits


@every_family
def test_with_closed_gates_the_model_is_the_base_to_the_bit(family):
    base, model, _ = grafted(family)
    for module in model.modules():
        if isinstance(module, graft.Grafted):
            module.own_gate.register_forward_hook(lambda gate, args, out: torch.full_like(out, -torch.inf))
    assert torch.equal(logits(model, family), logits(base, family))


@every_family
@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_a_block_gives_what_it_gave_and_its_gated_experts_beside(family, tuning):
    base, model, ids = grafted(family, tuning)
    name, block = next(iter(blocks(base).items()))
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))

    def of(model):
        with torch.no_grad():
            out = model.get_submodule(name)(hidden)
        return out if isinstance(out, torch.Tensor) else out[0]

    with torch.no_grad():
        tokens = hidden.reshape(-1, 32)
        expected = of(base).reshape(-1, 32).clone()
        for expert in ids[name]:
            gate = torch.sigmoid(tokens @ graft.router_rows(block)[expert])
            expected += gate[:, None] * graft.run_experts(block.experts, tokens, [expert])[0]
    torch.testing.assert_close(of(model).reshape(-1, 32), expected, rtol=1e-5, atol=1e-5)


@every_family
@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_training_moves_what_is_personal_and_nothing_of_the_frozen_model(family, tuning):
    base, model, _ = grafted(family, tuning)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    personal = {name: parameter for name, parameter in model.named_parameters() if graft.is_personal(name)}
    learning = {name for name, parameter in personal.items() if parameter.requires_grad}
    assert learning == ({name for name in personal if "lora" in name} if tuning is LORA else set(personal))
    assert not any(block and not rows.router_of(name, rows.layout(model)) for name, block in rows.layout(model).items())
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    for _ in range(2):  # a B starts at zero, so its A moves from the second step on
        optimizer.zero_grad()
        model(**tiny_batch(family)).loss.backward()
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert learning <= moved
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@every_family
@pytest.mark.parametrize("tuning", [Tuning("lora", ("attention",), rank=8), FULL], ids=["lora", "full"])
def test_a_model_in_bfloat16_whose_routers_are_in_float32(family, tuning):
    base = tiny_model(family).to(torch.bfloat16)
    for block in blocks(base).values():
        if family in ("ernie4_5_moe", "switch_transformers"):  # as transformers loads the one and runs the other
            block.router.to(torch.float32)
    model = prepare(shrink(base, anatomy(base).all_experts), tuning, seed="0")
    graft.attach(model, dict.fromkeys(blocks(model), (5,)), tuning, seed="0")
    model(**tiny_batch(family)).loss.backward()
    own = {name: parameter for name, parameter in model.named_parameters() if graft.is_personal(name)}
    assert all(parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16) for parameter in own.values())
    assert all(parameter.grad.isfinite().all() for parameter in own.values() if parameter.requires_grad)


def test_the_adapters_of_each_layers_personal_experts_start_from_a_draw_of_their_own():
    (_, model, _), (_, again, _) = grafted("olmoe"), grafted("olmoe")
    firsts = [block.module.grafted.copies.lora["down_proj"].a for block in blocks(model).values()]
    draws = [row for each in firsts for row in each.detach()]
    assert len(draws) == 2 * len(blocks(model))
    assert not any(torch.equal(one, other) for i, one in enumerate(draws) for other in draws[:i])
    same = [block.module.grafted.copies.lora["down_proj"].a for block in blocks(again).values()]
    assert all(torch.equal(one, other) for one, other in zip(firsts, same, strict=True))


@every_family
def test_merged_adapters_give_the_same(family):
    _, model, _ = grafted(family)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
    before = logits(model, family)
    lora.merge(model)
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model, family), before, rtol=1e-4, atol=1e-5)


def test_rows_read_and_write_personal_experts_by_names_that_the_base_does_not_have():
    base, model, _ = grafted("olmoe")
    names = {name for name in rows.layout(model) if graft.is_personal(name)}
    assert names and not names & {name for name, _ in base.named_parameters()}
    tensors = {name: tensor + 1 for name, tensor in rows.read(model).items()}
    _, other, _ = grafted("olmoe")
    rows.write(other, tensors)
    assert torch.equal(logits(other, "olmoe"), logits(written(model, tensors), "olmoe"))


def written(model: nn.Module, tensors):
    rows.write(model, tensors)
    return model


@pytest.mark.parametrize("ids", [(8,), (-1,), (3, 3)])
def test_experts_that_are_not_there_or_named_twice(ids):
    with pytest.raises(BadValue, match=r"experts .* of model\.layers\.0\.mlp cannot be grafted; give different ids from 0 to 7"):
        grafted("olmoe", grafts=ids)


def test_what_is_personal_has_the_name_as_a_whole_part_of_its_path():
    assert graft.is_personal("model.layers.0.mlp.grafted.copies.up") and graft.is_personal("grafted/model.layers.0.mlp")
    assert not graft.is_personal("model.layers.0.mlp.regrafted.up") and not graft.is_personal("grafted_heads.weight")
