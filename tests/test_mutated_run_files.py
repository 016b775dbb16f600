"""Spoiled run files: read, planned, or refused with one short sentence; never a traceback. The benchmark tries more of them."""

import tomllib
from collections import Counter

import pytest
from mutated_run_files import VALID, spoiled

from fedexperts import config
from fedexperts.errors import LONGEST, BadValue, FedExpertsError
from fedexperts.experiment.plan import plan
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.io.toml import to_toml
from fedexperts.models.shapes import load_shapes

NUMBER = 500
PLANNED = 10  # of those that can be read


def test_what_is_spoiled_was_a_run_file(tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(VALID))
    assert plan(prepare_run(config.read(tmp_path / "run.toml"), parts=Parts(load=load_shapes)))["clients"]


def test_spoiled_run_files_are_read_or_refused_with_a_short_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path, parts, ends = tmp_path / "run.toml", Parts(load=load_shapes), Counter()
    for number in range(NUMBER):
        path.write_text(spoiled(f"test/{number}"), encoding="utf-8", errors="surrogatepass")
        try:
            settings = config.read(path)
            ends["read"] += 1
            if ends["read"] <= PLANNED and settings.model.name == "tiny":
                plan(prepare_run(settings, parts=parts))
                ends["planned"] += 1
        except FedExpertsError as error:
            ends["refused"] += 1
            assert 10 < len(str(error)) <= LONGEST, (number, str(error))
    assert ends["refused"] > 300 and ends["read"] > PLANNED and ends["planned"] >= 3, ends


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"x = {'[' * 100_000}", "nests tables or lists in each other without end"),
        (f"[{'a.' * 100_000}b]", "nests tables or lists in each other without end"),
        (f"x = {'[' * 40}1{']' * 40}", "nests tables or lists deeper than 20 levels; no setting needs that"),
        (f"seed = {'9' * 6000}", "is not TOML: Exceeds the limit"),
        ("seed = 1\nseed = 2", "is not TOML: Cannot overwrite a value"),
        ("\x00", "is not TOML: "),
    ],
)
def test_texts_that_no_parser_can_take_are_refused(tmp_path, text, said):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(BadValue, match=said):
        config.read(tmp_path / "run.toml")


def test_a_long_sentence_keeps_its_beginning_and_its_end():
    said = str(BadValue(f"training.parts = {'x' * 5000} is not allowed; give some of attention, experts"))
    assert len(said) <= LONGEST
    assert said.startswith("training.parts = xxx") and said.endswith("is not allowed; give some of attention, experts")
    assert str(BadValue("short")) == "short"


def test_the_same_seed_spoils_alike():
    assert spoiled("a/1") == spoiled("a/1") != spoiled("a/2")
    readable = 0
    for number in range(50):
        try:
            tomllib.loads(spoiled(f"a/{number}"))
            readable += 1
        except (ValueError, RecursionError):
            continue
    assert readable > 30


@pytest.mark.parametrize("limit", [10**9, 10**400])
def test_more_generated_examples_than_can_be_made_are_refused(tmp_path, limit):
    (tmp_path / "run.toml").write_text(to_toml({"data": {"sources": ["synthetic/copy"], "limit": limit}}))
    with pytest.raises(BadValue, match=r"^a limit of 10+.* examples of synthetic/copy is too many to generate"):
        prepare_run(config.read(tmp_path / "run.toml"), parts=Parts(load=load_shapes))
