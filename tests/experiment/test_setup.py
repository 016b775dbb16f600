"""The planned sizes of a run's batches."""

from random import Random

import pytest

from fedexperts.config import RunConfig
from fedexperts.core.training import fit
from fedexperts.data.encode import Encoder
from fedexperts.experiment.setup import Parts, longest_response, prepare_run, target_places
from fedexperts.io.toml import checked
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.footprint import footprint
from fedexperts.moe.logits import IGNORED
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import tiny_model, tiny_tokenizer
from fedexperts.types import Client, ClientContext, Example, Split, Training


def words(number):
    return " ".join(["w5"] * number)


def example(prompt, response):
    """An example of this many words."""
    return Example(words(prompt), words(response), "t")


def places(batch):
    """How many places have a target: those whose next token has a label."""
    return int((batch["labels"][:, 1:] != IGNORED).any(dim=0).sum())


def test_the_longest_response_is_counted_in_tokens_including_the_end_token():
    examples = [example(9, 1), example(1, 3), example(1, 3)]
    assert longest_response(tiny_tokenizer(), examples) == 4
    assert longest_response(make_tokenizer(64), [Example("a", "été", "t")]) == 6  # bytes


@pytest.mark.parametrize("max_tokens", [8, 24, 64])
def test_no_batch_has_more_target_positions_than_target_places(max_tokens):
    rng, encoder, numbers = Random(0), Encoder(tiny_tokenizer(), max_tokens), set()
    for _ in range(60):
        size, longest = rng.randint(1, 5), rng.randint(1, 12)
        chosen = [example(rng.randint(0, 60), rng.randint(0, longest)) for _ in range(size)]
        batch = encoder.batch(chosen)
        most = target_places(longest_response(tiny_tokenizer(), chosen), (size, max_tokens), encoder_decoder=False)
        assert places(batch) <= most <= max_tokens
        numbers.add(places(batch) == min(most, max_tokens - 1))
    assert numbers == {True, False}


def test_responses_without_overlap_use_all_target_places():
    examples = [example(1, 1), example(3, 1), example(5, 1)]
    assert target_places(longest_response(tiny_tokenizer(), examples), (3, 64), encoder_decoder=False) == 6
    assert places(Encoder(tiny_tokenizer(), 64).batch(examples)) == 6


def test_the_responses_of_an_encoder_decoder_all_start_at_the_first_position():
    examples = [example(1, 1), example(3, 6), example(5, 2)]
    most = [target_places(longest_response(tiny_tokenizer(), examples), (3, tokens), encoder_decoder=True) for tokens in (64, 4)]
    widths = [Encoder(tiny_tokenizer(), tokens, encoder_decoder=True).batch(examples)["labels"].shape[1] for tokens in (64, 4)]
    assert most == widths == [7, 4]


@pytest.mark.parametrize("apart", [False, True], ids=["answers in line", "answers apart"])
def test_training_with_short_responses_takes_at_most_the_planned_memory_and_not_much_less(apart):
    model, tuning, tokens = tiny_model("olmoe", vocab_size=2048), Tuning(), 64
    examples = [example(61 - 3 * (number % 4) if apart else 61, 1) for number in range(16)]
    data, client = Split(examples, examples[:1], examples[:1]), Client("c01", len(examples))
    context = ClientContext(
        client, model, data, Encoder(tiny_tokenizer(), tokens), Training(**vars(tuning), batch_size=4), client_state={}
    )
    most = target_places(longest_response(tiny_tokenizer(), examples), (4, tokens), encoder_decoder=False)

    measured = fit(prepare(model, tuning, seed="0"), context, seed="0", steps=3).cost.peak_bytes
    planned, everywhere = (
        footprint(model, tuning, (4, tokens), target_positions=each).of(anatomy(model).all_experts) for each in (most, None)
    )
    assert most == 8
    assert measured <= planned <= 1.5 * measured
    assert everywhere > 1.5 * measured


def test_a_run_plans_with_the_longest_response_of_its_data_and_searches_it_once(tiny_tree, tmp_path):
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *(f"text {n},{'ab'[n % 2]}" for n in range(60))]))
    data = {**tiny_tree["data"], "sources": [str(tmp_path / "mine.csv")], "limit": 24}
    config, parts = checked(RunConfig, {**tiny_tree, "data": data}), Parts()
    server = prepare_run(config, parts=parts).server
    model = parts.base(config.model).model
    assert server.footprint == footprint(model, Tuning(), (2, 24), target_positions=2 * (1 + 1))
    assert server.footprint.activation_bytes < footprint(model, Tuning(), (2, 24)).activation_bytes
    assert prepare_run(config.model_copy(update={"seed": 7}), parts=parts).server.footprint is server.footprint
    assert list(parts.responses.values()) == [2]
