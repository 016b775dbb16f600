"""What was sent and what it took, counted on the very objects that travel."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any

import torch

from fedexperts.core.devices import Profile
from fedexperts.moe.anatomy import Experts
from fedexperts.types import Failure, Job, Tensors, Update


@dataclass(frozen=True)
class Entry:
    """One job of one client, and its answer."""

    round: int
    client: str
    task: str
    experts: int  # that the client worked with, over the whole model
    bytes_down: int
    bytes_up: int = 0
    seconds: float = 0.0
    tokens: int = 0
    peak_bytes: int = 0
    flops_estimated: float = 0.0
    failed: str | None = None
    loss: float | None = None  # mean over the client's steps
    clock_seconds: float | None = None  # virtual; None without a clock, and for what measures the run
    metrics: Mapping[str, Any] = field(default_factory=dict)  # what else the method tells of itself, as JSON has it

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Clock:
    """Virtual time: what a job takes on its client's device, from what was counted.

    Without a profile a client has none, and evaluations take none. A client that fails by itself says so as soon as it has its
    job.
    """

    profiles: Mapping[str, Profile] = field(default_factory=dict)
    deadline_seconds: float = inf

    def timed(self, entry: Entry) -> Entry:
        """`entry` with its seconds. One that is past the deadline lasts until then: it failed, and nothing of it went up."""
        profile = self.profiles.get(entry.client)
        if profile is None or entry.task == "evaluate":
            return entry
        seconds = profile.seconds(entry.bytes_down, entry.flops_estimated, entry.bytes_up)
        if seconds <= self.deadline_seconds:
            return replace(entry, clock_seconds=seconds)
        late = f"it would have answered after {seconds:,.1f} s, later than the deadline of {self.deadline_seconds:,g} s"
        lost = replace(entry, bytes_up=0, loss=None, metrics={}, failed=entry.failed or late)
        return replace(lost, clock_seconds=self.deadline_seconds)


class Ledger:
    """The entries of the round under way, in the order of its jobs, and who held what in it."""

    def __init__(self, clock: Clock = Clock()) -> None:
        self.clock = clock
        self.entries: list[Entry] = []
        self.holds: dict[str, Experts] = {}
        self.sends: dict[str, Experts] = {}  # of clients that sent other experts than they held
        self.uses: dict[str, Mapping[str, Sequence[int]]] = {}  # tokens that each expert got that a client held, while it trained

    def clear(self) -> None:
        self.entries, self.holds, self.sends, self.uses = [], {}, {}, {}

    @property
    def clock_seconds(self) -> float | None:
        """How long the round lasts: as its slowest client; None without a clock."""
        return max((entry.clock_seconds for entry in self.entries if entry.clock_seconds is not None), default=None)

    @property
    def lost(self) -> bool:
        """Whether clients were asked, and none gave an answer that can be used."""
        return bool(self.entries) and all(entry.failed for entry in self.entries)

    def sent(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """`jobs`, each entered as it passes."""
        for job in jobs:
            self.entries.append(asked(job))
            self.holds[job.client] = job.experts
            yield job

    def received(self, answers: Iterable[Update | Failure]) -> Iterator[Update]:
        """The updates that can be used, all of `answers` entered.

        A failure is entered with its reason and goes no further, and so does an update with a number that is not finite, or one
        that comes after the deadline.
        """
        for answer in answers:
            i = next(i for i, entry in enumerate(self.entries) if (entry.client, entry.task) == (answer.client, answer.task))
            self.entries[i] = answered(self.entries[i], answer, self.clock)
            if isinstance(answer, Update) and not self.entries[i].failed:
                self.note_experts(answer)
                self.note_uses(answer)
                yield answer
            del answer  # or it would be held until the next one has come

    def note_experts(self, update: Update) -> None:
        """Which experts came with `update`, where some did, and others than its client held."""
        held = self.holds[update.client]
        # The fewest rows of a block count, since a router may have come with all its own
        by_length = sorted(update.patch.rows.items(), key=lambda named: len(named[1]), reverse=True)
        rows = {block: ids for name, ids in by_length for block in held if name.startswith(f"{block}.")}
        sent = {block: tuple(ids.tolist()) for block, ids in rows.items()}
        if sent and any(tuple(held[block]) != ids for block, ids in sent.items()):
            self.sends[update.client] = sent

    def note_uses(self, update: Update) -> None:
        """Whom the client's model routed tokens to, where it tells that of just the experts that it held."""
        held = self.holds[update.client]
        told = update.metrics.get("routed")
        if not isinstance(told, Mapping) or told.keys() != held.keys():  # who wrote it may be anyone
            return
        if all(counts_of(told[block], len(ids)) for block, ids in held.items()):
            self.uses[update.client] = told


def counts_of(told: object, number: int) -> bool:
    """Whether it is a list of `number` counts."""
    return isinstance(told, list) and len(told) == number and all(isinstance(count, int) and count >= 0 for count in told)


def asked(job: Job) -> Entry:
    """The entry of a job without its answer."""
    experts = sum(len(ids) for ids in job.experts.values())
    return Entry(job.round, job.client, job.task, experts, bytes_down=job.nbytes)


def answered(entry: Entry, answer: Update | Failure, clock: Clock) -> Entry:
    """`entry` with what its answer took; it has `failed` where the answer cannot be used."""
    if isinstance(answer, Failure):
        return clock.timed(replace(entry, failed=answer.reason))
    broken = not_finite({**answer.patch.tensors, **answer.extra})
    failed = f"its update holds NaN or infinity in {broken}" if broken else None
    told = {} if failed or entry.task == "evaluate" else dict(answer.metrics)  # an evaluation's stand in evals.jsonl
    loss = told.pop("loss", None)
    told.pop("routed", None)  # stands in rounds.jsonl, beside who held what
    return clock.timed(replace(entry, bytes_up=answer.nbytes, failed=failed, loss=loss, metrics=told, **asdict(answer.cost)))


def not_finite(tensors: Tensors) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    return next((name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
