import pytest
import torch

from fedexperts.engines.client_store import ClientStateStore
from fedexperts.types import Job, Patch


def job(round, task="train", client="c01"):
    return Job(client, round, task, "0", {}, Patch({}))


@pytest.fixture
def client_store(tmp_path):
    return ClientStateStore(tmp_path / "clients")


def save(client_store, number, **which):
    client_store.save(job(number, **which), {"w": torch.tensor([float(number)])})


def loaded(client_store, *which, **named):
    kept = client_store.load(job(*which, **named))
    return kept["w"].item() if kept else None


def test_a_client_that_kept_nothing_has_nothing(client_store):
    assert loaded(client_store, 1) is None
    assert not client_store.folder.exists()


def test_a_round_reads_what_the_latest_earlier_one_kept(client_store):
    save(client_store, 2)
    assert loaded(client_store, 3) == 2.0
    assert loaded(client_store, 9) == 2.0
    save(client_store, 5)
    assert loaded(client_store, 9) == 5.0


def test_a_round_that_is_done_again_starts_from_what_it_started_from(client_store):
    save(client_store, 2)
    save(client_store, 5)
    assert loaded(client_store, 5) == 2.0
    save(client_store, 5)
    assert loaded(client_store, 5) == 2.0
    assert loaded(client_store, 6) == 5.0


def test_the_first_round_done_again_starts_from_nothing(client_store):
    save(client_store, 1)
    assert loaded(client_store, 1) is None


def test_an_evaluation_sees_what_its_own_round_kept_and_nothing_later(client_store):
    save(client_store, 2)
    save(client_store, 5)
    assert loaded(client_store, 5, "evaluate") == 5.0
    assert loaded(client_store, 4, "evaluate") == 2.0
    assert loaded(client_store, 0, "evaluate") is None


def test_a_stage_before_the_rounds_is_older_than_the_first(client_store):
    save(client_store, 0, task="profile")
    assert loaded(client_store, 1) == 0.0
    assert loaded(client_store, 0, "profile") is None


def test_two_versions_are_held_and_older_ones_go(client_store):
    for number in (1, 3, 4, 8):
        save(client_store, number)
    assert [path.stem for path in client_store.versions("c01")] == ["000004-train", "000008-train"]


def test_a_round_done_again_later_than_others_takes_no_version_they_need(client_store):
    for number in (1, 2, 3):
        save(client_store, number)
    save(client_store, 2)  # by a process that outlived its run for a moment
    assert loaded(client_store, 4) == 3.0
    assert loaded(client_store, 3) == 2.0


def test_clients_keep_apart(client_store):
    save(client_store, 1, client="c01")
    save(client_store, 2, client="c02")
    assert loaded(client_store, 3, client="c01") == 1.0
    assert loaded(client_store, 3, client="c02") == 2.0
    assert loaded(client_store, 3, client="c03") is None


def test_what_a_killed_process_left_half_written_is_no_version(client_store):
    save(client_store, 1)
    (client_store.folder / "c01" / ".000002-train.safetensors.abc123").write_bytes(b"half")
    assert loaded(client_store, 3) == 1.0
    assert len(client_store.versions("c01")) == 1


def test_what_killed_processes_left_half_written_goes_with_the_next_version(client_store):
    save(client_store, 1)
    (client_store.folder / "c01" / ".000002-train.safetensors.abc123").write_bytes(b"half")
    save(client_store, 2)
    assert sorted(path.name for path in (client_store.folder / "c01").iterdir()) == [
        "000001-train.safetensors",
        "000002-train.safetensors",
    ]


def test_rounds_beyond_nine_are_newer_than_nine(client_store):
    save(client_store, 9)
    save(client_store, 10)
    assert loaded(client_store, 11) == 10.0
