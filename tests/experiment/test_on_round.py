"""What a caller is told after each round, and how it ends a run."""

import json

import pytest

import fedexperts
from fedexperts.errors import BadRun


class Enough(Exception):
    """Raised by a callback."""


def logged(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def test_every_round_is_told_once_with_what_it_added_to_the_logs(tiny_tree, tmp_path):
    told = []
    out = fedexperts.run(tiny_tree, tmp_path / "out", on_round=told.append)
    assert [(each.round, each.rounds, each.folder) for each in told] == [(round, 3, out) for round in (0, 1, 2, 3)]
    before, first, second, last = told
    assert (before.loss, before.losses, before.bytes_up, before.seconds) == (None, {}, 0, 0)
    assert first.scores == {} and first.client_scores == {}  # evaluated are rounds 0, 2 and 3
    for each, line in zip((first, second, last), logged(out, "rounds"), strict=True):
        jobs = [job for job in logged(out, "ledger") if (job["round"], job["task"]) == (each.round, "train")]
        assert (each.loss, each.seconds, each.failed) == (line["loss"], line["seconds"], {})
        assert each.losses == {job["client"]: job["loss"] for job in jobs} and len(each.losses) == 2
        assert each.bytes_up == sum(job["bytes_up"] for job in jobs) > 0
        assert each.bytes_down == sum(job["bytes_down"] for job in jobs) > 0
    for each in (before, second, last):
        evaluated = [line for line in logged(out, "evals") if line["round"] == each.round]
        assert each.scores == {line["task"] or "overall": line["value"] for line in evaluated if line["client"] is None}
        assert each.scores.keys() == {"double", "first", "overall"}
        assert {client: sum(tasks.values()) for client, tasks in each.client_scores.items()} == {
            line["client"]: line["value"] for line in evaluated if line["client"]
        }


def test_setup_tasks_are_told_as_round_0(tiny_tree, tmp_path):
    told = []
    fedexperts.run({**tiny_tree, "method": {"name": "fedmoe", "profile_rounds": 1}}, tmp_path / "out", on_round=told.append)
    assert [each.round for each in told] == [0, 1, 2, 3]
    assert told[0].loss is not None and told[0].scores["overall"] >= 0 and told[0].seconds > 0


@pytest.mark.parametrize("error", [Enough, KeyboardInterrupt])
def test_an_exception_ends_the_run_after_its_round_and_the_rest_is_the_same_bits(tiny_tree, tmp_path, error):
    whole = fedexperts.run(tiny_tree, tmp_path / "whole")

    def stop(done):
        if done.round == 2:
            raise error

    with pytest.raises(error):
        fedexperts.run(tiny_tree, tmp_path / "out", on_round=stop)
    assert [line["round"] for line in logged(tmp_path / "out", "rounds")] == [1, 2]
    with pytest.raises(BadRun, match="holds a run already"):
        fedexperts.run(tiny_tree, tmp_path / "out")
    told = []
    out = fedexperts.run(tiny_tree, tmp_path / "out", resume=True, on_round=told.append)
    assert [each.round for each in told] == [3]  # the others are not new
    for name in ("evals", "predictions"):
        assert (out / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes()
    assert fedexperts.run(tiny_tree, tmp_path / "out", resume=True, on_round=told.append) == out
    assert len(told) == 1  # a finished run has nothing new


def test_a_client_that_fails_is_told_by_name(tiny_tree, tmp_path):
    told = []
    tree = {**tiny_tree, "devices": {"memory_gb": [1, 1e-6, 1, 1]}, "federation": {"rounds": 1}}
    fedexperts.run(tree, tmp_path / "out", on_round=told.append)
    assert told[-1].failed.keys() == {"c02"} and "out of memory" in told[-1].failed["c02"]
    assert "c02" not in told[-1].losses
