"""What can go wrong, by name. Every message says what was given, what is allowed and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import repr as short_repr


class FedExpertsError(Exception):
    """Something the user can mend; the command line prints its one sentence and exits with 2."""


class BadValue(FedExpertsError, ValueError):
    """A value that no setting, method or model allows."""


class NoExperts(BadValue):
    """A model without Mixture-of-Experts layers that we can find."""


class TooSmall(BadValue):
    """A client whose memory holds no legal sub-model."""


class BadData(BadValue):
    """Data that cannot be read, or cannot be divided as asked."""


class Undeclared(FedExpertsError):
    """A method keeps, sends or reports something under a name that it does not declare: a mistake in its code."""


class Leak(Undeclared):
    """What a client keeps to itself was about to leave it."""


class BadMessage(FedExpertsError):
    """What came from the other side, and cannot be read: cut off, changed on the way, or of another protocol."""


class BadRun(FedExpertsError):
    """A results folder that does not fit what was asked of it."""


class Busy(BadRun):
    """A results folder in which another process is at work."""


def quoted(value: object) -> str:
    """The beginning of `value`, which may be anything, as an error sentence quotes it."""
    try:
        return short_repr(value)[:60]
    except Exception:  # a number of more digits than Python writes out, for one
        return f"a value of type {type(value).__name__}"


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`; did you mean X?` for the allowed name closest to `given`, or nothing when none is close."""
    close = get_close_matches(given, sorted(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
