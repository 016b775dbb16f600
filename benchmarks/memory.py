"""Peaks of memory of a whole run on each engine: for `engines.py`."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.engine_starts import ENGINES, STARTS, Start, in_process, on_deployment, played, settings, wide_model
from fedexperts.deploy.processes import return_memory
from fedexperts.experiment import runner
from fedexperts.experiment.setup import Prepared
from fedexperts.types import Engine


def table(repeat: int) -> Table:
    table = Table("engine", "process", "peak in model sizes, over what it held before", "peak MB, all")
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        model = wide_model(Path(folder) / "model")
        for engine in ENGINES:
            for row in in_process("memory", "peaks", engine, str(model)):
                over = (row["peak"] - row["before"]) / row["model"]
                table.add_row(engine, row["process"], f"{over:.2f}", f"{row['peak'] / 1e6:.0f}")
    return table


def peaks(engine: str, model: str) -> list[dict[str, Any]]:
    """What the server's processes took in a whole run of two rounds with ten clients, in bytes."""
    before = status("self", "VmRSS")
    forget("self")
    if engine == "deployment":
        return_memory()  # `fedexperts server` opens the federation, which does it, before it loads anything
    config = settings("all weights", model, clients=10, rounds=2, score="before_aggregation")
    start = partial(on_deployment, join=played) if engine == "deployment" else STARTS[engine]
    superlink_rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        out = runner.run(config, Path(folder) / "run", engine=partial(watched, start, superlink_rows))
        (weights,) = out.glob("checkpoint/*/weights.safetensors")
        lines = map(json.loads, (out / "rounds.jsonl").read_text().splitlines())
        assert not any(line["failed"] for line in lines), "an update that did not come would not count"
        own = {"process": "rounds", "before": before, "peak": status("self", "VmHWM")}
        return [{**row, "model": weights.stat().st_size} for row in (own, *superlink_rows)]


@contextmanager
def watched(start: Start, rows: list[dict[str, Any]], prepared: Prepared, out: Path) -> Iterator[Engine]:
    """The engine of `start`; at its end, the peaks of the SuperLinks that it has are added to `rows`."""
    with start(prepared, out) as engine:
        del prepared
        before = {pid: status(pid, "VmRSS") for pid in superlinks()}
        for pid in before:
            forget(pid)
        yield engine
        rows += ({"process": "SuperLink", "before": rss, "peak": status(pid, "VmHWM")} for pid, rss in before.items())


def forget(pid: str) -> None:
    """The peak of a process begins anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def status(pid: str, what: str) -> int:
    """A line of /proc/PID/status in bytes."""
    (kilobytes,) = re.findall(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) * 1024


def superlinks() -> list[str]:
    """The SuperLink that this process started, where it did."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in children if "deploy.superlink" in Path(f"/proc/{pid}/cmdline").read_text()]
