"""How far a run is, and what its run file says."""

import tomllib
from collections.abc import Mapping
from typing import Any

from fedexperts.report.read import RunResults


def settings(run: RunResults) -> Mapping[str, Any]:
    """The resolved run file; empty if it is missing or incomplete."""
    try:
        return tomllib.loads(run.run_file)
    except tomllib.TOMLDecodeError:
        return {}


def rounds_planned(run: RunResults) -> int | None:
    """`federation.rounds` of the resolved run file; None if it is not in there."""
    rounds = settings(run).get("federation", {}).get("rounds")
    return int(rounds) if isinstance(rounds, int) else None


def rounds_done(run: RunResults) -> int:
    """The last finished round."""
    return max((row.round for row in run.rounds), default=0)


def finished(run: RunResults) -> bool:
    """Whether the run was evaluated after its last round, or stopped before it; True if the number of rounds is unknown."""
    planned = rounds_planned(run)
    return planned is None or any(row.round >= planned for row in run.evaluations_of.get((None, None), ())) or stopped(run)


def stopped(run: RunResults) -> bool:
    """Whether the run stopped after its last finished round, as its run file says."""
    return any(row.stopped and row.round == rounds_done(run) for row in run.evaluations_of.get((None, None), ()))
