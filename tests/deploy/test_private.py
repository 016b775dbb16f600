"""Who may read what a deployment writes, and what becomes of temporary files after a kill."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

import pytest

from fedexperts.deploy import processes
from fedexperts.deploy.processes import child_process, private, temporary
from fedexperts.errors import BadRun, Busy
from fedexperts.io.files import atomic_folder, write_text

HOLDING = """
import sys, time
from pathlib import Path
from fedexperts.deploy.processes import temporary
with temporary(Path(sys.argv[1])) as folder:
    (folder / "inner").mkdir()
    (folder / "inner" / "left").write_text("4711")
    (folder / "link").symlink_to(sys.argv[1])
    print(folder, flush=True)
    time.sleep(600)
"""
TALKING = """
import sys, time
from pathlib import Path
while not Path(sys.argv[1]).exists():
    print("line" * 25, flush=True)
    time.sleep(0.002)
print("line last", flush=True)
"""


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


def test_the_keys_of_a_federation_and_their_folders_are_their_owners_only(fedexperts, tmp_path):
    before = os.umask(0o022)
    try:
        code, _, err = fedexperts("keys", tmp_path / "keys", "--host", "localhost", "--clients", "north")
        assert code == 0, err
        assert modes(tmp_path / "keys") == {0o600, 0o700}
        write_text(tmp_path / "as usual", "")
        assert (tmp_path / "as usual").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_files_and_folders_that_are_complete_or_absent_have_the_permissions_of_the_process(tmp_path):
    with private():
        write_text(tmp_path / "a" / "file", "x")
        with atomic_folder(tmp_path / "a" / "folder") as scratch:
            (scratch / "file").touch()
    assert modes(tmp_path / "a") == {0o600, 0o700}


def test_a_process_that_is_started_writes_for_its_owner_only(tmp_path):
    code = "import sys; open(sys.argv[1], 'w').close()"
    with child_process([sys.executable, "-c", code, str(tmp_path / "written")], tmp_path, None) as child:
        child.wait(60)
    assert (tmp_path / "written").stat().st_mode & 0o777 == 0o600


def test_the_output_of_a_process_does_not_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MOST_LOG_BYTES", 1000)
    monkeypatch.setattr(processes, "LOG_SECONDS", 0.01)
    log, before = tmp_path / "child.log", tmp_path / "child.log.1"
    log.write_bytes(b"old\n")
    with child_process([sys.executable, "-c", TALKING, str(tmp_path / "end")], tmp_path, "child") as child:
        deadline = monotonic() + 60
        while not before.exists() or b"old" in before.read_bytes():
            assert monotonic() < deadline and child.poll() is None
            sleep(0.01)
        (tmp_path / "end").touch()
        assert child.wait(60) == 0
    assert b"line" in before.read_bytes()
    assert log.read_bytes().endswith(b"line last\n"), "it goes on in the file that was emptied"
    assert b"\0" not in log.read_bytes()


def test_of_a_large_log_the_end_is_kept_and_on_a_full_disk_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MOST_LOG_BYTES", 1000)
    log = tmp_path / "child.log"
    log.write_bytes(b"a" * 1000)
    processes.move_if_large(log)
    assert log.stat().st_size == 1000
    log.write_bytes(b"a" * 1000 + b"b" * 1000)
    processes.move_if_large(log)
    assert (log.stat().st_size, (tmp_path / "child.log.1").read_bytes()) == (0, b"b" * 1000)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processes.shutil, "copyfileobj", full)
    log.write_bytes(b"c" * 2000)
    processes.move_if_large(log)
    assert (log.stat().st_size, (tmp_path / "child.log.1").exists()) == (0, False)


def test_what_a_killed_process_left_is_removed_by_the_next_start_and_no_other_process_gets_the_folder_meanwhile(tmp_path):
    (tmp_path / "kept").write_text("own")
    child = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    folder = Path(child.stdout.readline().strip())
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with pytest.raises(Busy, match="another process is running for"), temporary(tmp_path):
            pass
        assert (folder / "inner" / "left").exists()
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert (folder / "inner" / "left").exists()
    with temporary(tmp_path) as again:
        assert again == folder and [*again.iterdir()] == []
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(again)
        with tempfile.NamedTemporaryFile() as file:
            assert Path(file.name).parent == again
    assert not folder.exists()
    assert (tmp_path / "kept").read_text() == "own"
    assert tempfile.gettempdir() == str(folder.parent)


def test_a_temporary_folder_that_others_can_read_is_refused(tmp_path):
    with temporary(tmp_path) as folder:
        pass
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    try:
        with pytest.raises(BadRun, match="is not a folder that only this user can read"), temporary(tmp_path):
            pass
    finally:
        folder.rmdir()
