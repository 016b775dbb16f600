"""The log of a deployment: readable lines with time and level on the terminal, and all of it as JSON lines in a file.

Needs neither torch nor Flower.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from time import gmtime
from typing import Any

from fedexperts.errors import FedExpertsError

LOG = "log.jsonl"
"""The file, in the folder of a client and in that of a server's own files."""
log = logging.getLogger("fedexperts")


def level_of(quiet: bool, verbose: bool) -> int:
    """Of what the terminal shows: `quiet`: warnings and errors, `verbose`: each answer too."""
    return logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO


@contextmanager
def logging_to(path: Path, level: int) -> Iterator[None]:
    """Logs to stderr from `level` on, and everything to `path`, to which other processes may write lines, and which may be moved.

    An error that ends the block is in the file; who catches it shows it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers = [terminal(level), WatchedFileHandler(path)]
    handlers[1].setFormatter(JsonLines())
    before = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    except FedExpertsError as error:
        log.error(str(error), extra={"is_shown": True})
        raise
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(before[0])
        log.propagate = before[1]


def terminal(level: int) -> logging.Handler:
    """Readable lines on stderr, such as: 2030-01-31T12:00:00Z INFO north is there."""
    handler, form = logging.StreamHandler(), logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    form.converter = gmtime
    handler.setFormatter(form)
    handler.setLevel(level)
    handler.addFilter(lambda record: not getattr(record, "is_shown", False))
    return handler


class JsonLines(logging.Formatter):
    """A JSON object for each record: time (UTC), level, message, and the fields that were logged with it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def say(level: int, sentence: str, **fields: Any) -> None:
    """Logs `sentence`, as it is, with `fields`, which are finite JSON values, in its JSON line."""
    log.log(level, "%s", sentence, extra={"fields": fields})
