"""Packed batches: the same losses, gradients and routing as one example in each row, for every family that can."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fedexperts.config import RunConfig
from fedexperts.core.training import cross_entropy
from fedexperts.data.encode import Encoder, first_fit_decreasing
from fedexperts.errors import BadValue
from fedexperts.experiment.runtime import encoder_for
from fedexperts.experiment.setup import prepare_run
from fedexperts.federation import jobs_for
from fedexperts.io.toml import checked
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.moe.logits import IGNORED
from fedexperts.moe.packing import real_tokens, require_packing
from fedexperts.moe.routing import Recorder, balance_loss
from fedexperts.testing import FAMILIES, VOCABULARY, tiny_model
from fedexperts.types import ClientContext, Example

MIXING = ("switch_transformers", "gpt_oss")  # transformers gives the masks of gpt-oss no positions
DECODERS = [family for family in FAMILIES if family not in MIXING]
EXAMPLES = [Example("ab" * length, "c" * (1 + length % 3), "t") for length in (9, 1, 4, 2, 7, 0, 3)]


@pytest.fixture(scope="module")
def encoder():
    return Encoder(make_tokenizer(max_tokens=64), 32)


def small_ids(batch):
    """`batch` in the vocabulary of the tiny models."""
    return {
        name: torch.where(ids >= 0, ids % (VOCABULARY - 8) + 4, ids) if name in ("input_ids", "labels") else ids
        for name, ids in batch.items()
    }


def test_windows_hold_each_example_once_and_no_more_than_fits():
    lengths = [5, 3, 8, 2, 2, 7]
    windows = first_fit_decreasing(lengths, 10)
    assert windows == [[2, 3], [5, 1], [0, 4]]
    assert first_fit_decreasing([10, 10], 10) == [[0], [1]] and first_fit_decreasing([], 4) == []


def test_positions_begin_anew_and_tell_padding(encoder):
    packed, batch = encoder.packed(EXAMPLES), encoder.batch(EXAMPLES)
    assert len(packed["input_ids"]) < len(EXAMPLES) and packed["input_ids"].shape[1] <= 32
    assert torch.equal(real_tokens(packed["position_ids"]), packed["attention_mask"] == 1)
    assert int(packed["attention_mask"].sum()) == int(batch["attention_mask"].sum())
    assert int(((packed["position_ids"] == 0) & (packed["attention_mask"] == 1)).sum()) == len(EXAMPLES)
    assert sorted(packed["labels"][packed["labels"] != IGNORED]) == sorted(batch["labels"][batch["labels"] != IGNORED])
    assert (packed["labels"][packed["position_ids"] == 0] == IGNORED).all(), "no example is predicted from the one before"


@pytest.mark.parametrize("family", DECODERS)
def test_losses_gradients_and_routing_are_those_of_single_rows(family, encoder):
    found = []
    for encode in (encoder.batch, encoder.packed):
        model = tiny_model(family)
        with Recorder(model, keep_logits=True) as recorder:
            loss = cross_entropy(model, small_ids(encode(EXAMPLES)))
        balance = balance_loss(recorder)
        (loss + balance).backward()
        gradients = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
        found.append((loss, balance, gradients, recorder.routing().counts))
    (loss, balance, gradients, counts), (packed_loss, packed_balance, packed_gradients, packed_counts) = found
    assert (loss - packed_loss).abs() <= 1e-5 and (balance - packed_balance).abs() <= 1e-5
    assert all(torch.equal(counts[block], packed_counts[block]) for block in counts)
    assert (gradients - packed_gradients).abs().max() <= 1e-5 * max(1.0, float(gradients.abs().max()))


def test_attention_would_mix_examples_without_positions(encoder):
    model, packed = tiny_model("mixtral"), small_ids(encoder.packed(EXAMPLES))
    mixed = {name: each for name, each in packed.items() if name != "position_ids"}
    assert (cross_entropy(model, packed) - cross_entropy(model, mixed)).abs() > 1e-4


def test_models_that_would_mix_examples_are_refused():
    for family in DECODERS:
        require_packing(tiny_model(family))
    with pytest.raises(BadValue, match="is an encoder-decoder; leave it out"):
        require_packing(tiny_model("switch_transformers"))
    with pytest.raises(BadValue, match="GptOssForCausalLM does not use them for its attention"):
        require_packing(tiny_model("gpt_oss"))
    require_packing(tiny_model("gpt_oss").to("meta"))
    linear = tiny_model("mixtral")
    linear.config = SimpleNamespace(is_encoder_decoder=False, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(BadValue, match="has layers of linear_attention"):
        require_packing(linear)


def test_a_run_with_packing_trains_on_the_same_tokens(tiny_tree):
    losses = []
    for packing in (False, True):
        training = {**tiny_tree["training"], "packing": packing, "batch_size": 6, "label_smoothing": 0.0}
        prepared = prepare_run(checked(RunConfig, {**tiny_tree, "training": training}))
        job, context = first_job(prepared)
        update = prepared.method.train(job, context)
        losses.append((update.metrics["loss"], update.cost.tokens))
    (loss, tokens), (packed_loss, packed_tokens) = losses
    assert tokens == packed_tokens and loss == pytest.approx(packed_loss, abs=1e-4)


def first_job(prepared):
    """The first client's job, and its context."""
    client = next(iter(prepared.server.clients.values()))
    (job,) = jobs_for(replace(prepared.server, round=1, task="train"), prepared.method, [client])
    data, encoder = prepared.data[client.name], encoder_for(prepared)
    return job, ClientContext(client, prepared.base.model, data, encoder, prepared.training, {})
