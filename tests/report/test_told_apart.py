import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from fedexperts import report
from fedexperts.report import comparison_tables, csv_export, measures, paired, read, told_apart
from fedexperts.report.read import ClientPlan, Evaluation, Plan, ReferenceLine, RunResults

from .fake import write_comparison

T_2 = 4.302653


def run(method: str, seed: int, clients: Mapping[str, float], folder: Path = Path("none"), examples: int = 10) -> RunResults:
    """A run of one task, scored by accuracy on `examples` of each client."""
    mean = sum(clients.values()) / len(clients)
    rows = (
        *(Evaluation(1, name, "sort", examples, "accuracy", value) for name, value in clients.items()),
        Evaluation(1, None, "sort", examples * len(clients), "accuracy", mean),
        Evaluation(1, metric="overall", value=mean),
    )
    plan = Plan(method, seed, read.ModelPlan("tiny"), tuple(map(ClientPlan, clients)))
    return RunResults(folder, plan, evaluations=rows)


def seeds(method: str, values: Sequence[float]) -> list[RunResults]:
    return [run(method, seed, {"a": value, "b": value}) for seed, value in enumerate(values)]


BASE = [0.10, 0.50, 0.90]
GROUPS = {
    "fedavg": seeds("fedavg", BASE),
    "better": seeds("better", [0.200, 0.602, 1.000]),  # +10, +10.2, +10
    "alike": seeds("alike", [0.12, 0.49, 0.92]),  # +2, −1, +2
}


def test_what_is_more_than_chance_is_said_and_what_is_not():
    pairs = {(pair.one, pair.other): pair for pair in told_apart.overall(GROUPS)}
    assert list(pairs) == [("better", "fedavg"), ("alike", "fedavg"), ("alike", "better")]
    assert {key: pair.verdict for key, pair in pairs.items()} == {
        ("better", "fedavg"): "better",
        ("alike", "fedavg"): "not told apart",
        ("alike", "better"): "worse",
    }
    alike = pairs["alike", "fedavg"]  # mean 1, s = √3, so the error is 1 and t = 1 of 2 degrees of freedom
    assert alike.difference.p == pytest.approx(0.42265, rel=1e-4)
    assert alike.p == pytest.approx(0.42265, rel=1e-4)  # the largest of three is not multiplied
    words = told_apart.words(GROUPS)
    assert "better is better than fedavg (+10.1 ± 0.3)" in words and "alike is worse than better" in words
    assert "Not told apart: alike and fedavg." in words
    assert "could have seen a difference of" in words and "points (with 80 % power" in words


def test_the_final_table_and_all_reports_have_the_words(tmp_path: Path):
    assert told_apart.words(GROUPS) in comparison_tables.final(GROUPS).note
    runs = write_comparison(tmp_path / "runs", methods=("fedmoe", "fedavg", "local"), seeds=2)
    report.write([runs], tmp_path / "r.html", tmp_path / "r.csv", tmp_path / "r.md", latex=tmp_path / "r.tex")
    for name in ("r.html", "r.md", "r.tex"):
        text = (tmp_path / name).read_text()
        assert "Not told apart: " in text and "could have seen" in text, name


def test_two_runs_that_differ_by_the_same_in_every_seed_are_not_called_different():
    groups = {"fedavg": seeds("fedavg", BASE), "twin": seeds("twin", BASE)}
    (pair,) = told_apart.overall(groups)
    assert (pair.difference.mean, pair.p, pair.verdict) == (0.0, None, "no spread")
    assert not pair.told_apart


def test_a_single_seed_is_compared_over_its_clients_and_says_so():
    one, other = {"a": 0.5, "b": 0.7, "c": 0.9}, {"a": 0.4, "b": 0.4, "c": 0.7}  # +10, +30, +20
    groups = {"fedavg": [run("fedavg", 0, other)], "fedmoe": [run("fedmoe", 0, one)]}
    (pair,) = told_apart.overall(groups)
    assert pair.difference.over == "clients" and pair.difference.mean == pytest.approx(20)
    assert pair.difference.error == pytest.approx(10 / 3**0.5, rel=0.06)  # s = 10, three clients
    (table,) = told_apart.tables(groups, "fedavg")
    assert "the clients of a single seed (it says nothing of other seeds)" in table.note
    alone = {"fedavg": [run("fedavg", 0, {"a": 0.5})], "fedmoe": [run("fedmoe", 0, {"a": 0.7})]}
    assert told_apart.words(alone).startswith("No two methods can be told apart")


def test_clients_that_only_one_method_has_are_not_paired():
    groups = {"centralized": [run("centralized", 0, {"a-c": 0.6})], "fedmoe": [run("fedmoe", 0, {"a": 0.5, "b": 0.5})]}
    (pair,) = told_apart.overall(groups)
    assert pair.difference.error is None and pair.verdict == "not tested"


def test_a_perplexity_is_better_if_it_is_lower():
    runs = {
        method: [
            RunResults(
                Path("none"),
                Plan(method, seed, read.ModelPlan("tiny")),
                evaluations=(Evaluation(1, None, "text", 9, "perplexity", value),),
            )
            for seed, value in enumerate(values)
        ]
        for method, values in {"fedavg": (8.0, 9.0, 8.0), "low": (6.0, 7.1, 6.0)}.items()
    }
    runs = {
        method: [replace(each, evaluations=(*each.evaluations, replace(each.evaluations[0], task=None))) for each in every]
        for method, every in runs.items()
    }
    (pair,) = told_apart.overall(runs)
    assert (pair.measure.unit, pair.verdict) == ("", "better")


def test_reference_lines_are_compared_with_each_method():
    line = tuple(
        ReferenceLine(0, row.client, row.task, row.examples, row.metric, 0.05, line="constant answer")
        for row in GROUPS["fedavg"][0].evaluations
    )
    groups = {name: [replace(each, reference_lines=line) for each in runs] for name, runs in GROUPS.items()}
    pairs = {(pair.one, pair.other): pair for pair in told_apart.overall(groups)}
    assert len(pairs) == 6
    assert pairs["better", "constant answer"].difference.mean == pytest.approx(100 * (1.802 / 3 - 0.05))
    assert "constant answer" not in told_apart.words(groups)


def with_predictions(folder: Path, runs: Mapping[str, list[list[float]]]) -> dict[str, list[RunResults]]:
    """Runs whose predictions.jsonl has a score for each example of each seed, the same examples in all of them."""
    groups: dict[str, list[RunResults]] = {}
    for method, scores in runs.items():
        for seed, each in enumerate(scores):
            home = folder / method / f"seed-{seed}"
            home.mkdir(parents=True, exist_ok=True)
            half = len(each) // 2
            shares = {"a": each[:half], "b": each[half:]}
            rows = [
                {"round": 1, "client": client, "task": "sort", "source": "s", "metric": "accuracy", "answer": "x", "score": score}
                | {"prompt": f"{client}{number}", "reference": "y"}
                for client, share in shares.items()
                for number, score in enumerate(share)
            ]
            (home / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            values = {client: sum(share) / len(share) for client, share in shares.items()}
            groups.setdefault(method, []).append(run(method, seed, values, home, half))
    return groups


def test_where_the_scores_of_all_examples_are_known_the_interval_is_over_them_too(tmp_path: Path):
    scores = {"fedavg": [[0.0, 0.0, 0.0, 0.0]] * 2, "fedmoe": [[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]]}
    groups = with_predictions(tmp_path, scores)
    measure = measures.quality([run for runs in groups.values() for run in runs], None)
    difference = paired.difference(measure, groups["fedmoe"], groups["fedavg"])
    assert difference is not None
    assert (difference.mean, difference.over) == (50.0, "seeds and examples")
    assert difference.error == pytest.approx(100 * (1 / 3 / 4) ** 0.5, rel=0.06)  # s² = 1/3, four examples, and no seed differs
    (home := groups["fedmoe"][0].folder / "predictions.jsonl").write_text(home.read_text().partition("\n")[2])
    some = [RunResults(each.folder, each.plan, evaluations=each.evaluations) for each in groups["fedmoe"]]
    fallen_back = paired.difference(measure, some, groups["fedavg"])  # of one example there is no score
    assert fallen_back is not None and (fallen_back.over, fallen_back.error) == ("seeds", 0.0)


def test_an_example_that_two_clients_have_is_one_with_the_mean_of_its_scores(tmp_path: Path):
    scores = {"fedavg": [[0.0] * 4] * 2, "fedmoe": [[1.0, 0.0, 1.0, 0.0]] * 2}
    groups = with_predictions(tmp_path, scores)
    for runs in groups.values():
        for each in runs:  # client b has the examples of a
            path = each.folder / "predictions.jsonl"
            path.write_text(path.read_text().replace('"b0"', '"a0"').replace('"b1"', '"a1"'))
    measure = measures.quality([run for runs in groups.values() for run in runs], None)
    difference = paired.difference(measure, groups["fedmoe"], groups["fedavg"])
    assert difference is not None and (difference.mean, difference.over) == (50.0, "seeds and examples")
    assert difference.error == pytest.approx(100 * (0.5 / 2) ** 0.5, rel=0.06)  # two examples, 1 and 0: s² = 1/2


def test_tasks_are_compared_with_the_baseline_and_corrected_together(tmp_path: Path):
    runs = write_comparison(tmp_path, methods=("fedmoe", "fedavg", "local"), seeds=3)
    groups = read.grouped(read.read_all([runs]))
    pairs = told_apart.by_task(groups, "fedavg")
    assert len(pairs) == 2 * 4 and {pair.other for pair in pairs} == {"fedavg"}
    tables = told_apart.tables(groups, "fedavg")
    assert [len(table.rows) for table in tables] == [3, 8]
    assert tables[1].columns[2] == "task"


def test_the_csv_has_every_test_with_its_p_values():
    text = csv_export.to_csv({"": GROUPS}, "fedavg")
    rows = [row for row in csv.DictReader(StringIO(text)) if row["measure"] == "difference in quality"]
    assert [(row["method"], row["baseline"]) for row in rows] == [("better", "fedavg"), ("alike", "fedavg"), ("alike", "better")]
    assert float(rows[1]["p_value"]) == float(rows[1]["p_value_corrected"]) == pytest.approx(0.42265, rel=1e-4)
    assert float(rows[0]["p_value_corrected"]) == pytest.approx(3 * float(rows[0]["p_value"]))
    assert float(rows[1]["difference_high"]) == pytest.approx(1 + T_2, rel=1e-5)
    assert all(float(row["could_have_seen"]) > 0 for row in rows)
