import json
from pathlib import Path

import pytest

from fedexperts.errors import BadRun
from fedexperts.report.read import grouped, read, read_all

from .fake import write_comparison, write_run


def test_everything_a_run_wrote_is_read(tmp_path: Path):
    run = read(write_run(tmp_path / "run", rounds=4))
    assert (run.plan.method, run.plan.seed, len(run.plan.clients)) == ("fedmoe", 0, 8)
    assert [(row.round, row.task) for row in run.rounds] == [(0, "profile"), *((number, "train") for number in range(1, 5))]
    assert len(run.ledger) == 8 + 4 * 4 + 2 * 8  # profiles, four clients in four rounds, two evaluations of all
    assert len(run.evaluations) == 3 * (8 + 4 + 1)  # rounds 0, 2, 4: each client, each of four tasks, overall
    assert run.versions["torch"] == "2.13.0"
    assert {len(row.metrics) for row in run.ledger} == {0}, "ledgers from before there were any are read too"


def test_what_a_method_told_of_itself_is_read(tmp_path: Path):
    folder = write_run(tmp_path / "run", rounds=4)
    with (folder / "ledger.jsonl").open("a") as file:
        file.write('{"round": 5, "client": "c01", "task": "train", "metrics": {"sent": 3, "reached": [2.0, 1.5]}}\n')
    assert read(folder).ledger[-1].metrics == {"sent": 3, "reached": [2.0, 1.5]}


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path):
    folder = write_run(tmp_path / "run", rounds=4)
    before = read(folder)
    for name in ("rounds", "ledger", "evals"):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write('{"round": 5, "client": "c0')
    after = read(folder)
    assert (after.rounds, after.ledger, after.evaluations) == (before.rounds, before.ledger, before.evaluations)


def test_a_run_that_has_only_its_plan_is_a_run(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    for name in ("rounds.jsonl", "ledger.jsonl", "evals.jsonl", "run.toml", "versions.json"):
        (folder / name).unlink()
    run = read(folder)
    assert (run.rounds, run.ledger, run.evaluations, run.run_file) == ((), (), (), "")


def test_a_broken_line_inside_a_file_is_named_with_file_and_line(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('"bytes_down": ', '"bytes_down": "many" , "was": ')
    (folder / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(BadRun, match=r"ledger\.jsonl, line 3, .*bytes_down"):
        read(folder)


def test_a_plan_without_its_method_is_refused(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    plan = json.loads((folder / "plan.json").read_text())
    del plan["method"]
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BadRun, match=r"plan\.json .*method"):
        read(folder)


@pytest.mark.parametrize("kind", ["empty folder", "file", "nothing"])
def test_a_path_without_a_run_is_refused_by_name(tmp_path: Path, kind: str):
    path = tmp_path / "results"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("")
    with pytest.raises(BadRun, match=r"results .*(contains no run|is not a folder)"):
        read_all([path])


def test_a_comparison_is_read_as_its_runs_and_grouped_by_method_over_seeds(tmp_path: Path):
    folder = write_comparison(tmp_path, methods=("fedmoe", "fedavg"), seeds=3)
    groups = grouped(read_all([folder]))
    assert {label: [run.plan.seed for run in runs] for label, runs in groups.items()} == {
        "fedavg": [0, 1, 2],
        "fedmoe": [0, 1, 2],
    }


def test_a_run_named_twice_is_read_once(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    assert len(read_all([folder, tmp_path, tmp_path / ".." / tmp_path.name])) == 1


def test_seed_10_comes_after_seed_2(tmp_path: Path):
    for seed in (10, 2):
        write_run(tmp_path / f"seed-{seed}", seed=seed, rounds=1)
    assert [run.plan.seed for run in read_all([tmp_path])] == [2, 10]


def test_one_method_run_twice_with_a_seed_is_told_apart_by_folder(tmp_path: Path):
    for variant in ("patient", "hasty"):
        for seed in (0, 1):
            write_run(tmp_path / variant / f"seed-{seed}", seed=seed, rounds=1)
    groups = grouped(read_all([tmp_path / "patient", tmp_path / "hasty"]))
    assert list(groups) == [f"fedmoe ({tmp_path / 'patient'})", f"fedmoe ({tmp_path / 'hasty'})"]
    assert [len(runs) for runs in groups.values()] == [2, 2]


def test_the_predictions_of_a_run_are_read_and_a_run_without_any_has_none(tmp_path: Path):
    folder = write_run(tmp_path / "run", rounds=2)
    assert read(folder).predictions == ()
    row = {"round": 2, "client": "c01", "task": "sort", "source": "synthetic/sort", "metric": "exact_match"}
    text = {"prompt": "sort b a\u2028c", "reference": "a b c", "answer": None, "score": 0.5}
    (folder / "predictions.jsonl").write_text(json.dumps({**row, **text}) + "\n" + '{"round": 2, "client": "c0')
    (only,) = read(folder).predictions
    assert (only.round, only.client, only.source, only.prompt) == (2, "c01", "synthetic/sort", "sort b a\u2028c")
    assert only.answer is None and only.score == 0.5
    (folder / "predictions.jsonl").write_text('{"round": "two"}\n')
    with pytest.raises(BadRun, match=r"predictions\.jsonl, line 1, .*round"):
        _ = read(folder).predictions
