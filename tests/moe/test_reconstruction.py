"""Losses of reconstruction by hand and against a plain loop, on every family."""

import pytest
import torch

from fedexperts.moe import reconstruction
from fedexperts.moe.anatomy import Block, blocks
from fedexperts.moe.graft import run_experts
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.reconstruction import (
    by_reconstruction,
    losses_of,
    most_used,
    reconstruction_losses,
    selection_flops_estimated,
)
from fedexperts.moe.routing import Recorder
from fedexperts.testing import FAMILIES, flop_counter, tiny_batch, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)


def three_experts():
    """A block whose expert e gives (e + 1) times its input."""
    experts = torch.nn.ModuleDict({f"expert_{e}": Times(e + 1.0) for e in range(3)})
    return Block("mlp", torch.nn.Identity(), torch.nn.Identity(), experts)


class Times(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1, 1), factor), requires_grad=False)

    def forward(self, x):
        return x * self.weight


def test_the_losses_by_hand():
    """Two tokens x = (3, 4) and (0, 1), of norms 5 and 1; the block gives 2x.

    Expert 0 gives x: the loss is |2 - 1| · (5 + 1) = 6. Expert 1 gives 2x: 0. Expert 2 gives 3x: 6.
    With expert 0 selected and gates of equal size, 0 and 1 give 1.5x: 3; 0 and 2 give 2x: 0. Expert 0 itself: infinite.
    """
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    equal = torch.zeros(2, 3)
    assert losses_of(three_experts(), x, 2 * x, equal, ()).tolist() == [6, 0, 6]
    torch.testing.assert_close(
        losses_of(three_experts(), x, 2 * x, equal, (0,)), torch.tensor([torch.inf, 3, 0], dtype=torch.float64)
    )


def test_gates_are_those_of_a_router_that_has_no_other_experts():
    """With log gates log 3 and log 1, experts 0 and 1 weigh 3/4 and 1/4 and give 1.25x for 2x: 0.75 · 5 = 3.75."""
    x = torch.tensor([[3.0, 4.0]])
    gates = torch.tensor([[3.0, 1.0, 7.0]]).log()
    torch.testing.assert_close(losses_of(three_experts(), x, 2 * x, gates, (0,))[1], torch.tensor(3.75, dtype=torch.float64))


def test_losses_of_a_bfloat16_model_are_summed_in_float32():
    """Experts of gates 0.7 and 0.3 that give 1 and 2 give 1.3, which bfloat16 has not: 1.296875 is next to it."""
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    twice = torch.nn.ModuleDict({"expert_0": Times(1.0), "expert_1": Times(2.0)}).to(torch.bfloat16)
    block = Block("mlp", torch.nn.Identity(), torch.nn.Identity(), twice)
    targets = torch.full((1, 1), 1 + 1 / 128, dtype=torch.bfloat16)
    gates = torch.tensor([[0.7, 0.3]]).log()
    loss = losses_of(block, x, targets, gates, (0,))[1]
    assert float(loss) == pytest.approx(1.3 - 1 - 1 / 128, rel=1e-5)


@every_family
def test_the_losses_are_those_of_a_plain_loop_over_tokens_that_count(family):
    model, batch = tiny_model(family), tiny_batch(family)
    seen = {}
    with torch.no_grad(), Recorder(model, keep_logits=True) as recorder:
        hooks = [
            block.experts.register_forward_hook(
                lambda experts, args, out, name=name: seen.update({name: (args[0], out, recorder.last(name)[1])})
            )
            for name, block in recorder.blocks.items()
        ]
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels" or family == "switch_transformers"}
        model(**inputs)
    for hook in hooks:
        hook.remove()
    losses = reconstruction_losses(model, [batch], {})
    for name, block in blocks(model).items():
        rows, out, counted = (each.reshape(-1, each.shape[-1]) if each.ndim > 1 else each for each in seen[name])
        for expert in range(8):
            with torch.no_grad():
                alone = run_experts(block.experts, rows, [expert])[0]
            expected = sum(float((out[t] - alone[t]).norm()) for t in range(len(rows)) if counted[t])
            assert float(losses[name][expert]) == pytest.approx(expected, rel=1e-4)


def test_batches_add_up_and_chunks_do_not_show(monkeypatch):
    model, one, two = tiny_model("olmoe"), tiny_batch("olmoe"), tiny_batch("olmoe", seed=1)
    together = reconstruction_losses(model, [one, two], {})
    apart = [reconstruction_losses(model, [batch], {}) for batch in (one, two)]
    monkeypatch.setattr(reconstruction, "CHUNK_BYTES", 1)
    single = reconstruction_losses(model, [one, two], {})
    for name, losses in together.items():
        torch.testing.assert_close(losses, apart[0][name] + apart[1][name])
        torch.testing.assert_close(losses, single[name])


def test_the_best_comes_first_and_more_are_added_one_by_one():
    model, batches = tiny_model("olmoe"), [tiny_batch("olmoe")]
    first = reconstruction_losses(model, batches, {})
    best = {name: (int(loss.argmin()),) for name, loss in first.items()}
    assert by_reconstruction(model, batches) == best
    second = reconstruction_losses(model, batches, best)
    assert by_reconstruction(model, batches, 2) == {
        name: tuple(sorted((*best[name], int(loss.argmin())))) for name, loss in second.items()
    }


@every_family
def test_of_experts_chosen_in_any_order_each_next_one_is_the_best_beside_them(family):
    model, batches = tiny_model(family), [tiny_batch(family)]
    selected, descending = dict.fromkeys(blocks(model), ()), False
    for _ in range(4):
        losses = reconstruction_losses(model, batches, {name: tuple(sorted(ids)) for name, ids in selected.items()})
        selected = {name: (*selected[name], int(loss.argmin())) for name, loss in losses.items()}
        descending |= any(list(ids[:3]) != sorted(ids[:3]) for ids in selected.values())
    assert descending  # else this would show nothing
    assert by_reconstruction(model, batches, 4) == {name: tuple(sorted(ids)) for name, ids in selected.items()}


def test_memory_does_not_grow_with_the_text():
    model = tiny_model("olmoe")

    def peak(number):
        with MemoryMeter(model) as meter:
            reconstruction_losses(model, [tiny_batch("olmoe", seed=seed) for seed in range(number)], {})
        return meter.peak_bytes

    batch = sum(tensor.nbytes for tensor in tiny_batch("olmoe").values())
    assert peak(12) <= peak(2) + 12 * 2 * batch  # the text itself, and nothing of what the layers made of it


def test_most_used_are_those_that_routing_picks_most():
    model, batch = tiny_model("mixtral"), tiny_batch("mixtral")
    with torch.no_grad(), Recorder(model) as recorder:
        model(**batch)
    for name, ids in most_used(model, [batch], 2).items():
        counts = recorder.routing().counts[name].tolist()
        assert sorted(counts[expert] for expert in ids) == sorted(counts)[-2:]


def test_a_stride_looks_at_every_so_many_th_token_that_counts():
    model, batch = tiny_model("olmoe"), tiny_batch("olmoe", batch_size=1, padding=0)
    seen = []

    def note(*args):
        seen.append(args[1])
        return losses_of(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reconstruction, "losses_of", note)
        reconstruction_losses(model, [batch], {})
        reconstruction_losses(model, [batch], {}, stride=5)
    assert len(seen[0]) == 12
    assert torch.equal(seen[len(seen) // 2], seen[0][::5])


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_a_selection_costs_a_pass_and_each_expert_each_token_that_it_looks_at(family):
    """Of an encoder-decoder the encoder's experts look at the question, the decoder's at the answer."""
    model, batch = tiny_model(family), tiny_batch(family)
    batch["labels"][:, 4:] = -100
    looked = 0
    for name, block in blocks(model).items():
        decodes = family == "switch_transformers" and name.startswith("decoder.")
        tokens = int((batch["labels"] != -100).sum()) if decodes else int(batch["attention_mask"].sum())
        looked += tokens * sum(weight.numel() for weight in block.experts.parameters())
    plain = selection_flops_estimated(model, [batch], passes=0)
    assert plain > 0
    assert selection_flops_estimated(model, [batch], passes=1) == plain + 2 * looked


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "switch_transformers"])
def test_the_flops_of_a_selection_are_those_of_torchs_counter(family):
    """The second and third expert are added to those before them; an odd number of tokens is looked at in strides of two."""
    model, batches = tiny_model(family), [tiny_batch(family, 2, 13), tiny_batch(family, 3, 12)]
    for passes, stride in ((1, 1), (3, 2)):
        with flop_counter() as counter:
            by_reconstruction(model, batches, passes, stride)
        estimated = selection_flops_estimated(model, batches, passes, stride)
        assert estimated == pytest.approx(counter.get_total_flops(), rel=0.001)
    with flop_counter() as counter:
        most_used(model, batches)
    assert selection_flops_estimated(model, batches, passes=0) == pytest.approx(counter.get_total_flops(), rel=0.001)


def same_experts(model):
    """Makes the experts of each block equal, and each router prefer the first ones."""
    with torch.no_grad():
        for block in blocks(model).values():
            for weight in block.experts.parameters():
                weight.copy_(weight[:1].expand_as(weight))
    return model


def test_of_experts_with_equal_losses_the_lower_is_selected():
    model, batches = same_experts(tiny_model("olmoe")), [tiny_batch("olmoe")]
    losses = reconstruction_losses(model, batches, {})
    assert all(len(set(loss.tolist())) == 1 for loss in losses.values())
    assert by_reconstruction(model, batches) == dict.fromkeys(blocks(model), (0,))


def test_of_experts_that_are_picked_equally_often_the_lower_are_selected():
    model, batch = tiny_model("olmoe", num_experts=64), tiny_batch("olmoe", batch_size=1, tokens=1, padding=0)
    with torch.no_grad(), Recorder(model) as recorder:
        model(**batch)
    for name, ids in most_used(model, [batch], 32).items():
        picked = recorder.routing().counts[name].nonzero().flatten().tolist()
        others = [expert for expert in range(64) if expert not in picked]
        assert ids == tuple(sorted([*picked, *others[: 32 - len(picked)]]))


@pytest.mark.parametrize("training", [True, False])
def test_a_selection_is_made_without_dropout_and_leaves_the_mode_of_the_model(training):
    model, batch = tiny_model("switch_transformers", dropout_rate=0.5), tiny_batch("switch_transformers")
    reference = by_reconstruction(model.eval(), [batch]), most_used(model, [batch])
    model.train(training)
    assert by_reconstruction(model, [batch]) == reference[0] and model.training == training
    assert most_used(model, [batch]) == reference[1] and model.training == training


def test_at_least_one_expert_is_run_at_a_time_and_as_many_as_fit(monkeypatch):
    rows = torch.zeros(10, 1)  # experts of width 1: 40 bytes each
    for size, groups in ((1, [[0], [1], [2]]), (80, [[0, 1], [2]]), (119, [[0, 1], [2]]), (1000, [[0, 1, 2]])):
        monkeypatch.setattr(reconstruction, "CHUNK_BYTES", size)
        assert list(reconstruction.chunks([0, 1, 2], three_experts(), rows)) == groups
