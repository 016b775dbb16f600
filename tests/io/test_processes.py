"""Worker processes: what their parent learns of their death, and that none outlives it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from multiprocessing import active_children

import pytest

from fedexperts.io import processes
from fedexperts.io.processes import ProcessDied, WorkerProcess, exit_reason


def obey(receive, *, folder=None):
    """Called in the processes: does what the message says."""
    match receive():
        case b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        case b"exit":
            os._exit(7)
        case b"raise":
            raise SystemExit(3)
        case b"ignore interrupts":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case b"clean up":
            try:
                (folder / "begun").touch()
                time.sleep(300)
            finally:
                (folder / "cleaned up").touch()
    return str(os.getpid()).encode()


def ask(worker, message):
    worker.send(message)
    return worker.receive()


def until(happens):
    last = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < last
        time.sleep(0.02)


@pytest.fixture
def worker(tmp_path):
    worker = WorkerProcess(partial(obey, folder=tmp_path), daemon=True)
    yield worker
    worker.stop()
    assert active_children() == []


def test_a_process_answers_one_message_after_the_other(worker):
    assert ask(worker, b"") == ask(worker, b"") == str(worker.process.pid).encode()
    assert worker.process.pid != os.getpid()


@pytest.mark.parametrize(("message", "reason"), [(b"die", "SIGKILL"), (b"exit", "exit code 7"), (b"raise", "exit code 3")])
def test_a_process_that_dies_is_replaced_and_the_reason_is_its_signal_or_exit_code(worker, message, reason):
    before = worker.process.pid
    with pytest.raises(ProcessDied, match=f"^{reason}$"):
        ask(worker, message)
    assert ask(worker, b"") == str(worker.process.pid).encode() != str(before).encode()


def test_a_process_that_died_idle_is_found_dead_at_the_next_message(worker):
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()
    with pytest.raises(ProcessDied, match="SIGKILL"):
        ask(worker, b"")


def test_a_process_ignores_the_interrupt_of_its_terminal(worker):
    ask(worker, b"")
    os.kill(worker.process.pid, signal.SIGINT)
    assert ask(worker, b"") == str(worker.process.pid).encode()


def test_a_process_that_is_stopped_in_the_middle_of_its_work_cleans_up(worker, tmp_path):
    worker.send(b"clean up")
    until((tmp_path / "begun").exists)
    worker.stop()
    assert (tmp_path / "cleaned up").exists()
    assert worker.process.exitcode == 0


def test_a_process_that_ignores_its_interrupt_is_killed(worker, monkeypatch):
    """It ends with its pipe all the same, unless it is busy."""
    ask(worker, b"ignore interrupts")
    worker.send(b"clean up")
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.2)
    worker.stop()
    assert exit_reason(worker.process.exitcode) == "SIGKILL"


def test_processes_end_with_the_parent_that_is_killed_though_they_are_busy(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from functools import partial\n"
        "from pathlib import Path\n"
        "from fedexperts.io.processes import WorkerProcess\n"
        "from test_processes import obey\n"
        "if __name__ == '__main__':\n"
        "    WorkerProcess(partial(obey, folder=Path(sys.argv[1])), daemon=True).send(b'clean up')\n"
        "    time.sleep(300)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    command = [sys.executable, script, tmp_path]
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    try:
        until((tmp_path / "begun").exists)
        parent.kill()
        parent.communicate(timeout=120)  # the stdout that both have is closed only once both have ended
        assert (tmp_path / "cleaned up").exists()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def test_worker_processes_need_no_torch():
    code = "import sys, fedexperts.io.processes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def blocked(pid):
    """The signals that a process holds back, from the mask that Linux shows."""
    with open(f"/proc/{pid}/status") as lines:  # noqa: PTH123, no file on a disk
        mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk:"))
    return {signal.Signals(number) for number in range(1, 32) if mask >> (number - 1) & 1}


def test_a_folder_for_temporary_files_with_a_path_too_long_for_a_socket_is_no_obstacle(tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    worker = WorkerProcess(obey, daemon=True)
    try:
        assert type(worker.process).__name__ == "SpawnProcess"  # the other kind may have its socket from before
        assert ask(worker, b"") == str(worker.process.pid).encode()
    finally:
        worker.stop()


@pytest.fixture
def heeding_interrupts():
    """What a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_interrupts")
def test_ctrl_c_while_processes_start_interrupts_the_parent_alone_and_is_not_lost():
    with pytest.raises(KeyboardInterrupt), processes.interrupts_held():
        signal.raise_signal(signal.SIGINT)  # of this thread: another one would not hold it back
        arrived = True
    assert arrived
    worker = WorkerProcess(obey, daemon=True)
    try:
        assert signal.SIGINT in blocked(worker.process.pid)  # also while it imports, before it can ignore it
        assert signal.SIGINT not in blocked(os.getpid())
        os.kill(worker.process.pid, signal.SIGINT)
        assert ask(worker, b"") == str(worker.process.pid).encode()
    finally:
        worker.stop()
