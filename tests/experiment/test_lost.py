"""What of a run's data is lost: counted by hand on a few examples, warned of by the plan, shown by the report."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from fedexperts.config import RunConfig
from fedexperts.data.encode import Encoder
from fedexperts.experiment.lost import MOST, lost_of, percent, sentences, spread
from fedexperts.experiment.plan import plan
from fedexperts.experiment.plan_tables import plan_tables
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.io.toml import checked
from fedexperts.models.shapes import load_shapes
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.types import Example

SHORT = Example("a", "b", "t")
LONG_PROMPT = Example("x" * 100, "b", "t")
LONG_ANSWER = Example("a", "y" * 100, "t")


@pytest.fixture(scope="module")
def encoder():
    return Encoder(make_tokenizer(max_tokens=48), 16)


def test_what_is_cut_of_an_example_is_what_its_batch_lacks(encoder):
    whole = Encoder(encoder.tokenizer, 1000)
    for example in (SHORT, LONG_PROMPT, LONG_ANSWER):
        (cut,) = encoder.cuts([example])
        tokens, kept = (int(each.batch([example])["attention_mask"].sum()) for each in (whole, encoder))
        assert cut.prompt_lost + cut.response_lost == tokens - kept
        assert cut.prompt + cut.response == tokens
        assert (cut.prompt_lost > 0, cut.response_lost > 0) == (example is LONG_PROMPT, example is LONG_ANSWER)
        assert (encoder.batch([example])["labels"][0, -1] == encoder.eos) == (example is not LONG_ANSWER)


def test_shares_are_those_of_the_examples(encoder):
    train = [SHORT, LONG_PROMPT, replace(LONG_PROMPT, prompt="z" * 100), LONG_ANSWER]
    test = [SHORT, LONG_ANSWER, replace(SHORT, response="c"), replace(SHORT, prompt="c")]
    row = lost_of("t", train, test, encoder, generate_tokens=8)
    assert (row.examples, row.prompts_cut, row.answers_cut) == (4, 0.5, 0.25)
    assert (row.references_cut, row.tested_on_training, row.majority) == (0.25, 0.5, 0.75)
    assert 0.5 < row.prompt_tokens_lost < 1
    said = list(sentences([row], 16, 8))
    assert [
        any(part in each for each in said)
        for part in ("50% of the prompts", "25% of the answers", "references", "50% of the test")
    ]
    assert len(said) == 3
    assert not list(sentences([lost_of("t", [SHORT], [], encoder, 8)], 16, 8))


def test_a_small_share_is_not_said_to_be_none():
    assert [percent(share) for share in (0.001, 0.004, 0.006, 0.5, 0)] == ["under 1%", "under 1%", "1%", "50%", "0%"]


def test_of_many_examples_some_from_everywhere_are_looked_at():
    many = [replace(SHORT, prompt=str(number)) for number in range(3 * MOST)]
    looked_at = spread(many)
    assert len(looked_at) == MOST and looked_at[-1].prompt == str(3 * MOST - 3)
    assert list(spread(many[:5])) == many[:5]


def test_the_plan_says_what_is_lost(tiny_tree):
    tree = {**tiny_tree, "data": {**tiny_tree["data"], "max_tokens": 8}}
    planned = plan(prepare_run(checked(RunConfig, tree), parts=Parts(load=load_shapes)))
    assert {row["task"] for row in planned["lost"]} == {"double", "first"}
    assert any("data.max_tokens = 8 cuts" in warning for warning in planned["warnings"])
    out = StringIO()
    for table in plan_tables(planned):
        Console(file=out, width=100).print(table)
    assert "leaked" in out.getvalue()
    beyond = {**tiny_tree, "data": {**tiny_tree["data"], "max_tokens": 10**6}}
    planned = plan(prepare_run(checked(RunConfig, beyond), parts=Parts(load=load_shapes)))
    assert any("positions of" in warning for warning in planned["warnings"])
