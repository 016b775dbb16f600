"""Training every family on another device: full, with adapters, and with backward to some experts only."""

from dataclasses import replace

import pytest
import torch

from fedexperts.core.training import fit, validate
from fedexperts.engines.local import seeded_torch
from fedexperts.moe import rows
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.device import on_device
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import prepare
from fedexperts.testing import FAMILIES, tiny_batch, tiny_context, tiny_experts, tiny_model
from fedexperts.types import Client, Training

every_family = pytest.mark.parametrize("family", FAMILIES)
every_tuning = pytest.mark.parametrize("train", ["full", "lora"])
STEP = Training(batch_size=4, local_steps=1, optimizer="sgd", lr=0.1, validation_examples=4)
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")


def trained(family, device, training, *, select=False, through="chosen", **options):
    """A model of some experts after its local steps on `device`, what `fit` gave, and its loss afterwards."""
    base = on_device(tiny_model(family, **options), device)
    experts = tiny_experts(base)
    model = prepare(shrink(base, experts), training.tuning, seed="0")
    context = tiny_context(base, Client("a", 8, "x"), training)
    some = {name: ids[:1] for name, ids in anatomy(model).all_experts.items()}
    with seeded_torch("0", torch.device(device)):  # PhiMoE's router draws from torch's generator, as dropout does
        fitted = fit(model, context, seed="0", select_experts=(lambda _: some) if select else None, through=through)
    return model, fitted, validate(model, context)


def assert_same(family, device, near, training, **options):
    start = prepare(shrink(tiny_model(family), tiny_experts(tiny_model(family))), training.tuning, seed="0")
    (here, ours, scored), (there, theirs, rescored) = (trained(family, each, training, **options) for each in ("cpu", device))
    assert all(tensor.device == torch.device(device) for tensor in [*there.parameters(), *there.buffers()])
    assert near(rows.read(here), rows.read(there))
    assert any(not torch.equal(tensor, rows.read(start)[name]) for name, tensor in rows.read(there).items())
    assert theirs.loss == pytest.approx(ours.loss, abs=1e-4) and theirs.routed == ours.routed
    assert rescored.loss == pytest.approx(scored.loss, abs=1e-4)
    assert near(rescored.routing.counts, scored.routing.counts)


@every_tuning
@every_family
def test_a_step_changes_the_weights_as_on_the_cpu(family, train, device, near):
    assert_same(family, device, near, replace(STEP, train=train))


@every_tuning
@every_family
@pytest.mark.parametrize("through", ["chosen", "all"])
def test_a_step_that_reaches_some_experts_changes_the_weights_as_on_the_cpu(family, train, through, device, near):
    assert_same(family, device, near, replace(STEP, train=train), select=True, through=through)


@every_tuning
def test_steps_of_adamw_end_near_those_of_the_cpu(train, device):
    """Near, since it divides by the gradient's size: an element whose gradient is but rounding may go either way."""
    training = replace(STEP, train=train, optimizer="adamw", lr=1e-3, local_steps=3)
    ours, theirs = (rows.read(trained("olmoe", each, training)[0]) for each in ("cpu", device))
    gaps = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    assert gaps.max() <= 6e-3 and gaps.mean() <= 1e-6


@pytest.mark.parametrize("select", [False, True], ids=["whole", "selective"])
def test_dropout_of_adapters_is_drawn_from_the_generator_of_the_device_and_again_in_backward(device, near, select):
    """On twin that is the CPU's, so that the numbers are the same; on a card the same seed gives the same step."""
    training = replace(STEP, train="lora", dropout=0.3)

    once, again = (rows.read(trained("olmoe", device, training, select=select)[0]) for _ in range(2))
    assert near(once, again)
    if device.startswith("twin"):
        assert near(rows.read(trained("olmoe", "cpu", training, select=select)[0]), once)


@every_family
def test_a_model_that_was_moved_computes_what_it_did(family, device, near):
    model, batch = tiny_model(family), tiny_batch(family)
    there = on_device(model, device)
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.no_grad():
        assert near(model(**batch).logits, there(**moved).logits.cpu())
    assert on_device(there, device) is there and on_device(model, "cpu") is model
    with pytest.raises(RuntimeError, match="same device"):
        there(**batch)


def test_tied_weights_stay_tied_when_a_model_moves(device):
    there = on_device(tiny_model("olmoe", tie_word_embeddings=True), device)
    assert there.lm_head.weight is there.model.embed_tokens.weight
