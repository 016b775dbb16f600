"""The benchmark of ceilings, on a set so small that its numbers can be told beforehand."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import ceilings
from fedexperts.data.encode import Encoder
from fedexperts.errors import BadRun
from fedexperts.models.load import load
from fedexperts.moe.precision import compute_dtype
from fedexperts.types import Example

ASKED = ceilings.Asked(epochs=4, lr=1e-2, batch=4, max_tokens=24, limit=None, validation=False, precision="float32")


@pytest.fixture
def colours(tmp_path):
    """A set of two classes that a word tells apart, as large as each other."""
    rows = [{"text": f"{['red', 'blue'][number % 2]} {number}", "label": number % 2} for number in range(40)]
    for name, chosen in (("colours.train.jsonl", rows[:32]), ("colours.test.jsonl", rows[32:])):
        lines = ({**row, "label_name": ["warm", "cold"][row["label"]]} for row in chosen)
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "colours.train.jsonl")


@pytest.fixture(scope="module")
def base(tiny_folder):
    return load(str(tiny_folder))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_set_is_measured_beside_tf_idf_and_the_most_frequent_answer_and_the_base_stays_as_it_is(
    tiny_folder, colours, precision
):
    base = load(str(tiny_folder), dtype="float32")
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    found = ceilings.ceiling(base, colours, replace(ASKED, precision=precision))
    assert compute_dtype(base.model) == getattr(torch, precision)
    assert (found["train"], found["test"], found["metric"]) == (32, 8, "accuracy")
    assert found["tfidf"]["accuracy"] == 1.0 and found["majority"] == 0.5
    assert found["fine_tuned"]["perplexity"] < found["zero_shot"]["perplexity"] / 2
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.model.named_parameters())


def test_for_choosing_settings_rows_kept_out_of_training_are_scored(base, colours):
    found = ceilings.ceiling(base, colours, replace(ASKED, epochs=1, limit=2, validation=True))
    assert (found["train"], found["test"]) == (29, 2)
    kept, held = ceilings.held_apart(list(range(100)))
    assert len(held) == 10 and sorted(kept + held) == list(range(100)) and (kept, held) == ceilings.held_apart(list(range(100)))


def test_a_finished_set_is_kept_and_one_measured_otherwise_is_refused(base, colours, tmp_path, monkeypatch):
    asked, out = replace(ASKED, epochs=1), tmp_path / "out"
    first = ceilings.measure(base, [colours], asked, out)
    with monkeypatch.context() as patch:
        patch.setattr(ceilings, "ceiling", None)
        assert ceilings.measure(base, [colours], asked, out) == first
    with pytest.raises(BadRun, match=r"was measured with another epochs, lr; give another --out"):
        ceilings.measure(base, [colours], replace(asked, epochs=2, lr=0.1), out)


def test_the_table_shows_every_gap_in_points_and_whether_what_was_wanted_was_reached():
    result = {
        "set": "banking77",
        "train": 10003,
        "test": 3080,
        "metric": "accuracy",
        "zero_shot": {"accuracy": 0.0, "perplexity": 40.0},
        "fine_tuned": {"accuracy": 0.79, "perplexity": 1.25},
        "tfidf": {"accuracy": 0.88, "C": 30.0},
        "majority": 0.013,
        "seconds": {"training": 60, "scoring": 30},
    }
    free = {**result, "set": "dolly/closed_qa", "tfidf": None, "majority": None, "metric": "token_f1"}
    free |= {"zero_shot": {"token_f1": 0.1, "perplexity": 30.0}, "fine_tuned": {"token_f1": 0.2, "perplexity": 9.0}}
    _, row, other = ceilings.table([result, free], known=["dolly"])
    assert row == [
        *("banking77", "10,003 / 3,080", "accuracy", "0.0", "79.0", "88.0", "-9.0", "1.3", "+77.7"),
        *("40 → 1.25", "1.5"),
    ]
    assert other[0] == "dolly/closed_qa *" and other[3:9] == ["10.0", "20.0", "-", "-", "-", "-"]
    assert ceilings.wanted([result, free]) == ["banking77: 9.0 points below TF-IDF + LR; at most 8 wanted: MISSED"]


def test_each_batch_has_examples_of_like_length_and_each_example_comes_once():
    lengths = [number % 7 for number in range(70)]
    found = ceilings.batches(lengths, 10, seed="0")
    assert sorted(place for batch in found for place in batch) == list(range(70))
    assert sorted([*{lengths[place] for place in batch}] for batch in found) == [[number] for number in range(7)]
    assert found == ceilings.batches(lengths, 10, seed="0") != ceilings.batches(lengths, 10, seed="1")


def test_the_length_of_an_example_is_what_the_model_is_given(base):
    encoder = Encoder(base.tokenizer, 8)
    assert ceilings.lengths([Example("ab", "c", "t"), Example("a" * 50, "b" * 50, "t")], encoder) == [5, 8]


def test_the_learning_rate_rises_for_a_tenth_and_falls_to_zero():
    rates = [ceilings.rate(step, 100) for step in range(101)]
    assert max(rates) <= 1 and rates[0] == pytest.approx(1 / 11) and rates[55] == pytest.approx(0.5) and rates[100] == 0
    assert rates.index(max(rates)) == 10


def test_the_words_that_all_prompts_share_are_no_part_of_a_text():
    assert ceilings.shared(["Which? red", "Which? blue", "Which? black"]) == len("Which? ")
    assert ceilings.shared(["same", "same"]) == 4
