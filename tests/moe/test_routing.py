"""Counting what routers pick, and the balance loss."""

import math
from itertools import permutations

import pytest
import torch

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.routing import (
    Recorder,
    _logits,
    _picked,
    balance_loss,
    divergence,
    recorded_logits,
    router_drift,
)
from fedexperts.moe.shrink import shrink
from fedexperts.testing import FAMILIES, tiny_batch, tiny_experts, tiny_model

TOKENS, PADDING = 12, 3


def counted(model, **batch):
    with Recorder(model) as recorder, torch.no_grad():
        model(**batch)
    return recorder.routing()


def same(one, other):
    assert one.counts.keys() == other.counts.keys()
    return one.tokens == other.tokens and all(torch.equal(one.counts[name], other.counts[name]) for name in one.counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_counts_as_much_as_its_sequences_without_padding(family):
    model = tiny_model(family)
    batch = tiny_batch(family, tokens=TOKENS, padding=PADDING)
    together = counted(model, **batch)

    totals = {name: torch.zeros_like(counts) for name, counts in together.counts.items()}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        alone = counted(model, input_ids=ids[mask == 1][None], labels=labels[labels != -100][None])
        for name, counts in alone.counts.items():
            totals[name] += counts

    for name, counts in together.counts.items():
        assert torch.equal(counts, totals[name])
        assert together.tokens[name] == 2 * TOKENS - PADDING
        assert counts.sum() == together.tokens[name] * blocks(model)[name].shape.top_k
        assert torch.equal(together.probabilities()[name], counts.double() / (2 * TOKENS - PADDING))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_counts_nothing_twice(family):
    model, batch = tiny_model(family), tiny_batch(family)
    plain = counted(model, **batch)
    model.activation_checkpointing_enable()
    model.train()
    if family == "phimoe":
        for block in blocks(model).values():
            block.router.eval()  # its choice is drawn at random while training
    runs = []
    for block in blocks(model).values():
        block.router.register_forward_hook(lambda *_: runs.append(1))
    with Recorder(model) as recorder:
        model(**batch, use_cache=False).loss.backward()
    assert len(runs) == 2 * len(blocks(model)), "each layer is computed a second time"
    assert same(recorder.routing(), plain)


def test_a_decoding_step_with_a_cache_counts_its_new_token_only():
    model = tiny_model("qwen3_moe")
    ids = tiny_batch("qwen3_moe", padding=0)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # prompts are padded on the left
    with Recorder(model) as recorder:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert set(recorder.routing().tokens.values()) == {2 * TOKENS - 4 + 2 * 2}, "the prompts, then two tokens twice"


def test_an_encoder_that_generation_runs_by_itself_is_counted():
    model = tiny_model("switch_transformers")
    batch = tiny_batch("switch_transformers", padding=PADDING)
    del batch["labels"]
    with Recorder(model) as recorder:
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    encoder, decoder = recorder.routing().tokens.values()
    assert encoder == 2 * TOKENS - PADDING
    assert decoder == 2 * 4


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_order_of_a_router_s_outputs_does_not_matter(order):
    """It has changed between versions of transformers; they are distinguished by type and shape."""
    block = blocks(tiny_model("granitemoe"))["model.layers.0.block_sparse_moe"]
    output = block.router(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)))
    turned = tuple(output[part] for part in order)
    assert torch.equal(_picked(block, turned), _picked(block, output))
    assert torch.equal(_logits(block, turned), output[0])
    assert _picked(block, output).sum(-1).eq(2).all()


def test_a_recorder_that_is_off_counts_nothing():
    model, batch = tiny_model("mixtral"), tiny_batch("mixtral")
    with Recorder(model) as recorder:
        pass
    model(**batch)
    assert set(recorder.routing().tokens.values()) == {0}
    assert not any(probabilities.any() for probabilities in recorder.routing().probabilities().values())


def test_a_mask_given_by_position_is_seen_too():
    model, batch = tiny_model("mixtral"), tiny_batch("mixtral")
    with Recorder(model) as recorder:
        model(batch["input_ids"], batch["attention_mask"])
    assert set(recorder.routing().tokens.values()) == {2 * TOKENS - PADDING}


def test_a_mask_of_attention_scores_is_refused():
    model, batch = tiny_model("mixtral"), tiny_batch("mixtral")
    with Recorder(model), pytest.raises(BadValue, match="attention_mask has 4 axes"):
        model(batch["input_ids"], attention_mask=torch.ones(2, 1, TOKENS, TOKENS))


def make_uniform(model):
    """Every token is as likely to go to each expert, and each expert gets as many tokens: by symmetry of the logits."""
    for block in blocks(model).values():
        for path, _ in block.expert_axes().items():
            if not path.startswith("experts."):
                tensor = dict([*block.module.named_parameters(), *block.module.named_buffers()])[path]
                tensor.detach().zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_balance_loss_of_even_probabilities_is_one_in_layers_of_any_size(family):
    model = tiny_model(family)
    small = shrink(model, tiny_experts(model))
    make_uniform(small)
    with Recorder(small, keep_logits=True) as recorder:
        small(**tiny_batch(family))
    sizes = {block.shape.num_experts for block in blocks(small).values()}
    assert len(sizes) > 1
    assert balance_loss(recorder).item() == pytest.approx(1.0, abs=1e-6)


def test_the_balance_loss_equals_the_formula_written_out():
    model = tiny_model("olmoe", num_hidden_layers=1)
    batch = tiny_batch("olmoe")
    hidden = []
    blocks(model)["model.layers.0.mlp"].router.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with Recorder(model, keep_logits=True) as recorder:
        model(**batch)
    weight = blocks(model)["model.layers.0.mlp"].router.weight
    probabilities = torch.softmax(hidden[0].reshape(-1, 32) @ weight.T, dim=-1)[batch["attention_mask"].flatten() == 1]
    picked = torch.zeros_like(probabilities)
    for token, row in enumerate(probabilities):
        for expert in row.argsort(descending=True)[:2]:
            picked[token, expert] = 1
    by_hand = sum(8 * picked[:, e].mean() * probabilities[:, e].mean() for e in range(8)) / 2
    assert balance_loss(recorder).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_balance_loss_of_one_expert_that_gets_everything_is_the_number_of_experts():
    model = tiny_model("switch_transformers", router_bias=True)
    for block in blocks(model).values():
        block.router.classifier.bias.data[3] = 1000.0
    with Recorder(model, keep_logits=True) as recorder:
        model(**tiny_batch("switch_transformers"))
    assert balance_loss(recorder).item() == pytest.approx(8.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_balance_loss_reaches_every_router(family, checkpointing):
    model, batch = tiny_model(family), tiny_batch(family)
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    with Recorder(model, keep_logits=True) as recorder:
        model(**batch, use_cache=False)
    balance_loss(recorder).backward()
    for block in blocks(model).values():
        weight = block.router.classifier.weight if block.is_switch else block.router.weight
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().sum() > 0


def test_a_balance_loss_without_logits_is_refused():
    model = tiny_model("mixtral")
    with Recorder(model) as recorder:
        model(**tiny_batch("mixtral"))
    with pytest.raises(BadValue, match="keep_logits=True"):
        balance_loss(recorder)


def test_the_divergence_of_two_routings_by_hand():
    even, skewed = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * math.log(4 / 3)  # ½ ln ½/¼ + ½ ln ½/¾
    assert divergence(even.log(), skewed.log() + 3, sigmoid=False).tolist() == pytest.approx([expected])
    scores = torch.tensor([[0.2, 0.6]])  # ¼ and ¾ of their sum
    assert divergence(even.logit(), scores.logit(), sigmoid=True).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_have_not_drifted_from_themselves_and_others_have(family):
    one, other, batch = tiny_model(family), tiny_model(family, seed=1), tiny_batch(family)
    assert router_drift(one, one, [batch]) == dict.fromkeys(blocks(one), 0.0)
    drift = router_drift(one, other, [batch])
    assert drift.keys() == blocks(one).keys()
    assert all(each > 0 for each in drift.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_is_the_mean_over_tokens_whatever_the_batches_and_their_padding(family):
    one, other = tiny_model(family), tiny_model(family, seed=1)
    batch = tiny_batch(family, tokens=TOKENS, padding=PADDING)
    alone = [
        {"input_ids": ids[mask == 1][None], "attention_mask": mask[mask == 1][None], "labels": labels[labels != -100][None]}
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    assert router_drift(one, other, [batch]) == pytest.approx(router_drift(one, other, alone), rel=1e-4)


def test_drift_looks_at_all_experts_where_the_same_are_picked():
    one, other = tiny_model("olmoe"), tiny_model("olmoe")
    with torch.no_grad():
        for block in blocks(other).values():
            block.router.weight.mul_(1.5)  # the order of the logits stays
    first, *_ = router_drift(one, other, [tiny_batch("olmoe")]).values()
    assert first > 0


def test_the_divergence_is_never_negative_where_rounding_would_make_it_so():
    logits = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    moved = logits + 1e-7 * torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
    assert (divergence(logits, moved, sigmoid=False) >= 0).all()
    assert (divergence(logits, moved, sigmoid=True) >= 0).all()


def test_a_decoder_goes_by_its_own_mask_before_the_labels():
    model, batch = tiny_model("switch_transformers"), tiny_batch("switch_transformers", padding=PADDING)
    own_mask = torch.ones_like(batch["labels"])
    own_mask[:, 5:] = 0
    by_labels, by_mask = counted(model, **batch), counted(model, **batch, decoder_attention_mask=own_mask)
    encoder, decoder = blocks(model)
    assert by_labels.tokens == {encoder: 2 * TOKENS - PADDING, decoder: 2 * TOKENS - PADDING}
    assert by_mask.tokens == {encoder: 2 * TOKENS - PADDING, decoder: 2 * 5}


def test_a_block_whose_router_saw_no_token_has_no_logits_and_takes_no_part_in_the_balance_loss():
    model, batch = tiny_model("switch_transformers"), tiny_batch("switch_transformers")
    encoder, decoder = blocks(model)
    with Recorder(model, keep_logits=True) as recorder:
        model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert list(recorded_logits(recorder)) == [encoder]
    alone = balance_loss(recorder)
    with Recorder(model, keep_logits=True) as recorder:
        model(**batch)
        recorder._logits[decoder].clear()
    assert torch.equal(balance_loss(recorder), alone)


def test_counts_of_several_passes_add_up():
    model, batch = tiny_model("mixtral"), tiny_batch("mixtral")
    once = counted(model, **batch)
    with Recorder(model, keep_logits=True) as recorder, torch.no_grad():
        model(**batch)
        model(**batch)
    twice = recorder.routing()
    assert all(torch.equal(twice.counts[name], 2 * counts) for name, counts in once.counts.items())
    assert twice.tokens == {name: 2 * number for name, number in once.tokens.items()}
    assert all(len(logits) == twice.tokens[name] for name, logits in recorded_logits(recorder).items())


def test_a_router_all_of_whose_tokens_are_padding_takes_no_part_in_the_balance_loss():
    model, batch = tiny_model("switch_transformers"), tiny_batch("switch_transformers")
    batch["labels"][:] = -100
    with Recorder(model, keep_logits=True) as recorder:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    encoder, decoder = blocks(model)
    assert list(recorded_logits(recorder)) == [encoder] and recorder.routing().tokens[decoder] == 0
    assert balance_loss(recorder).isfinite()


def test_the_logits_of_a_single_expert_of_switch_are_not_its_probability():
    model = tiny_model("switch_transformers", num_experts=1)
    block = next(iter(blocks(model).values()))
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = hidden.view(5, 32) @ block.router.classifier.weight.T
    torch.testing.assert_close(_logits(block, block.router(hidden)), expected)
