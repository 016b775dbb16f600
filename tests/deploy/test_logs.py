"""The log of a deployment: what the terminal shows, and what the file has."""

import json
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fedexperts.core.ledger import Entry
from fedexperts.deploy.logs import level_of, logging_to, say
from fedexperts.deploy.run_log import RunLog
from fedexperts.errors import BadRun

ANSWER = Entry(2, "north", "train", 4, bytes_down=3_000_000, bytes_up=2_000_000, seconds=1.25, tokens=100, loss=0.5)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def a_round(log):
    """Two clients train, one of which fails, and both are evaluated."""
    server = SimpleNamespace(round=2, task="train")
    log.start("fedavg", 0, 1, 3)
    log.answered(ANSWER)
    log.answered(replace(ANSWER, client="south", loss=None, bytes_up=0, failed="its disk is full"))
    log.failed(server, {"south": "its disk is full"})
    log.answered(replace(ANSWER, task="evaluate", loss=None, bytes_up=10))
    log.round(server)


@pytest.mark.parametrize(("quiet", "verbose", "number"), [(True, False, 1), (False, False, 3), (False, True, 6)])
def test_the_terminal_shows_as_much_as_is_wanted_with_time_and_level_and_the_file_has_everything(
    tmp_path, capsys, quiet, verbose, number
):
    with logging_to(tmp_path / "log.jsonl", level_of(quiet, verbose)):
        a_round(RunLog())
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == number
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING) \S", line) for line in shown)
    assert any("WARNING round 2: south failed in train and is left out: its disk is full" in line for line in shown)
    assert len(lines(tmp_path / "log.jsonl")) == 6


def test_the_line_of_a_round_has_its_loss_bytes_seconds_and_failures(tmp_path):
    with logging_to(tmp_path / "log.jsonl", logging.ERROR):
        a_round(RunLog())
    *_, last = lines(tmp_path / "log.jsonl")
    assert last.pop("seconds") >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", last.pop("time"))
    assert last.pop("message").startswith("round 2, train: 2 clients, 1 failed, loss 0.5000, 6.00 MB down, 2.00 MB up, ")
    assert last == {
        "level": "INFO",
        "round": 2,
        "task": "train",
        "clients": ["north", "south"],
        "loss": 0.5,
        "bytes_down": 6_000_000,
        "bytes_up": 2_000_000,
        "failures": {"south": "its disk is full"},
    }


def test_lines_are_valid_json_also_of_a_loss_that_is_no_number(tmp_path):
    with logging_to(tmp_path / "log.jsonl", logging.ERROR):
        log = RunLog()
        log.start("fedavg", 0, 0, 1)
        log.answered(replace(ANSWER, loss=float("nan")))
        log.round(SimpleNamespace(round=2, task="train"))
    assert [line.get("loss") for line in lines(tmp_path / "log.jsonl")] == [None] * 3


def test_the_error_that_ends_a_command_is_in_the_file_and_shown_once(tmp_path, capsys):
    with pytest.raises(BadRun), logging_to(tmp_path / "log.jsonl", logging.INFO):
        say(logging.INFO, "all is %well")
        raise BadRun("round 3: all clients failed")
    first, last = lines(tmp_path / "log.jsonl")
    assert first["message"] == "all is %well"
    assert (last["level"], last["message"]) == ("ERROR", "round 3: all clients failed")
    assert "all clients failed" not in capsys.readouterr().err  # the command line shows it


def test_a_log_that_was_moved_away_goes_on_in_a_new_file(tmp_path):
    with logging_to(tmp_path / "log.jsonl", logging.ERROR):
        say(logging.INFO, "before")
        (tmp_path / "log.jsonl").rename(tmp_path / "log.1")
        say(logging.INFO, "after")
    assert [line["message"] for line in lines(tmp_path / "log.jsonl")] == ["after"]


def test_the_line_of_a_round_is_of_its_own_jobs_and_setup_tasks_are_no_rounds(tmp_path):
    log, entry = RunLog(), Entry(1, "north", "train", 4, bytes_down=3, bytes_up=2, seconds=1.0, tokens=1, loss=0.5)
    with logging_to(tmp_path / "log.jsonl", logging.ERROR):
        log.start("fedmoe", 0, 0, 1)
        log.answered(replace(entry, task="profile"))
        log.round(SimpleNamespace(round=1, task="profile"))
        log.answered(entry)
        log.answered(replace(entry, client="south", task="evaluate", bytes_down=100, failed="gone"))
        log.round(SimpleNamespace(round=1, task="train"))
    *_, last = lines(tmp_path / "log.jsonl")
    assert (last["clients"], last["bytes_down"], last["failures"]) == (["north"], 3, {})
    assert (log.status.steps_done, log.status.steps) == (1, 1)
