"""Importance of experts, equations (3) to (5) and (14), and the selection (15) of HFedMoE."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.importance import at_random, importance, select, terms
from fedexperts.moe.routing import Recorder, Routing, gating_entropy
from fedexperts.testing import FAMILIES, tiny_batch, tiny_model

# Two layers of three experts that see two tokens. G of the first: (1/2, 1/4, 1/4) and (1/4, 1/4, 1/2); of the second the token
# that goes half to expert 0 comes twice. Top 1 picks experts 0 and 2 of the first layer and expert 0, twice, of the second.
GATES = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], [[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]])
PICKED = {"0": [1, 0, 1], "1": [2, 0, 0]}


def recorded(gates, picked):
    """A recorder with the logits log G."""
    block = SimpleNamespace(sigmoid=False, shape=SimpleNamespace(num_experts=gates.shape[-1]))
    counts = {name: torch.tensor(each) for name, each in picked.items()}
    recorder = Recorder.__new__(Recorder)
    recorder.blocks = dict.fromkeys(picked, block)
    recorder._logits = {
        name: [(each.log(), torch.ones(len(each), dtype=torch.bool))] for name, each in zip(picked, gates, strict=True)
    }
    recorder.routing = lambda: Routing(counts, dict.fromkeys(counts, gates.shape[1]))
    return recorder


def test_two_tokens_three_experts_and_two_layers_by_hand():
    """λ = 0.9, β = 0.1.

    (3) s_cum:  (0.375, 0.25, 0.375), and (0.5, 0.25, 0.25)
    (4) s_spec: (0.5, 0.25, 0.5), and (0.5, 0.25, 0.25)
    (5) s:      0.9 · 0.375 + 0.1 · 0.5 = 0.3875 for experts 0 and 2 of the first layer; else s_cum and s_spec are the same
    (14):       expert 0 of layer 0: ½ [½ ln(0.5 / 0.375) + ¼ ln(0.25 / 0.375)] = ½ [½ ln(4/3) − ¼ ln(3/2)]; the others' G is the
                same for both tokens, so its logarithm is 0
    """
    scores = importance(recorded(GATES, PICKED), mean_share=0.9, redundancy=0.1)
    assert scores.usage.tolist() == pytest.approx([0.375, 0.25, 0.375, 0.5, 0.25, 0.25])
    s = [0.3875, 0.25, 0.3875, 0.5, 0.25, 0.25]
    assert scores.combined.tolist() == pytest.approx(s)
    redundant = (math.log(4 / 3) / 2 - math.log(3 / 2) / 4) / 2
    assert redundant > 0.02
    less = [0.1 * redundant, 0, 0.1 * redundant, 0, 0, 0]
    assert scores.bottleneck.tolist() == pytest.approx([a - b for a, b in zip(s, less, strict=True)])
    assert scores.picked.tolist() == [1, 0, 1, 2, 0, 0]
    assert scores.tokens.tolist() == [2] * 6


def test_blocks_of_different_shapes_are_each_as_if_alone():
    """An encoder's and a decoder's routers see different tokens."""
    model, batch = tiny_model("switch_transformers"), tiny_batch("switch_transformers", padding=4)
    batch["labels"] = batch["labels"][:, :7].contiguous()
    with Recorder(model, keep_logits=True) as recorder, torch.no_grad():
        model(**batch)
    scores, start = importance(recorder, 0.7, 0.3), 0
    assert len({len(passes[0]) for passes in recorder.logits.values()}) == 2
    for name, (logits,) in recorder.logits.items():
        assert scores.tokens[start : start + 8].tolist() == [len(logits)] * 8
        g = logits.softmax(-1)
        s = 0.7 * g.mean(0) + 0.3 * g.max(0).values
        torch.testing.assert_close(scores.combined[start : start + 8], s)
        torch.testing.assert_close(scores.bottleneck[start : start + 8], s - 0.3 * (g * (g / g.mean(0)).log()).mean(0))
        assert torch.equal(scores.picked[start : start + 8], recorder.routing().counts[name])
        start += 8
    assert start == len(scores.usage)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_matter_nothing_is_changed_and_no_graph_remains(family):
    model = tiny_model(family)
    both = tiny_batch(family, padding=3)
    alone = {name: tensor[:1] for name, tensor in both.items()}
    alone["labels"] = alone["labels"][:, : int((alone["labels"] != -100).sum())]
    padded = {
        "input_ids": torch.cat([alone["input_ids"], torch.zeros(1, 3, dtype=torch.int64)], 1),
        "attention_mask": torch.cat([alone["attention_mask"], torch.zeros(1, 3, dtype=torch.int64)], 1),
        "labels": torch.cat([alone["labels"], torch.full((1, 3), -100)], 1),
    }
    results = []
    for batch in (alone, padded):
        with Recorder(model, keep_logits=True) as recorder:
            model(**batch)
        results.append(importance(recorder))
    for field in ("usage", "combined", "bottleneck"):
        one, other = (getattr(each, field) for each in results)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert not one.requires_grad
    usage = results[0].usage.split([block.shape.num_experts for block in blocks(model).values()])
    assert all(float(each.sum()) == pytest.approx(1) for each in usage), "sigmoid scores are divided by their sum"
    assert torch.equal(results[0].picked, results[1].picked)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.1, 3.0, 300.0]), st.booleans(), st.integers(0, 99)
)
def test_the_redundancy_is_never_negative_and_nothing_is_ever_nan(layers, tokens, experts, scale, sigmoid, seed):
    logits = scale * torch.randn(layers, tokens, experts, generator=torch.Generator().manual_seed(seed))
    usage, combined, plain = terms(logits, sigmoid, 0.9, 0.0)
    assert torch.equal(plain, combined)
    bottleneck = terms(logits, sigmoid, 0.9, 1.0)[2]
    assert bottleneck.isfinite().all()
    assert (bottleneck <= combined).all()
    assert torch.allclose(usage.sum(-1), torch.ones(layers), atol=1e-5)
    assert torch.equal(terms(logits, sigmoid, 1.0, 0.0)[1], usage)


def test_an_expert_that_a_router_rules_out_counts_nothing():
    logits = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, 0.0, -math.inf]]])
    assert terms(logits, False, 0.9, 0.1).tolist() == [[[0.5, 0.5, 0.0]]] * 3


def test_gating_entropy_is_zero_for_a_router_that_is_sure_and_log_e_for_one_that_has_no_idea():
    sure, torn = torch.tensor([[1.0, 0.0, 0.0]]) + 1e-30, torch.full((1, 3), 1 / 3)
    assert float(gating_entropy(recorded(torch.stack([sure, sure]), PICKED))) == pytest.approx(0, abs=1e-6)
    assert float(gating_entropy(recorded(torch.stack([torn, torn]), PICKED))) == pytest.approx(math.log(3))
    assert float(gating_entropy(recorded(torch.stack([sure, torn]), PICKED))) == pytest.approx(math.log(3) / 2)


def test_without_logits_the_recorder_is_refused():
    model = tiny_model("olmoe")
    with Recorder(model) as recorder, torch.no_grad():
        model(**tiny_batch("olmoe"))
    with pytest.raises(BadValue, match="keep_logits"):
        importance(recorder)


# Selection


def chosen(score, picked, sizes, budget):
    return select(torch.tensor(score), torch.tensor(picked), sizes, budget).nonzero().flatten().tolist()


SCORE = [0.9, 0.8, 0.7, 0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (2, [0, 5]),  # the best of each layer, though three of the first are better than all of the second
        (3, [0, 1, 5]),
        (4, [0, 1, 2, 5]),  # whatever the layer
        (5, [0, 1, 2, 4, 5]),
        (6, [0, 1, 2, 3, 4, 5]),
        (100, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_every_layer_gets_its_best_expert_then_the_best_of_the_model(budget, expected):
    assert chosen(SCORE, [1] * 6, [3, 3], budget) == expected


def test_only_what_was_picked_is_chosen_and_less_than_the_budget_where_less_was():
    assert chosen(SCORE, [0, 2, 0, 1, 0, 0], [3, 3], 2) == [1, 3]
    assert chosen(SCORE, [0, 2, 0, 1, 0, 0], [3, 3], 5) == [1, 3]
    assert chosen(SCORE, [0, 2, 3, 0, 0, 0], [3, 3], 2) == [1, 2], "a layer that saw no token has nothing to give"


def test_of_equal_scores_the_lower_place_comes_first():
    assert chosen([0.5] * 6, [1] * 6, [2, 4], 4) == [0, 1, 2, 3]
    assert chosen([0.5] * 6, [1, 1, 0, 1, 1, 1], [2, 4], 3) == [0, 1, 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 20), st.integers(0, 99))
def test_a_larger_budget_keeps_what_a_smaller_one_chose(sizes, extra, seed):
    chance = torch.Generator().manual_seed(seed)
    score, picked = torch.rand(sum(sizes), generator=chance), torch.randint(0, 3, (sum(sizes),), generator=chance)
    smaller, larger = (select(score, picked, sizes, len(sizes) + extra + more) for more in (0, 1))
    assert not (smaller & ~larger).any() and int(larger.sum() - smaller.sum()) <= 1
    assert int(smaller.sum()) == min(len(sizes) + extra, int((picked > 0).sum()))
    assert not (smaller & (picked == 0)).any()
    for here, reached in zip(smaller.split(sizes), picked.split(sizes), strict=True):
        assert bool(here.any()) == bool(reached.any())


def test_a_budget_below_the_number_of_layers_is_refused_with_both_numbers():
    with pytest.raises(BadValue, match=r"a budget of 1 experts does not .* 2 MoE layers; give at least 2"):
        chosen(SCORE, [1] * 6, [3, 3], 1)


def test_random_scores_come_from_their_seed_alone():
    before = torch.get_rng_state()
    assert torch.equal(at_random(5, "a"), at_random(5, "a")) and not torch.equal(at_random(5, "a"), at_random(5, "b"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_block_that_saw_no_token_has_no_importance_and_is_never_selected():
    model, batch = tiny_model("switch_transformers"), tiny_batch("switch_transformers")
    with Recorder(model, keep_logits=True) as recorder, torch.no_grad():
        model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    scores = importance(recorder)
    for vector in (scores.usage, scores.combined, scores.bottleneck, scores.picked, scores.tokens):
        assert vector[:8].any() and not vector[8:].any()
    assert not select(scores.combined, scores.picked, [8, 8], 16)[8:].any()


def test_experts_that_treat_all_tokens_alike_are_not_redundant_whatever_rounding_does():
    for seed in range(20):
        logits = (10 * torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(seed))).expand(1, 5, 64)
        _, combined, bottleneck = terms(logits, False, 0.9, redundancy=1e5)
        assert (bottleneck <= combined).all()
