"""How far a run is, and what its run file says."""

import tomllib
from collections.abc import Mapping
from typing import Any

from fedexperts.report.read import RunResults


def settings(run: RunResults) -> Mapping[str, Any]:
    """The resolved run file; empty when it is missing or half written."""
    try:
        return tomllib.loads(run.run_file)
    except tomllib.TOMLDecodeError:
        return {}


def rounds_asked(run: RunResults) -> int | None:
    """`federation.rounds` of the resolved run file; None when the file is not there or says nothing of it."""
    rounds = settings(run).get("federation", {}).get("rounds")
    return int(rounds) if isinstance(rounds, int) else None


def rounds_done(run: RunResults) -> int:
    """The last round that was finished."""
    return max((row.round for row in run.rounds), default=0)


def finished(run: RunResults) -> bool:
    """Whether the run was evaluated after the last of its rounds; where nothing says how many it has, it is."""
    asked = rounds_asked(run)
    return asked is None or any(row.round >= asked for row in run.evaluations_of.get((None, None), ()))
