import csv
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedexperts.errors import BadValue
from fedexperts.report import (
    axes,
    client_metrics,
    comparison_tables,
    csv_export,
    expert_sets,
    measures,
    resources,
    run_cost_tables,
    run_tables,
    scores,
)
from fedexperts.report.read import BlockPlan, ClientPlan, Evaluation, LedgerRow, ModelPlan, OnRetained, Plan, Round, RunResults
from fedexperts.report.stats import Interval
from fedexperts.report.table_format import Table, plus_minus, to_markdown, to_rich


def run(
    method: str = "fedmoe",
    seed: int = 0,
    ledger: tuple[LedgerRow, ...] = (),
    evaluations: tuple[Evaluation, ...] = (),
    rounds: tuple[Round, ...] = (),
    clients: tuple[ClientPlan, ...] = (),
) -> RunResults:
    model = ModelPlan("tiny", 1000, {"layers.0": BlockPlan(4, 2), "layers.1": BlockPlan(4, 2)})
    return RunResults(Path("results"), Plan(method, seed, model, clients), rounds, ledger, evaluations)


def scored(method: str, seed: int, overall: float) -> RunResults:
    return run(method, seed, evaluations=(Evaluation(1, metric="mean", value=overall),))


def cell(table: Table, row: str, column: str) -> str:
    return next(cells for cells in table.rows if cells[0] == row)[table.columns.index(column)]


WORK = (
    LedgerRow(
        0, "a", "profile", bytes_down=1_000_000, bytes_up=0, seconds=1, tokens=10, peak_bytes=5_000_000, flops_estimated=1e12
    ),
    LedgerRow(1, "a", "train", bytes_down=2_000_000, bytes_up=2_000_000, seconds=2, tokens=20, peak_bytes=7_000_000),
    LedgerRow(1, "b", "train", bytes_down=4_000_000, bytes_up=0, seconds=3, failed="killed"),
    LedgerRow(2, "b", "train", bytes_down=4_000_000, bytes_up=4_000_000, seconds=4, tokens=40, peak_bytes=9_000_000),
    LedgerRow(2, "a", "evaluate", bytes_down=9_000_000, bytes_up=9_000_000, seconds=9, tokens=9, peak_bytes=99_000_000),
)


def test_costs_are_sums_over_all_but_evaluations():
    table = run_cost_tables.costs(run(ledger=WORK))
    assert cell(table, "total", "down (MB)") == "11.0"  # 1 + 2 + 4 + 4
    assert cell(table, "total", "up (MB)") == "6.00"  # 2 + 4
    assert cell(table, "total", "client seconds") == "10.0"
    assert cell(table, "total", "tokens") == "70"
    assert cell(table, "total", "median peak (MB)") == "7.00"  # of 5, 7, 9: failed work has no peak
    assert cell(table, "total", "largest peak (MB)") == "9.00"
    assert cell(table, "total", "failed") == "1"
    assert cell(table, "evaluate (not in the total)", "down (MB)") == "9.00"


def test_bytes_per_client_and_round_are_those_of_training_alone():
    assert resources.bytes_per_client_round(run(ledger=WORK)) == (4_000_000 + 4_000_000 + 8_000_000) / 3


def test_bytes_until_a_round_start_with_the_stages_before_it():
    until = axes.bytes_until(run(ledger=WORK))
    assert [until(number) for number in (0, 1, 2)] == [1_000_000, 9_000_000, 17_000_000]


def test_a_client_over_its_memory_is_named_with_both_numbers():
    clients = (ClientPlan("a", memory_bytes=5_000_000), ClientPlan("b", memory_bytes=9_000_000), ClientPlan("c"))
    table = run_cost_tables.over_memory(run(ledger=WORK, clients=clients))
    assert table.rows == (("a", "7.00", "5.00", "40.0"),)


def test_experts_held_are_counted_over_layers_at_each_clients_first_and_last_training():
    assigned = {"layers.0": (0, 1), "layers.1": (0, 1, 2)}
    rounds = (
        Round(0, "profile", holds={"a": {"layers.0": (0, 1, 2, 3), "layers.1": (0, 1, 2, 3)}}),
        Round(1, holds={"a": assigned, "b": {"layers.0": (0, 1, 2, 3), "layers.1": (0, 1, 2, 3)}}),
        Round(2, holds={"a": {"layers.0": (3, 2), "layers.1": (0, 1)}}),
    )
    table = run_cost_tables.assigned_experts(run(rounds=rounds))
    assert table.rows == (("first round of each client", "6.5", "5", "8"), ("last round of each client", "6.0", "4", "8"))
    assert table.title.endswith("of 8")


REPORTED = (
    LedgerRow(0, "a", "count", metrics={"qualified": 100}),
    LedgerRow(1, "a", "train", metrics={"reached": [2.0, 1.0], "qualified": 4}),
    LedgerRow(1, "b", "train", failed="killed"),
    LedgerRow(2, "b", "train", metrics={"reached": {"layers.1": 1.0, "layers.0": 1.0}, "qualified": 2}),
)
WHOLE = {"layers.0": (0, 1, 2, 3), "layers.1": (0, 1, 2, 3)}
SELECTIVE = (
    Round(1, holds={"a": WHOLE, "b": WHOLE}, sends={"a": {"layers.0": (0, 3), "layers.1": (1,)}}, failed={"b": "killed"}),
    Round(2, holds={"a": WHOLE, "b": WHOLE}, sends={"b": {"layers.0": (), "layers.1": ()}}),
)


def test_experts_reached_are_shown_by_layer_and_experts_sent_over_all_layers():
    table = run_cost_tables.trained_and_sent(run(ledger=REPORTED, rounds=SELECTIVE))
    assert table.columns == ("experts", "of", "mean", "least", "most")
    assert table.rows == (
        ("reached in layers.0", "4", "1.5", "1.0", "2.0"),
        ("reached in layers.1", "4", "1.0", "1.0", "1.0"),
        ("sent", "8", "3.7", "0.0", "8.0"),  # a sent 3, then all it holds; b failed, then sent none
    )


def test_clients_that_send_what_they_hold_need_no_table_of_what_they_sent():
    rounds = (Round(1, holds={"a": WHOLE}),)
    assert run_cost_tables.trained_and_sent(run(ledger=WORK, rounds=rounds)).rows == ()
    assert expert_sets.num_sent(run(rounds=rounds)) == []


def test_metrics_of_any_name_are_shown_as_the_method_reports_them():
    assert run_cost_tables.reported_metrics(run(ledger=REPORTED)).rows == (("qualified", "3.00", "2.00", "4.00"),)
    assert run_cost_tables.reported_metrics(run(ledger=WORK)).rows == ()


@pytest.mark.parametrize("value", ["x", None, True, [1.0], {"layers.0": 1.0}, float("nan"), 10**400, [[1.0], [2.0]]])
def test_a_metric_that_is_not_what_its_name_promises_is_left_out(value: object):
    results = run(ledger=(*REPORTED, LedgerRow(3, "a", "train", metrics={"reached": value, "qualified": value})))
    assert client_metrics.reached(results) == {"layers.0": [2.0, 1.0], "layers.1": [1.0, 1.0]}
    assert client_metrics.of_method(results) == {"qualified": [4.0, 2.0]}


def test_runs_are_compared_by_the_metrics_that_any_of_them_has():
    groups = {"selective": [run("selective", ledger=REPORTED, rounds=SELECTIVE)], "fedavg": [run("fedavg", ledger=WORK)]}
    table = comparison_tables.comparison(groups)
    assert cell(table, "selective", "experts reached per layer and step") == "1.25"  # 1.5 and 1
    assert cell(table, "selective", "experts sent per client and round") == "3.67"
    assert cell(table, "selective", "metric: qualified") == "3"
    assert cell(table, "fedavg", "experts sent per client and round") == "–"
    alone = comparison_tables.comparison({"fedavg": groups["fedavg"]})
    assert len(alone.columns) == len(table.columns) - 3


def test_quality_shows_first_and_last_and_the_clients_at_the_end():
    evaluations = (
        Evaluation(0, None, "sort", 30, "accuracy", 0.1),
        Evaluation(5, None, "sort", 30, "accuracy", 0.5),
        *(Evaluation(5, name, "sort", 10, "accuracy", value) for name, value in (("a", 0.3), ("b", 0.8), ("c", 0.4))),
    )
    row = run_tables.quality(run(evaluations=evaluations)).rows[0]
    assert row == ("sort", "10.0", "50.0", "30.0", "35.0", "40.0", "60.0", "80.0", "3", "30", "accuracy (%)")


def test_the_worst_client_by_perplexity_has_the_highest():
    evaluations = (
        Evaluation(1, None, "text", 20, "perplexity", 5.0),
        *(Evaluation(1, name, "text", 10, "perplexity", value) for name, value in (("a", 2.0), ("b", 8.0))),
    )
    table = run_tables.quality(run(evaluations=evaluations))
    assert (cell(table, "text", "worst client"), cell(table, "text", "best client")) == ("8.00", "2.00")
    assert cell(table, "text", "metric") == "perplexity"


def test_the_overall_quality_is_a_share_unless_every_task_is_judged_by_perplexity():
    text, sort = Evaluation(1, None, "text", 20, "perplexity", 5.0), Evaluation(1, None, "sort", 20, "accuracy", 0.5)
    assert scores.unit([run(evaluations=(text, sort))], None) == "%"
    assert scores.unit([run(evaluations=(text,))], None) == ""


def test_a_failure_in_both_the_round_and_the_ledger_is_one():
    rounds = (Round(1, failed={"b": "killed by signal 9"}),)
    assert resources.failures(run(ledger=WORK, rounds=rounds)) == [resources.ClientFailure(1, "b", "train", "killed by signal 9")]


def test_a_comparison_shows_mean_and_interval_over_seeds():
    groups = {"fedmoe": [scored("fedmoe", seed, value) for seed, value in enumerate((0.1, 0.2, 0.3))]}
    assert cell(comparison_tables.comparison(groups), "fedmoe", "overall (%)") == "20.0 ± 24.8"  # 4.302653 · 10 / √3


def test_a_single_seed_shows_no_interval():
    assert cell(comparison_tables.comparison({"fedmoe": [scored("fedmoe", 0, 0.2)]}), "fedmoe", "overall (%)") == "20.0"


def test_differences_are_paired_over_the_shared_seeds():
    groups = {
        "fedavg": [scored("fedavg", seed, value) for seed, value in enumerate((0.10, 0.50, 0.90))],
        "fedmoe": [scored("fedmoe", seed, value) for seed, value in enumerate((0.12, 0.53, 0.91))],
        "local": [scored("local", 2, 0.40)],
    }
    table = comparison_tables.differences(groups, "fedavg")
    assert [row[0] for row in table.rows] == ["fedmoe", "local"]
    assert cell(table, "fedmoe", "overall (%)") == "+2.0 ± 2.5"  # 2, 3, 1: 4.302653 / √3
    assert (cell(table, "local", "shared seeds"), cell(table, "local", "overall (%)")) == ("1", "-50.0")


def test_the_baseline_is_the_given_method_else_the_first_federated_one_else_the_first():
    reference = replace(run("local"), plan=replace(run("local").plan, reference=True))
    groups = {"local": [reference], "ditto": [run("ditto")], "fedavg": [run("fedavg")]}
    assert comparison_tables.baseline_of(groups) == "ditto"
    assert comparison_tables.baseline_of({"local": [reference]}) == "local"
    assert comparison_tables.baseline_of(groups, "local") == "local"
    with pytest.raises(BadValue, match="did you mean fedavg"):
        comparison_tables.baseline_of(groups, "fedavgg")


def test_csv_gives_interval_and_difference_of_each_measure():
    groups = {
        "fedavg": [scored("fedavg", 0, 0.1), scored("fedavg", 1, 0.3)],
        "fedmoe": [scored("fedmoe", 0, 0.2), scored("fedmoe", 1, 0.4)],
    }
    rows = list(csv.DictReader(StringIO(csv_export.csv_text(csv_export.csv_lines(groups, "fedavg")))))
    assert len(rows) == 2 * (1 + len(measures.COSTS) + len(measures.ASSIGNED_IN_FULL))
    row = next(row for row in rows if row["method"] == "fedmoe" and row["measure"] == "quality")
    assert (row["task"], row["unit"], row["seeds"], row["baseline"]) == ("", "%", "2", "fedavg")
    assert float(row["mean"]) == pytest.approx(30)
    assert float(row["high"]) - float(row["mean"]) == pytest.approx(12.706205 * 10, rel=1e-6)  # s = 10·√2, n = 2
    assert float(row["difference"]) == pytest.approx(10)


def test_markdown_takes_nothing_in_a_cell_as_markup():
    table = Table("T", ("name", "value"), (("a|b<script>*\n_", "1"),))
    lines = to_markdown(table).splitlines()
    assert lines[2:] == ["| name | value |", "| --- | ---: |", "| a\\|b&lt;script&gt;\\* \\_ | 1 |"]


def test_the_terminal_takes_nothing_in_a_cell_as_markup_or_control():
    console = Console(width=80, record=True, file=StringIO())
    console.print(to_rich(Table("T", ("name",), (("[red]\x1b[2Jx",),))))
    text = console.export_text(styles=True)
    assert "[red]�[2Jx" in text


def test_a_table_turned_twice_is_the_same():
    table = Table("T", ("method", "a", "b"), (("x", "1", "2"), ("y", "3", "4")))
    assert table.transposed().rows == (("a", "1", "3"), ("b", "2", "4"))
    assert table.transposed().transposed() == table


@pytest.mark.parametrize(
    ("value", "unit", "sign", "shown"),
    [
        (Interval(61.25, 4.04, 3), "%", "", "61.2 ± 4.0"),
        (Interval(1.234, 0.5, 3), "", "", "1.23 ± 0.50"),
        (Interval(12345.6, None, 1), "MB", "", "12,346"),
        (Interval(2.0, 0.0, 2), "%", "+", "+2.0 ± 0"),
        (Interval(3.0, None, 1), "", "", "3"),
        (None, "%", "", "–"),
    ],
)
def test_a_mean_is_shown_with_the_digits_that_matter(value: Interval | None, unit: str, sign: str, shown: str):
    assert plus_minus(value, unit, sign) == shown


def test_a_run_without_results_has_tables_without_rows():
    empty = run()
    assert run_tables.one_run(empty) == ()
    assert cell(comparison_tables.final({"fedmoe": [empty]}), "fedmoe", "overall (%)") == "–"


def against_base(client: str | None, right: str, drift: tuple[float, ...] = (), round: int = 3) -> Evaluation:
    """A line of what a model got right (1) and wrong (0) of the retained task mmlu, and of its drift by layer."""
    values = tuple(map(float, right))
    retained = {"mmlu": OnRetained("likelihood", len(values), sum(values) / len(values), values)}
    return Evaluation(round, client, retained=retained, drift={f"layers.{layer}": each for layer, each in enumerate(drift)})


FORGETFUL = (
    against_base(None, "1110", round=0),
    against_base("a", "0110", (0.002, 0.010)),
    against_base("b", "1000", (0.004, 0.020)),
)


def test_what_is_retained_is_the_mean_over_clients_and_its_difference_is_paired_over_examples():
    (row,) = run_tables.retained(run(evaluations=FORGETFUL)).rows
    # base 3/4; a 2/4 and b 1/4, so 37.5 on average; by example −50, −50, −50, 0: −37.5 ± 3.182446 · 25 / 2
    assert row == ("mmlu", "75.0", "37.5", "25.0", "50.0", "-37.5 ± 39.8", "2", "4", "likelihood (%)")


def test_a_difference_without_values_of_examples_has_no_interval():
    base, after = (OnRetained("perplexity", 5, value) for value in (8.0, 10.0))
    evaluations = (Evaluation(0, retained={"text": base}), Evaluation(3, "a", retained={"text": after}))
    (row,) = run_tables.retained(run(evaluations=evaluations)).rows
    assert row[1:6] == ("8.00", "10.0", "10.0", "10.0", "+2") and row[-1] == "perplexity"


def test_drift_is_shown_of_each_layer_over_clients_and_of_all():
    table = run_tables.drift(run(evaluations=FORGETFUL))
    assert table.rows == (
        ("layer 0", "3.00", "2.00", "4.00"),
        ("layer 1", "15.0", "10.0", "20.0"),
        ("all layers", "9.00", "2.00", "20.0"),
    )


def test_methods_stand_beside_the_base_with_intervals_over_seeds():
    second = (FORGETFUL[0], against_base("a", "1110", (0.0, 0.0)), against_base("b", "0110", (0.0, 0.002)))
    groups = {"fedavg": [run("fedavg", 0, evaluations=FORGETFUL), run("fedavg", 1, evaluations=second)]}
    table = comparison_tables.retained_compared(groups)
    assert table.rows[0] == ("base model", "75.0", "")
    # 37.5 and 62.5 of the two seeds: 50 ± 12.706 · 12.5, and 75 less
    assert table.rows[1] == ("fedavg", "50.0 ± 158.8", "-25.0 ± 158.8")
    drift = comparison_tables.drift_compared(groups)
    assert drift.columns == ("method", "layer 0", "layer 1", "all layers")
    assert [each.partition(" ±")[0] for each in drift.rows[0]] == ["fedavg", "1.50", "8.00", "4.75"]  # over seeds: 9 and 0.5
    rows = list(csv.DictReader(StringIO(csv_export.csv_text(csv_export.csv_lines(groups, "fedavg")))))
    by_key = {(row["measure"], row["task"]): float(row["mean"]) for row in rows if row["mean"]}
    assert by_key["retained", "mmlu"] == pytest.approx(50) and by_key["retained − base", "mmlu"] == pytest.approx(-25)
    assert by_key["router drift", ""] == pytest.approx(4.75) and by_key["router drift, layer 1", ""] == pytest.approx(8)


def test_what_was_not_measured_has_no_table_and_no_column():
    plain = run(evaluations=(Evaluation(1, None, "sort", 30, "accuracy", 0.1), Evaluation(1, metric="mean", value=0.1)))
    assert run_tables.retained(plain).rows == run_tables.drift(plain).rows == ()
    assert comparison_tables.against_base({"fedmoe": [plain]}) == ()
    assert not any(
        "retained" in column or "drift" in column for column in comparison_tables.comparison({"fedmoe": [plain]}).columns
    )


def test_each_client_has_its_line_for_each_task_and_all_have_the_same_weight_in_the_mean():
    evaluations = (
        *(Evaluation(round, "a", "sort", 30, "rougeL", value) for round, value in ((0, 0.1), (5, 0.2))),
        *(Evaluation(round, "b", "sort", 2, "rougeL", value) for round, value in ((0, 0.2), (5, 0.4))),
        *(Evaluation(round, "b", "copy", 2, "rougeL", value) for round, value in ((0, 0.4), (5, 0.8))),
        Evaluation(5, "b", "text", 2, "perplexity", 9.0),
        *(Evaluation(5, None, task, 9, metric, 0.5) for task, metric in (("sort", "rougeL"), ("copy", "rougeL"))),
        Evaluation(5, None, "text", 9, "perplexity", 9.0),
    )
    clients = (ClientPlan("a"), ClientPlan("b"), ClientPlan("c"))
    table = run_tables.by_client(run(evaluations=evaluations, clients=clients))
    assert table.rows == (
        ("a", "sort", "30", "10.0", "20.0", "rougeL (%)"),
        ("b", "sort", "2", "20.0", "40.0", "rougeL (%)"),
        ("b", "copy", "2", "40.0", "80.0", "rougeL (%)"),
        ("b", "text", "2", "9.00", "9.00", "perplexity"),
        ("mean over clients", "", "", "20.0", "40.0", "equal weights (%)"),  # a 10 and 20; b 30 and 60
    )


@pytest.mark.parametrize(("score", "moment"), [("after_aggregation", "After"), ("before_aggregation", "Before"), (None, "After")])
def test_tables_say_which_model_of_each_client_was_scored(score: str | None, moment: str):
    results = replace(run(), run_file=f'[evaluation]\nscore = "{score}"\n' if score else "")
    assert f" {moment} aggregation: each client" in run_tables.quality(results).note
    assert f" {moment} aggregation: each client" in comparison_tables.final({"fedmoe": [results]}).note
