"""The axes that the progress of a run is shown over: rounds, bytes sent, virtual time."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from fedexperts.report import progress, resources
from fedexperts.report.read import RunResults
from fedexperts.report.resources import MB

Place = Callable[[int], float]  # round → its position on an axis


@dataclass(frozen=True)
class Axis:
    """A quantity that grows with the rounds of a run, to plot or compare progress over."""

    name: str
    label: str  # on the axis of a figure
    cost: str  # name of the cost of reaching a target, in `unit`
    unit: str
    of: Callable[[RunResults], Place | None]  # None: the run lacks the data
    note: str = ""


def bytes_until(run: RunResults) -> Callable[[int], int]:
    """Round → bytes that all clients together have sent and received by its end."""
    rows = sorted(resources.cost_rows(run), key=lambda row: row.round)
    rounds = [row.round for row in rows]
    sums = [0, *accumulate(row.bytes_down + row.bytes_up for row in rows)]
    return lambda round: sums[bisect_right(rounds, round)]


def mb_until(run: RunResults) -> Place:
    """`bytes_until` in MB."""
    until = bytes_until(run)
    return lambda round: until(round) / MB


def has_clock(run: RunResults) -> bool:
    """Whether every round of the run has a virtual time."""
    return bool(run.rounds) and all(row.clock_seconds is not None for row in run.rounds)


def clock_until(run: RunResults) -> Place | None:
    """Round → virtual seconds of all setup tasks and rounds by its end; None for a run without a clock."""
    if not has_clock(run):
        return None
    rows = sorted(run.rounds, key=lambda row: row.round)
    rounds = [row.round for row in rows]
    sums = [0.0, *accumulate(row.clock_seconds or 0.0 for row in rows)]
    return lambda round: sums[bisect_right(rounds, round)]


def virtual_seconds(run: RunResults) -> float | None:
    """The virtual time of the whole run in seconds; None without a clock."""
    until = clock_until(run)
    return until(progress.rounds_done(run)) if until else None


BY_ROUNDS = Axis("rounds", "round", "rounds", "", lambda run: float)
BY_BYTES = Axis(
    "bytes",
    "MB sent so far (10^6 bytes)",
    "sent",
    "MB",
    mb_until,
    "Bytes: down and up, all clients together, without evaluations.",
)
BY_TIME = Axis(
    "virtual time",
    "virtual time (s)",
    "virtual time",
    "s",
    clock_until,
    "Virtual time: each round takes as long as its slowest client would on its device; evaluations take none.",
)
AXES: Mapping[str, Axis] = {axis.name: axis for axis in (BY_ROUNDS, BY_BYTES, BY_TIME)}
