"""Several processes that do one thing after the other."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from multiprocessing import active_children

from fedexperts.experiment.process_pool import Died, side_by_side


def doubled(number, *, dies=None):
    """Imported by the processes under this name."""
    if number == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number, os.getpid()


def test_each_task_is_done_once_and_one_whose_process_dies_costs_no_other():
    found = list(side_by_side(partial(doubled, dies=2), [1, 2, 3, 4], 2))
    by_task = dict(found)
    assert len(found) == len(by_task) == 4
    died = by_task.pop(2)
    assert isinstance(died, Died)
    assert died == "its process died (SIGKILL)"
    assert {task: value for task, (value, _) in by_task.items()} == {1: 2, 3: 6, 4: 8}
    assert os.getpid() not in {process for _, process in by_task.values()}
    assert active_children() == []


def test_whoever_stops_halfway_leaves_no_process_behind():
    running = side_by_side(doubled, range(10), 2)
    next(running)
    assert len(active_children()) == 2
    running.close()
    assert active_children() == []


def busy(_):
    """Says that it has begun, and goes on for long."""
    print("begun", flush=True)
    time.sleep(300)


def test_processes_end_with_whoever_started_them(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "from fedexperts.experiment.process_pool import side_by_side\n"
        "from test_process_pool import busy\n"
        "if __name__ == '__main__':\n"
        "    list(side_by_side(busy, [1, 2], 2))\n"
    )
    path = os.pathsep.join(each for each in sys.path if each)
    environment = {**os.environ, "PYTHONPATH": path}
    started = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert [started.stdout.readline() for _ in range(2)] == [b"begun\n", b"begun\n"]
        started.kill()
        started.communicate(timeout=120)  # their stdout is closed only once both have ended
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
