"""Files and folders that are complete or absent."""

import errno
import os
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from fedexperts.errors import BadValue, Busy
from fedexperts.io import files


def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_no_other(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_file(path) as scratch:
        scratch.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [each.name for each in path.parent.iterdir()] == ["a.txt"]


def test_a_secret_file_can_be_read_by_its_owner_alone(tmp_path):
    files.write_bytes(tmp_path / "key", b"secret", mode=0o600)
    files.write_bytes(tmp_path / "certificate", b"public")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("key", "certificate")] == [0o600, 0o644]


def test_tensors_that_share_memory_are_written_whole_and_those_that_do_not_are_not_copied():
    whole = torch.arange(6.0).view(2, 3)
    separate = files.without_shared_memory({"whole": whole, "row": whole[1], "columns": whole.T})
    assert separate["whole"].data_ptr() == whole.data_ptr()
    restored = load(files.safetensors_bytes({"whole": whole, "row": whole[1], "columns": whole.T}))
    assert torch.equal(restored["whole"], whole)
    assert torch.equal(restored["row"], whole[1])
    assert torch.equal(restored["columns"], whole.T)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    files.write_tensors(path, {"a": torch.ones(2)})

    def refuse(message):
        def save(*_):
            raise SafetensorError(message)

        monkeypatch.setattr(files, "save_file", save)
        files.write_tensors(path, {"a": torch.zeros(2)})

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as full:
        refuse(f"I/O error: No space left on device (os error {errno.ENOSPC})")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(path))
    with pytest.raises(SafetensorError, match="something else"):
        refuse("something else")
    assert load_file(path)["a"].tolist() == [1, 1]
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["a", "a" * 3, "a" * 40])
def test_aligned_tensors_start_at_a_multiple_of_64_bytes_and_read_the_same(tmp_path, name):
    path = tmp_path / "weights.safetensors"
    files.write_tensors(path, {name: torch.arange(5.0)})
    files.align_tensors(path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % 64 == 0
    assert torch.equal(load_file(path)[name], torch.arange(5.0))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_run_has_the_same_id_each_time_and_another_run_another(tmp_path):
    first = files.run_id(tmp_path / "one")
    assert files.run_id(tmp_path / "one") == first != files.run_id(tmp_path / "two")


def test_a_folder_is_written_whole_or_not_at_all_and_never_over_another(tmp_path):
    with files.atomic_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    for path in (tmp_path / "out", tmp_path / "out" / "a"):
        with pytest.raises(BadValue, match="exists and is not empty; give a folder"):
            files.require_empty(path)
    (tmp_path / "empty").mkdir()
    files.require_empty(tmp_path / "empty")
    with pytest.raises(BadValue, match="exists and is not empty"), files.atomic_folder(tmp_path / "raced") as scratch:
        (tmp_path / "raced").mkdir()
        (tmp_path / "raced" / "theirs").touch()  # another process was faster
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "out", "raced"]


def test_a_locked_folder_is_refused_to_others_until_the_lock_ends(tmp_path):
    with files.locked(tmp_path / "run"), pytest.raises(Busy, match="wait for it"), files.locked(tmp_path / "run"):
        raise AssertionError("both hold the lock")
    with files.locked(tmp_path / "run"):
        pass
