"""Logs that only grow: each line names the hash of the one before it, so that a line that changes, goes or moves is noticed.

A line is a JSON object. Its last entry is its seal, the sha256 of all before that entry; `number` counts from 1, and `previous`
is the seal of the line before. A process that is killed may leave a line incomplete: the next one then names the sha256 of that
piece (`torn`), and follows the last complete line.

A seal is no signature. Whoever can write the file can write all of it anew, with other seals, or cut off its end: so the seal of
the last line belongs in a second place as well.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedexperts.errors import Damaged
from fedexperts.io.files import sync
from fedexperts.io.manifest import finite

START = "0" * 64
"""The seal before the first line."""
SEALED = re.compile(rb'(.*), "seal": "([0-9a-f]{64})"\}', re.DOTALL)


@dataclass(frozen=True)
class Line:
    """A line of a log. record: what was logged; None of a line that a killed process left incomplete."""

    place: int  # in the file, from 1
    data: bytes
    record: Mapping[str, Any] | None


@dataclass(frozen=True)
class End:
    """Where a log ends: the number and the seal of its last complete line, and what a killed process has left after it."""

    number: int = 0
    seal: str = START
    torn: Sequence[bytes] = ()
    is_open: bool = False  # whether the last line lacks its end


def append(path: Path, record: Mapping[str, Any], end: End) -> End:
    """Appends `record` after `end` and syncs the file; returns where the log ends now.

    Raises:
        OSError: the disk refused.
    """
    torn = {"torn": digest(end.torn)} if end.torn else {}
    entry = {"number": end.number + 1, "previous": end.seal, **torn, **finite(record)}
    body = json.dumps(entry, allow_nan=False).encode()[:-1]
    seal, is_new = sha256(body).hexdigest(), not path.exists()
    with path.open("ab") as file:
        file.write((b"\n" if end.is_open else b"") + body + f', "seal": "{seal}"}}\n'.encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)
    return End(end.number + 1, seal)


def end_of(path: Path) -> End:
    """Where the log in `path` ends; its beginning if there is no such file.

    Raises:
        Damaged: it has changed since it was written.
    """
    end = End()
    for line in verified(path) if path.exists() else ():
        is_open = not line.data.endswith(b"\n")
        if line.record is None:
            end = End(end.number, end.seal, (*end.torn, line.data), is_open)
        else:
            end = End(line.record["number"], line.record["seal"], (), is_open)
    return end


def verified(path: Path) -> Iterator[Line]:
    """The lines of the log in `path`, in their order.

    Raises:
        Damaged: a line was changed, deleted or moved; names the first.
    """
    number, seal = 0, START
    incomplete: list[Line] = []
    with path.open("rb") as file:
        for place, data in enumerate(file, 1):
            line = Line(place, data, sealed(data))
            if line.record is None:
                incomplete.append(line)
                continue
            if why := link_error(line.record, number, seal, incomplete):
                raise Damaged(f"{path}, line {incomplete[0].place if incomplete else place}: {why}")
            yield from (*incomplete, line)
            number, seal, incomplete = number + 1, line.record["seal"], []
    if incomplete and incomplete[-1].data.endswith(b"\n"):
        raise Damaged(f"{path}, line {incomplete[0].place}: {CHANGED}")
    yield from incomplete


CHANGED = "it was changed after it was written"


def sealed(line: bytes) -> dict[str, Any] | None:
    """The record in `line` if its seal fits."""
    found = SEALED.fullmatch(line.removesuffix(b"\n"))
    if found is None or sha256(found[1]).hexdigest() != found[2].decode():
        return None
    record: dict[str, Any] = json.loads(line)
    return record


def link_error(record: Mapping[str, Any], number: int, seal: str, incomplete: Sequence[Line]) -> str | None:
    """Why `record` is not what was written after line `number`, with `seal`, and what is `incomplete`; None if it is."""
    if incomplete and record.get("torn") != digest([line.data for line in incomplete]):
        return CHANGED
    if not incomplete and "torn" in record:
        return "an incomplete line before it was deleted"
    if record.get("number") != number + 1:
        return f"it is number {record.get('number')}, and number {number + 1} belongs here: lines were deleted or moved"
    return None if record.get("previous") == seal else "it does not follow the line before it, which was replaced"


def digest(torn: Sequence[bytes]) -> str:
    """sha256 of incomplete lines, without the end of the last."""
    return sha256(b"".join(torn).removesuffix(b"\n")).hexdigest()
