"""What clients keep on disk: a job starts from the version of the client's last accepted job."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedexperts.engines.client_store import ClientStateStore, digest
from fedexperts.errors import Damaged
from fedexperts.types import Job, Patch, job_key


def job(round, accepted=None, task="train", client="c01"):
    """`accepted`: the round of the client's last job whose answer was merged; None: there was none."""
    last = "" if accepted is None else job_key(accepted, "train") if isinstance(accepted, int) else accepted
    return Job(client, round, task, "0", {}, Patch({}), accepted=last)


@pytest.fixture
def client_store(tmp_path):
    return ClientStateStore(tmp_path / "clients")


def save(client_store, round, accepted=None, **which):
    client_store.save(job(round, accepted, **which), {"w": torch.tensor([float(round)])})


def loaded(client_store, round, accepted=None, **which):
    state = client_store.load(job(round, accepted, **which))
    return state["w"].item() if state else None


def test_a_client_that_kept_nothing_has_nothing(client_store):
    assert loaded(client_store, 1) is None
    assert not client_store.folder.exists()


def test_a_job_starts_from_what_the_last_accepted_one_kept(client_store):
    save(client_store, 2)
    assert loaded(client_store, 3, 2) == 2.0
    assert loaded(client_store, 9, 2) == 2.0
    save(client_store, 5, 2)
    assert loaded(client_store, 9, 5) == 5.0
    assert loaded(client_store, 9, 7) == 5.0, "in round 7 it kept nothing new"


def test_what_was_kept_of_an_answer_that_was_not_merged_does_not_count_and_goes(client_store):
    save(client_store, 2)
    save(client_store, 5, 2)
    assert loaded(client_store, 6, 2) == 2.0
    save(client_store, 6, 2)
    assert [path.stem for path in client_store.versions("c01")] == ["000002-train", "000006-train"]


def test_a_round_that_is_done_again_starts_from_what_it_started_from(client_store):
    save(client_store, 2)
    save(client_store, 5, 2)
    assert loaded(client_store, 5, 2) == 2.0
    save(client_store, 5, 2)
    assert loaded(client_store, 5, 2) == 2.0
    assert loaded(client_store, 6, 5) == 5.0


def test_the_first_round_done_again_starts_from_nothing(client_store):
    save(client_store, 1)
    assert loaded(client_store, 1) is None


def test_an_evaluation_sees_what_its_own_round_kept_and_nothing_later(client_store):
    save(client_store, 2)
    save(client_store, 5, 2)
    assert loaded(client_store, 5, 5, task="evaluate") == 5.0
    assert loaded(client_store, 4, 2, task="evaluate") == 2.0
    assert loaded(client_store, 0, task="evaluate") is None


def test_a_setup_task_is_older_than_the_first_round(client_store):
    save(client_store, 0, task="profile")
    assert loaded(client_store, 1, "000000-profile") == 0.0
    assert loaded(client_store, 0, task="profile") is None


def test_two_versions_stay_and_older_ones_go(client_store):
    for round, accepted in ((1, None), (3, 1), (4, 3), (8, 4)):
        save(client_store, round, accepted)
    assert [path.stem for path in client_store.versions("c01")] == ["000004-train", "000008-train"]


def test_clients_keep_apart(client_store):
    save(client_store, 1, client="c01")
    save(client_store, 2, client="c02")
    assert loaded(client_store, 3, 1, client="c01") == 1.0
    assert loaded(client_store, 3, 2, client="c02") == 2.0
    assert loaded(client_store, 3, 2, client="c03") is None


def test_what_a_killed_process_left_half_written_is_no_version(client_store):
    save(client_store, 1)
    (client_store.folder / "c01" / ".000002-train.safetensors.abc123").write_bytes(b"half")
    assert loaded(client_store, 3, 2) == 1.0
    assert len(client_store.versions("c01")) == 1


def test_what_killed_processes_left_half_written_goes_with_the_next_version(client_store):
    save(client_store, 1)
    (client_store.folder / "c01" / ".000002-train.safetensors.abc123").write_bytes(b"half")
    save(client_store, 2, 1)
    assert sorted(path.name for path in (client_store.folder / "c01").iterdir()) == [
        "000001-train.safetensors",
        "000002-train.safetensors",
    ]


def test_rounds_beyond_nine_are_newer_than_nine(client_store):
    save(client_store, 9)
    save(client_store, 10, 9)
    assert loaded(client_store, 11, 10) == 10.0


def test_versions_after_a_job_can_be_dropped(client_store):
    for round, accepted in ((1, None), (2, 1)):
        save(client_store, round, accepted)
    client_store.drop_newer("c01", "000001-train")
    assert [path.stem for path in client_store.versions("c01")] == ["000001-train"]
    client_store.drop_newer("c01", "")
    assert client_store.versions("c01") == []


def test_a_damaged_version_is_refused_and_set_aside_and_the_next_job_goes_on_from_the_one_before(client_store):
    save(client_store, 1)
    save(client_store, 2, 1)
    first, last = client_store.versions("c01")
    sound = last.read_bytes()
    for place in (3, 12, len(sound) // 2, len(sound) - 1):  # the length of the head, the head, the numbers
        last.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(
            Damaged, match=r"state of 000002-train is damaged; restore .*, or let it continue from that of 000001-"
        ):
            loaded(client_store, 3, 2)
    last.write_bytes(sound[:-2])
    for _ in range(2):  # the server may have been restarted, and repeat the round
        with pytest.raises(Damaged, match="from that of 000001-"):
            client_store.load(job(3, 2), set_aside=True)
    assert loaded(client_store, 4, 2) == 1.0
    last.write_bytes(sound)  # restored
    assert loaded(client_store, 4, 2) == 2.0
    last.unlink()
    first.write_bytes(b"nothing")
    with pytest.raises(Damaged, match="let it continue without in its next job"):
        client_store.load(job(4, 2), set_aside=True)
    assert loaded(client_store, 5, 2) is None


def test_versions_of_before_there_was_a_sha256_are_read(client_store):
    save(client_store, 1)
    (path,) = client_store.versions("c01")
    save_file(load_file(path), path)
    assert loaded(client_store, 2, 1) == 1.0


def test_the_sha256_is_of_names_kinds_shapes_and_bytes():
    tensors = {"a": torch.zeros(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16), "c": torch.zeros(0, dtype=torch.bool)}
    other = [
        {**tensors, "a": tensors["a"].T},
        {**tensors, "c": torch.zeros(0)},
        {"d" if n == "a" else n: t for n, t in tensors.items()},
    ]
    assert digest(tensors) == digest(dict(reversed(tensors.items())))
    assert len({digest(tensors), *map(digest, other)}) == 4
