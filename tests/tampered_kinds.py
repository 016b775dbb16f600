"""Ways to change an answer: at every place of it every value that may do harm there."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from fedexperts.types import Cost, Patch, Update

Change = Callable[[Update], object]


@dataclass(frozen=True)
class Kind:
    """One way to change an answer. harmless: whether the run may take it: it is no more than another honest answer."""

    name: str
    change: Change
    harmless: bool = False


class Absent(Exception):
    """The answer has nothing at the place that a kind changes."""


HUGE = 10**5000  # of more digits than Python turns into text
NUMBERS: Mapping[str, object] = {
    "None": None,
    "True": True,
    "text": "5",
    "NaN": math.nan,
    "infinity": math.inf,
    "-infinity": -math.inf,
    "1e31": 1e31,
    "-1": -1,
    "10**400": 10**400,
    "-10**400": -(10**400),
    "5,001 digits": HUGE,
    "list": [5],
    "object": {"a": 5},
    "bytes": b"5",
    "complex": 1j,
}


def nested(depth: int) -> object:
    """A list in a list in a list …"""
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


VALUES: Mapping[str, object] = {
    **NUMBERS,
    "text with a lone surrogate": "\ud800",
    "text with control characters": "\x1b[31m\r\n\0[/bold]",
    "3 MB of text": "x" * 3_000_000,
    "3 MB of numbers": [10**30] * 100_000,
    "empty list": [],
    "empty object": {},
    "tuple": (),
    "set": {1},
    "object with number as key": {1: 1},
    "object with None as key": {None: None},
    "nested 900 deep": nested(900),
    "nested 100,000 deep": nested(100_000),
    "tensor": torch.ones(2),
    "function": print,
}
"""What may stand where another JSON value belongs."""

TENSORS: Mapping[str, Callable[[torch.Tensor], object]] = {
    "None": lambda t: None,
    "text": lambda t: "weights",
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy() if t.dtype != torch.bfloat16 else [1],
    "number": lambda t: 1.0,
    "float64 or float32": lambda t: t.float() if t.dtype == torch.float64 else t.double(),
    "float16": lambda t: t.half(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "int32": lambda t: t.to(torch.int32),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "flat": lambda t: t.reshape(-1)[None, None],
    "axis more": lambda t: t[None],
    "scalar": lambda t: t.sum() if t.ndim else t[None],
    "no rows": lambda t: t[:0] if t.ndim else t.new_zeros(0),
    "row more": lambda t: torch.cat([t, t[:1]]) if t.ndim else t.expand(2),
    "row less": lambda t: t[1:] if t.ndim else t.new_zeros(0),
    "axes swapped": lambda t: t.reshape(*reversed(t.shape)) if t.ndim > 1 and len({*t.shape}) > 1 else t[None],
    "NaN": lambda t: with_one(t, math.nan),
    "infinity": lambda t: with_one(t, math.inf),
    "-infinity": lambda t: with_one(t, -math.inf),
    "1e30": lambda t: with_one(t, 1e30),
    "-1e30": lambda t: with_one(t, -1e30),
    "all 3e38": lambda t: torch.full_like(t, 3e38 if t.is_floating_point() else whole(t, 1)),
    "all 1e30": lambda t: torch.full_like(t, 1e30 if t.is_floating_point() else whole(t, -1)),
    "sparse": lambda t: t.to_sparse() if t.ndim else torch.sparse_coo_tensor(size=()),
    "without numbers": lambda t: t.to("meta"),
    "600 MB": lambda t: torch.ones(1, dtype=t.dtype).expand(600_000_000 // t.element_size()),
}
"""What may come in place of a tensor."""

SCALES: Mapping[str, Callable[[torch.Tensor], object]] = {
    **{name: TENSORS[name] for name in ("None", "text", "list", "array", "float16", "int32", "bool", "axis more", "scalar")},
    **{name: TENSORS[name] for name in ("no rows", "row more", "row less", "NaN", "infinity", "-infinity", "1e30", "-1e30")},
    **{name: TENSORS[name] for name in ("all 3e38", "all 1e30", "sparse", "without numbers", "600 MB")},
    "float64": lambda scales: scales.double(),
    "all NaN": lambda scales: torch.full_like(scales, math.nan),
}
"""What may come in place of the scales of weights in int8."""

ROWS: Mapping[str, Callable[[torch.Tensor], object]] = {
    "None": lambda ids: None,
    "list": lambda ids: ids.tolist(),
    "text": lambda ids: "0",
    "int32": lambda ids: ids.int(),
    "float": lambda ids: ids.double(),
    "bool": lambda ids: ids.bool(),
    "axis more": lambda ids: ids[None],
    "scalar": lambda ids: torch.tensor(0),
    "descending": lambda ids: ids.flip(0),
    "one twice": lambda ids: torch.cat([ids[:1], ids[:-1]]),
    "out of range": lambda ids: ids + 1000,
    "2**62": lambda ids: ids + 2**62,
    "negative": lambda ids: ids - 100,
    "one more": lambda ids: torch.cat([ids, ids[-1:] + 1]),
    "one less": lambda ids: ids[1:],
    "none": lambda ids: ids[:0],
    "without numbers": lambda ids: ids.to("meta"),
}
"""What may come in place of the row ids of a weight."""

NAMES = ("", "x", "\ud800", "\x1b[31mred\x1b[0m\n", "x" * 100_000, 5, None, ("a",), "grafted/own", "qualified", "p", "control/x")
"""Names of what was not in the job and no method declares."""


def with_one(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """`tensor` with one element changed; of whole numbers the largest or smallest there is."""
    changed = tensor.clone()
    if changed.numel():
        changed.view(-1)[0] = value if tensor.is_floating_point() else whole(tensor, 1 if value > 0 else -1)
    return changed


def whole(tensor: torch.Tensor, sign: int) -> int:
    """A whole number of that sign about as large as the dtype of `tensor` allows."""
    return sign * (127 if tensor.dtype == torch.int8 else 2**62)


def typical(tensors: Mapping[str, torch.Tensor], patch: Patch) -> list[str]:
    """One name of each kind of weight: dense or with rows, of each rank, adapters A and B; and the last."""
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        first.setdefault((name in patch.rows, tensor.ndim, "lora_B" in name or name.endswith(".b")), name)
    return [*dict.fromkeys([*first.values(), *list(tensors)[-1:]])]


def put(value: Any, path: tuple[Any, ...], new: object) -> Any:
    """A copy of the JSON `value` with `new` at `path`; REMOVED takes what is there away."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    copy = dict(value) if isinstance(value, Mapping) else list(value)
    if new is REMOVED and not rest:
        del copy[key]
    else:
        copy[key] = put(copy.get(key) if isinstance(copy, dict) else copy[key], rest, new)
    return copy


REMOVED = object()


def paths(value: object, path: tuple[Any, ...] = (), every: bool = False) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value. Unless `every` place is asked for, the first two in each object below the top, and
    the first in each list.
    """
    if path:
        yield path
    inside = list(value) if isinstance(value, Mapping) else [*range(len(value))] if isinstance(value, list) else []
    most = len(inside) if every or not path else 2 if isinstance(value, Mapping) else 1
    for key in inside[:most]:
        yield from paths(value[key], (*path, key), every)  # type: ignore[index]


def generated(answer: Update) -> Iterator[Kind]:
    """Every place of an answer with every value that may do harm there."""
    yield from fields_changed(answer)
    yield from patches_changed(answer)
    yield from scales_changed(answer)
    yield from extras_changed(answer)
    yield from metrics_changed(answer)


def fields_changed(answer: Update) -> Iterator[Kind]:
    for field in fields(Update):
        for name, value in VALUES.items():
            yield Kind(f"{field.name} is {name}", lambda update, field=field, value=value: replace(update, **{field.name: value}))
    for field in fields(Cost):
        for name, value in VALUES.items():
            change = lambda update, field=field, value=value: replace(update, cost=replace(update.cost, **{field.name: value}))  # noqa: E731
            yield Kind(f"cost.{field.name} is {name}", change)


def patches_changed(answer: Update) -> Iterator[Kind]:
    patch = answer.patch
    for part in ("tensors", "rows", "scales"):
        for name, value in VALUES.items():
            change = lambda update, part=part, value=value: replace(update, patch=replace(update.patch, **{part: value}))  # noqa: E731
            yield Kind(f"patch.{part} is {name}", change)
    for key in NAMES:
        yield Kind(f"patch has {key!r:.20}", partial(with_weight, name=key, tensor=torch.ones(1, 2)))
        yield Kind(f"patch has rows of {key!r:.20}", partial(with_rows, name=key, ids=torch.tensor([0])))
    for key in typical(patch.tensors, patch):
        yield Kind(f"patch lacks {key}", partial(without_weight, name=key))
        for name, made in TENSORS.items():
            yield Kind(
                f"{key} is {name}", lambda update, key=key, made=made: with_weight(update, key, made(update.patch.tensors[key]))
            )
        for name, made in ROWS.items():
            ids = patch.rows.get(key, torch.arange(len(patch.tensors[key])))
            yield Kind(f"rows of {key} are {name}", lambda update, key=key, made=made, ids=ids: with_rows(update, key, made(ids)))
            yield Kind(
                f"{key} cut to rows {name}",
                lambda update, key=key, made=made, ids=ids: with_rows(
                    with_weight(update, key, cut(update, key, made(ids))), key, made(ids)
                ),
            )


def cut(update: Update, key: str, ids: object) -> object:
    """As many rows of a weight as there are `ids`."""
    number = len(ids) if isinstance(ids, torch.Tensor | list | str) and getattr(ids, "ndim", 1) else 1
    return torch.ones(number, *update.patch.tensors[key].shape[1:])


def scales_changed(answer: Update) -> Iterator[Kind]:
    """The scales of weights in int8; none where weights travel otherwise."""
    for name, made in SCALES.items() if answer.patch.scales is not None else ():
        change = lambda update, made=made: replace(update, patch=replace(update.patch, scales=made(update.patch.scales)))  # noqa: E731
        yield Kind(f"scales are {name}", change)


def extras_changed(answer: Update) -> Iterator[Kind]:
    for key in NAMES:
        yield Kind(f"extra has {key!r:.20}", partial(with_extra, name=key, tensor=torch.ones(2)))
    for key in typical(answer.extra, answer.patch):
        yield Kind(f"extra lacks {key}", lambda update, key=key: replace(update, extra=put(update.extra, (key,), REMOVED)))
        for name, made in TENSORS.items():
            yield Kind(
                f"extra {key} is {name}", lambda update, key=key, made=made: with_extra(update, key, made(update.extra[key]))
            )


def metrics_changed(answer: Update) -> Iterator[Kind]:
    for key in NAMES:
        yield Kind(f"metrics have {key!r:.20}", partial(with_metric, path=(key,), value=1))
    for path in paths(answer.metrics):
        where = "/".join(map(str, path))
        yield Kind(f"metrics lack {where}", partial(with_metric, path=path, value=REMOVED))
        for name, value in VALUES.items():
            yield Kind(f"metric {where} is {name}", partial(with_metric, path=path, value=value))
        if isinstance(at(answer.metrics, path), Mapping):
            for key in NAMES:
                yield Kind(f"metric {where} has {key!r:.20}", partial(with_metric, path=(*path, key), value=1))
                twin = next(iter(at(answer.metrics, path).values()), 1)
                yield Kind(f"metric {where} has twin {key!r:.20}", partial(with_metric, path=(*path, key), value=twin))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def with_weight(update: Update, name: Any, tensor: object) -> Update:
    return replace(update, patch=replace(update.patch, tensors={**update.patch.tensors, name: tensor}))


def without_weight(update: Update, name: str) -> Update:
    tensors, rows = dict(update.patch.tensors), dict(update.patch.rows)
    del tensors[name]
    rows.pop(name, None)
    return replace(update, patch=Patch(tensors, rows))


def with_rows(update: Update, name: Any, ids: object) -> Update:
    return replace(update, patch=replace(update.patch, rows={**update.patch.rows, name: ids}))


def with_extra(update: Update, name: Any, tensor: object) -> Update:
    return replace(update, extra={**update.extra, name: tensor})


def with_metric(update: Update, path: tuple[Any, ...], value: object) -> Update:
    return replace(update, metrics=put(update.metrics, path, value))
