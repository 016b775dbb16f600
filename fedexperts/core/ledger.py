"""What was sent and what it took, counted on the very objects that travel."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any

from fedexperts.core.devices import Profile
from fedexperts.moe.anatomy import Experts
from fedexperts.types import Failure, Job, Update


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
    """The entries of the round under way, in the order of its jobs, and who held what in it.

    on_answer: gets the entry of each answer, once it has been validated.
    """

    def __init__(self, clock: Clock = Clock(), on_answer: Callable[[Entry], None] = lambda entry: None) -> None:
        self.clock, self.on_answer = clock, on_answer
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
        """Whether jobs were sent, and none got an answer that can be used."""
        return bool(self.entries) and all(entry.failed for entry in self.entries)

    def sent(self, job: Job) -> None:
        """Enters a job as it leaves."""
        self.entries.append(entry_of(job))
        self.holds[job.client] = job.experts

    def received(self, answer: Update | Failure) -> tuple[Update, ...]:
        """Enters an answer; the update in it, where it can be used: it is no failure and came before the deadline."""
        i = next(i for i, entry in enumerate(self.entries) if (entry.client, entry.task) == (answer.client, answer.task))
        self.entries[i] = answered(self.entries[i], answer, self.clock)
        self.on_answer(self.entries[i])
        if isinstance(answer, Failure) or self.entries[i].failed:
            return ()
        self.note_experts(answer)
        self.note_uses(answer)
        return (answer,)

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
        """The tokens that the client's model routed to each expert that it held, where routers were recorded."""
        if routed := update.metrics.get("routed"):
            self.uses[update.client] = routed


def entry_of(job: Job) -> Entry:
    """The entry of a job without its answer."""
    experts = sum(len(ids) for ids in job.experts.values())
    return Entry(job.round, job.client, job.task, experts, bytes_down=job.nbytes)


def answered(entry: Entry, answer: Update | Failure, clock: Clock) -> Entry:
    """`entry` with what its answer took; it has `failed` where the answer cannot be used."""
    if isinstance(answer, Failure):
        return clock.timed(replace(entry, failed=answer.reason, bytes_up=answer.bytes_up))
    metrics = {} if entry.task == "evaluate" else dict(answer.metrics)  # an evaluation's stand in evals.jsonl
    loss = metrics.pop("loss", None)
    metrics.pop("routed", None)  # stands in rounds.jsonl, beside who held what
    return clock.timed(replace(entry, bytes_up=answer.nbytes, loss=loss, metrics=metrics, **asdict(answer.cost)))
