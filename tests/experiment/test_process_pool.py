"""Tasks in several processes; the end of a process is tested in tests/io/test_processes.py."""

import os
import signal
from functools import partial
from multiprocessing import active_children

from fedexperts.experiment.process_pool import Died, in_parallel


def doubled(number, *, dies=None):
    """Imported by the processes under this name."""
    if number == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number, os.getpid()


def test_each_task_is_executed_once_and_a_dead_process_affects_only_its_own_task():
    pairs = list(in_parallel(partial(doubled, dies=2), [1, 2, 3, 4], 2))
    by_task = dict(pairs)
    assert len(pairs) == len(by_task) == 4
    died = by_task.pop(2)
    assert isinstance(died, Died)
    assert died == "its process died (SIGKILL)"
    assert {task: value for task, (value, _) in by_task.items()} == {1: 2, 3: 6, 4: 8}
    assert os.getpid() not in {process for _, process in by_task.values()}
    assert active_children() == []


def test_a_caller_that_stops_halfway_leaves_no_process_behind():
    running = in_parallel(doubled, range(10), 2)
    next(running)
    assert len(active_children()) == 2
    running.close()
    assert active_children() == []
