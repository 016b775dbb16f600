"""Reference lines against values computed by hand, and in the folder and the tables of a run."""

import csv
import json
from dataclasses import replace

import pytest

import fedexperts
from fedexperts.config import RunConfig
from fedexperts.core.evaluation import merge
from fedexperts.core.reference_lines import CONSTANT, COPY, reference_lines
from fedexperts.experiment.reference_lines import lines_of
from fedexperts.experiment.setup import prepare_run
from fedexperts.io.toml import checked
from fedexperts.report import write
from fedexperts.types import Example


def whole(text):
    return text


def test_the_constant_is_the_clients_most_frequent_answer_to_each_task():
    colors = ("red", "blue")
    train = [Example(str(n), answer, "color", "accuracy", choices=colors) for n, answer in enumerate(("red", "blue", "blue"))]
    train += [Example("x", "seven", "number"), Example("y", "eight", "number")]
    test = [Example("a", "blue", "color", "accuracy", choices=colors), Example("b", "red", "color", "accuracy", choices=colors)]
    test += [Example("c", "seven", "number"), Example("d", "Seven.", "number"), Example("e", "nine", "number")]
    constant = reference_lines(train, test, whole)[CONSTANT]
    assert (constant.main("color"), constant.main("number")) == (1 / 2, 2 / 3)
    assert constant.overall() == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert constant.by_task()["color"]["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_the_copy_is_the_input_as_far_as_a_model_may_generate():
    test = [
        Example("Say: so it is", "so it is", "echo", "verbatim", input="so it is"),
        Example("so it is", "so", "echo", "verbatim"),
    ]
    assert reference_lines([], test, whole)[COPY].main("echo") == 1 / 2
    assert reference_lines([], test, lambda text: text[:2])[COPY].main("echo") == 1 / 2
    scores = reference_lines([], [Example("p", "k l m", "f", "token_f1", input="k l x y")], whole)[COPY]
    assert scores.main("f") == pytest.approx(2 * 2 / 7)


def test_likelihood_has_the_most_frequent_place_and_texts_have_none():
    train = [Example("", "right", "quiz", "likelihood", choices=("wrong", "right")), Example("", "text", "book", "perplexity")]
    test = [Example("", answer, "quiz", "likelihood", choices=("no", "yes")) for answer in ("yes", "yes", "no")]
    test += [Example("", "text", "book", "perplexity"), Example("", "last", "quiz", "likelihood", choices=("last",))]
    lines = reference_lines(train, test, whole)
    assert lines[CONSTANT].by_task() == {"quiz": {"likelihood": 2 / 4}} and not lines[COPY].tasks


def test_lines_of_clients_merge_as_their_scores_do(tiny_tree):
    prepared = prepare_run(checked(RunConfig, tiny_tree))
    lines = list(lines_of(prepared))
    for name in (CONSTANT, COPY):
        of_line = [line for line in lines if line["line"] == name]
        per_client = [reference_lines(split.train, split.test, whole)[name] for split in prepared.clients.values()]
        together = {line["task"]: line for line in of_line if line["client"] is None}
        if name == CONSTANT:
            assert together[None]["value"] == pytest.approx(merge(per_client).overall())
        assert together[None]["examples"] == sum(len(split.test) for split in prepared.clients.values())
        assert {line["client"] for line in of_line} == {None, *prepared.clients}


def test_a_line_that_lacks_a_task_has_no_overall_value(tiny_tree):
    prepared = prepare_run(checked(RunConfig, tiny_tree))
    test = tuple(
        replace(example, metric="likelihood", choices=(example.response, "x")) if example.task == "first" else example
        for example in prepared.clients.pool.test
    )
    pool = replace(prepared.clients.pool, test=test)
    lines = list(lines_of(replace(prepared, clients=replace(prepared.clients, pool=pool))))
    assert COPY not in {line["line"] for line in lines if line["client"] is None and line["task"] is None}


def test_a_run_and_its_report_have_them(tiny_tree, tmp_path):
    tree = {**tiny_tree, "federation": {**tiny_tree["federation"], "rounds": 1}}
    fedexperts.run(tree, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "reference_lines.jsonl").read_text().splitlines()]
    constant = next(line["value"] for line in lines if (line["line"], line["client"], line["task"]) == (CONSTANT, None, None))
    report = write([tmp_path / "run"], html=tmp_path / "page.html", csv=tmp_path / "all.csv", markdown=tmp_path / "all.md")
    quality = next(table for table in report.tables if table.title == "Quality")
    column = quality.columns.index(CONSTANT)
    assert quality.rows[-1][column] == f"{100 * constant:.1f}"
    row = next(
        row
        for row in csv.DictReader((tmp_path / "all.csv").read_text().splitlines())
        if row["method"] == CONSTANT and not row["task"]
    )
    assert float(row["mean"]) == pytest.approx(100 * constant)
    assert COPY in (tmp_path / "page.html").read_text() and COPY in (tmp_path / "all.md").read_text()
