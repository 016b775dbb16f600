"""Costs of each job, counted on the objects that are sent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any

from fedexperts.core.devices import Profile
from fedexperts.moe.anatomy import Experts
from fedexperts.types import Failure, Job, Update


@dataclass(frozen=True)
class Entry:
    """One job of one client and the costs of its answer."""

    round: int
    client: str
    task: str
    experts: int  # assigned to the client, over the whole model
    bytes_down: int
    bytes_up: int = 0
    seconds: float = 0.0
    tokens: int = 0
    peak_bytes: int = 0
    flops_estimated: float = 0.0
    failed: str | None = None
    loss: float | None = None  # mean over the client's steps
    clock_seconds: float | None = None  # virtual; None without a clock and for evaluations
    metrics: Mapping[str, Any] = field(default_factory=dict)  # other metrics of the method, as JSON values

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Clock:
    """Virtual time of jobs on the clients' devices, computed from the counted costs.

    Clients without a profile have no virtual time, and evaluations take none. A client that fails reports it as soon as it has
    received its job.
    """

    profiles: Mapping[str, Profile] = field(default_factory=dict)
    deadline_seconds: float = inf

    def timed(self, entry: Entry) -> Entry:
        """`entry` with its virtual seconds; if they exceed the deadline, the job failed at the deadline and sent nothing."""
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
    """The entries of the current round, in the order of its jobs; the experts that each client held, sent and used; predictions.

    on_answer: called with the entry of each validated answer.
    """

    def __init__(self, clock: Clock = Clock(), on_answer: Callable[[Entry], None] = lambda entry: None) -> None:
        self.clock, self.on_answer = clock, on_answer
        self.entries: list[Entry] = []
        self.holds: dict[str, Experts] = {}  # client → experts of its job
        self.sends: dict[str, Experts] = {}  # of clients that sent other experts than those of their job
        self.uses: dict[
            str, Mapping[str, Sequence[int]]
        ] = {}  # MoE block → training tokens routed to each of the client's experts
        self.predictions: dict[str, Sequence[Mapping[str, Any]]] = {}  # of clients that sent some with their scores

    def clear(self) -> None:
        self.entries, self.holds, self.sends, self.uses, self.predictions = [], {}, {}, {}, {}

    @property
    def clock_seconds(self) -> float | None:
        """Virtual seconds of the round, which are those of its slowest client; None without a clock."""
        return max((entry.clock_seconds for entry in self.entries if entry.clock_seconds is not None), default=None)

    @property
    def lost(self) -> bool:
        """Whether jobs were sent and all of them failed."""
        return bool(self.entries) and all(entry.failed for entry in self.entries)

    def sent(self, job: Job) -> None:
        """Adds the entry of a job that is sent."""
        self.entries.append(entry_of(job))
        self.holds[job.client] = job.experts

    def received(self, answer: Update | Failure) -> tuple[Update, ...]:
        """Records an answer; returns the update, or nothing if it failed or missed the deadline."""
        i = next(i for i, entry in enumerate(self.entries) if (entry.client, entry.task) == (answer.client, answer.task))
        self.entries[i] = answered(self.entries[i], answer, self.clock)
        self.on_answer(self.entries[i])
        if isinstance(answer, Failure) or self.entries[i].failed:
            return ()
        self.note_experts(answer)
        self.note_uses(answer)
        if shown := answer.metrics.get("predictions"):
            self.predictions[answer.client] = shown
        return (answer,)

    def note_experts(self, update: Update) -> None:
        """Records the experts in `update` if it contains any and they differ from those of the client's job."""
        assigned = self.holds[update.client]
        # The shortest row ids of a block are its experts': a router may be sent with all its rows
        by_length = sorted(update.patch.rows.items(), key=lambda named: len(named[1]), reverse=True)
        rows = {block: ids for name, ids in by_length for block in assigned if name.startswith(f"{block}.")}
        sent = {block: tuple(ids.tolist()) for block, ids in rows.items()}
        if sent and any(tuple(assigned[block]) != ids for block, ids in sent.items()):
            self.sends[update.client] = sent

    def note_uses(self, update: Update) -> None:
        """Records the tokens that the client's model routed to each of its experts, if routers were recorded."""
        if routed := update.metrics.get("routed"):
            self.uses[update.client] = routed


def entry_of(job: Job) -> Entry:
    """The entry of a job before its answer."""
    experts = sum(len(ids) for ids in job.experts.values())
    return Entry(job.round, job.client, job.task, experts, bytes_down=job.nbytes)


def answered(entry: Entry, answer: Update | Failure, clock: Clock) -> Entry:
    """`entry` with the costs of its answer; `failed` is set if the answer is not usable."""
    if isinstance(answer, Failure):
        return clock.timed(replace(entry, failed=answer.reason, bytes_up=answer.bytes_up))
    metrics = {} if entry.task == "evaluate" else dict(answer.metrics)  # those of an evaluation are in evals.jsonl
    loss = metrics.pop("loss", None)
    for elsewhere in ("routed", "predictions"):  # in rounds.jsonl, beside the assigned experts, and in predictions.jsonl
        metrics.pop(elsewhere, None)
    return clock.timed(replace(entry, bytes_up=answer.nbytes, loss=loss, metrics=metrics, **asdict(answer.cost)))
