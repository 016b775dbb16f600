"""The exceptions of the package. Every message says what was given, what is allowed and what to do, in one short sentence."""

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import repr as short_repr

LONGEST = 300
"""Characters of a sentence about a value."""


class FedExpertsError(Exception):
    """A mistake that the user can correct; the command line prints its sentence and exits with 2."""


class BadValue(FedExpertsError, ValueError):
    """A value that no setting, method or model allows. Of a sentence that quotes something long, the middle is left out."""

    def __init__(self, sentence: object = "") -> None:
        super().__init__(bounded(str(sentence)))


class NoExperts(BadValue):
    """A model without Mixture-of-Experts layers that we can find."""


class TooSmall(BadValue):
    """A client whose memory holds no legal sub-model."""


class BadData(BadValue):
    """Data that cannot be read, or cannot be divided as the settings say."""


class Undeclared(FedExpertsError):
    """A method keeps, sends or reports something under a name that it does not declare: a mistake in its code."""


class Leak(Undeclared):
    """What a client keeps to itself was about to leave it."""


class BadMessage(FedExpertsError):
    """A message that cannot be read: cut off, changed on the way, or of another protocol."""


class BadRun(FedExpertsError):
    """A results folder that does not fit the command: it holds another run, or none."""


class Damaged(BadRun):
    """A file of a results folder that is missing, or is not what the run wrote."""


class Busy(BadRun):
    """A results folder in which another process is at work."""


def bounded(sentence: str) -> str:
    """`sentence` in at most LONGEST characters: its beginning, which says where, and its end, which says what to do."""
    return sentence if len(sentence) <= LONGEST else f"{sentence[: LONGEST - 123].rstrip()} … {sentence[-120:].lstrip()}"


def quoted(value: object) -> str:
    """The beginning of `value`, which may be anything, as an error sentence quotes it."""
    try:
        return short_repr(value)[:60]
    except Exception:  # a number of more digits than Python writes out, for one
        return f"a value of type {type(value).__name__}"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean X?` for the allowed name closest to `name`, or nothing when none is close."""
    close = get_close_matches(name, sorted(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def listed(names: Iterable[object], limit: int = 8) -> str:
    """`names` with commas between them; of more than `limit`, the first ones and their total number."""
    texts = [shortened(str(name), 40) for name in names]
    first = ", ".join(texts[:limit])
    return first if len(texts) <= limit else f"{first}, … ({len(texts)} in all)"


def shortened(text: str, limit: int = 100) -> str:
    """`text` on one line, cut to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
