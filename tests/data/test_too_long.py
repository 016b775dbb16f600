"""`data.too_long`: examples with more than `max_tokens` tokens are cut, left out and counted, or refused."""

import pytest

from fedexperts.config import RunConfig
from fedexperts.data.encode import Encoder
from fedexperts.data.pool import Pool
from fedexperts.data.too_long import fitting
from fedexperts.errors import BadData
from fedexperts.experiment.plan import plan
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.io.toml import checked
from fedexperts.models.shapes import load_shapes
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.types import Example

SHORT = Example("a", "b", "t")
LONG_PROMPT = Example("x" * 100, "b", "t")
LONG_ANSWER = Example("a", "y" * 100, "t")
POOL = Pool((SHORT, LONG_PROMPT, LONG_ANSWER), (SHORT, LONG_PROMPT), {"file": "sha"})


@pytest.fixture(scope="module")
def encoder():
    return Encoder(make_tokenizer(max_tokens=48), 16)


def test_cut_leaves_everything(encoder):
    assert fitting(POOL, encoder, "cut") is POOL


def test_drop_leaves_what_fits_and_counts_the_rest(encoder):
    kept = fitting(POOL, encoder, "drop")
    assert (kept.train, kept.test, kept.dropped, kept.hashes) == ((SHORT,), (SHORT,), {"t": 3}, POOL.hashes)
    assert all(cut.prompt_lost == cut.response_lost == 0 for cut in encoder.cuts([*kept.train, *kept.test]))


def test_refuse_says_how_many_and_how_long(encoder):
    with pytest.raises(BadData, match=r'3 of the 5 examples of t have more than data.max_tokens = 16 .* up to \d+.*"refuse"'):
        fitting(POOL, encoder, "refuse")
    fits = Pool((SHORT,), (SHORT,), {})
    assert fitting(fits, encoder, "refuse") == fits


def test_dropping_all_of_a_task_is_refused(encoder):
    with pytest.raises(BadData, match=r"all test examples of t have more than .* leaves none"):
        fitting(Pool((SHORT,), (LONG_PROMPT,), {}), encoder, "drop")


def test_a_run_drops_and_its_plan_says_so(tiny_tree, tmp_path):
    rows = [f'{{"prompt": "number {index}", "response": "{index}"}}' for index in range(40)]
    rows += [f'{{"prompt": "{index} {"x" * 400}", "response": "{index}"}}' for index in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    source = {"name": str(tmp_path / "rows.jsonl"), "task": "numbers"}
    tree = {**tiny_tree, "data": {"sources": [source], "clients": 2, "max_tokens": 32, "too_long": "drop"}}
    prepared = prepare_run(checked(RunConfig, tree), parts=Parts(load=load_shapes))
    planned = plan(prepared)
    assert planned["lost"][0]["dropped"] == 8
    assert any("exceed data.max_tokens = 32: 8" in each for each in planned["warnings"])
    examples = [example for split in prepared.clients.values() for part in (split.train, split.validation) for example in part]
    assert all(len(example.prompt) < 100 for example in examples)
    refusing = {**tree, "data": {**tree["data"], "too_long": "refuse"}}
    with pytest.raises(BadData, match="8 of the 48 examples of numbers"):
        prepare_run(checked(RunConfig, refusing), parts=Parts(load=load_shapes))
