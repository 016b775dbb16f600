"""What every engine keeps to: one answer for each job, in any order, and none that does not fit its job."""

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import replace

import torch
from torch import Tensor

from fedexperts.errors import Leak
from fedexperts.moe import factors, graft
from fedexperts.types import Failure, Job, Patch, Tensors, Update

WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = frozenset((*WHOLE, torch.float16, torch.bfloat16, torch.float32, torch.float64))
"""Of what a client may say beside its weights."""


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


def update_error(job: Job, update: Update) -> str | None:
    """Why `update`, which names no other weights than `job`, does not fit them; None where it does.

    Each weight has the dtype that it has in the job, and the shape, but for rows that are left out, and for ranks, where the job
    says that clients have their own.
    """
    ranks = factors.rank_axes(job.patch.tensors) if "rank" in job.extra and job.task != "evaluate" else {}
    if missing := [name for name in ranks if name not in update.patch.tensors]:
        return f"its update lacks {missing[0]}"
    for name, ids in update.patch.rows.items():
        if why := no_rows_of(job.patch, name, ids):
            return f"its update has rows of {name} that {why}"
    for name, tensor in update.patch.tensors.items():
        wanted, chosen = job.patch.tensors[name], update.patch.rows.get(name)
        if tensor.dtype != wanted.dtype:
            return f"its update has {name} as {tensor.dtype}, and its job had it as {wanted.dtype}"
        if chosen is None and name in job.patch.rows:
            return f"its update does not say which rows of {name} it has"
        fits = [*wanted.shape] if chosen is None else [len(chosen), *wanted.shape[1:]]
        if name in ranks and tensor.ndim == len(fits):
            fits[ranks[name]] = min(tensor.shape[ranks[name]], fits[ranks[name]])
        if [*tensor.shape] != fits:
            return f"its update has {name} of shape {[*tensor.shape]}, and {fits} would fit its job"
    if len({update.patch.tensors[name].shape[axis] for name, axis in ranks.items()}) > 1:
        return "its update has adapters of different ranks"
    strange = (name for name, tensor in update.extra.items() if tensor.dtype not in DTYPES)
    return next((f"its update has {name} as {update.extra[name].dtype}, which no method reads" for name in strange), None)


def no_rows_of(patch: Patch, name: str, ids: Tensor) -> str | None:
    """Why `ids` are not those of some of the rows that `patch` has of `name`; None where they are."""
    if name not in patch.tensors:
        return "was not in its job"
    if ids.dtype != torch.int64 or ids.ndim != 1:
        return "are no list of whole numbers"
    if len(ids) > 1 and not bool((ids[1:] > ids[:-1]).all()):
        return "do not ascend"
    there = patch.rows.get(name, torch.arange(len(patch.tensors[name])))
    return None if bool(torch.isin(ids, there).all()) else "were not in its job"


def answer_limit(job: Job) -> int:
    """Bytes that the answer to `job` may take as it travels, all tensors and their framing together.

    What is larger is refused before it is decoded.
    """
    return 2 * job.nbytes + 2**24


def outline(job: Job) -> Job:
    """`job` without its numbers: names, dtypes, shapes and row ids, which is what an answer is held against."""
    return replace(job, patch=Patch(shapes(job.patch.tensors), job.patch.rows), extra=shapes(job.extra))


def shapes(tensors: Tensors) -> dict[str, Tensor]:
    """`tensors` without their numbers."""
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def reorder_and_validate(
    run: Callable[[Iterable[Job]], Iterable[Update | Failure]], jobs: Iterable[Job]
) -> Iterator[Update | Failure]:
    """The answers of `run` in the order of their jobs; an update that does not fit its job is a failure.

    A sum in float64 shows the order of its terms once in some 10⁸ elements, and a large model has more than that; so one
    that comes early waits for its turn.

    Raises:
        Leak: an update holds a weight that its job did not.
    """
    waiting: list[str] = []
    sent: dict[str, Job] = {}
    early: dict[str, Update | Failure] = {}
    for answer in run(noted(jobs, waiting, sent)):
        early[answer.client] = validate_update(sent.pop(answer.client), answer)
        del answer  # or it would be held until the next one has come
        while waiting and waiting[0] in early:
            yield early.pop(waiting.pop(0))
    assert not early and not waiting, f"an engine answered for {sorted(early)} and not for {waiting}"


def validate_update(job: Job, answer: Update | Failure) -> Update | Failure:
    """`answer`, or a failure where it does not fit `job`.

    Raises:
        Leak: it holds a weight that `job` did not.
    """
    if isinstance(answer, Failure):
        return answer
    require_shared(job.patch.tensors.keys(), answer)
    why = update_error(job, answer)
    return Failure(job.client, job.round, job.task, why) if why else answer


def noted(jobs: Iterable[Job], names: list[str], sent: dict[str, Job]) -> Iterator[Job]:
    """`jobs`, leaving the name of each client in `names`, and the outline of its job in `sent`, as it passes."""
    for job in jobs:
        names.append(job.client)
        sent[job.client] = outline(job)
        yield job
