"""Jobs and answers as bytes: the tensors as safetensors, everything else as JSON. Nothing is pickled."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from safetensors.torch import load
from torch import Tensor

from fedexperts.files import encoded
from fedexperts.types import Cost, Failure, Job, Patch, Update

PROTOCOL = 1


def pack_job(job: Job) -> bytes:
    head = {"client": job.client, "round": job.round, "task": job.task, "seed": job.seed, "experts": dict(job.experts)}
    return pack(head, patch=job.patch, extra=job.extra)


def unpack_job(data: bytes) -> Job:
    head, patch, extra = unpack(data)
    experts = {block: tuple(ids) for block, ids in head.pop("experts").items()}
    return Job(**head, experts=experts, patch=patch, extra=extra)


def pack_answer(answer: Update | Failure) -> bytes:
    if isinstance(answer, Failure):
        return pack({"failure": asdict(answer)}, Patch({}), {})
    head = {
        "client": answer.client,
        "round": answer.round,
        "task": answer.task,
        "examples": answer.examples,
        "metrics": dict(answer.metrics),
        "cost": asdict(answer.cost),
    }
    return pack(head, answer.patch, answer.extra)


def unpack_answer(data: bytes) -> Update | Failure:
    head, patch, extra = unpack(data)
    if "failure" in head:
        return Failure(**head["failure"])
    return Update(**{**head, "cost": Cost(**head["cost"])}, patch=patch, extra=extra)


def pack(head: Mapping[str, Any], patch: Patch, extra: Mapping[str, Tensor]) -> bytes:
    """A manifest's length, the manifest, the tensors; row ids that several names share go once."""
    ids = {id(rows): rows for rows in patch.rows.values()}
    numbers = {key: str(i) for i, key in enumerate(ids)}
    manifest = {"protocol": PROTOCOL, "head": head, "rows": {name: numbers[id(rows)] for name, rows in patch.rows.items()}}
    groups = {"patch": patch.tensors, "rows": {numbers[key]: rows for key, rows in ids.items()}, "extra": extra}
    tensors = {f"{group}/{name}": tensor for group, held in groups.items() for name, tensor in held.items()}
    text = json.dumps(manifest).encode()
    return len(text).to_bytes(8, "big") + text + encoded(tensors)


def unpack(data: bytes) -> tuple[dict[str, Any], Patch, dict[str, Tensor]]:
    end = 8 + int.from_bytes(data[:8], "big")
    manifest = json.loads(data[8:end])
    groups: dict[str, dict[str, Tensor]] = {"patch": {}, "rows": {}, "extra": {}}
    for key, tensor in load(data[end:]).items():
        group, _, name = key.partition("/")
        groups[group][name] = tensor
    rows = {name: groups["rows"][number] for name, number in manifest["rows"].items()}
    return manifest["head"], Patch(groups["patch"], rows), groups["extra"]
