"""A and B by name: pairs, cuts, products and what is added beneath them."""

import pytest
import torch

from fedexperts.moe import factors, rows
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import tiny_batch, tiny_model

LORA = Tuning("lora", rank=4, alpha=6.0)
FAMILIES = ["olmoe", "gpt_oss", "switch_transformers"]  # gpt_oss holds its experts' matrices transposed
every_family = pytest.mark.parametrize("family", FAMILIES)
A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"


def adapted(model, tuning=LORA, only=None):
    """`model` with adapters whose B is not zero."""
    copy = prepare(shrink(model, {}), tuning, "s", only)
    chance = torch.Generator().manual_seed(0)
    trained = rows.read(copy)
    rows.write(copy, {b: 0.1 * torch.randn(trained[b].shape, generator=chance) for b in factors.pairs(trained).values()})
    return copy


def logits(model, family):
    with torch.no_grad():
        return model(**tiny_batch(family)).logits


def row(matrix):
    """One row, row-first."""
    return torch.tensor([matrix])


@every_family
def test_every_adapter_of_a_model_has_its_pair_and_its_rank(family):
    trained = rows.read(adapted(tiny_model(family)))
    pairs, axes = factors.pairs(trained), factors.rank_axes(trained)
    assert {*pairs, *pairs.values()} == axes.keys() == {name for name in trained if "experts" in name or "lora" in name}
    assert len(pairs) > 10
    for a, b in pairs.items():
        assert (trained[a].shape[axes[a]], trained[b].shape[axes[b]]) == (4, 4)
        assert len(trained[a]) == len(trained[b])
    assert factors.rank_of(trained) == 4
    assert factors.rank_step(trained) == (1 if family == "switch_transformers" else 4)


def test_cut_takes_the_first_ranks_and_leaves_what_is_no_adapter():
    whole = {A: row([[1.0, 2.0], [3.0, 4.0]]), B: row([[5.0, 6.0], [7.0, 8.0]]), "gate": row([9.0])}
    short = factors.cut(whole, 1)
    assert {name: each.tolist() for name, each in short.items()} == {A: [[[1.0, 2.0]]], B: [[[5.0], [7.0]]], "gate": [[9.0]]}
    assert factors.padded(short[A], 1, 2).tolist() == [[[1.0, 2.0], [0.0, 0.0]]]
    assert factors.padded(short[B], 2, 2).tolist() == [[[5.0, 0.0], [7.0, 0.0]]]


def test_the_product_of_stacked_factors_is_the_weighted_mean_of_the_products():
    one = {A: row([[1.0, 0.0]]), B: row([[4.0], [0.0]])}  # BA = [[4, 0], [0, 0]]
    other = {A: row([[0.0, 2.0], [1.0, 1.0]]), B: row([[0.0, 4.0], [4.0, 0.0]])}  # [[4, 4], [0, 8]]
    stack = factors.stacked([(1.0, one), (3.0, other)])
    assert stack[A].tolist() == [[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]]
    assert stack[B].tolist() == [[[1.0, 0.0, 3.0], [0.0, 3.0, 0.0]]]
    assert (stack[B] @ stack[A]).tolist() == [[[4.0, 3.0], [0.0, 6.0]]]


def test_the_best_factors_of_a_diagonal_matrix_are_its_largest_entries():
    a = row([[1.0, 0.0], [0.0, 1.0]])
    b, a = factors.truncated_svd(row([[3.0, 0.0], [0.0, -5.0]]), a, 1)
    torch.testing.assert_close(b @ a, row([[0.0, 0.0], [0.0, -5.0]]))
    assert (b.shape, a.shape) == ((1, 2, 1), (1, 1, 2))


@pytest.mark.parametrize("many", [3, 12])  # ranks stacked: fewer than the sides of the matrix, or more
def test_the_best_factors_are_those_of_the_dense_singular_value_decomposition(many):
    chance = torch.Generator().manual_seed(0)
    b, a = torch.randn(4, 6, many, generator=chance), torch.randn(4, many, 8, generator=chance)
    for rank in (1, 2, 3):
        u, sigma, vt = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
        nearest = (u[..., :rank] * sigma[:, None, :rank]) @ vt[:, :rank]
        found_b, found_a = factors.truncated_svd(b, a, rank)
        torch.testing.assert_close(found_b @ found_a, nearest.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_a @ found_a.mT, torch.eye(rank).expand(4, -1, -1), rtol=1e-5, atol=1e-5)
        longer = dict(zip((B, A), factors.truncated_svd(b, a, 3), strict=True))
        torch.testing.assert_close(factors.cut(longer, rank), {B: found_b, A: found_a})
    high_b, high_a = factors.truncated_svd(b, a, 10)
    torch.testing.assert_close(high_b @ high_a, b @ a, rtol=1e-4, atol=1e-4)
    assert high_b.shape == (4, 6, 10) and not high_b[..., 6:].any() and not high_a[:, 8:].any()


def test_the_norm_is_that_of_the_product():
    chance = torch.Generator().manual_seed(0)
    b, a = torch.randn(3, 6, 2, generator=chance), torch.randn(3, 2, 5, generator=chance)
    b[1] = 0
    torch.testing.assert_close(factors.norm(b, a), torch.linalg.matrix_norm((b @ a).double()))


@every_family
def test_what_is_added_beneath_fresh_adapters_does_what_adapters_of_that_product_do(family):
    base = tiny_model(family)
    before = {name: each.clone() for name, each in base.state_dict().items()}
    reference = adapted(base)
    trained = rows.read(reference)
    change = {a: trained[b] @ trained[a] for a, b in factors.pairs(trained).items()}
    fresh = prepare(shrink(base, {}), LORA, "s")
    started = rows.read(fresh)
    assert not torch.allclose(logits(fresh, family), logits(reference, family), atol=1e-3)
    factors.add_to_base(fresh, change)
    torch.testing.assert_close(logits(fresh, family), logits(reference, family), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(each, started[name]) for name, each in rows.read(fresh).items())
    assert all(torch.equal(each, before[name]) for name, each in base.state_dict().items())
    assert not any(each.requires_grad for name, each in fresh.named_parameters() if "base_layer" in name)


@every_family
def test_adapters_of_a_single_expert_are_its_row_of_those_of_all(family):
    base = tiny_model(family)
    chosen = {name: (2 + place,) for place, name in enumerate(blocks(base))}
    everyone, single = prepare(shrink(base, {}), LORA, "s"), adapted(base, only=chosen)
    layout, seen = rows.layout(everyone), 0
    whole = rows.read(everyone)
    assert rows.layout(single) == layout
    for name, each in rows.read(single).items():
        block = layout[name]
        of_expert = block and not rows.router_of(name, layout)
        assert each.shape == (whole[name][:1] if of_expert else whole[name]).shape
        if of_expert:
            assert "lora_B" in name or name.endswith(".b") or torch.equal(each[0], whole[name][chosen[block][0]])
            whole[name][chosen[block][0]] = each[0]
        else:
            whole[name] = each
        seen += bool(of_expert)
    assert seen == len(chosen) * 4
    rows.write(everyone, whole)
    torch.testing.assert_close(logits(single, family), logits(everyone, family), rtol=1e-5, atol=1e-6)


@every_family
def test_an_adapted_expert_that_no_token_reaches_stays_as_it_is(family):
    base, unreached = tiny_model(family), 0
    for expert in range(8):
        model = adapted(base, only=dict.fromkeys(blocks(base), (expert,)))
        own = {name: each for name, each in model.named_parameters() if "experts" in name and each.requires_grad}
        batch = tiny_batch(family, batch_size=1, tokens=1, padding=0)
        model(**batch).logits.square().sum().backward()
        unreached += sum(each.grad is None or not each.grad.any() for each in own.values())
        assert all(each.grad is None or each.grad.isfinite().all() for each in own.values())
    assert unreached > 8


def test_the_norm_of_a_product_that_cancels_is_zero_and_no_nan():
    chance = torch.Generator().manual_seed(0)
    b, a = torch.randn(50, 6, 2, generator=chance).double(), torch.randn(50, 2, 5, generator=chance).double()
    norms = factors.norm(torch.cat([b, -7 * b], 2), torch.cat([7 * a, a], 1))
    assert norms.isfinite().all() and (norms < 1e-5).all()


def test_ranks_without_adapters_of_stacked_experts_may_be_any_number():
    a = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    tensors = {a: torch.zeros(1, 3, 8), a.replace("lora_A", "lora_B"): torch.zeros(1, 8, 3)}
    assert factors.rank_step(tensors) == 1
    assert factors.rank_step({}) == 1
    stacked = "model.layers.0.mlp.experts.lora.down_proj"
    half = {
        f"{stacked}.a": torch.zeros(8, 8, 8, dtype=torch.bfloat16),
        f"{stacked}.b": torch.zeros(8, 8, 8, dtype=torch.bfloat16),
    }
    assert factors.rank_step({**tensors, **half}) == 8
