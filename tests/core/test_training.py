"""Local training of a client, on the tiny model."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fedexperts.config import RunConfig
from fedexperts.core.training import batches, cross_entropy, fit, optimizer_for, seen, stratified_first_n, validate
from fedexperts.errors import BadData, Undeclared
from fedexperts.experiment.runner import engine_for
from fedexperts.experiment.setup import prepare_run
from fedexperts.io.toml import checked
from fedexperts.methods.base import patch_for
from fedexperts.methods.contract import Method
from fedexperts.moe import rows
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.backward import SelectiveBackward
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import tiny_batch, tiny_model
from fedexperts.types import Assignment, ClientContext, Example, Job, Patch, Training

ROUTER = "model.layers.0.mlp.gate.weight"
EXPERTS = {"model.layers.0.mlp": (0, 5), "model.layers.1.mlp": (1, 2, 3), "model.layers.2.mlp": tuple(range(8))}


@pytest.fixture(scope="module")
def prepared(tiny_tree):
    return prepare_run(checked(RunConfig, tiny_tree))


@pytest.fixture
def context(prepared, tmp_path):
    runtime = engine_for(prepared, tmp_path).runtime
    return ClientContext(runtime.clients["c01"], runtime.model, runtime.data["c01"], runtime.encoder, runtime.training, {})


def job(prepared, experts=EXPERTS, seed="s"):
    return Job("c01", 1, "train", seed, experts, patch_for(prepared.server, Assignment(experts)))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_built_model_has_the_received_weights(prepared, context):
    sent = job(prepared)
    doubled = replace(sent, patch=replace(sent.patch, tensors={name: 2 * t for name, t in sent.patch.tensors.items()}))
    assert equal(rows.read(Method().build_model(doubled, context)), doubled.patch.tensors)


def test_weights_in_the_client_state_replace_received_ones(prepared, context):
    state = {ROUTER: torch.full((2, 32), 7.0), "control/x": torch.ones(1)}
    built = rows.read(Method().build_model(job(prepared), replace(context, client_state=state)))
    assert torch.equal(built[ROUTER], state[ROUTER])


def test_an_entry_of_the_client_state_that_is_neither_a_weight_nor_declared_is_refused_by_name(prepared, context):
    with pytest.raises(Undeclared, match="client c01 keeps rooter, which is no trained weight of its model"):
        Method().build_model(job(prepared), replace(context, client_state={"rooter": torch.ones(1)}))


def test_frozen_weights_are_shared_with_the_base_and_trained_weights_are_copies(prepared, context):
    tuned = replace(context, training=replace(context.training, parts=("router",)))
    whole = prepared.server.anatomy.all_experts
    sent = Job("c01", 1, "train", "s", whole, patch_for(prepared.server, Assignment(whole, frozenset({ROUTER}))))
    model = Method().build_model(sent, tuned)
    base = dict(context.model.named_parameters())
    shared = {name: p.data_ptr() == base[name].data_ptr() for name, p in model.named_parameters()}
    assert shared == {name: not name.endswith("gate.weight") for name in base}
    assert sum(not each for each in shared.values()) == 3


@pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", rank=4)], ids=["full", "lora"])
def test_training_never_writes_the_base(prepared, context, tuning):
    before = {name: p.detach().clone() for name, p in context.model.named_parameters()}
    tuned = replace(context, training=replace(context.training, **vars(tuning)))
    model = Method().build_model(replace(job(prepared), patch=replace(job(prepared).patch, tensors={}, rows={})), tuned)
    started = rows.read(model)
    fit(model, tuned, seed="s")
    assert not equal(rows.read(model), started)
    assert equal(dict(context.model.named_parameters()), before)


def test_the_same_job_gives_the_same_bits_and_another_seed_gives_others(prepared, context):
    one, again, other = (Method().train(job(prepared, seed=seed), context) for seed in ("a", "a", "b"))
    assert equal(one.patch.tensors, again.patch.tensors)
    assert one.metrics == again.metrics
    assert not equal(one.patch.tensors, other.patch.tensors)


def test_fit_counts_tokens_flops_and_memory(prepared, context):
    fitted = fit(Method().build_model(job(prepared), context), context, seed="s", steps=3)
    chosen = [context.encoder.batch(batch) for batch in batches(context.data.train, 2, 3, "s")]
    assert fitted.cost.tokens == sum(int(batch["attention_mask"].sum()) for batch in chosen)
    assert fitted.cost.flops_estimated > 0
    trained = sum(tensor.nbytes for tensor in job(prepared).patch.tensors.values())
    assert fitted.cost.peak_bytes > 4 * trained  # weights, gradients and two moments, and activations besides


def test_fit_counts_tokens_per_expert_if_routers_are_recorded(prepared, context):
    fitted = fit(Method().build_model(job(prepared), context), context, seed="s", steps=3)
    experts, top_k = job(prepared).experts, {block: shape.top_k for block, shape in prepared.server.anatomy.blocks.items()}
    assert {block: len(counts) for block, counts in fitted.routed.items()} == {block: len(ids) for block, ids in experts.items()}
    assert all(sum(fitted.routed[block]) == fitted.cost.tokens * min(top_k[block], len(ids)) for block, ids in experts.items())
    unseen = replace(context, training=replace(context.training, router_aux_loss_coef=0.0))
    assert fit(Method().build_model(job(prepared), context), unseen, seed="s", steps=1).metrics.keys() == {"loss"}
    watched = fit(Method().build_model(job(prepared), context), unseen, seed="s", steps=1, watch=lambda recorder: None)
    assert watched.metrics.keys() == {"loss", "routed"}


def test_the_peak_includes_tensors_that_the_method_keeps(prepared, context):
    method_tensors = [torch.zeros(1000), torch.zeros(10, 100)]
    plain, more = (
        fit(Method().build_model(job(prepared), context), context, seed="s", steps=2, beside=each)
        for each in ([], method_tensors)
    )
    assert more.cost.peak_bytes == plain.cost.peak_bytes + 8000


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_peak_is_that_of_the_longest_batch_at_any_step(prepared, context, place):
    short = fit(Method().build_model(job(prepared), context), context, seed="s", steps=4).cost.peak_bytes
    long = replace(context.data.train[0], prompt="a rather long prompt " * 3)
    one_at_a_time = replace(context, training=replace(context.training, batch_size=1))
    order = [example for (example,) in batches(context.data.train, 1, 4, "s")]
    train = [long if example is order[place + 1] else example for example in context.data.train]
    peak = fit(
        Method().build_model(job(prepared), context),
        replace(one_at_a_time, data=replace(context.data, train=train)),
        seed="s",
        steps=4,
    )
    plain = fit(Method().build_model(job(prepared), context), one_at_a_time, seed="s", steps=4)
    assert peak.cost.peak_bytes > plain.cost.peak_bytes
    assert short > plain.cost.peak_bytes  # two at a time take more than one


def test_the_first_loss_is_that_of_the_received_model(prepared, context):
    plain = replace(context, training=replace(context.training, label_smoothing=0.0, router_aux_loss_coef=0.0))
    model = Method().build_model(job(prepared), plain)
    (first,) = batches(plain.data.train, 2, 1, "s")
    expected = float(cross_entropy(model, plain.encoder.batch(first)).detach())
    assert fit(model, plain, seed="s", steps=1).loss == pytest.approx(expected, abs=1e-6)


def test_a_penalty_adds_to_the_loss_and_gradients_can_be_seen_before_they_are_clipped(prepared, context):
    norms = []

    def look(model):
        norms.append(max(float(p.grad.norm()) for p in model.parameters() if p.requires_grad))

    clipped = replace(context, training=replace(context.training, max_grad_norm=1e-6))
    plain = fit(Method().build_model(job(prepared), clipped), clipped, seed="s", steps=1, after_backward=look)
    fined = fit(Method().build_model(job(prepared), clipped), clipped, seed="s", steps=1, penalty=lambda model: torch.tensor(5.0))
    assert fined.loss == pytest.approx(plain.loss + 5.0, abs=1e-5)
    assert len(norms) == 1
    assert norms[0] > 1e-3


def test_fit_lowers_the_loss_on_the_training_examples(prepared, context):
    data = replace(context.data, train=context.data.train[:1], validation=context.data.train[:1])
    one = replace(context, data=data, training=replace(context.training, lr=1e-2))
    model = Method().build_model(job(prepared), one)
    before = validate(model, one).loss
    fit(model, one, seed="s", steps=15)
    assert validate(model, one).loss < before / 2


def test_the_validation_loss_is_the_mean_over_the_tokens_of_all_responses(prepared, context):
    """By hand: each example alone, no padding, the sum of -log p of its response tokens."""
    chosen = context.data.train[:5]  # batches of 2, 2 and 1, of unequal lengths
    assert len({len(example.response) for example in chosen}) > 1
    model = Method().build_model(job(prepared), context)
    total, count = 0.0, 0
    for example in chosen:
        batch = context.encoder.batch([example])
        logits = model(input_ids=batch["input_ids"]).logits[0].detach().double()
        for place in range(1, batch["labels"].shape[1]):
            if batch["labels"][0, place] != -100:
                total -= float(functional.log_softmax(logits[place - 1], -1)[batch["input_ids"][0, place]])
                count += 1
    assert count == sum(len(example.response) + 1 for example in chosen)  # a token a letter, and the end
    assert validate(model, context, chosen).loss == pytest.approx(total / count, rel=1e-5)


def test_validation_is_of_the_first_validation_examples_and_counts_each_routed_token_once(prepared, context):
    few = replace(context, training=replace(context.training, validation_examples=1))
    model = Method().build_model(job(prepared), few)
    validation = validate(model, few)
    tokens = int(few.encoder.batch(few.data.validation[:1])["attention_mask"].sum())
    assert validation.routing.tokens == dict.fromkeys(EXPERTS, tokens)
    assert {block: int(counts.sum()) for block, counts in validation.routing.counts.items()} == dict.fromkeys(EXPERTS, 2 * tokens)


@given(tasks=st.lists(st.sampled_from("abc"), max_size=30), number=st.integers(0, 40))
def test_stratified_examples_are_the_first_of_each_task_in_proportion_to_its_share(tasks, number):
    given = [Example(str(place), "", task) for place, task in enumerate(tasks)]
    selected = stratified_first_n(given, number)
    assert len(selected) == min(number, len(given))
    assert selected == [example for example in given if example in selected]
    for task in set(tasks):
        of_task, chosen = ([each for each in some if each.task == task] for some in (given, selected))
        assert chosen == of_task[: len(chosen)]
        assert abs(len(chosen) - len(selected) * len(of_task) / len(given)) < 1.5
    if len(set(tasks)) < 2:
        assert selected == given[:number]


def test_a_task_with_one_of_ten_examples_is_in_six_of_them_and_not_in_two():
    tasks = ["rare", *9 * ["common"]]
    examples = [Example(str(index), "", task) for index, task in enumerate(tasks)]
    assert [example.task for example in stratified_first_n(examples, 2)] == ["common"] * 2
    assert [example.task for example in stratified_first_n(examples, 6)] == ["rare", *5 * ["common"]]


def test_a_client_without_examples_has_no_batches():
    with pytest.raises(BadData, match="a client has no training examples"):
        next(batches([], 4, 1, "s"))


@given(number=st.integers(1, 9), size=st.integers(1, 12), steps=st.integers(1, 12), seed=st.text(max_size=3))
def test_batches_show_every_example_once_before_any_comes_again(number, size, steps, seed):
    shown = list(batches(range(number), size, steps, seed))
    assert [len(batch) for batch in shown] == [size] * steps
    flat = [example for batch in shown for example in batch]
    for start in range(0, len(flat) - number + 1, number):
        assert sorted(flat[start : start + number]) == list(range(number))
    assert max(Counter(flat).values()) - min(Counter({n: flat.count(n) for n in range(number)}).values()) <= 1
    assert shown == list(batches(range(number), size, steps, seed))


def test_tokens_of_an_encoder_decoder_are_those_of_question_and_answer():
    batch = tiny_batch("switch_transformers", batch_size=2, tokens=12, padding=3)
    assert seen(tiny_model("switch_transformers"), batch) == (12 + 9) + (9 + 12)
    assert seen(tiny_model("olmoe"), tiny_batch("olmoe", batch_size=2, tokens=12, padding=3)) == 12 + 9


def test_the_loss_of_an_encoder_decoder_is_over_its_labels_as_they_stand():
    model, batch = tiny_model("switch_transformers"), tiny_batch("switch_transformers")
    expected = model(**batch, output_router_logits=False).loss
    assert float(cross_entropy(model, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def whole_job(prepared):
    return job(prepared, prepared.server.anatomy.all_experts)


def few(recorder):
    """The most used expert of each block."""
    return {block: (int(counts.argmax()),) for block, counts in recorder.routing().counts.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_backward_reaches_the_chosen_experts_and_no_other_moves(prepared, context, optimizer):
    context = replace(context, training=replace(context.training, optimizer=optimizer, weight_decay=0.1))
    model = Method().build_model(whole_job(prepared), context)
    before, chosen = rows.read(model), {}

    def reach(recorder):
        for block, ids in few(recorder).items():
            chosen.setdefault(block, set()).update(ids)
        return few(recorder)

    fit(model, context, seed="s", select_experts=reach)
    after, layout = rows.read(model), rows.layout(model)
    moved = {name: {i for i, row in enumerate(after[name]) if not torch.equal(row, before[name][i])} for name in after}
    experts = {name: block for name, block in layout.items() if block and "experts" in name}
    assert {name: moved[name] for name in experts} == {name: chosen[block] for name, block in experts.items()}
    assert all(moved[name] for name in after.keys() - experts.keys()), "routers and all that is dense move"


def test_experts_that_were_left_out_start_afresh_when_backward_reaches_them_again(prepared, context):
    everyone, model = prepared.server.anatomy.all_experts, Method().build_model(whole_job(prepared), context)
    chosen, seen = iter([everyone, {}, everyone]), []
    fit(
        model,
        context,
        seed="s",
        steps=3,
        select_experts=lambda recorder: next(chosen),
        after_backward=lambda model: seen.append(rows.read(model)),
    )
    after, experts = rows.read(model), [name for name, block in rows.layout(model).items() if block and "experts" in name]
    steps = torch.cat([(after[name] - seen[-1][name]).abs().flatten() for name in experts]) / context.training.lr
    assert (steps > 0.9).any() and ((steps > 0.99) & (steps < 1.01)).sum() > 0.9 * (steps > 0.1).sum(), "AdamW's first step is lr"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_shrinks_a_weight_without_a_gradient_by_lr_times_decay(optimizer):
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.zeros(4)
    optimizer_for([weight], Training(optimizer=optimizer, lr=0.1, weight_decay=0.2)).step()
    assert weight.tolist() == pytest.approx([0.98] * 4)


def test_with_all_experts_selected_training_equals_a_full_backward(prepared, context):
    model, other = Method().build_model(whole_job(prepared), context), Method().build_model(whole_job(prepared), context)
    sgd = replace(context, training=replace(context.training, optimizer="sgd", lr=0.1))
    plain = fit(model, sgd, seed="s")
    reached = fit(other, sgd, seed="s", select_experts=lambda recorder: prepared.server.anatomy.all_experts)
    assert reached.loss == pytest.approx(plain.loss, abs=1e-5)
    ours, theirs = rows.read(other), rows.read(model)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


def test_fewer_selected_experts_take_less_memory_and_fewer_flops(prepared, context):
    costs = []
    for reach in (None, lambda recorder: prepared.server.anatomy.all_experts, few):
        costs.append(fit(Method().build_model(whole_job(prepared), context), context, seed="s", select_experts=reach).cost)
    full, whole, one = costs
    assert one.peak_bytes < min(whole.peak_bytes, full.peak_bytes)
    assert one.flops_estimated < full.flops_estimated <= whole.flops_estimated  # which computes gradients that nobody needs


def test_watch_is_called_with_each_batch_and_its_result_is_added_to_the_loss(prepared, context):
    context = replace(context, training=replace(context.training, router_aux_loss_coef=0.0))
    tokens = []

    def watch(recorder):
        routing = recorder.routing()
        tokens.append(next(iter(routing.tokens.values())))
        assert all(sum(len(each) for each in passes) == tokens[-1] for passes in recorder.logits.values())
        return 100.0 + 0.0 * next(iter(recorder.logits.values()))[0].sum()

    model = Method().build_model(whole_job(prepared), context)
    fitted = fit(model, context, seed="s", watch=watch)
    assert len(tokens) == context.training.local_steps
    assert sum(tokens) == fitted.cost.tokens
    other = Method().build_model(whole_job(prepared), context)
    plain = fit(other, context, seed="s", watch=lambda recorder: None)
    assert fitted.loss == pytest.approx(plain.loss + 100.0, rel=1e-4)
    assert equal(rows.read(model), rows.read(other))


def trained_weights(prepared, context, **settings):
    context = replace(context, training=replace(context.training, router_aux_loss_coef=0.0, **settings))
    model = Method().build_model(whole_job(prepared), context)
    fitted = fit(model, context, seed="s", steps=3)
    return rows.read(model), fitted


def test_accumulated_gradients_are_those_of_one_large_batch(prepared, context):
    large, of_large = trained_weights(prepared, context, batch_size=8)
    small, of_small = trained_weights(prepared, context, batch_size=2, gradient_accumulation_steps=4)
    assert max(float((large[name] - small[name]).abs().max()) for name in large) < 1e-5
    assert of_small.loss == pytest.approx(of_large.loss, abs=1e-5) and of_small.cost.tokens == of_large.cost.tokens
    assert of_small.cost.peak_bytes < of_large.cost.peak_bytes


def test_terms_beside_the_cross_entropy_are_means_over_the_batches_of_a_step(prepared, context):
    context = replace(context, training=replace(context.training, router_aux_loss_coef=0.0, gradient_accumulation_steps=3))
    losses = []
    for penalty in (0.0, 5.0):
        model = Method().build_model(whole_job(prepared), context)
        losses.append(fit(model, context, seed="s", steps=1, penalty=lambda model, value=penalty: torch.tensor(value)).loss)
    assert losses[1] - losses[0] == pytest.approx(5.0, abs=1e-5)


def test_with_accumulation_only_experts_that_no_batch_of_a_step_selects_start_afresh(prepared, context):
    context = replace(context, training=replace(context.training, gradient_accumulation_steps=2, local_steps=2))
    turns = iter([(0, 1), (2, 3), (4, 5), (0, 1)])  # (0, 1) are reached in both steps, so their moments stay

    def select(recorder):
        ids = next(turns)
        return dict.fromkeys(recorder.blocks, ids)

    model = Method().build_model(whole_job(prepared), context)
    before = rows.read(model)
    fit(model, context, seed="s", select_experts=select)
    after = rows.read(model)
    moved = {
        row
        for name, tensor in after.items()
        if ".experts." in name
        for row in range(len(tensor))
        if not torch.equal(tensor[row], before[name][row])
    }
    assert {0, 1} <= moved <= {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", rank=8)], ids=["full", "lora"])
@pytest.mark.parametrize("selects", [False, True], ids=["all experts", "selected experts"])
def test_checkpointed_activations_change_no_weight_and_count_each_token_once(prepared, context, tuning, selects):
    results = []
    for checkpointing in (False, True):
        settings = {**vars(context.training), **vars(tuning), "gradient_checkpointing": checkpointing}
        each = replace(context, training=Training(**settings))
        model = Method().build_model(Job("c01", 1, "train", "s", {}, Patch({})), each)
        results.append((fit(model, each, seed="s", steps=2, select_experts=few if selects else None), rows.read(model)))
    (plain, weights), (checkpointed, same) = results
    assert max(float((weights[name] - same[name]).abs().max()) for name in weights) < 1e-6
    assert checkpointed.routed == plain.routed and checkpointed.loss == pytest.approx(plain.loss, abs=1e-6)
    assert checkpointed.cost.peak_bytes < plain.cost.peak_bytes


def test_the_learning_rate_rises_over_the_warmup_steps_of_each_job(prepared, context):
    training = Training(lr=0.4, warmup_steps=4)
    assert [training.lr * training.lr_factor(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    start = rows.read(Method().build_model(whole_job(prepared), context))
    settings = {"optimizer": "sgd", "max_grad_norm": 0.0, "lr": 0.1}
    moves = []
    for warmup in (0, 10):
        each = replace(context, training=replace(context.training, warmup_steps=warmup, **settings))
        model = Method().build_model(whole_job(prepared), each)
        fit(model, each, seed="s", steps=1)
        moves.append({name: tensor - start[name] for name, tensor in rows.read(model).items()})
    assert all(torch.allclose(moves[0][name] / 10, moves[1][name], atol=1e-6) for name in start)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_training_in_half_precision_lowers_the_loss_as_in_float32(prepared, context, precision):
    losses = {}
    for each in ("float32", precision):
        now = replace(context, training=replace(context.training, precision=each, local_steps=12, lr=3e-3))
        model = Method().build_model(whole_job(prepared), now)
        fitted = fit(model, now, seed="s")
        losses[each] = validate(model, now).loss
        assert fitted.loss == fitted.loss and {tensor.dtype for tensor in rows.read(model).values()} == {torch.float32}
    assert losses[precision] == pytest.approx(losses["float32"], rel=0.05)


def test_steps_whose_gradients_overflow_in_float16_are_counted_and_change_nothing(prepared, context):
    half = replace(context, training=replace(context.training, precision="float16", optimizer="sgd"))
    model = Method().build_model(whole_job(prepared), half)
    start = rows.read(model)

    fitted = fit(model, half, seed="s", steps=3, penalty=lambda model: 1e38 * sum(p.float().sum() for p in model.parameters()))
    assert fitted.metrics["skipped_steps"] == 3
    assert all(torch.equal(tensor, start[name]) for name, tensor in rows.read(model).items())
    kept = fit(model, half, seed="s", steps=3)
    assert kept.metrics["skipped_steps"] < 3
    plain = Method().build_model(whole_job(prepared), context)
    assert "skipped_steps" not in fit(plain, context, seed="s", steps=1).metrics


@pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", rank=8)], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_backward_that_reaches_selected_experts_works_in_half_precision(tuning, family):
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_model(family).to(dtype)
        model = prepare(shrink(base, anatomy(base).all_experts), tuning, seed="0").train()
        with SelectiveBackward(model) as selective:
            loss = cross_entropy(model, tiny_batch(family))
            selective.choose(dict.fromkeys(blocks(model), (0, 1, 2, 3)))
            loss.backward()
            gradients[dtype] = [each.grad for each in selective.parameters]
    whole, half = (gradients[dtype] for dtype in (torch.float32, torch.bfloat16))
    assert {each.dtype for each in half if each is not None} == {torch.float32}
    assert [each is None for each in whole] == [each is None for each in half]
    norm = sum(float((a - b).square().sum()) for a, b in zip(whole, half, strict=True) if a is not None and b is not None) ** 0.5
    assert norm < 0.5 * sum(float(each.square().sum()) for each in whole if each is not None) ** 0.5
