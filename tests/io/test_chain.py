"""A log that notices what was changed, deleted or moved in it, and tells that from a line that a kill left incomplete."""

import json

import pytest

from fedexperts.errors import Damaged
from fedexperts.io.chain import START, End, append, end_of, verified


@pytest.fixture
def log(tmp_path):
    path, end = tmp_path / "log.jsonl", End()
    for number in range(1, 6):
        end = append(path, {"said": f'{number} \n, "seal"', "not a number": float("nan")}, end)
    assert end_of(path) == end
    return path


def read(path):
    return [line.record and line.record["said"][0] for line in verified(path)]


def changed(path, change):
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))


def test_a_log_reads_as_it_was_written_and_each_line_names_the_seal_of_the_one_before(log):
    assert read(log) == ["1", "2", "3", "4", "5"]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["number"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["previous"] for line in lines] == [START, *(line["seal"] for line in lines[:-1])]


def test_an_empty_log_begins_at_the_beginning(tmp_path):
    assert end_of(tmp_path / "none.jsonl") == End()
    (tmp_path / "empty.jsonl").touch()
    assert end_of(tmp_path / "empty.jsonl") == End()


def swap(lines):
    lines[1], lines[2] = lines[2], lines[1]


def forge(lines):
    """Line 2 anew, with a seal that fits."""
    first = json.loads(lines[0])
    path = forge.folder / "forged.jsonl"
    append(path, {"said": "2"}, End(1, first["seal"]))
    lines[1] = path.read_bytes()


@pytest.mark.parametrize(
    ("change", "place", "why"),
    [
        (lambda lines: lines.__setitem__(1, lines[1].replace(b"2", b"3", 1)), 2, "it was changed"),
        (lambda lines: lines.__setitem__(4, lines[4].replace(b"5", b"6", 1)), 5, "it was changed"),  # the last
        (lambda lines: lines.__setitem__(2, b"\n"), 3, "it was changed"),
        (lambda lines: lines.insert(1, b"{}\n"), 2, "it was changed"),
        (lambda lines: lines.pop(0), 1, "it is number 2, and number 1 belongs here"),
        (lambda lines: lines.pop(2), 3, "it is number 4, and number 3 belongs here"),
        (lambda lines: lines.insert(3, lines[1]), 4, "it is number 2, and number 4 belongs here"),
        (swap, 2, "it is number 3, and number 2 belongs here"),
        (forge, 3, "it does not follow the line before it"),
    ],
)
def test_a_line_that_was_changed_deleted_or_moved_is_named(log, tmp_path, change, place, why):
    forge.folder = tmp_path
    changed(log, change)
    for reading in (read, end_of):
        with pytest.raises(Damaged, match=rf"log\.jsonl, line {place}: {why}"):
            reading(log)


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_line_that_a_kill_left_incomplete_is_told_from_a_changed_one_and_the_log_goes_on_after_it(log, kept):
    changed(log, lambda lines: lines.__setitem__(4, lines[4][:kept]))
    assert read(log) == ["1", "2", "3", "4", None]
    end = append(log, {"said": "5 again"}, end_of(log))
    assert read(log) == ["1", "2", "3", "4", None, "5"]
    append(log, {"said": "6"}, end)
    assert read(log) == ["1", "2", "3", "4", None, "5", "6"]

    whole = log.read_bytes()
    changed(log, lambda lines: lines.__setitem__(4, b"x" + lines[4]))  # now that it has been named, it may not change either
    with pytest.raises(Damaged, match="line 5: it was changed"):
        read(log)
    log.write_bytes(whole)
    changed(log, lambda lines: lines.pop(4))
    with pytest.raises(Damaged, match="line 5: an incomplete line before it was deleted"):
        read(log)


def test_two_kills_in_a_row_leave_two_incomplete_lines(log):
    changed(log, lambda lines: lines.__setitem__(4, lines[4][:40]))
    with log.open("ab") as file:
        file.write(b'\n{"number": 5, "prev')
    append(log, {"said": "5"}, end_of(log))
    assert read(log) == ["1", "2", "3", "4", None, None, "5"]


def test_a_last_line_that_lacks_nothing_but_its_end_counts(log):
    changed(log, lambda lines: lines.__setitem__(4, lines[4].removesuffix(b"\n")))
    append(log, {"said": "6"}, end_of(log))
    assert read(log) == ["1", "2", "3", "4", "5", "6"]
