"""Results as data: every column as declared, every number that of the logs, and the same in files."""

import json
import math
import re
from pathlib import Path

import pandas
import pytest

import fedexperts as library
from fedexperts.errors import BadRun, BadValue
from fedexperts.report.frames import FRAMES, KEYS, reference_page
from fedexperts.report.read import read
from fedexperts.report.results import results

from .fake import write_comparison, write_run, write_settings

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "results.md"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("compared"), ("fedmoe", "fedavg"), seeds=2, retained=True)


def test_the_page_of_the_reference_is_made_of_the_declarations():
    assert PAGE.read_text() == reference_page(), "python -m fedexperts.report.frames > docs/reference/results.md"
    assert re.findall(r"^## `(\w+)`$", PAGE.read_text(), re.MULTILINE) == list(FRAMES)


@pytest.mark.parametrize("name", FRAMES)
def test_a_table_has_the_declared_columns_with_rows_and_without(compared, tmp_path, name):
    empty = write_run(tmp_path / "run", rounds=2)
    for log in ("rounds", "evals", "ledger"):
        (empty / f"{log}.jsonl").write_text("")
    for some in (results(compared), results(empty)):
        frame = getattr(some, name)
        assert [(column, str(dtype)) for column, dtype in frame.dtypes.items()] == [
            (column.name, column.dtype) for column in (*KEYS, *FRAMES[name].columns)
        ]
    assert all(column.meaning for column in FRAMES[name].all_columns)


def test_every_run_of_a_comparison_has_its_rows_by_method_and_seed(compared):
    some = results(compared)
    wanted = {(method, seed) for method in ("fedmoe", "fedavg") for seed in (0, 1)}
    for frame in (some.runs, some.clients, some.rounds, some.evaluations, some.ledger, some.experts, some.retained, some.drift):
        assert set(frame.groupby(["method", "seed"]).groups) == wanted
    assert len(some.runs) == 4 and some.runs.finished.all() and set(some.runs.rounds_done) == {12}
    assert len(some.predictions) == len(some.reference_lines) == 0


def test_numbers_are_those_of_the_logs(compared):
    folder = compared / "fedmoe" / "seed-1"
    run, some = read(folder), results(folder)
    assert len(some.ledger) == len(run.ledger) and some.ledger.bytes_up.sum() == sum(row.bytes_up for row in run.ledger)
    assert some.ledger.failed.notna().sum() == 1  # in round 5
    scored = [row for row in run.evaluations if row.metric is not None]
    main = some.evaluations[some.evaluations.main]
    assert main.value.tolist() == [row.value for row in scored]
    assert set(main[main.task.isna()].metric) == {"mean"} and main[main.task.isna()].client.isna().all()
    trained = some.rounds[some.rounds.task == "train"].set_index("round")
    logged = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert trained.loss.tolist() == [line["loss"] for line in logged if line["task"] == "train"]
    assert (trained.clients.tolist(), trained.failed.sum()) == ([4] * 12, 1)
    assert trained.bytes_down[5] == sum(row.bytes_down for row in run.ledger if (row.round, row.task) == (5, "train"))
    assert trained.clock_seconds.isna().all()


def test_experts_say_who_held_trained_and_used_each(tmp_path):
    folder = write_run(tmp_path / "run", "fedavg", rounds=1, clients=("a", "b", "c"), layers=1)
    block = "model.layers.0.mlp"
    held = {name: {block: [0, 3, 7]} for name in ("a", "b", "c")}
    line = {"round": 1, "task": "train", "clients": ["a", "b", "c"], "failed": {"c": "no"}, "holds": held, "seconds": 1.0}
    line |= {"sends": {"b": {block: [3]}}, "uses": {"a": {block: [10, 30, 0]}, "b": {block: [0, 0, 0]}}}
    (folder / "rounds.jsonl").write_text(json.dumps(line) + "\n")
    frame = results(folder).experts.set_index(["client", "expert"])
    trained = {("a", 0), ("a", 3), ("a", 7), ("b", 3)}  # b sent one, and the answer of c was not used
    assert {place for place, value in frame.trained.items() if value} == trained
    assert len(frame) == 9 and set(frame.block) == {block}
    assert frame.tokens["a"].tolist() == [10, 30, 0] and frame.share["a"].tolist() == [0.25, 0.75, 0.0]
    assert frame.share["b"].isna().all() and frame.tokens["c"].isna().all()


def test_all_metrics_of_a_task_have_their_rows_and_the_main_one_is_marked(tmp_path):
    folder = write_run(tmp_path / "run", rounds=2)
    line = {"round": 2, "client": "c01", "task": "sort", "examples": 3, "metric": "rouge1", "value": 0.5}
    (folder / "evals.jsonl").write_text(json.dumps({**line, "metrics": {"rouge1": 0.5, "perplexity": None}}) + "\n")
    rows = results(folder).evaluations
    assert rows[["metric", "main", "examples"]].values.tolist() == [["rouge1", True, 3], ["perplexity", False, 3]]
    assert rows.value[0] == 0.5 and math.isnan(rows.value[1])


def test_settings_keep_the_names_of_their_run_files_and_variants_theirs(tmp_path):
    write_settings(tmp_path / "out")
    runs = results(tmp_path / "out").runs
    assert set(runs.setting) == {"standard", "enforced"} and len(runs) == 2 * 4 * 2


def test_what_is_written_as_csv_and_parquet_is_read_back_the_same(compared, tmp_path):
    some = results(compared)
    written = some.write(tmp_path / "csv")
    assert {path.stem for path in written} == {*FRAMES, "columns"}
    some.write(tmp_path / "parquet", format="parquet", tables=["evaluations", "experts", "ledger"])
    assert len(list((tmp_path / "parquet").iterdir())) == 4
    for name in ("evaluations", "experts", "ledger"):
        frame = getattr(some, name)
        same = {column.name: column.dtype for column in FRAMES[name].all_columns}
        read_back = pandas.read_csv(
            tmp_path / "csv" / f"{name}.csv",
            dtype=same,
            keep_default_na=False,
            na_values={column: [""] for column in same if column != "setting"},
        )
        pandas.testing.assert_frame_equal(read_back, frame, check_exact=True)
        pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "parquet" / f"{name}.parquet"), frame, check_exact=True)
    columns = pandas.read_csv(tmp_path / "csv" / "columns.csv")
    assert len(columns) == sum(len(frame.all_columns) for frame in FRAMES.values()) and columns.meaning.notna().all()


def test_an_unfinished_run_has_the_rounds_that_are_there_and_half_a_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", rounds=4, planned_rounds=9)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 5, "cli')
    some = results(folder)
    assert some.rounds["round"].max() == 4
    assert some.runs[["rounds_planned", "rounds_done", "finished"]].values.tolist() == [[9, 4, False]]
    assert str(some).splitlines()[-1].startswith("1 run, 1 not finished; tables: ") and "fedmoe" in str(some)
    write_run(tmp_path / "other", "fedavg", rounds=4)
    assert "<p>2 runs, 1 not finished and left out here; " in results(tmp_path)._repr_html_()


def test_a_folder_that_is_damaged_or_no_runs_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(BadRun, match="contains no run"):
        results(tmp_path)
    with pytest.raises(BadRun, match="is not a folder"):
        results(str(tmp_path / "nowhere"))
    folder = write_run(tmp_path / "run")
    (folder / "evals.jsonl").write_text('{"round": "x"}\n')
    with pytest.raises(BadRun, match=r"evals\.jsonl, line 1, does not have the format"):
        results(folder)


def test_tables_and_formats_that_there_are_not_are_refused_with_the_nearest(compared, tmp_path):
    with pytest.raises(BadValue, match=r"there is no table 'evaluation'; .*did you mean evaluations\?"):
        results(compared).write(tmp_path / "out", tables=["rounds", "evaluation"])
    with pytest.raises(BadValue, match=r"format = 'excel' is not one of csv, parquet"):
        results(compared).write(tmp_path / "out", format="excel")
    assert not (tmp_path / "out").exists()


def test_a_notebook_and_print_show_the_table_of_results(compared):
    some = results([compared / "fedmoe", compared / "fedavg"])
    html = some._repr_html_()
    assert html.startswith("<table>") and html.count("<tr>") == 3 and "fedmoe" in html and "4 runs" in html
    assert "<script" not in html and len(html) < 5_000
    assert "fedavg" in str(some) and "tables: runs, clients" in str(some) and len(str(some).splitlines()) > 5


def test_names_in_a_notebook_are_text(tmp_path):
    folder = write_run(tmp_path / "run", method="<b>mine</b>")
    assert "&lt;b&gt;mine" in results(folder)._repr_html_() and "<b>" not in results(folder)._repr_html_()


def test_the_package_offers_it_and_the_command_writes_the_same(compared, fedexperts, tmp_path):
    assert len(library.results(compared).runs) == 4
    code, out, err = fedexperts("results", compared, "--to", tmp_path / "data", "--table", "rounds", "--format", "parquet")
    assert (code, err) == (0, "") and out.count("written: ") == 2
    frame = pandas.read_parquet(tmp_path / "data" / "rounds.parquet")
    pandas.testing.assert_frame_equal(frame, library.results(compared).rounds)
    code, _, err = fedexperts("results", compared, "--table", "round")
    assert code == 2 and "did you mean rounds?" in err
    assert not (compared / "tables").exists()
    assert fedexperts("results", compared)[0] == 0 and (compared / "tables" / "evaluations.csv").is_file()
    assert len(library.results(compared).runs) == 4
