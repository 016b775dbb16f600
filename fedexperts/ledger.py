"""What was sent and what it took, counted on the very objects that travel."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from fedexperts.moe.anatomy import Experts
from fedexperts.types import Cost, Failure, Job, Tensors, Update


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

    def as_json(self) -> dict[str, object]:
        return asdict(self)


class Ledger:
    """The entries of the round under way, in the order of its jobs, and who held what in it."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.holds: dict[str, Experts] = {}

    def clear(self) -> None:
        self.entries, self.holds = [], {}

    def sent(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """`jobs`, each entered as it passes."""
        for job in jobs:
            experts = sum(len(ids) for ids in job.experts.values())
            self.entries.append(Entry(job.round, job.client, job.task, experts, bytes_down=job.nbytes))
            self.holds[job.client] = job.experts
            yield job

    def received(self, answers: Iterable[Update | Failure]) -> Iterator[Update]:
        """The updates that can be used, all of `answers` entered.

        A failure is entered with its reason and goes no further, and so does an update with a number that is not finite.
        """
        for answer in answers:
            broken = unusable(answer) if isinstance(answer, Update) else answer.reason
            cost = answer.cost if isinstance(answer, Update) else Cost()
            self.enter(
                answer.client,
                answer.task,
                bytes_up=answer.nbytes if isinstance(answer, Update) else 0,
                loss=answer.metrics.get("loss") if isinstance(answer, Update) and not broken else None,
                failed=broken,
                **asdict(cost),
            )
            if isinstance(answer, Update) and not broken:
                yield answer

    def enter(self, client: str, task: str, **found: object) -> None:
        i = next(i for i, entry in enumerate(self.entries) if (entry.client, entry.task) == (client, task))
        self.entries[i] = replace(self.entries[i], **found)  # type: ignore[arg-type]  # the fields of Entry, by name


def unusable(update: Update) -> str | None:
    """The reason to leave `update` out."""
    broken = not_finite({**update.patch.tensors, **update.extra})
    return f"its update holds NaN or infinity in {broken}" if broken else None


def not_finite(tensors: Tensors) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    return next((name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
