"""Jobs and answers as messages: each tensor as safetensors, everything else as JSON. Nothing is pickled."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from math import isfinite
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from safetensors.torch import load
from torch import Tensor

from fedexperts.engines.message import Message, from_bytes, to_bytes
from fedexperts.errors import BadMessage
from fedexperts.io.files import safetensors_bytes
from fedexperts.types import Cost, Failure, Job, Patch, Update

MOST_BYTES = 2**30
"""Of a tensor in one piece: carriers have limits at 2 GB, and a larger one goes in several."""
Name = Annotated[str, Field(pattern=r"^\w[\w ]*$")]
"""Of a task: a client names its files by it."""


@dataclass(frozen=True)
class AboutJob:
    """What a job's message says beside its tensors."""

    client: str
    round: Annotated[int, Field(ge=0)]
    task: Name
    seed: str
    experts: dict[str, tuple[int, ...]]
    accepted: str


@dataclass(frozen=True)
class AboutUpdate:
    """What an update's message says beside its tensors."""

    client: str
    round: int
    task: str
    examples: Annotated[int, Field(ge=0)]
    metrics: dict[str, Any]
    cost: Cost


JOB, UPDATE, FAILURE = TypeAdapter(AboutJob), TypeAdapter(AboutUpdate), TypeAdapter(Failure)
TENSOR = "tensor"  # what a part's only tensor is called inside


def pack_job(job: Job) -> bytes:
    return to_bytes(job_message(job))


def unpack_job(data: bytes) -> Job:
    return read_job(from_bytes(data))


def pack_answer(answer: Update | Failure) -> bytes:
    return to_bytes(answer_message(answer))


def unpack_answer(data: bytes) -> Update | Failure:
    return read_answer(from_bytes(data))


def job_message(job: Job) -> Message:
    about = {
        "client": job.client,
        "round": job.round,
        "task": job.task,
        "seed": job.seed,
        "experts": dict(job.experts),
        "accepted": job.accepted,
    }
    return written({"job": about}, job.patch, job.extra)


def read_job(message: Message) -> Job:
    """Raises BadMessage where there is none in it."""
    with reading("job"):
        about = JOB.validate_python(message.head["job"])
        patch, extra = tensors(message)
        return Job(**vars(about), patch=patch, extra=extra)


def answer_message(answer: Update | Failure) -> Message:
    if isinstance(answer, Failure):
        return Message({"failure": asdict(answer)}, {})
    about = {
        "client": answer.client,
        "round": answer.round,
        "task": answer.task,
        "examples": answer.examples,
        "metrics": dict(answer.metrics),
        "cost": asdict(answer.cost),
    }
    return written({"update": about}, answer.patch, answer.extra)


def read_answer(message: Message) -> Update | Failure:
    """Raises BadMessage where there is none in it."""
    with reading("answer"):
        if "failure" in message.head:
            return FAILURE.validate_python(message.head["failure"])
        about = UPDATE.validate_python(message.head["update"])
        loss, cost = about.metrics.get("loss", 0.0), about.cost
        if not all(isfinite(each) and each >= 0 for each in astuple(cost)) or not isinstance(loss, int | float):
            raise ValueError(f"{cost}, loss = {loss!r}")
        patch, extra = tensors(message)
        return Update(**vars(about), patch=patch, extra=extra)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a BadMessage."""
    try:
        yield
    except Exception as error:  # who wrote it may be anyone, and may have written anything
        raise BadMessage(f"it holds no {what} that can be read ({type(error).__name__}: {error})") from None


def written(head: Mapping[str, Any], patch: Patch, extra: Mapping[str, Tensor]) -> Message:
    """`head` and the tensors, in their order; row ids that several names share go once."""
    ids = {id(rows): rows for rows in patch.rows.values()}
    numbers = {key: str(i) for i, key in enumerate(ids)}
    groups = {"patch": patch.tensors, "rows": {numbers[key]: rows for key, rows in ids.items()}, "extra": extra}
    parts: dict[str, bytes] = {}
    shapes: dict[str, list[int] | None] = {}
    for name, tensor in ((f"{group}/{name}", tensor) for group, held in groups.items() for name, tensor in held.items()):
        shapes[name] = None if tensor.nbytes <= MOST_BYTES else list(tensor.shape)
        for number, piece in enumerate(pieces(tensor)):
            parts[place(name, number)] = safetensors_bytes({TENSOR: piece})
    return Message({**head, "tensors": shapes, "rows": {name: numbers[id(rows)] for name, rows in patch.rows.items()}}, parts)


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """`tensor`, or where it is too large for one piece its elements in several: a dense weight has a single row to split at."""
    if tensor.nbytes <= MOST_BYTES:
        return (tensor,)
    flat = tensor.reshape(-1)
    size = max(1, MOST_BYTES // tensor.element_size())
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def place(name: str, number: int) -> str:
    """The part with piece `number` of a tensor."""
    return f"{number}/{name}" if number else name


def tensors(message: Message) -> tuple[Patch, dict[str, Tensor]]:
    """What `written` wrote: the patch, the rest. Takes each part out of `message`, so that no two copies of all are held."""
    groups: dict[str, dict[str, Tensor]] = {"patch": {}, "rows": {}, "extra": {}}
    for key, shape in message.head["tensors"].items():
        group, _, name = key.partition("/")
        groups[group][name] = piece(message.parts.pop(key)) if shape is None else joined(message.parts, key).view(shape)
    rows = {name: groups["rows"][number] for name, number in message.head["rows"].items()}
    return Patch(groups["patch"], rows), groups["extra"]


def joined(parts: dict[str, bytes], name: str) -> Tensor:
    """All pieces of a tensor, one after the other, taken out of `parts`."""
    found = [piece(parts.pop(name))]
    while (key := place(name, len(found))) in parts:
        found.append(piece(parts.pop(key)))
    return torch.cat(found)


def piece(part: bytes) -> Tensor:
    """The tensor in it, copied to where torch puts tensors of its own: products of one that begins elsewhere may differ in
    their last bits.
    """
    return load(part)[TENSOR].clone()
