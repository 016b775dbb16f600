"""What users of the Python API are told after each round of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedexperts.experiment.progress import Quiet
from fedexperts.experiment.trackers import NewLines
from fedexperts.types import Server


@dataclass(frozen=True)
class RoundDone:
    """What a round added to the logs of a run. What comes before the first round (setup tasks, an evaluation) is round 0."""

    folder: Path  # of the run's results
    round: int
    rounds: int  # of the run, if it does not stop early
    loss: float | None  # mean training loss of the clients that answered; None: not known
    losses: Mapping[str, float]  # client → its training loss
    failed: Mapping[str, str]  # client → why its answer was not used
    scores: Mapping[str, float]  # if models were evaluated: task → main metric over all clients, and "overall"
    client_scores: Mapping[str, Mapping[str, float]]  # client → task → main metric
    bytes_down: int  # to all clients, without evaluations
    bytes_up: int
    seconds: float  # of training, measured
    clock_seconds: float | None  # virtual; None: no clock


OnRound = Callable[[RoundDone], object]


class Telling(Quiet):
    """Shows nothing, and calls `on_round` after each complete step of the run in `out` with what is new in its logs.

    An exception in `on_round` ends the run. The checkpoint of the round is written by then, so the run can be resumed.
    """

    def __init__(self, on_round: OnRound, out: Path, rounds: int) -> None:
        self.on_round, self.out, self.rounds = on_round, out, rounds
        self.new_lines = NewLines(out)

    def start(self, label: str, seed: int, done: int, total: int) -> None:
        self.new_lines()  # of rounds that are done already

    def round(self, server: Server) -> None:
        logs = self.new_lines()
        for number in sorted({line["round"] for lines in logs for line in lines}):
            of_round = ([line for line in lines if line["round"] == number] for lines in logs)
            self.on_round(done(self.out, self.rounds, number, *of_round))


def done(
    out: Path,
    rounds: int,
    number: int,
    steps: list[dict[str, Any]],
    jobs: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
) -> RoundDone:
    """Round `number` in lines of the three logs that are about it."""
    jobs = [job for job in jobs if job["task"] != "evaluate"]
    losses = [step["loss"] for step in steps if step["loss"] is not None]
    clocks = [step["clock_seconds"] for step in steps if step["clock_seconds"] is not None]
    scored = [line for line in evaluations if line["value"] is not None]
    by_client: dict[str, dict[str, float]] = {}
    for line in scored:
        if line["client"] is not None:
            by_client.setdefault(line["client"], {})[line["task"]] = line["value"]
    return RoundDone(
        folder=out,
        round=number,
        rounds=rounds,
        loss=losses[-1] if losses else None,
        losses={job["client"]: job["loss"] for job in jobs if job["loss"] is not None},
        failed={client: reason for step in steps for client, reason in step["failed"].items()},
        scores={line["task"] or line["metric"]: line["value"] for line in scored if line["client"] is None},
        client_scores=by_client,
        bytes_down=sum(job["bytes_down"] for job in jobs),
        bytes_up=sum(job["bytes_up"] for job in jobs),
        seconds=sum(step["seconds"] for step in steps),
        clock_seconds=sum(clocks) if clocks else None,
    )
