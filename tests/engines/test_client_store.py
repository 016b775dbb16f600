import pytest
import torch

from fedexperts.engines.client_store import Keeper
from fedexperts.types import Job, Patch


def job(round, task="train", client="c01"):
    return Job(client, round, task, "0", {}, Patch({}))


@pytest.fixture
def keeper(tmp_path):
    return Keeper(tmp_path / "clients")


def save(keeper, number, **which):
    keeper.save(job(number, **which), {"w": torch.tensor([float(number)])})


def loaded(keeper, *which, **named):
    kept = keeper.load(job(*which, **named))
    return kept["w"].item() if kept else None


def test_a_client_that_kept_nothing_has_nothing(keeper):
    assert loaded(keeper, 1) is None
    assert not keeper.folder.exists()


def test_a_round_reads_what_the_latest_earlier_one_kept(keeper):
    save(keeper, 2)
    assert loaded(keeper, 3) == 2.0
    assert loaded(keeper, 9) == 2.0
    save(keeper, 5)
    assert loaded(keeper, 9) == 5.0


def test_a_round_that_is_done_again_starts_from_what_it_started_from(keeper):
    save(keeper, 2)
    save(keeper, 5)
    assert loaded(keeper, 5) == 2.0
    save(keeper, 5)
    assert loaded(keeper, 5) == 2.0
    assert loaded(keeper, 6) == 5.0


def test_the_first_round_done_again_starts_from_nothing(keeper):
    save(keeper, 1)
    assert loaded(keeper, 1) is None


def test_an_evaluation_sees_what_its_own_round_kept_and_nothing_later(keeper):
    save(keeper, 2)
    save(keeper, 5)
    assert loaded(keeper, 5, "evaluate") == 5.0
    assert loaded(keeper, 4, "evaluate") == 2.0
    assert loaded(keeper, 0, "evaluate") is None


def test_a_stage_before_the_rounds_is_older_than_the_first(keeper):
    save(keeper, 0, task="profile")
    assert loaded(keeper, 1) == 0.0
    assert loaded(keeper, 0, "profile") is None


def test_two_versions_are_held_and_older_ones_go(keeper):
    for number in (1, 3, 4, 8):
        save(keeper, number)
    assert [path.stem for path in keeper.versions("c01")] == ["000004-train", "000008-train"]


def test_a_round_done_again_later_than_others_takes_no_version_they_need(keeper):
    for number in (1, 2, 3):
        save(keeper, number)
    save(keeper, 2)  # by a process that outlived its run for a moment
    assert loaded(keeper, 4) == 3.0
    assert loaded(keeper, 3) == 2.0


def test_clients_keep_apart(keeper):
    save(keeper, 1, client="c01")
    save(keeper, 2, client="c02")
    assert loaded(keeper, 3, client="c01") == 1.0
    assert loaded(keeper, 3, client="c02") == 2.0
    assert loaded(keeper, 3, client="c03") is None


def test_what_a_killed_process_left_half_written_is_no_version(keeper):
    save(keeper, 1)
    (keeper.folder / "c01" / ".000002-train.safetensors.abc123").write_bytes(b"half")
    assert loaded(keeper, 3) == 1.0
    assert len(keeper.versions("c01")) == 1


def test_what_killed_processes_left_half_written_goes_with_the_next_version(keeper):
    save(keeper, 1)
    (keeper.folder / "c01" / ".000002-train.safetensors.abc123").write_bytes(b"half")
    save(keeper, 2)
    assert sorted(path.name for path in (keeper.folder / "c01").iterdir()) == [
        "000001-train.safetensors",
        "000002-train.safetensors",
    ]


def test_rounds_beyond_nine_are_newer_than_nine(keeper):
    save(keeper, 9)
    save(keeper, 10)
    assert loaded(keeper, 11) == 10.0
