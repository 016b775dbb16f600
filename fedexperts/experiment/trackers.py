"""Writes the metrics in a run's logs to TensorBoard, MLflow or W&B while it runs. Nothing is sent over the network by default."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedexperts.errors import BadValue
from fedexperts.io.files import run_id, write_text
from fedexperts.io.manifest import NUMBERS
from fedexperts.io.toml import Tree, flattened, to_toml

Points = Mapping[str, float]
Write = Callable[[int, Points], None]  # writes the metrics of a round

PROJECT = "fedexperts"
MOST_METRICS = 1000  # per request to MLflow
LONGEST_PARAM = 6000  # characters, for MLflow
SUMS = ("bytes_down", "bytes_up", "tokens", "flops_estimated")


@dataclass(frozen=True)
class Tracked:
    """A run as trackers see it."""

    out: Path
    together: Path  # folder of the comparison, or of the run
    method: str
    setting: str
    seed: int
    resolved: Tree

    @property
    def group(self) -> str:
        """The name of the group of all seeds of the method."""
        return f"{self.setting}: {self.method}" if self.setting else self.method

    @property
    def name(self) -> str:
        return f"{self.group}, seed {self.seed}"


def require(to: str | None) -> None:
    """Raises BadValue if the tracker `to` is not installed."""
    # find_spec also finds a folder of that name in the working directory, such as wandb's own, but without an origin
    if to is not None and not ((spec := find_spec(to)) and spec.origin):
        raise BadValue(
            f'track.to = "{to}" needs {to}, which is not installed; install it (pip install "fedexperts[{to}]"), '
            "or leave track.to out"
        )


@contextmanager
def tracking(to: str | None, run: Tracked, done: bool) -> Iterator[Callable[[], None]]:
    """Yields a function, to be called after each complete round, that writes new lines of the logs to the tracker `to`.

    After a resume the tracker continues and gets no metric twice. A run that is `done` is skipped if `out`/tracked records that
    the tracker has all of it.
    """
    noted = run.out / "tracked"
    if to is None or (done and noted.exists() and noted.read_text() == to):
        yield lambda: None
        return
    with TRACKERS[to](run) as write:
        reader = Reader(run.out, write)
        reader()
        yield reader
    write_text(noted, to)


class Reader:
    """Reads the lines that were appended to a run's logs since the last call and writes their metrics."""

    def __init__(self, out: Path, write: Write) -> None:
        self.new_lines, self.write = NewLines(out), write

    def __call__(self) -> None:
        points = points_of(*self.new_lines())
        for round in sorted(points):
            self.write(round, points[round])


class NewLines:
    """The lines that were appended to the rounds, the ledger and the evaluations of a run since the last call."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.read = dict.fromkeys(NUMBERS, 0)

    def __call__(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
        return self.added("rounds.jsonl"), self.added("ledger.jsonl"), self.added("evals.jsonl")

    def added(self, name: str) -> list[dict[str, Any]]:
        """New lines of one log; none if it does not exist yet."""
        path = self.out / name
        if not path.exists():
            return []
        with path.open() as file:
            file.seek(self.read[name])
            lines = file.readlines()
            self.read[name] = file.tell()
        return [json.loads(line) for line in lines]


def points_of(
    rounds: list[dict[str, Any]], ledger: list[dict[str, Any]], evals: list[dict[str, Any]]
) -> dict[int, dict[str, float]]:
    """Round → name → value, from lines of the three logs that cover complete rounds. Setup tasks are round 0."""
    points: dict[int, dict[str, float]] = {}

    def put(round: int, value: float | None, *path: str) -> None:
        if value is not None:
            points.setdefault(round, {})[name_of(*path)] = value

    for line in rounds:
        number, task = line["round"], line["task"]
        for key in ("loss", "seconds", "clock_seconds"):
            put(number, line[key], task, key)
        put(number, len(line["clients"]) - len(line["failed"]), task, "clients")
        put(number, len(line["failed"]), task, "failed")
        entries = [entry for entry in ledger if (entry["round"], entry["task"]) == (number, task)]
        for key in SUMS:
            put(number, sum(entry[key] for entry in entries), task, key)
        put(number, max((entry["peak_bytes"] for entry in entries), default=None), task, "peak_bytes")
        for entry in entries:
            put(number, entry["loss"], "clients", entry["client"], task, "loss")

    for line in evals:
        number, whose = line["round"], ("eval",) if line["client"] is None else ("clients", line["client"])
        if line["task"] is None and line["metric"] is not None:
            put(number, line["value"], *whose, line["metric"])
        for metric, value in line.get("metrics", {}).items():
            put(number, value, *whose, line["task"], metric)
        for task, scored in line.get("retained", {}).items():
            put(number, scored["value"], *(("base",) if line["client"] is None else whose), "retained", task, scored["metric"])
        for block, nats in line.get("drift", {}).items():
            put(number, nats, *whose, "drift", block)
    return points


def name_of(*path: str) -> str:
    """A metric name for all trackers: MLflow allows only these characters; TensorBoard and W&B group by the part before `/`."""
    return "/".join(re.sub(r"[^\w.: -]+", "_", part) for part in path)


@contextmanager
def tensorboard(run: Tracked) -> Iterator[Write]:
    """Event files in `tensorboard/` of the results folder, rewritten from the logs after a resume."""
    from torch.utils.tensorboard import SummaryWriter  # an extra

    folder = run.out / "tensorboard"
    before = list(folder.glob("events.out.tfevents.*"))
    for path in before:
        path.unlink()
    # With purge_step an open TensorBoard discards what it has read from the old files
    with SummaryWriter(folder, purge_step=0 if before else None) as writer:
        writer.add_text("run.toml", "\n".join(f"    {line}" for line in to_toml(run.resolved).splitlines()))

        def write(round: int, points: Points) -> None:
            for name, value in points.items():
                writer.add_scalar(name, value, round)
            writer.flush()

        yield write


@contextmanager
def mlflow(run: Tracked) -> Iterator[Write]:
    """A run in `mlflow.db` of the results folder or comparison, or in the store of MLFLOW_TRACKING_URI."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.entities import Metric, Param  # an extra
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run.together / 'mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name(PROJECT)
    place = experiment.experiment_id if experiment else client.create_experiment(PROJECT)
    own = {"fedexperts.id": run_id(run.out)}
    begun = client.search_runs([place], filter_string=f"tags.`fedexperts.id` = '{own['fedexperts.id']}'")
    tags = {**own, "method": run.method, "setting": run.setting, "seed": str(run.seed)}
    entry = begun[0] if begun else client.create_run(place, tags=tags, run_name=run.name)
    number = entry.info.run_id
    if not entry.data.params:
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in flattened(run.resolved).items()]
        client.log_batch(number, params=params)
    client.update_run(number, status="RUNNING")
    logged_rounds: dict[str, set[int]] = {}  # name → rounds that MLflow already has

    def missing(name: str, round: int) -> bool:
        if begun and name not in logged_rounds:
            logged_rounds[name] = {metric.step for metric in client.get_metric_history(number, name)}
        return round not in logged_rounds.get(name, ())

    def write(round: int, points: Points) -> None:
        now = int(time.time() * 1000)
        new = [Metric(name, value, now, round) for name, value in points.items() if missing(name, round)]
        for start in range(0, len(new), MOST_METRICS):
            client.log_batch(number, metrics=new[start : start + MOST_METRICS])

    try:
        yield write
    except BaseException:
        client.set_terminated(number, "FAILED")
        raise
    client.set_terminated(number)


@contextmanager
def wandb(run: Tracked) -> Iterator[Write]:
    """An offline run in `wandb/` of the results folder, rewritten from the logs after a resume; `wandb sync` uploads it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb as library  # an extra

    number = run_id(run.out)
    for before in (run.out / "wandb").glob(f"offline-run-*-{number}"):
        shutil.rmtree(before)
    quiet = library.Settings(mode="offline", silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True)
    with library.init(
        project=PROJECT,
        id=number,
        name=run.name,
        group=run.group,
        config=dict(run.resolved),
        dir=run.out,
        settings=quiet,
        reinit="create_new",
    ) as entry:
        yield lambda round, points: entry.log(dict(points), step=round)


TRACKERS: Mapping[str, Callable[[Tracked], AbstractContextManager[Write]]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "wandb": wandb,
}
