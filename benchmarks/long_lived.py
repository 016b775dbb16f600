"""What it saves that the worker of a client stays: for `engines.py`."""

import os
import re
import resource
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from rich.table import Table

from benchmarks.engine_starts import in_process, settings, wide_model, worker_command
from fedexperts.deploy.processes import child_process
from fedexperts.deploy.socket_rpc import call, listening
from fedexperts.engines.message import Message
from fedexperts.engines.remote import job_request
from fedexperts.experiment import flower
from fedexperts.experiment.setup import prepare_run
from fedexperts.federation import jobs_for

JOBS = 50  # to a worker that stays, for each to a new one: processor time is measured in hundredths of a second


def table(repeat: int) -> Table:
    table = Table("base", "to one that stays: s, processor s", "to a new one", "over", "of that loading the base s")
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        for label, model in (("small, 43 MB", "small"), ("random, 200 MB", str(wide_model(Path(folder) / "model")))):
            old, new, loading = in_process("long_lived", "messages", model, repeat)
            over = " and ".join(f"{b / a:.0f}" for a, b in zip(old, new, strict=True))
            table.add_row(label, *("{:.3f}, {:.3f}".format(*each) for each in (old, new)), over, f"{loading:.2f}")
    return table


def messages(model: str, repeat: int) -> tuple[list[float], list[float], float]:
    """Medians: seconds and processor seconds of a job to a worker that stays, the same to a new one, seconds to load the base."""
    config = settings("adapters", model)
    prepared = prepare_run(config)
    old: list[tuple[float, float]] = []
    new: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        out = Path(folder)
        job = next(jobs_for(replace(prepared.server, round=1, task="train"), prepared.method, prepared.server.clients.values()))
        message = job_request(job, flower.about(config, prepared.base.identity, out))
        command, again = (worker_command(config, job.client, out / each) for each in ("old", "new"))  # one folder, one process
        with worker(command, out) as (path, pid):
            seconds(path, message)  # the first job loads the base
            for _ in range(repeat):
                before = processor(pid)
                each = statistics.median(seconds(path, message) for _ in range(JOBS))
                old.append((each, (processor(pid) - before) / JOBS))
                started, ended = perf_counter(), of_children()
                with worker(again, out) as (other, _):
                    seconds(other, message)
                    whole = perf_counter() - started
                new.append((whole, of_children() - ended))
        loads = re.findall(r"loaded the base model .* in ([\d.]+) s", (out / "worker.log").read_text())
    assert len(loads) == 1 + repeat, "each new worker loads, the one that stays once"
    middles = ([statistics.median(values) for values in zip(*each, strict=True)] for each in (old, new))
    return (*middles, statistics.median(map(float, loads[1:])))


@contextmanager
def worker(command: list[str], out: Path) -> Iterator[tuple[str, int]]:
    """A client's worker: the path of its socket, and its process id."""
    with tempfile.TemporaryDirectory(prefix="engines-") as folder, listening(Path(folder) / "worker") as listener:
        number = listener.fileno()
        with child_process([*command, str(number)], out, "worker", pass_fds=(number,)) as child:
            yield str(Path(folder) / "worker"), child.pid


def seconds(path: str, message: Message) -> float:
    started = perf_counter()
    answer = call(path, message)
    assert "update" in answer.head, answer.head
    return perf_counter() - started


def processor(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def of_children() -> float:
    """Seconds of processor time of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
