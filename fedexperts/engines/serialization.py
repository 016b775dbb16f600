"""Jobs and answers as messages: each tensor as safetensors, everything else as JSON. Nothing is pickled.

A part is what the safetensors library makes of a tensor, to the byte. The library copies the numbers three times on each side,
which took half of the time that a message costs; here they are copied once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from math import isfinite, prod
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from fedexperts.engines.message import Bytes, Message, from_bytes, read_json, to_bytes
from fedexperts.errors import BadMessage
from fedexperts.types import Cost, Failure, Job, Patch, Update, WireDtype

MAX_PART_BYTES = 2**30
"""Of a tensor in one part: carriers have limits at 2 GB, and a larger tensor travels in several."""
MAX_HEADER_BYTES = 2**10
"""Of the safetensors header of a part: it describes one tensor, and could describe millions of empty ones."""
TENSOR = "tensor"
"""The name of a part's only tensor inside it."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""Name in safetensors → dtype."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Name = Annotated[str, Field(pattern=r"^\w[\w ]*$")]
"""Of a task: a client names its files by it."""


@dataclass(frozen=True)
class JobHead:
    """The fields of a job's message beside its tensors."""

    client: str
    round: Annotated[int, Field(ge=0)]
    task: Name
    seed: str
    experts: dict[str, tuple[int, ...]]
    accepted: str
    also: tuple[str, ...]
    wire_dtype: WireDtype


@dataclass(frozen=True)
class UpdateHead:
    """The fields of an update's message beside its tensors."""

    client: str
    round: int
    task: str
    examples: Annotated[int, Field(ge=0)]
    metrics: dict[str, Any]
    cost: Cost


JOB, UPDATE, FAILURE = TypeAdapter(JobHead), TypeAdapter(UpdateHead), TypeAdapter(Failure)


def pack_job(job: Job) -> bytes:
    return to_bytes(job_message(job))


def unpack_job(data: bytes) -> Job:
    return read_job(from_bytes(data))


def pack_answer(answer: Update | Failure) -> bytes:
    return to_bytes(answer_message(answer))


def unpack_answer(data: bytes) -> Update | Failure:
    return read_answer(from_bytes(data))


def job_message(job: Job) -> Message:
    head = {
        "client": job.client,
        "round": job.round,
        "task": job.task,
        "seed": job.seed,
        "experts": dict(job.experts),
        "accepted": job.accepted,
        "also": list(job.also),
        "wire_dtype": job.patch.wire_dtype,
    }
    return message_with_tensors({"job": head}, job.patch, job.extra)


def read_job(message: Message) -> Job:
    """Raises BadMessage where `message` holds none."""
    with reading("job"):
        head = vars(JOB.validate_python(message.head["job"]))
        patch, extra = take_tensors(message)
        return Job(patch=replace(patch, wire_dtype=head.pop("wire_dtype")), extra=extra, **head)


def answer_message(answer: Update | Failure) -> Message:
    if isinstance(answer, Failure):
        return Message({"failure": asdict(answer)}, {})
    head = {
        "client": answer.client,
        "round": answer.round,
        "task": answer.task,
        "examples": answer.examples,
        "metrics": dict(answer.metrics),
        "cost": asdict(answer.cost),
    }
    return message_with_tensors({"update": head}, answer.patch, answer.extra)


def read_answer(message: Message) -> Update | Failure:
    """Raises BadMessage where `message` holds none."""
    with reading("answer"):
        if "failure" in message.head:
            return FAILURE.validate_python(message.head["failure"])
        head = UPDATE.validate_python(message.head["update"])
        loss, cost = head.metrics.get("loss", 0.0), head.cost
        if not all(isfinite(each) and each >= 0 for each in astuple(cost)) or not isinstance(loss, int | float):
            raise ValueError(f"{cost}, loss = {loss!r}")
        patch, extra = take_tensors(message)
        return Update(**vars(head), patch=patch, extra=extra)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a BadMessage."""
    try:
        yield
    except Exception as error:  # the sender may be anyone, and may have sent anything
        raise BadMessage(f"it holds no {what} that can be read ({type(error).__name__}: {error})") from None


def message_with_tensors(head: Mapping[str, Any], patch: Patch, extra: Mapping[str, Tensor]) -> Message:
    """`head` and the tensors, in their order; row ids that several names share travel once."""
    ids = {id(rows): rows for rows in patch.rows.values()}
    numbers = {key: str(i) for i, key in enumerate(ids)}
    shared_rows = {numbers[key]: rows for key, rows in ids.items()}
    scales = {} if patch.scales is None else {TENSOR: patch.scales}
    groups = {"patch": patch.tensors, "rows": shared_rows, "scales": scales, "extra": extra}
    parts: dict[str, Bytes] = {}
    shapes: dict[str, list[int] | None] = {}  # None: in a single part, which has the shape
    for name, tensor in ((f"{group}/{name}", tensor) for group, tensors in groups.items() for name, tensor in tensors.items()):
        shapes[name] = None if tensor.nbytes <= MAX_PART_BYTES else list(tensor.shape)
        for number, piece in enumerate(pieces(tensor)):
            parts[part_name(name, number)] = tensor_part(piece)
    return Message({**head, "tensors": shapes, "rows": {name: numbers[id(rows)] for name, rows in patch.rows.items()}}, parts)


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """`tensor`, or where it is too large for one part its elements in several: a dense weight has a single row to split at."""
    if tensor.nbytes <= MAX_PART_BYTES:
        return (tensor,)
    flat = tensor.reshape(-1)
    size = max(1, MAX_PART_BYTES // tensor.element_size())
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def part_name(name: str, number: int) -> str:
    """The part with piece `number` of a tensor."""
    return f"{number}/{name}" if number else name


def take_tensors(message: Message) -> tuple[Patch, dict[str, Tensor]]:
    """The patch and the extra tensors. Takes each part out of `message`, so only one tensor is in memory twice."""
    groups: dict[str, dict[str, Tensor]] = {"patch": {}, "rows": {}, "scales": {}, "extra": {}}
    for key, shape in message.head["tensors"].items():
        group, _, name = key.partition("/")
        whole = shape is None
        groups[group][name] = read_tensor(message.parts.pop(key)) if whole else joined(message.parts, key).view(shape)
    rows = {name: groups["rows"][number] for name, number in message.head["rows"].items()}
    return Patch(groups["patch"], rows, scales=groups["scales"].get(TENSOR)), groups["extra"]


def joined(parts: dict[str, Bytes], name: str) -> Tensor:
    """All pieces of a tensor, one after the other, taken out of `parts`; [elements]."""
    flat = [read_tensor(parts.pop(name))]
    while (key := part_name(name, len(flat))) in parts:
        flat.append(read_tensor(parts.pop(key)))
    return torch.cat(flat)


def tensor_part(tensor: Tensor) -> bytes:
    """`tensor` in the safetensors format, under the name TENSOR."""
    return b"".join((*part_header(tensor.dtype, tensor.shape), raw(tensor.detach().to("cpu").contiguous())))


def part_header(dtype: torch.dtype, shape: Sequence[int]) -> tuple[bytes, bytes]:
    """The first 8 bytes of a part, the length of its header, and the header, with spaces up to a multiple of 8."""
    ends = [0, prod(shape) * dtype.itemsize]
    about = {TENSOR: {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": ends}}
    header = json.dumps(about, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little"), header


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in its own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_tensor(part: Bytes) -> Tensor:
    """The tensor in `part`, copied to where torch puts tensors of its own: products of one that begins elsewhere may differ in
    their last bits.

    Raises:
        BadMessage: its header has room for more than one, or is not that of a tensor of as many bytes.
    """
    length = int.from_bytes(part[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise BadMessage(f"a tensor's header has {length:,} bytes, and {MAX_HEADER_BYTES:,} are allowed")
    header, data = bytes(part[8 : 8 + length]), memoryview(part)[8 + length :]
    about = read_json(header)[TENSOR]
    dtype, shape = DTYPES[about["dtype"]], about["shape"]
    if part_header(dtype, shape)[1] != header or prod(shape) * dtype.itemsize != len(data):
        raise BadMessage(f"a tensor's header, {header!r:.200}, does not fit the {len(data):,} bytes behind it")
    tensor = torch.empty(shape, dtype=dtype)
    raw(tensor)[:] = data
    return tensor
