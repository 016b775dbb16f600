"""What a run keeps of its clients' answers: which, where, and what does not change with them."""

import json
from itertools import groupby

import pytest

from fedexperts.config import RunConfig
from fedexperts.core import predictions
from fedexperts.errors import BadValue
from fedexperts.experiment import checkpoint, client_task
from fedexperts.experiment.runner import run
from fedexperts.io.manifest import digest
from fedexperts.io.toml import checked
from fedexperts.report.read import read


class Killed(Exception):
    """A run ends here."""


def config(tree, method="fedavg", **evaluation):
    settings = {**tree["evaluation"], "every": 1, **evaluation}
    return checked(RunConfig, {**tree, "method": {"name": method}, "evaluation": settings})


def over(tree, source):
    """The tree of a run of one round on other data."""
    data = {**tree["data"], "sources": [source], "max_tokens": 64, "limit": 30}
    return {**tree, "data": data, "federation": {"rounds": 1}}


def logged(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def asked(rows):
    """Client and round → what it was asked, in order."""
    return {key: [row.prompt for row in some] for key, some in groupby(rows, key=lambda row: (row.client, row.round))}


@pytest.fixture(scope="module")
def kept(tiny_tree, tmp_path_factory):
    return run(config(tiny_tree), tmp_path_factory.mktemp("kept") / "out")


def test_every_client_shows_some_of_its_test_examples_at_every_evaluation(kept):
    rows = read(kept).predictions
    assert asked(rows).keys() == {(f"c0{client}", round) for client in (1, 2, 3, 4) for round in (0, 1, 2, 3)}
    by_client = {(client, tuple(prompts)) for (client, _), prompts in asked(rows).items()}
    assert len(by_client) == 4  # the same ones at each evaluation
    assert {len(prompts) for _, prompts in by_client} == {2}  # of the five wanted: all that there are
    assert {(row.source, row.task, row.metric) for row in rows} == {
        ("synthetic/double", "double", "verbatim"),
        ("synthetic/first", "first", "verbatim"),
    }
    for row in rows:
        assert row.score == float(row.answer.strip() == row.reference.strip())


def test_with_all_of_them_their_mean_score_is_the_clients(tiny_tree, tmp_path):
    out = read(run(config(tiny_tree, "local", predictions="all", generate_tokens=4), tmp_path / "out"))
    scores = {}
    for row in out.predictions:
        scores.setdefault((row.round, row.client, row.task), []).append(row.score)
    compared = [line for line in out.evaluations if line.client is not None]
    assert len(compared) == len(scores) == 16
    for line in compared:
        found = scores[line.round, line.client, line.task]
        assert len(found) == line.examples and sum(found) / len(found) == pytest.approx(line.value)


def test_weights_and_scores_are_the_same_bits_with_and_without_them(tiny_tree, kept, tmp_path):
    without = run(config(tiny_tree, predictions=0), tmp_path / "out")
    assert not (without / "predictions.jsonl").exists()
    for name in ("evals.jsonl", "reference_lines.jsonl"):
        assert (without / name).read_bytes() == (kept / name).read_bytes()
    saved, same = (checkpoint.latest(out) for out in (kept, without))
    assert digest(saved / checkpoint.WEIGHTS) == digest(same / checkpoint.WEIGHTS)
    assert (without / "predictions.jsonl").exists() is False and "prompt" not in (kept / "ledger.jsonl").read_text()


def test_methods_seeds_and_engines_show_the_same_prompts_and_engines_the_same_answers(tiny_tree, kept, tmp_path):
    workers = {**tiny_tree, "federation": {**tiny_tree["federation"], "workers": 2}}
    parallel = run(config(workers), tmp_path / "parallel")
    assert (parallel / "predictions.jsonl").read_bytes() == (kept / "predictions.jsonl").read_bytes()
    other = read(run(config(tiny_tree, "random_moe", predictions=1), tmp_path / "other"))
    mine = asked(read(kept).predictions)
    assert {key: prompts for key, prompts in asked(other.predictions).items() if key[1]} == {
        key: prompts[:1] for key, prompts in mine.items() if key[1]
    }


def test_clients_that_are_scored_before_aggregation_show_answers_of_that_model(tiny_tree, tmp_path):
    out = run(config(tiny_tree, score="before_aggregation"), tmp_path / "out")
    rounds = {line["round"]: line["clients"] for line in logged(out, "rounds")}
    assert asked(read(out).predictions).keys() == {
        *(((f"c0{client}"), 0) for client in (1, 2, 3, 4)),
        *((client, round) for round, clients in rounds.items() for client in clients),
    }
    assert "prompt" not in (out / "ledger.jsonl").read_text()


def test_of_a_multiple_choice_the_chosen_option_is_shown_beside_the_right_one(tiny_tree, tmp_path):
    rows = [{"instruction": "Choose.", "input": f"question {n}", "choices": ["x", "y", "z"], "gold": n % 3} for n in range(40)]
    (tmp_path / "quiz.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = {"name": str(tmp_path / "quiz.jsonl"), "metric": "likelihood"}
    rows = read(run(config(over(tiny_tree, source)), tmp_path / "out")).predictions
    assert len(rows) > 4
    for row in rows:
        assert {row.answer, row.reference} <= {"A", "B", "C"} and row.score == float(row.answer == row.reference)
        assert row.source == source["name"]


def test_a_text_without_an_answer_is_shown_with_its_perplexity(tiny_tree, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(f"{json.dumps({'text': f'a text with {n} words'})}\n" for n in range(40)))
    source = {"name": str(tmp_path / "text.jsonl"), "task": "text"}
    rows = read(run(config(over(tiny_tree, source)), tmp_path / "out")).predictions
    assert len(rows) > 4
    assert {(row.answer, row.metric) for row in rows} == {(None, "perplexity")} and min(row.score for row in rows) > 1


@pytest.mark.parametrize("score", ["after_aggregation", "before_aggregation"])
def test_a_run_that_was_killed_has_every_row_once_after_it_was_resumed(tiny_tree, tmp_path, monkeypatch, score):
    settings = config(tiny_tree, score=score)
    whole = run(settings, tmp_path / "whole")
    original = checkpoint.save

    def save(out, server, *rest):
        if server.round == 2 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise Killed
        original(out, server, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Killed):
        run(settings, tmp_path / "out")
    assert {row["round"] for row in logged(tmp_path / "out", "predictions")} == {0, 1, 2}  # that of 2 will be cut off
    run(settings, tmp_path / "out", resume=True)
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()


def test_a_resumed_run_may_keep_another_number(tiny_tree, tmp_path):
    out = run(config(tiny_tree, predictions=0), tmp_path / "out")
    longer = config({**tiny_tree, "federation": {**tiny_tree["federation"], "rounds": 4}}, predictions=1)
    run(longer, out, resume=True)
    assert {(row.round, row.client) for row in read(out).predictions} == {(4, f"c0{client}") for client in (1, 2, 3, 4)}


def test_a_client_that_shows_other_examples_than_its_own_fails_alone(tiny_tree, tmp_path, monkeypatch):
    original = client_task.predictions.rows

    def rows(judged, examples):
        shown = original(judged, examples)
        seen.append(shown)
        return [{**row, "prompt": "buy"} for row in shown] if len(seen) == 1 else shown

    seen = []
    monkeypatch.setattr(client_task.predictions, "rows", rows)
    out = run(config(tiny_tree), tmp_path / "out")
    failed = [line for line in logged(out, "ledger") if line["failed"]]
    assert [(line["round"], line["task"]) for line in failed] == [(0, "evaluate")]
    assert failed[0]["failed"].startswith("its metric predictions has as answer 1 one to 'buy', which is not the example")
    assert len({row.client for row in read(out).predictions if row.round == 0}) == 3
    assert "buy" not in (out / "predictions.jsonl").read_text()
    assert {line["client"] for line in logged(out, "evals") if line["round"] == 0 and line["client"]} == {
        row.client for row in read(out).predictions if row.round == 0
    }


@pytest.mark.parametrize("value", [-1, "some", 1.5, [3]])
def test_a_number_of_answers_that_cannot_be_is_refused_in_a_sentence(tiny_tree, value):
    with pytest.raises(BadValue, match=r"^evaluation\.predictions") as refused:
        config(tiny_tree, predictions=value)
    assert len(str(refused.value)) <= 300 and "\n" not in str(refused.value)


def test_the_default_is_a_few_and_none_of_data_that_clients_bring_themselves(tiny_tree):
    assert config(tiny_tree).predictions == 5
    source = {"name": "theirs", "prompt": "q", "response": "a", "task": "t"}
    own = {**tiny_tree, "data": {"own": True, "names": ["a", "b"], "sources": [source]}}
    assert config(own).predictions == 0
    assert config(own, predictions=2).predictions == 2
    assert config(own, predictions="all").predictions > 10**5
    assert "predictions" not in config(own).resolved()["evaluation"]  # the default stays one, whatever data come later
    assert predictions.chosen([], 5) == []
