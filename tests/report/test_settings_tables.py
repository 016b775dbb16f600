import csv
from io import StringIO
from math import sqrt
from pathlib import Path

import pytest

from fedexperts import report
from fedexperts.report import axes, comparison_tables, csv_export, settings_tables, target_ratios, targets
from fedexperts.report.read import Evaluation, LedgerRow, ModelPlan, Plan, Round, RunResults, Settings, by_setting
from fedexperts.report.table_format import Table
from fedexperts.report.targets import Target

from .fake import GAIN, TASKS, write_comparison, write_run, write_settings

WITHIN = (
    "Comparison",
    "Overall quality: told apart or not",
    "Quality of each task against fedavg: told apart or not",
    "Difference from fedavg",
)
"""The tables of a setting in which several methods were run."""


def run(
    method: str,
    qualities: dict[int, float],
    seed: int = 0,
    setting: str = "",
    reference: bool = False,
    metric: str = "accuracy",
    task: str = "sort",
    rounds: tuple[Round, ...] = (),
    ledger: tuple[LedgerRow, ...] = (),
) -> RunResults:
    """A run of one task, scored as `qualities` say in each round."""
    rows = [
        Evaluation(number, task=named, metric=metric if named else "overall", value=value)
        for number, value in qualities.items()
        for named in (task, None)
    ]
    plan = Plan(method, seed, ModelPlan("tiny"), setting=setting, reference=reference)
    return RunResults(Path("results"), plan, rounds, ledger, tuple(rows))


def settings_of(*runs: RunResults) -> Settings:
    return by_setting(runs)


def cell(table: Table, row: str, column: str) -> str:
    return next(cells for cells in table.rows if cells[0] == row)[table.columns.index(column)]


def test_the_variation_of_8_10_12_is_a_fifth():
    assert settings_tables.variation([8.0, 10.0, 12.0]) == pytest.approx(2.0 / 10.0)  # s = 2 with n − 1
    assert settings_tables.variation([5.0]) is None
    assert settings_tables.variation([0.0, 0.0]) is None


def test_the_target_is_the_best_mean_over_seeds_of_the_methods_that_federate():
    groups = {
        "fedavg": [run("fedavg", {5: 0.9}), run("fedavg", {5: 0.3}, seed=1)],  # 60 on average, once 90
        "fedmoe": [run("fedmoe", {5: 0.7})],
        "centralized": [run("centralized", {5: 0.95}, reference=True)],
    }
    assert targets.target(groups, None) == targets.target(groups, "sort") == Target("fedmoe", 70.0, "%")
    assert targets.target({"centralized": groups["centralized"]}, None) is None
    assert targets.target({"fedmoe": [run("fedmoe", {})]}, None) is None
    assert targets.target({"fedmoe": [run("fedmoe", {5: 0.0})]}, None) is None  # which everybody would have reached


def test_the_first_round_at_a_share_of_the_target_is_an_evaluated_one():
    goal = Target("fedmoe", 80.0, "%")
    scored = run("fedavg", {0: 0.1, 5: 0.5, 10: 0.72, 15: 0.79, 20: 0.7})
    assert targets.first_round(scored, None, goal, 0.9) == 10  # 72 is 90 % of 80
    assert targets.first_round(scored, None, goal, 0.99) is None  # 79.2 is wanted, 79 was reached
    assert targets.first_round(scored, "sort", goal, 0.05) == 0


def test_rounds_to_the_target_are_a_mean_over_the_seeds_that_get_there():
    goal = Target("fedmoe", 80.0, "%")
    runs = [run("fedavg", {2: 0.8}), run("fedavg", {2: 0.1, 6: 0.8}), run("fedavg", {2: 0.1})]
    cost = targets.cost_to_target(runs, None, goal, 0.9)
    assert cost is not None
    assert (cost.mean, cost.n) == (4.0, 2)
    assert targets.cost_to_target(runs[2:], None, goal, 0.9) is None


def test_the_cost_to_the_target_is_a_ratio_over_the_seeds_in_which_both_reach_it_and_the_others_are_counted():
    """Of 80 %, fedavg gets to 90 % in rounds 2, 4, 6 and 8, and fedmoe in rounds 4, 16, never and 8; in one seed neither does."""
    ends = {"fedavg": (2, 4, 6, 8, None), "fedmoe": (4, 16, None, 8, None)}
    groups = {
        method: [run(method, {1: 0.1, **({} if end is None else {end: 0.8})}, seed) for seed, end in enumerate(rounds)]
        for method, rounds in ends.items()
    }
    goal = Target("fedavg", 80.0, "%")
    against = targets.against(groups["fedmoe"], groups["fedavg"], None, goal, 0.9)
    assert (against.both, against.only_method, against.only_baseline, against.neither) == (3, 0, 1, 1)
    assert against.ratio is not None
    assert against.ratio.mean == pytest.approx(2.0)  # of 2, 4 and 1: logarithms 1, 2, 0 in halvings, s = 1
    assert against.ratio.high == pytest.approx(2 ** (1 + 4.302653 / sqrt(3)), rel=1e-5)
    swapped = targets.against(groups["fedavg"], groups["fedmoe"], None, goal, 0.9)
    assert swapped.ratio is not None and swapped.ratio.mean == pytest.approx(0.5)
    assert (swapped.only_method, swapped.only_baseline) == (1, 0)


def test_the_table_of_ratios_has_the_axes_that_all_runs_have_and_says_what_it_leaves_out():
    groups = {"fedavg": [timed("fedavg", 100.0, 50.0, 25.0)], "fedmoe": [timed("fedmoe", 10.0, 20.0, 30.0)]}
    table = target_ratios.table(groups, "fedavg")
    assert table.columns[:5] == ("method", "of the target", "rounds", "sent", "virtual time")
    assert table.columns[5:] == ("both reach it", "only it", "only fedavg", "neither")
    assert table.rows[0] == ("fedmoe", "90 %", "1.00", "1.00", "0.34", "1", "0", "0", "0")  # 60 of 175 virtual seconds
    assert "which it leaves out" in table.note
    assert target_ratios.table(groups, "local").rows == ()
    without_clock = {**groups, "local": [timed("local", None, None, None)]}
    assert "virtual time" not in target_ratios.table(without_clock, "fedavg").columns
    text = csv_export.to_csv({"": groups}, "fedavg")
    (row,) = [
        row for row in csv.DictReader(StringIO(text)) if row["measure"] == "sent to 99 % of target, ratio" and not row["task"]
    ]
    assert (row["method"], row["mean"], row["low"], row["baseline"], row["seeds"]) == ("fedmoe", "1.0", "", "fedavg", "1")


def timed(method: str, *seconds: float | None, first: int = 1, **fields) -> RunResults:
    """A run that sends 2 MB in each round, scores 40 % and 10 for each round, and whose rounds took so many virtual seconds."""
    numbers = range(first, first + len(seconds))
    rounds = tuple(Round(number, clock_seconds=each) for number, each in zip(numbers, seconds, strict=True))
    ledger = tuple(LedgerRow(number, "a", "train", bytes_down=1_500_000, bytes_up=500_000) for number in numbers)
    return run(method, {number: 0.4 + 0.1 * number for number in numbers}, rounds=rounds, ledger=ledger, **fields)


def test_the_cost_to_reach_the_target_is_in_rounds_bytes_and_virtual_time():
    settings = settings_of(
        timed("fedavg", 100.0, 50.0, 25.0), timed("fedmoe", 1.0, 1.0), timed("centralized", None, None, None, reference=True)
    )
    rounds, sent, time = settings_tables.to_target(settings)  # 70 % of fedavg: 63 and 69.3
    assert [table.title.split(" to ")[0] for table in (rounds, sent, time)] == ["Rounds", "Sent (MB)", "Virtual time (s)"]
    assert rounds.columns == sent.columns == time.columns == ("method", "90 %", "99 %")
    assert [cell(table, "fedavg", "90 %") for table in (rounds, sent, time)] == ["3 (1 of 1)", "6.00 (1 of 1)", "175.0 (1 of 1)"]
    assert [cell(table, "fedmoe", "90 %") for table in (rounds, sent, time)] == ["– (0 of 1)"] * 3
    assert [cell(table, "centralized", "99 %") for table in (rounds, sent, time)] == ["3 (1 of 1)", "6.00 (1 of 1)", "–"]


def test_where_no_run_has_a_clock_there_is_no_table_of_time():
    assert len(settings_tables.to_target(settings_of(timed("fedavg", None, None), timed("fedmoe", None)))) == 2


def test_a_run_has_a_clock_only_where_every_round_of_it_has_a_time():
    assert axes.clock_until(timed("fedavg", 3.0, None)) is None
    assert axes.virtual_seconds(timed("fedavg", 3.0, None)) is None
    assert axes.clock_until(run("fedavg", {0: 0.1})) is None
    until = axes.clock_until(timed("fedmoe", 5.0, 7.0, 2.0, first=0))  # the first is a stage before the rounds
    assert until is not None
    assert [until(round) for round in (0, 1, 2)] == [5.0, 12.0, 14.0]
    assert axes.virtual_seconds(timed("fedmoe", 5.0, 7.0, 2.0, first=0)) == 14.0


def test_of_perplexities_the_lowest_is_the_target_and_rounds_count_down_to_it():
    falling = run("fedavg", {0: 100.0, 5: 12.0, 10: 10.0}, metric="perplexity")
    goal = targets.target({"fedavg": [falling], "fedmoe": [run("fedmoe", {10: 11.0}, metric="perplexity")]}, None)
    assert goal == Target("fedavg", 10.0, "")
    assert targets.first_round(falling, None, goal, 0.9) == 10  # at most 11.1 is wanted
    assert targets.first_round(falling, None, goal, 0.8) == 5  # at most 12.5


FOUR = [
    run("fedmoe", {1: 0.2, 2: 0.5}, setting="one"),
    run("fedmoe", {1: 0.5, 2: 0.7}, setting="two"),
    run("fedavg", {1: 0.4, 2: 0.45}, setting="one"),
    run("local", {1: 0.9, 2: 0.9}, setting="one", reference=True),
    run("local", {1: 0.9, 2: 0.9}, setting="two", reference=True),
]


def test_a_table_has_each_methods_quality_in_each_setting_and_its_variation():
    table = settings_tables.overall(settings_of(*FOUR))
    assert [row[0] for row in table.rows] == ["fedmoe", "fedavg", "local"]
    assert (cell(table, "fedmoe", "one (%)"), cell(table, "fedmoe", "two (%)")) == ("50.0", "70.0")
    assert cell(table, "fedmoe", "variation, overall") == f"{sqrt(200) / 60:.4f}"  # s of 50 and 70 is √200
    assert cell(table, "fedmoe", "variation, sort") == f"{sqrt(200) / 60:.4f}"
    assert cell(table, "local", "variation, overall") == "0.0000"
    assert "divided by n − 1" in table.note


def test_a_method_that_was_not_run_in_a_setting_has_no_number_there():
    settings = settings_of(*FOUR)
    table = settings_tables.overall(settings)
    assert (cell(table, "fedavg", "two (%)"), cell(table, "fedavg", "variation, overall")) == ("–", "–")
    assert cell(settings_tables.to_target(settings)[0], "fedavg", "two, 90 %") == "–"
    titles = [each.title for each in settings_tables.all_tables(settings, "fedavg")]
    assert "one: Difference from fedavg" in titles
    assert "two: Comparison" in titles
    assert "two: Difference from fedavg" not in titles
    two, apart = settings_tables.of_setting(settings, "two", "fedavg")
    assert [row[0] for row in two.rows] == ["fedmoe", "local"]
    assert [row[:2] for row in apart.rows] == [("local", "fedmoe")]


def test_a_variation_over_some_of_the_settings_says_of_how_many():
    third = [run("fedmoe", {2: 0.6}, setting="three"), run("fedavg", {2: 0.45}, setting="two")]
    table = settings_tables.overall(settings_of(*FOUR, *third))
    assert cell(table, "fedavg", "variation, overall") == "0.0000 (2 of 3)"
    assert cell(table, "fedmoe", "variation, overall") == f"{10 / 60:.4f}"  # of 50, 70, 60


def test_rounds_to_target_leave_the_target_to_those_who_federate_and_say_whose_it_is():
    table = settings_tables.to_target(settings_of(*FOUR))[0]
    assert table.title == "Rounds to 90 % and 99 % of the target"
    assert cell(table, "fedmoe", "one, 90 %") == "2 (1 of 1)"
    assert cell(table, "fedavg", "one, 90 %") == "2 (1 of 1)"  # 45 of 50
    assert cell(table, "fedavg", "one, 99 %") == "– (0 of 1)"
    assert cell(table, "local", "two, 99 %") == "1 (1 of 1)"
    assert "one 50.0 % (fedmoe); two 70.0 % (fedmoe)" in table.note


def test_settings_of_different_tasks_have_each_their_own():
    settings = settings_of(
        run("fedmoe", {1: 0.5}, setting="one"),
        run("fedmoe", {1: 0.7}, setting="two", task="reverse"),
        run("fedmoe", {1: 9.0}, setting="three", task="text", metric="perplexity"),
    )
    table = settings_tables.overall(settings)
    assert table.columns[1:4] == ("one (%)", "two (%)", "three")
    assert [cell(table, "fedmoe", f"variation, {name}") for name in ("overall", "sort", "text")] == ["–"] * 3
    by_task = {each.title: each for each in settings_tables.by_task(settings)}
    assert by_task["Over the settings: reverse"].rows == (("fedmoe", "–", "70.0", "–"),)
    assert cell(settings_tables.to_target(settings)[0], "fedmoe", "three, 99 %") == "1 (1 of 1)"


def test_experts_are_those_of_each_clients_first_and_last_training_over_all_seeds():
    def first(number: int) -> dict[str, tuple[int, ...]]:
        return {"layers.0": tuple(range(number))}

    seed_0 = (Round(1, holds={"a": first(2), "b": first(4)}), Round(2, holds={"a": first(5)}))
    seed_1 = (Round(1, holds={"a": first(8), "b": first(2)}),)
    settings = settings_of(
        run("fedmoe", {1: 0.5}, setting="one", rounds=seed_0),
        run("fedmoe", {1: 0.5}, setting="one", rounds=seed_1, seed=1),
        run("fedmoe", {1: 0.5}, setting="two"),
    )
    table = settings_tables.assigned_experts(settings)
    assert table.rows == (("fedmoe", "4.0 (2–8)", "4.8 (2–8)", "–", "–"),)  # (3 + 5) / 2, and (4.5 + 5) / 2


def test_csv_has_targets_rounds_and_variations_of_each_task_too():
    rows = list(csv.DictReader(StringIO(csv_export.to_csv(settings_of(*FOUR), "fedavg"))))
    by_key = {(row["setting"], row["method"], row["measure"], row["task"]): row for row in rows}
    pairs = [row for row in rows if row["measure"] == "difference in quality"]  # a method has one with each other
    assert len(by_key) + len(pairs) - len({(row["setting"], row["method"]) for row in pairs}) == len(rows)
    assert by_key["one", "fedmoe", "target", ""]["mean"] == "50.0"
    assert by_key["one", "fedavg", "rounds to 90 % of target", "sort"]["mean"] == "2.0"
    missed = by_key["one", "fedavg", "rounds to 99 % of target", "sort"]
    assert (missed["seeds"], missed["of_seeds"], missed["mean"]) == ("", "1", "")
    assert float(by_key["", "fedmoe", "variation over settings", "sort"]["mean"]) == pytest.approx(sqrt(200) / 60)
    assert by_key["one", "fedmoe", "quality", ""]["baseline"] == "fedavg"
    assert by_key["two", "fedmoe", "quality", ""]["baseline"] == ""


def test_runs_without_a_setting_or_of_one_are_reported_as_ever(tmp_path: Path):
    runs = write_comparison(tmp_path / "runs", methods=("fedmoe", "fedavg"), seeds=1)
    write_run(tmp_path / "runs" / "more", method="local", setting="one")
    result = report.write([runs])
    assert [table.title for table in result.tables] == [
        "Results",
        "Comparison",
        "Overall quality: told apart or not",
        "Quality of each task against fedavg: told apart or not",
        "Difference from fedavg",
        "Rounds to 90 % and 99 % of the target",
        "Sent (MB) to 90 % and 99 % of the target",
        "Cost to the target relative to fedavg",
    ]
    write_run(tmp_path / "runs" / "two", method="local", setting="two")
    result = report.write([runs])
    assert result.tables[0].columns[1:4] == ("no setting (%)", "one (%)", "two (%)")


def test_the_report_of_settings_is_written_with_all_its_tables(tmp_path: Path):
    runs = write_settings(tmp_path / "runs")
    result = report.write([runs], tmp_path / "r.html", tmp_path / "r.csv", tmp_path / "r.md")
    titles = [table.title for table in result.tables]
    assert titles == [
        "Over the settings: overall quality",
        *(f"Over the settings: {task}" for task in TASKS),
        "Rounds to 90 % and 99 % of the target",
        "Sent (MB) to 90 % and 99 % of the target",
        *(f"{name}: Cost to the target relative to fedavg" for name in ("enforced", "standard")),
        "Experts held by a client, of 64",
        *(f"{name}: {what}" for name in ("enforced", "standard") for what in WITHIN),
    ]
    markdown, page = (tmp_path / "r.md").read_text(), (tmp_path / "r.html").read_text()
    assert [title for title in titles if f"### {title.replace('_', chr(92) + '_')}" not in markdown] == []
    assert [title for title in titles if f"<caption><span>{title}" not in page] == []
    assert f"<h1>{len(GAIN)} methods in 2 settings</h1>" in page


def test_a_run_that_is_not_finished_is_named_and_left_out_of_the_tables(tmp_path: Path):
    runs = write_settings(tmp_path / "runs", seeds=2)
    write_run(runs / "standard/fedmoe/seed-2", "fedmoe", 2, rounds=4, planned_rounds=12, setting="standard")
    result = report.write([runs], html=tmp_path / "r.html", markdown=tmp_path / "r.md")
    assert result.unfinished == ("standard: fedmoe, seed 2 (4 of 12 rounds)",)
    assert "standard: fedmoe, seed 2 (4 of 12 rounds)" in (tmp_path / "r.html").read_text()
    assert "Not finished: standard: fedmoe, seed 2 (4 of 12 rounds)." in (tmp_path / "r.md").read_text()
    comparison = next(table for table in result.tables if table.title == "standard: Comparison")
    assert cell(comparison, "fedmoe", "seeds") == "2"


def test_while_no_run_is_finished_those_under_way_are_shown(tmp_path: Path):
    for setting in ("one", "two"):
        for seed in (0, 1):
            write_run(tmp_path / f"{setting}/seed-{seed}", seed=seed, rounds=4, planned_rounds=12, setting=setting)
    result = report.write([tmp_path])
    assert len(result.unfinished) == 4
    assert cell(result.tables[0], "fedmoe", "one (%)") != "–"


@pytest.mark.parametrize("split", ["test", "validation"])
def test_reports_say_which_examples_were_scored(tmp_path: Path, split: str):
    runs = [write_run(tmp_path / f"seed-{seed}", seed=seed, split=split) for seed in (0, 1)]
    for folders in (runs[:1], runs):
        result = report.write(folders, html=tmp_path / "r.html")
        assert f"Scored on the clients&#39; {split} examples." in (tmp_path / "r.html").read_text()
        assert f"Scored on the clients' {split} examples." in result.tables[0].note


def test_bytes_before_the_rounds_are_those_of_each_client_that_took_part():
    rows = (
        LedgerRow(0, "a", "profile", bytes_down=3_000_000, bytes_up=1_000_000),
        LedgerRow(0, "b", "profile", bytes_down=3_000_000, bytes_up=1_000_000),
        LedgerRow(1, "a", "train", bytes_down=5_000_000, bytes_up=2_000_000),
        LedgerRow(1, "c", "train", bytes_down=7_000_000, bytes_up=2_000_000),
        LedgerRow(1, "a", "evaluate", bytes_down=9_000_000),
    )
    table = comparison_tables.comparison({"fedmoe": [RunResults(Path("r"), Plan("fedmoe", 0, ModelPlan("tiny")), ledger=rows)]})
    assert cell(table, "fedmoe", "sent before the rounds per client (MB)") == "4.00"
    assert cell(table, "fedmoe", "down per client and round (MB)") == "6.00"
    assert cell(table, "fedmoe", "up per client and round (MB)") == "2.00"
    assert cell(table, "fedmoe", "sent per client and round (MB)") == "8.00"
