"""What every engine keeps to: one answer for each job, in any order."""

from collections.abc import Callable, Iterable, Iterator, Set

from fedexperts.errors import Leak
from fedexperts.moe import graft
from fedexperts.types import Failure, Job, Update


def require_shared(sent: Set[str], update: Update) -> None:
    """Raises Leak when `update` holds a weight that is not in `sent`, the names of its job: it is the client's own.

    What is said beside the weights may have any name, but that of a personal expert.
    """
    beside = (name for name in update.extra if graft.is_personal(name))
    if own := [*sorted(update.patch.tensors.keys() - sent), *beside]:
        raise Leak(
            f"client {update.client} would send {own[0]}, which is not among the weights that it got: what is its own must not "
            "leave it; let the method's train answer with the names in job.patch only"
        )


def in_order(run: Callable[[Iterable[Job]], Iterable[Update | Failure]], jobs: Iterable[Job]) -> Iterator[Update | Failure]:
    """The answers of `run` in the order of their jobs.

    A sum in float64 shows the order of its terms once in some 10⁸ elements, and a large model has more than that; so one
    that comes early waits for its turn.

    Raises:
        Leak: an update holds a weight that its job did not.
    """
    waiting: list[str] = []
    sent: dict[str, Set[str]] = {}
    early: dict[str, Update | Failure] = {}
    for answer in run(noted(jobs, waiting, sent)):
        if isinstance(answer, Update):
            require_shared(sent.pop(answer.client), answer)
        early[answer.client] = answer
        del answer  # or it would be held until the next one has come
        while waiting and waiting[0] in early:
            yield early.pop(waiting.pop(0))
    assert not early and not waiting, f"an engine answered for {sorted(early)} and not for {waiting}"


def noted(jobs: Iterable[Job], names: list[str], sent: dict[str, Set[str]]) -> Iterator[Job]:
    """`jobs`, leaving the name of each client in `names`, and those of its weights in `sent`, as it passes."""
    for job in jobs:
        names.append(job.client)
        sent[job.client] = frozenset(job.patch.tensors)
        yield job
