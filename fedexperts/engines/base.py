"""What every engine keeps to: one answer for each job, in any order."""

from collections.abc import Callable, Iterable, Iterator

from fedexperts.types import Failure, Job, Update


def in_order(run: Callable[[Iterable[Job]], Iterable[Update | Failure]], jobs: Iterable[Job]) -> Iterator[Update | Failure]:
    """The answers of `run` in the order of their jobs.

    A sum in float64 shows the order of its terms once in some 10⁸ elements, and a large model has more than that; so one
    that comes early waits for its turn.
    """
    waiting: list[str] = []
    early: dict[str, Update | Failure] = {}
    for answer in run(noted(jobs, waiting)):
        early[answer.client] = answer
        while waiting and waiting[0] in early:
            yield early.pop(waiting.pop(0))
    assert not early and not waiting, f"an engine answered for {sorted(early)} and not for {waiting}"


def noted(jobs: Iterable[Job], names: list[str]) -> Iterator[Job]:
    """`jobs`, leaving the name of each client in `names` as it passes."""
    for job in jobs:
        names.append(job.client)
        yield job
