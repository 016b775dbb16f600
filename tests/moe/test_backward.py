"""Backward that reaches only chosen experts: what it computes, what it leaves out, what that saves."""

from functools import partial

import pytest
import torch

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.backward import SelectiveBackward
from fedexperts.moe.lora import expert_outputs
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.routing import Recorder
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import FAMILIES, tiny_batch, tiny_experts, tiny_model

TUNINGS = {"full": Tuning(), "lora": Tuning(train="lora", rank=4, alpha=8.0)}
every_family = pytest.mark.parametrize("family", FAMILIES)
full_and_lora = pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)


def trained(family, tuning, **overrides):
    """A model ready to train, whose adapters weigh something."""
    model = prepare(tiny_model(family, **overrides), tuning, seed="0")
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=chance) / 4)
    return model


def gradients(model, selective):
    """Name → gradient, if there is one; of stacked experts one for each."""
    gradients_by_name = {
        name: each.grad for name, each in model.named_parameters() if each.requires_grad and each.grad is not None
    }
    for block, part in selective._parts.items():
        for path, rows in getattr(part, "parameters", {}).items():
            gradients_by_name |= {f"{block}.experts.{path}[{e}]": row.grad for e, row in rows.items() if row.grad is not None}
    return gradients_by_name


def full_gradients(model):
    """The same names, from an ordinary backward's gradients."""
    gradients_by_name = {}
    for name, each in model.named_parameters():
        if each.requires_grad and each.grad is not None:
            block = next((b for b, it in blocks(model).items() if name.startswith(f"{b}.experts.") and not it.is_switch), None)
            gradients_by_name |= {f"{name}[{i}]": row for i, row in enumerate(each.grad)} if block else {name: each.grad}
    return gradients_by_name


def expert_of(name):
    """(block, expert) of an expert's parameter."""
    block, _, rest = name.partition(".experts.")
    if not rest:
        return None
    return block, int(rest.split("[")[1][:-1]) if "[" in rest else int(rest.split("expert_")[1].split(".")[0])


@every_family
@full_and_lora
def test_forward_is_unchanged_and_with_all_chosen_backward_is_the_full_one(family, tuning):
    model, batch = trained(family, tuning), tiny_batch(family)
    plain = model(**batch)
    plain.loss.backward()
    expected = full_gradients(model)
    model.zero_grad()

    with SelectiveBackward(model) as selective:
        out = model(**batch)
        selective.choose({name: tuple(range(8)) for name in blocks(model)})
        out.loss.backward()
        actual = gradients(model, selective)
    assert torch.equal(out.logits, plain.logits)
    assert {name for name, each in expected.items() if each.any()} <= set(actual) <= set(expected)
    for name, each in actual.items():
        assert (each - expected[name]).abs().max() <= 1e-6 * max(1.0, float(expected[name].abs().max())), name


@every_family
@full_and_lora
def test_in_the_last_block_the_chosen_and_the_router_have_the_gradients_of_the_full_backward(family, tuning):
    model, batch = trained(family, tuning), tiny_batch(family)
    model(**batch).loss.backward()
    expected = full_gradients(model)
    model.zero_grad()
    last = list(blocks(model))[-1]

    with SelectiveBackward(model) as selective:
        loss = model(**batch).loss
        selective.choose({last: (1, 2, 5)})
        loss.backward()
        actual = gradients(model, selective)
    own = {name: each for name, each in actual.items() if name.startswith(f"{last}.")}
    assert any(expert_of(name) is None for name in own), "the router's"
    chosen = {(last, 1), (last, 2), (last, 5)}
    useful = {expert for name, each in expected.items() if (expert := expert_of(name)) in chosen and each.any()}
    reached = {expert_of(name) for name in actual} - {None}
    assert useful <= reached <= chosen
    for name, each in own.items():
        assert torch.allclose(each, expected[name], atol=1e-6), name


@every_family
@full_and_lora
def test_through_all_experts_every_gradient_but_those_of_experts_that_are_not_chosen_is_the_full_one(family, tuning):
    model, batch = trained(family, tuning), tiny_batch(family)
    model(**batch).loss.backward()
    expected, chosen = full_gradients(model), tiny_experts(model)
    model.zero_grad()

    with SelectiveBackward(model, "all") as selective:
        loss = model(**batch).loss
        selective.choose(chosen)
        loss.backward()
        actual = gradients(model, selective)
    ids = {(name, expert) for name, experts in chosen.items() for expert in experts}
    wanted = {name for name, each in expected.items() if expert_of(name) is None or (expert_of(name) in ids and each.any())}
    assert wanted <= set(actual) and {expert_of(name) for name in actual} - {None} <= ids
    for name, each in actual.items():
        assert (each - expected[name]).abs().max() <= 1e-6 * max(1.0, float(expected[name].abs().max())), name


def test_through_the_chosen_experts_alone_a_router_below_has_another_gradient():
    model, batch = trained("olmoe", TUNINGS["full"]), tiny_batch("olmoe")
    model(**batch).loss.backward()
    expected, chosen = full_gradients(model), tiny_experts(model)
    model.zero_grad()
    with SelectiveBackward(model) as selective:
        loss = model(**batch).loss
        selective.choose(chosen)
        loss.backward()
        first, *_, last = [name for name in gradients(model, selective) if name.endswith("gate.weight")]
        actual = gradients(model, selective)
    assert torch.allclose(actual[last], expected[last], atol=1e-6)
    assert not torch.allclose(actual[first], expected[first], rtol=0.01, atol=1e-6)


@full_and_lora
def test_with_a_norm_on_the_outputs_of_experts_backward_is_the_full_one(tuning):
    model, batch = trained("olmoe", tuning), tiny_batch("olmoe")
    for block in blocks(model).values():
        block.experts.has_post_expert_norm, block.experts.post_expert_norm = True, torch.nn.RMSNorm(32)
    model(**batch).loss.backward()
    expected = full_gradients(model)
    model.zero_grad()

    with SelectiveBackward(model) as selective:
        loss = model(**batch).loss
        selective.choose({name: tuple(range(8)) for name in blocks(model)})
        loss.backward()
        actual = {name: each for name, each in gradients(model, selective).items() if "post_expert_norm" not in name}
    assert any(name.endswith("gate.weight") for name in actual)
    for name, each in actual.items():
        torch.testing.assert_close(each, expected[name], rtol=1e-4, atol=1e-6)


def constant_unless_chosen(model, chosen):
    """Makes the outputs of experts that are not chosen constants, in the simplest way: by masks if stacked, else detached."""

    def constant(expert, rows):
        return type(expert).forward(expert, rows).detach()

    def forward(experts, ids, hidden, index, weights):
        expert, order = torch.sort(index.reshape(-1), stable=True)
        out = expert_outputs(experts, hidden[order // index.shape[1]], expert)
        is_chosen = torch.isin(expert, torch.tensor(ids, dtype=torch.int64)).unsqueeze(1)
        out = torch.where(is_chosen, out, out.detach()) * weights.reshape(-1)[order].unsqueeze(1)
        return out[torch.argsort(order)].view(*index.shape, -1).sum(1)

    for name, block in blocks(model).items():
        if block.is_switch:
            for number, expert in enumerate(block.experts.values()):
                if number not in chosen[name]:
                    expert.forward = partial(constant, expert)
        else:
            block.experts.forward = partial(forward, block.experts, chosen.get(name, ()))


@every_family
@full_and_lora
def test_every_gradient_is_that_of_a_model_whose_other_experts_give_constants(family, tuning):
    model, batch = trained(family, tuning), tiny_batch(family)
    chosen = tiny_experts(model)
    with SelectiveBackward(model) as selective:
        loss = model(**batch).loss
        selective.choose(chosen)
        loss.backward()
        actual = gradients(model, selective)
    model.zero_grad()
    constant_unless_chosen(model, chosen)
    model(**batch).loss.backward()
    expected = full_gradients(model)
    assert len(actual) > 20
    for name, each in actual.items():
        assert torch.allclose(each, expected[name], atol=1e-6), name
    for name, each in expected.items():
        assert name in actual or not each.any(), name


@every_family
@full_and_lora
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_not_chosen_stays_bit_identical_and_has_no_state(family, tuning, optimizer):
    model = trained(family, tuning)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    chosen = dict.fromkeys(blocks(model), (0, 1, 2))
    with SelectiveBackward(model) as selective:
        kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        updating = kinds[optimizer](selective.parameters, lr=0.1, weight_decay=0.1)
        for seed in range(3):
            loss = model(**tiny_batch(family, seed=seed)).loss
            selective.choose(chosen)
            loss.backward()
            updating.step()
            updating.zero_grad()
        left = list(selective.left_out())
        assert left
        assert not any(each in updating.state for each in left)
    moved, unmoved = set(), set()
    for name, each in model.named_parameters():
        block = next((b for b in blocks(model) if name.startswith(f"{b}.experts.")), None)
        if not block or not each.requires_grad:
            continue
        rows = (
            enumerate(zip(each, before[name], strict=True))
            if "expert_" not in name
            else [(expert_of(name)[1], (each, before[name]))]
        )
        for expert, (now, then) in rows:
            if torch.equal(now, then):
                unmoved.add((block, expert))
            else:
                moved.add((block, expert))
    assert moved
    assert {expert for _, expert in moved} <= {0, 1, 2}
    assert {expert for _, expert in unmoved} >= {3, 4, 5, 6, 7}


@pytest.mark.parametrize(
    ("family", "tuning", "settings"),
    [
        ("switch_transformers", Tuning(), {"dropout_rate": 0.3}),
        *((family, Tuning(train="lora", rank=4, dropout=0.3), {}) for family in ("switch_transformers", "olmoe", "gpt_oss")),
    ],
)
def test_dropout_is_the_same_when_experts_compute_again(family, tuning, settings):
    batch = tiny_batch(family)
    results = []
    for selecting in (False, True):
        model = trained(family, tuning, **settings).train()
        torch.manual_seed(5)
        if selecting:
            with SelectiveBackward(model) as selective:
                loss = model(**batch).loss
                selective.choose({name: tuple(range(8)) for name in blocks(model)})
                loss.backward()
            results.append((loss.detach(), gradients(model, selective)))
        else:
            loss = model(**batch).loss
            loss.backward()
            results.append((loss.detach(), full_gradients(model)))
    (loss, expected), (again, got) = results
    assert torch.equal(loss, again)
    expected = {name: each for name, each in expected.items() if name in got or each.any()}  # of experts that met no token
    assert expected.keys() == got.keys()
    assert any("experts" in name and "lora" in name for name in got) == (tuning.train == "lora")
    assert all(torch.allclose(expected[name], got[name], atol=1e-6) for name in expected)


def test_dropout_of_experts_that_are_reached_is_theirs_when_others_are_not():
    """In the last block; gradients of lower layers differ, since backward goes through the chosen experts alone."""
    batch, by_choice = tiny_batch("olmoe"), []
    for chosen in (range(8), (1, 4, 6)):
        model = trained("olmoe", Tuning(train="lora", rank=4, dropout=0.3)).train()
        torch.manual_seed(5)
        with SelectiveBackward(model) as selective:
            loss = model(**batch).loss
            selective.choose({name: tuple(chosen) for name in blocks(model)})
            loss.backward()
        last = list(blocks(model))[-1]
        by_choice.append(
            {name: each for name, each in gradients(model, selective).items() if name.startswith(f"{last}.experts.")}
        )
    whole, part = by_choice
    assert part.keys() == {name for name in whole if expert_of(name)[1] in (1, 4, 6)} != set()
    assert all(torch.allclose(whole[name], part[name], atol=1e-6) for name in part)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "switch_transformers"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model, batch = trained(family, Tuning()).train(), tiny_batch(family)
    chosen, results = tiny_experts(model), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        with SelectiveBackward(model) as selective:
            loss = model(**batch, use_cache=False).loss
            selective.choose(chosen)
            loss.backward()
            results.append(gradients(model, selective))
        model.zero_grad()
    assert model.is_activation_checkpointing
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    assert all(torch.allclose(each, results[1][name], atol=1e-6) for name, each in results[0].items())


def test_experts_of_odd_width_that_have_no_grouped_product():
    model = trained("mixtral", Tuning(), intermediate_size=13)
    model.set_experts_implementation("eager")
    batch = tiny_batch("mixtral")
    plain = model(**batch)
    plain.loss.backward()
    expected = full_gradients(model)
    model.zero_grad()
    with SelectiveBackward(model) as selective:
        out = model(**batch)
        selective.choose({name: tuple(range(8)) for name in blocks(model)})
        out.loss.backward()
        actual = gradients(model, selective)
    assert torch.allclose(out.logits, plain.logits, atol=1e-6)
    assert all(torch.allclose(each, expected[name], atol=1e-6) for name, each in actual.items())
    assert model.get_experts_implementation() == {"": "eager"}


@full_and_lora
@pytest.mark.parametrize("raising", [False, True])
def test_afterwards_the_model_is_as_it_was_also_when_it_is_left_by_an_exception(tuning, raising):
    for family in ("olmoe", "switch_transformers"):
        model, batch = trained(family, tuning), tiny_batch(family)
        before = model.get_experts_implementation() if family == "olmoe" else None
        if raising:
            with pytest.raises(ZeroDivisionError), SelectiveBackward(model) as selective:
                model(**batch)
                selective.choose(dict.fromkeys(blocks(model), (0,)))
                raise ZeroDivisionError
        else:
            with SelectiveBackward(model):
                pass
        assert before is None or model.get_experts_implementation() == before
        model(**batch).loss.backward()
        assert any(each.grad is not None and "experts" in name for name, each in model.named_parameters())


def test_less_is_alive_at_the_peak_of_a_step_the_fewer_are_chosen():
    peaks = []
    for number in (16, 8, 4):
        model = trained("olmoe", Tuning(), num_experts=16, intermediate_size=64)
        batch = tiny_batch("olmoe")
        with SelectiveBackward(model) as selective:
            updating = torch.optim.AdamW(selective.parameters, lr=0.1)
            with MemoryMeter(model, updating) as meter:
                loss = model(**batch).loss
                selective.choose({name: tuple(range(number)) for name in blocks(model)})
                loss.backward()
                updating.step()
        peaks.append(meter.peak_bytes)
    assert peaks[0] > peaks[1] > peaks[2]
    expert = 3 * 3 * 32 * 64 * 4  # blocks, matrices, sizes: the weights of one expert in each block
    assert peaks[0] - peaks[1] > 0.3 * 8 * expert * 3, "gradient and two moments of those not reached by any token count nothing"


def test_unknown_blocks_and_experts_cannot_be_chosen():
    model = trained("olmoe", Tuning())
    with SelectiveBackward(model) as selective:
        with pytest.raises(BadValue, match=r"give ids from 0 to 7, ascending"):
            selective.choose({next(iter(blocks(model))): (3, 9)})
        with pytest.raises(BadValue, match="no MoE block"):
            selective.choose({"model.layers.9.mlp": (0,)})


def test_the_recorder_sees_the_same_routing():
    model, batch = trained("olmoe", Tuning()), tiny_batch("olmoe")
    with Recorder(model) as plain:
        model(**batch)
    with SelectiveBackward(model), Recorder(model) as recorder:
        model(**batch)
    assert all(torch.equal(each, plain.routing().counts[name]) for name, each in recorder.routing().counts.items())


def test_before_experts_are_chosen_all_are_left_out():
    for family in ("olmoe", "switch_transformers"):
        model = trained(family, Tuning())
        with SelectiveBackward(model) as selective:
            everything = {
                id(parameter) for part in selective._parts.values() for e in range(8) for parameter in part.parameters_of(e)
            }
            assert {id(parameter) for parameter in selective.left_out()} == everything
            selective.choose(dict.fromkeys(blocks(model), tuple(range(8))))
            assert not list(selective.left_out())


@pytest.mark.parametrize("ids", [(1, 0), (2, 2), (-1, 0), (7, 8)])
def test_chosen_experts_ascend_and_exist(ids):
    model = trained("switch_transformers", Tuning())
    with SelectiveBackward(model) as selective, pytest.raises(BadValue, match="ascending, each once"):
        selective.choose({next(iter(blocks(model))): ids})
