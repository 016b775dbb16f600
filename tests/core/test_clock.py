"""Devices in whole runs: the clock, the deadline, and jobs that exceed the memory."""

import csv
import json
from io import StringIO

import pytest
import torch
from older import without_hashes

from fedexperts import report
from fedexperts.config import RunConfig
from fedexperts.errors import BadRun
from fedexperts.experiment import checkpoint
from fedexperts.experiment.plan import plan
from fedexperts.experiment.runner import clock_for, run
from fedexperts.experiment.setup import prepare_run
from fedexperts.io.toml import checked
from fedexperts.report import axes, resources
from fedexperts.report.read import read

# A megabyte takes the first client a second down and two up, and a GFLOP a tenth of one; the others are ten times as slow.
FAST = {"flops": 1e10, "down_mbit": 8, "up_mbit": 4}
SLOW = {"flops": 1e9, "down_mbit": 0.8, "up_mbit": 0.4}


def config(tree, method="fedavg", rounds=2, each=2, **devices):
    federation = {"rounds": rounds, "clients_per_round": each}
    return checked(RunConfig, {**tree, "method": {"name": method}, "federation": federation, "devices": devices})


def lines(path, **fields):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


@pytest.fixture(scope="module")
def clocked(tiny_tree, tmp_path_factory):
    """Two rounds of all four clients, the first of them fast."""
    settings = config(tiny_tree, each=4, profile=[FAST, SLOW, SLOW, SLOW])
    return run(settings, tmp_path_factory.mktemp("clocked") / "out")


def test_each_round_lasts_as_its_slowest_client_and_each_job_as_its_bytes_and_flops_say(clocked):
    seconds = {"c01": (1e-6, 1e-10, 2e-6), "c02": (1e-5, 1e-9, 2e-5), "c03": (1e-5, 1e-9, 2e-5), "c04": (1e-5, 1e-9, 2e-5)}
    for line in lines(clocked / "rounds.jsonl"):
        entries = lines(clocked / "ledger.jsonl", round=line["round"], task="train")
        assert len(entries) == 4
        for entry in entries:
            of_byte_down, of_flop, of_byte_up = seconds[entry["client"]]
            expected = entry["bytes_down"] * of_byte_down + entry["flops_estimated"] * of_flop + entry["bytes_up"] * of_byte_up
            assert entry["clock_seconds"] == pytest.approx(expected)
        assert line["clock_seconds"] == max(entry["clock_seconds"] for entry in entries)
        assert min(entries, key=lambda entry: entry["clock_seconds"])["client"] == "c01"
    assert {entry["clock_seconds"] for entry in lines(clocked / "ledger.jsonl", task="evaluate")} == {None}


def test_the_plan_says_which_device_each_client_has(clocked):
    devices = json.loads((clocked / "plan.json").read_text())["devices"]
    assert list(devices) == ["c01", "c02", "c03", "c04"]
    assert [device["flops_per_second"] for device in devices.values()] == [1e10, 1e9, 1e9, 1e9]


def test_a_trace_of_devices_is_read_once(tiny_tree, tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text("flops,memory_gb,down_mbit,up_mbit\n" + "1e12,1,8,8\n" * 4)
    prepared = prepare_run(checked(RunConfig, {**tiny_tree, "devices": {"profile": {"csv": str(path)}}}))
    path.unlink()
    devices = plan(prepared)["devices"]
    assert list(devices) == list(prepared.clients)
    assert clock_for(prepared).profiles == prepared.profiles
    assert {device["flops_per_second"] for device in devices.values()} == {1e12}


def test_stages_before_the_rounds_count_in_the_time_of_the_run(tiny_tree, tmp_path):
    out = run(config(tiny_tree, "fedmoe", rounds=1, profile=SLOW), tmp_path / "out")
    stage, first = lines(out / "rounds.jsonl")
    assert (stage["round"], stage["task"]) == (0, "profile")
    assert min(stage["clock_seconds"], first["clock_seconds"]) > 0
    until = axes.clock_until(read(out))
    assert [until(0), until(1)] == [stage["clock_seconds"], stage["clock_seconds"] + first["clock_seconds"]]


def test_one_place_with_all_data_is_no_device_and_has_no_clock(tiny_tree, tmp_path):
    out = run(config(tiny_tree, "centralized", rounds=1, profile=SLOW, deadline_seconds=1e-9), tmp_path / "out")
    assert [line["clock_seconds"] for line in lines(out / "rounds.jsonl")] == [None]
    assert {entry["clock_seconds"] for entry in lines(out / "ledger.jsonl")} == {None}


def test_without_a_profile_a_run_has_no_clock_and_its_report_no_column(tiny_tree, tmp_path):
    out = run(config(tiny_tree, rounds=1), tmp_path / "out")
    assert [line["clock_seconds"] for line in lines(out / "rounds.jsonl")] == [None]
    written = report.write([out], html=tmp_path / "r.html", csv=tmp_path / "r.csv")
    assert "virtual" not in (tmp_path / "r.html").read_text().split("<script")[0]
    assert "virtual" not in (tmp_path / "r.csv").read_text()
    assert written.tables


def test_who_is_late_is_left_out_and_keeps_nothing_of_the_round(tiny_tree, tmp_path):
    settings = config(tiny_tree, "local", rounds=1, each=4, profile=[FAST, SLOW, SLOW, SLOW])
    seconds = {
        entry["client"]: entry["clock_seconds"]
        for entry in lines(run(settings, tmp_path / "all") / "ledger.jsonl")
        if entry["clock_seconds"]
    }
    deadline = (seconds.pop("c01") + min(seconds.values())) / 2
    late = config(tiny_tree, "local", rounds=1, each=4, profile=[FAST, SLOW, SLOW, SLOW], deadline_seconds=deadline)
    out = run(late, tmp_path / "late")
    (line,) = lines(out / "rounds.jsonl")
    assert line["clock_seconds"] == deadline
    assert line["failed"].keys() == {"c02", "c03", "c04"}
    assert all("later than the deadline of" in reason for reason in line["failed"].values())
    state = json.loads(next(out.glob("checkpoint/*/state.json")).read_text())
    assert state["accepted"] == state["kept"] == {"c01": "000001-train"}


def test_a_round_that_all_are_late_for_ends_the_run_with_the_reason(tiny_tree, tmp_path):
    with pytest.raises(BadRun, match=r"round 1: all 2 clients failed, c0\d because it would have answered after .* deadline of"):
        run(config(tiny_tree, profile=SLOW, deadline_seconds=1e-9), tmp_path / "out")


def test_a_round_that_all_are_late_for_may_be_one_that_changes_nothing(tiny_tree, tmp_path):
    settings = config(tiny_tree, "fedavg", rounds=2, profile=SLOW, deadline_seconds=1e-9)
    federation = settings.federation.model_copy(update={"min_clients": 0})
    out = run(settings.model_copy(update={"federation": federation}), tmp_path / "out")
    assert [len(line["failed"]) for line in lines(out / "rounds.jsonl")] == [2, 2]
    weights, method_state = checkpoint.tensors(checkpoint.latest(out))
    first = prepare_run(settings).server
    assert method_state == {} and weights.keys() == first.weights.keys()
    assert all(torch.equal(weights[name], first.weights[name]) for name in weights)


@pytest.fixture(scope="module")
def peak(clocked):
    """What a client needs at most: the same for all, since all train the whole model on as many examples."""
    return max(entry["peak_bytes"] for entry in lines(clocked / "ledger.jsonl", task="train"))


def test_a_job_that_takes_more_memory_than_its_client_has_fails_and_the_others_go_on(tiny_tree, tmp_path, peak):
    memory = [1.1 * peak / 1e9, 0.5 * peak / 1e9, 1.1 * peak / 1e9, 1.1 * peak / 1e9]
    settings = config(tiny_tree, "local", each=4, memory_gb=memory, profile=SLOW)
    out = run(settings, tmp_path / "out")
    for line in lines(out / "rounds.jsonl"):
        assert line["failed"].keys() == {"c02"}
        assert line["failed"]["c02"].startswith("out of memory: it needs ")
        assert line["failed"]["c02"].endswith(f" MB and has {0.5 * peak / 1e6:,.1f} MB")
    failed = lines(out / "ledger.jsonl", client="c02", task="train")
    assert len(failed) == 2
    for entry in failed:
        assert (entry["bytes_up"], entry["flops_estimated"]) == (0, 0)
        assert entry["clock_seconds"] == pytest.approx(entry["bytes_down"] * 1e-5)
    assert not (out / "clients/c02").exists()
    assert {entry["failed"] for entry in lines(out / "ledger.jsonl", task="evaluate")} == {None}
    assert [(row.client, row.round) for row in resources.failures(read(out))] == [("c02", 1), ("c02", 2)]
    said = plan(prepare_run(settings))["warnings"][0]
    assert "their jobs fail where the measured peak is above it" in said


def test_memory_may_be_left_to_the_report(tiny_tree, tmp_path, peak):
    settings = config(tiny_tree, rounds=1, each=4, memory_gb=0.5 * peak / 1e9, out_of_memory="train anyway")
    out = run(settings, tmp_path / "out")
    assert lines(out / "rounds.jsonl")[0]["failed"] == {}
    assert len(resources.over_memory(read(out))) == 4
    assert "it trains there all the same, and the report marks them" in plan(prepare_run(settings))["warnings"][0]


def test_a_run_that_began_under_former_names_goes_on(tiny_tree, tmp_path):
    settings = checked(RunConfig, {**tiny_tree, "method": {"name": "fedmoe"}, "federation": {"rounds": 1}})
    out = run(settings, tmp_path / "out")
    without_hashes(out)
    text = (out / "resolved.json").read_text()
    assert '"utilization"' in text and '"neighbors"' in text
    (out / "resolved.json").write_text(text.replace('"utilization"', '"utilisation"').replace('"neighbors"', '"neighbours"'))
    assert run(settings, out, resume=True) == out
    assert len(read(out).rounds) >= 1


def test_a_run_from_before_out_of_memory_was_a_setting_goes_on_only_as_it_began(tiny_tree, tmp_path):
    anyway, fails = (config(tiny_tree, rounds=1, out_of_memory=what) for what in ("train anyway", "fail"))
    out = run(anyway, tmp_path / "out")
    without_hashes(out)
    resolved = json.loads((out / "resolved.json").read_text())
    for setting in ("out_of_memory", "utilization"):
        del resolved["devices"][setting]
    (out / "resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(BadRun, match=r"other settings: devices\.out_of_memory changed"):
        run(fails, out, resume=True)
    assert run(anyway, out, resume=True) == out


def test_a_trace_that_changed_meanwhile_is_noticed(tiny_tree, tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text("flops,memory_gb,down_mbit,up_mbit\n" + "1e10,8,8,4\n" * 4)
    settings = config(tiny_tree, rounds=1, profile={"csv": str(path)})
    out = run(settings, tmp_path / "out")
    path.write_text(path.read_text().replace("1e10", "2e10"))
    with pytest.raises(BadRun, match=r"other files: the data changed"):
        run(settings, out, resume=True)


def test_a_comparison_shows_the_time_of_every_method_that_has_a_clock(tiny_tree, tmp_path, clocked):
    centralized = run(
        config(tiny_tree, "centralized", profile=[FAST, SLOW, SLOW, SLOW]), tmp_path / "pooled", label="centralized"
    )
    written = report.write([clocked, centralized], html=tmp_path / "r.html", csv=tmp_path / "r.csv")
    comparison = next(table for table in written.tables if table.title == "Comparison")
    column = comparison.columns.index("virtual time (s)")
    cells = {row[0]: row[column] for row in comparison.rows[: -comparison.sums]}
    total = sum(line["clock_seconds"] for line in lines(clocked / "rounds.jsonl"))
    assert cells == {"fedavg": f"{total:,.1f}", "centralized": "–"}
    (line,) = [
        row
        for row in csv.DictReader(StringIO((tmp_path / "r.csv").read_text()))
        if row["measure"] == "virtual time" and row["mean"]
    ]
    assert float(line["mean"]) == pytest.approx(total)
    assert "over virtual time" in (tmp_path / "r.html").read_text()
