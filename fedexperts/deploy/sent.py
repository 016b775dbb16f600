"""The record of what left a client: a line for each message, on the client's disk before the message leaves."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedexperts.engines.message import Message, digest
from fedexperts.errors import BadRun
from fedexperts.io import chain

SENT = "sent.jsonl"
"""The file, in the client's folder."""
LONGEST_VALUE = 2_000
"""Characters of JSON: of a longer metric the record has the number of bytes and the sha256."""
TENSORS = ("tensors", "rows")
"""Keys of a message's head that describe its parts."""


class SentLog:
    """Appends to the record of the client in `folder`; call it with a request (None: unreadable) and the message that answers it.

    Raises:
        Damaged: the record has changed since it was written.
    """

    def __init__(self, folder: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path, self.now = folder / SENT, now
        self.end = chain.end_of(self.path)

    def __call__(self, request: Message | None, reply: Message) -> Message:
        """`reply`, recorded; where the disk refuses the record, a refusal that says so, and nothing else leaves."""
        try:
            self.end = chain.append(self.path, {"time": self.now().isoformat(), **described(request, reply)}, self.end)
        except OSError as error:
            self.end = chain.end_of(self.path)  # a part of the line may be there
            refusal = f"its record of what leaves it cannot be written ({error.strerror}), so nothing leaves; free its disk"
            return Message({"refused": refusal}, {})
        return reply


def described(request: Message | None, reply: Message) -> dict[str, Any]:
    """What the record says of `reply`: all that it holds but the numbers in its tensors, of which it has names and bytes."""
    asked = {} if request is None else request.head
    given = asked.get("job")
    job: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    what = next((key for key in ("greeting", "update", "failure", "refused") if key in reply.head), "other")
    content = {key: value for key, value in reply.head.items() if key not in TENSORS}
    if what == "update":
        update = content["update"]
        content = {**update, "metrics": {name: shortened(value) for name, value in update["metrics"].items()}}
    else:
        content = {key: value for each in content.values() for key, value in as_mapping(each).items()}
    head = json.dumps(dict(reply.head))
    return {
        "run": run_of(asked.get("run")),
        "round": content.pop("round", job.get("round")),
        "task": content.pop("task", job.get("task")),
        "what": what,
        "content": content,
        "tensors": {name: len(part) for name, part in reply.parts.items()},
        "bytes": len(head.encode()) + sum(map(len, reply.parts.values())),
        "sha256": digest(head, reply.parts),
    }


def as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"reason": value}


def shortened(value: object) -> object:
    """`value`, or what stands for it where its JSON is long."""
    text = json.dumps(value)
    return value if len(text) <= LONGEST_VALUE else {"bytes": len(text.encode()), "sha256": sha256(text.encode()).hexdigest()}


def run_of(run: object) -> str | None:
    """The id of the run that a request is about, which may say anything."""
    try:
        return str(json.loads(run)["id"]) if isinstance(run, str) else None
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Audit:
    """The verified record of a client, and what to say of it."""

    records: Sequence[Mapping[str, Any]]
    sentences: Sequence[str]


def audit(folder: Path) -> Audit:
    """The record of the client in `folder`.

    Raises:
        BadRun: it is missing.
        Damaged: a line was changed, deleted or moved.
    """
    path = folder / SENT
    if not path.is_file():
        raise BadRun(f"{path} is missing; give the folder of a client that took part in a run (its --out)")
    lines = list(chain.verified(path))
    records = [line.record for line in lines if line.record is not None]
    torn = [line.place for line in lines if line.record is None]
    last = records[-1]["seal"] if records else chain.START
    total = sum(record["bytes"] for record in records)
    cut = (
        f"incomplete: line {', '.join(map(str, torn))} (the client was killed while it wrote it, before that message left)"
        if torn
        else "no line is incomplete"
    )
    return Audit(
        records,
        [
            f"{len(records)} messages, {total / 1e6:,.2f} MB, of {len({record['run'] for record in records})} runs; no line was "
            f"changed, deleted or moved; {cut}",
            f"the last seal is {last}; note it elsewhere: a record that was cut off at its end, or written anew, has another",
        ],
    )


def sent_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each message."""
    table = Table(title="Messages that left")
    for name in ("time (UTC)", "run", "round", "task", "what", "tensors", "bytes", "counts and metrics", "sha256"):
        table.add_column(name, justify="right" if name in ("round", "tensors", "bytes") else "left", overflow="fold")
    for record in records:
        shown = (record["time"][:19], (record["run"] or "")[:6], record["round"], record["task"], record["what"])
        sizes = (len(record["tensors"]), f"{record['bytes']:,}", ", ".join(names_in(record)), record["sha256"][:8])
        table.add_row(*(Text("" if each is None else str(each)) for each in (*shown, *sizes)))
    return table


def names_in(record: Mapping[str, Any]) -> list[str]:
    """The names of the counts and metrics in a message."""
    content = record["content"]
    return [name for name in (*content, *content.get("metrics", {})) if name not in ("client", "metrics")]
