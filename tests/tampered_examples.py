"""Answers that broke a run, or might have, one by one: what `tampering.generated` does not come upon by itself."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tampered_kinds import HUGE, REMOVED, Absent, Kind, at, nested, put, with_extra, with_metric, with_one, with_rows, with_weight
from torch import Tensor

from fedexperts.types import Cost, Failure, Patch, Update

COUNTS = {"double": 3, "first": 1}


def examples() -> Iterator[Kind]:
    yield from answers()
    yield from identities()
    yield from costs()
    yield from patches()
    yield from row_ids()
    yield from extras()
    yield from metrics()
    yield from scores()
    yield from predictions()
    yield from against_base()


def failure(reason: Any, **wrong: Any) -> Callable[[Update], object]:
    return lambda update: replace(Failure(update.client, update.round, update.task, reason), **wrong)


def answers() -> Iterator[Kind]:
    """What is no update, or is a failure."""
    nothing: Mapping[str, object] = {"None": None, "text": "no", "number": 5, "object": {"client": "c02"}, "tuple": ("c02", 1)}
    for name, value in nothing.items():
        yield Kind(f"the answer is {name}", lambda update, value=value: value)
    yield Kind("the answer is a class", lambda update: Update)
    yield Kind("the answer is an error", lambda update: ValueError("no"))
    yield Kind("the answer is its patch", lambda update: update.patch)
    reasons: Mapping[str, object] = {
        "empty": "",
        "blank": " \n\t",
        "unprintable": "\0\u200b\x07",
        "None": None,
        "number": 5,
        "of 5,001 digits": HUGE,
        "list": ["why"],
        "nested": nested(900),
        "with a lone surrogate": "\ud800 broke",
        "with colours": "\x1b[31mred\x1b[0m \x1b]0;title\x07",
        "with markup": "[/bold] [link=http://x]here[/link]",
        "with HTML": "<script>alert(1)</script></td>",
        "with lines": "one\r\ntwo\u2028three",
        "with a table": "a | b |\n|---|---|",
        "of 3 MB": "x" * 3_000_000,
        "right to left": "\u202egnp.exe",
    }
    for name, reason in reasons.items():
        yield Kind(f"a failure whose reason is {name}", failure(reason))
    yield Kind("a failure of another round", failure("no", round=10**400))
    yield Kind("a failure of another task", failure("no", task=["x"]))


def identities() -> Iterator[Kind]:
    wrong: Mapping[str, tuple[object, ...]] = {
        "client": ("c01", "c03", "nobody", "", "c02 ", 2, None, ["c02"], "\ud800"),
        "round": (99, -1, 0.5, "1", None, [1], 10**400, math.nan),
        "task": ("fine-tune", "", None, 5, ["train"], "\x1b[31m"),
        "examples": (9_999_998, 0, -1, 1e30, "12", None, True, math.nan, 10**400, HUGE, [12], 0.5),
    }
    for field, values in wrong.items():
        for value in values:
            yield Kind(f"{field} = {shown(value)}", lambda update, field=field, value=value: replace(update, **{field: value}))


def shown(value: object) -> str:
    return "5,001 digits" if value is HUGE else ascii(value)[:40]


def costs() -> Iterator[Kind]:
    strange: Mapping[str, object] = {"None": None, "object": {"seconds": 1}, "tuple": (1, 2, 3, 4), "number": 5}
    for name, value in strange.items():
        yield Kind(f"cost is {name}", lambda update, value=value: replace(update, cost=value))
    numbers: Mapping[str, tuple[object, ...]] = {
        "seconds": (math.nan, -1.0, math.inf, 10**400, "x", None, True, 1e29),
        "tokens": (math.nan, -1, 1.5, 1e20, 10**30, "x", True),
        "peak_bytes": (math.nan, -1, 0.5, 1e29, 10**30, None),
        "flops_estimated": (math.nan, -1.0, 1e31, HUGE, "x", True),
    }
    for field, values in numbers.items():
        for value in values:
            change = lambda update, field=field, value=value: replace(update, cost=replace(Cost(), **{field: value}))  # noqa: E731
            yield Kind(f"cost.{field} = {shown(value)}", change)


def every_weight(made: Callable[[Tensor], object]) -> Callable[[Update], object]:
    def change(update: Update) -> object:
        if not update.patch.tensors:
            raise Absent
        tensors: Any = {name: made(tensor) for name, tensor in update.patch.tensors.items()}
        return replace(update, patch=replace(update.patch, tensors=tensors))

    return change


def patches() -> Iterator[Kind]:
    everywhere: Mapping[str, Callable[[Tensor], object]] = {
        "NaN": lambda t: t * math.nan,
        "infinite": lambda t: t + math.inf,
        "1e30": lambda t: torch.full_like(t, 1e30),
        "times 100,000": lambda t: (t.abs() + 0.1) * 100_000,
        "with one NaN": lambda t: with_one(t, math.nan),
        "without rows": lambda t: t[:0],
        "of another dtype": lambda t: t.bfloat16(),
        "without their row axis": lambda t: t.flatten(0, 1),
        "joined to 600 MB": lambda t: torch.ones(1).expand(150_000_000),
        "complex": lambda t: t.to(torch.complex64),
        "without numbers": lambda t: t.to("meta"),
        "lists": lambda t: t.tolist(),
    }
    for name, made in everywhere.items():
        yield Kind(f"all weights are {name}", every_weight(made))
    mild: Mapping[str, Callable[[Tensor], object]] = {
        "a little larger": lambda t: t * 1.01,
        "zero": torch.zeros_like,
        "negative": torch.neg,
        "ones": torch.ones_like,
        "of a graph": lambda t: t.clone().requires_grad_(),
        "views": lambda t: t[:1].expand(t.shape),
        "at the limit": lambda t: torch.full_like(t, 99.0),
    }
    for name, made in mild.items():
        yield Kind(f"all weights are {name}", every_weight(made), harmless=True)
    nothing: Mapping[str, object] = {"None": None, "an object": {}, "a list": [], "text": "patch"}
    for name, value in nothing.items():
        yield Kind(f"the patch is {name}", lambda update, value=value: replace(update, patch=value))
    yield Kind("two weights of one shape are swapped", swapped, harmless=True)
    yield Kind("two weights of different shapes are swapped", misplaced)
    yield Kind("a weight more", lambda update: with_weight(update, "own", torch.ones(1, 3)))
    yield Kind("a personal expert", lambda update: with_weight(update, "model.layers.0.mlp.grafted.up", torch.ones(1, 3)))
    yield Kind("a weight with a number as name", lambda update: with_weight(update, 5, torch.ones(1, 3)))
    yield Kind("no weights", lambda update: replace(required(update), patch=Patch({})))
    yield Kind(
        "rows of weights that it does not send", lambda update: replace(required(update), patch=Patch({}, update.patch.rows))
    )


def required(update: Update) -> Update:
    """`update`, where it has weights."""
    if not update.patch.tensors:
        raise Absent
    return update


def swapped(update: Update) -> object:
    tensors = dict(update.patch.tensors)
    alike = [(a, b) for a in tensors for b in tensors if a < b and tensors[a].shape == tensors[b].shape]
    if not alike:
        raise Absent
    a, b = alike[0]
    return replace(update, patch=replace(update.patch, tensors={**tensors, a: tensors[b], b: tensors[a]}))


def misplaced(update: Update) -> object:
    tensors = dict(update.patch.tensors)
    apart = [(a, b) for a in tensors for b in tensors if tensors[a].shape != tensors[b].shape]
    if not apart:
        raise Absent
    a, b = apart[0]
    return replace(update, patch=replace(update.patch, tensors={**tensors, a: tensors[b], b: tensors[a]}))


def row_ids() -> Iterator[Kind]:
    strange: Mapping[str, Callable[[Tensor], object]] = {
        "descending": lambda ids: ids.flip(0),
        "all the first": lambda ids: ids[:1].expand(len(ids)),
        "out of range": lambda ids: ids + 10**6,
        "negative": lambda ids: ids - 10**6,
        "int32": lambda ids: ids.int(),
        "float": lambda ids: ids.float(),
        "in two axes": lambda ids: ids[None],
        "lists": lambda ids: ids.tolist(),
        "None": lambda ids: None,
        "one more": lambda ids: torch.cat([ids, ids[-1:] + 1]),
    }
    for name, made in strange.items():
        yield Kind(f"all row ids are {name}", every_ids(made))
    yield Kind("no row ids", lambda update: replace(with_ids(update), patch=replace(update.patch, rows={})))
    yield Kind("row ids of a weight that has a single row", rows_of_dense)
    yield Kind("an empty list of rows for a weight that has a single row", no_rows_of_dense)


def with_ids(update: Update) -> Update:
    """`update`, where weights in it have row ids."""
    if not update.patch.rows:
        raise Absent
    return update


def every_ids(made: Callable[[Tensor], object]) -> Callable[[Update], object]:
    def change(update: Update) -> object:
        ids: Any = {name: made(ids) for name, ids in with_ids(update).patch.rows.items()}
        return replace(update, patch=replace(update.patch, rows=ids))

    return change


def dense(update: Update) -> str:
    names = [name for name in update.patch.tensors if name not in update.patch.rows]
    if not names:
        raise Absent
    return names[0]


def rows_of_dense(update: Update) -> object:
    return with_rows(update, dense(update), torch.tensor([0]))


def no_rows_of_dense(update: Update) -> object:
    name = dense(update)
    return with_rows(with_weight(update, name, update.patch.tensors[name][:0]), name, torch.tensor([], dtype=torch.int64))


def extras() -> Iterator[Kind]:
    strange: Mapping[str, Callable[[Tensor], object]] = {
        "NaN": lambda t: with_one(t, math.nan) if t.is_floating_point() else t.double() * math.nan,
        "infinite": lambda t: with_one(t, math.inf) if t.is_floating_point() else t.double() + math.inf,
        "1e30": lambda t: with_one(t, 1e30),
        "beyond all bounds below": lambda t: with_one(t, -1e30),
        "of another dtype": lambda t: t.half(),
        "flat": lambda t: t.reshape(-1)[None, None, None],
        "empty": lambda t: t.new_zeros(0),
        "of 600 MB": lambda t: torch.ones(1, dtype=t.dtype).expand(600_000_000 // t.element_size()),
        "lists": lambda t: t.tolist(),
        "None": lambda t: None,
        "sparse": lambda t: t[None].to_sparse()[0] if t.ndim else torch.sparse_coo_tensor(size=()),
        "without numbers": lambda t: t.to("meta"),
    }
    for name, made in strange.items():
        yield Kind(f"all extra tensors are {name}", every_extra(made))
    yield Kind(
        "no extra tensors", lambda update: replace(extra_of(update), extra={}), harmless=True
    )  # hetlora's rank may be missing
    nothing: Mapping[str, object] = {"None": None, "a list": [1], "text": "p"}
    for name, value in nothing.items():
        yield Kind(f"extra is {name}", lambda update, value=value: replace(update, extra=value))
    for name in ("p ", "server_optimizer/m/x", "grafted/own", "loss", "model.norm.weight", "stack/x", 5, ("a",)):
        yield Kind(f"extra has {name}", lambda update, name=name: with_extra(update, name, torch.ones(3)))
    large = {
        "of 600 MB": torch.ones(1).expand(150_000_000),
        "of 600 MB in half precision": torch.ones(1).half().expand(300_000_000),
    }
    for name, tensor in large.items():
        yield Kind(f"extra has one tensor more {name}", lambda update, tensor=tensor: with_extra(update, "more", tensor))


def extra_of(update: Update) -> Update:
    """`update`, where it has extra tensors."""
    if not update.extra:
        raise Absent
    return update


def every_extra(made: Callable[[Tensor], object]) -> Callable[[Update], object]:
    def change(update: Update) -> object:
        extra: Any = {name: made(tensor) for name, tensor in extra_of(update).extra.items()}
        return replace(update, extra=extra)

    return change


def metric(*path: Any, value: object) -> Callable[[Update], object]:
    """What stands at `path` in the metrics is `value`, or what it makes of what stands there."""

    def change(update: Update) -> object:
        try:
            before = at(update.metrics, path)
        except (KeyError, IndexError, TypeError):
            raise Absent from None
        return with_metric(update, path, value(before) if callable(value) and value is not REMOVED else value)

    return change


def metrics() -> Iterator[Kind]:
    for name in ("qualified_", "p", "scores_", "\ud800", "", 5, None):
        yield Kind(f"a metric {name!r} more", lambda update, name=name: with_metric(update, (name,), 1))
    yield Kind(
        "qualified, which only one method declares", lambda update: with_metric(absent(update, "qualified"), ("qualified",), 1)
    )
    yield Kind("3 MB in a metric more", lambda update: with_metric(update, ("more",), "x" * 3_000_000))
    nothing: Mapping[str, object] = {"None": None, "a list": ["loss"], "text": "loss", "a number": 1}
    for name, value in nothing.items():
        yield Kind(f"the metrics are {name}", lambda update, value=value: replace(update, metrics=value))
    losses = (
        math.nan,
        math.inf,
        -math.inf,
        1e30,
        10**400,
        HUGE,
        "0.5",
        None,
        True,
        [0.5],
        {"a": 1},
        nested(900),
        torch.tensor(0.5),
    )
    for value in losses:
        yield Kind(f"loss = {shown(value)}", metric("loss", value=value))
    yield Kind("loss a little higher", metric("loss", value=lambda loss: loss + 0.01), harmless=True)
    for value in ("x", None, 5, [], ["x"], [1.0] * 99, [math.nan] * 3, [-1.0] * 3, [1e30] * 3, {"a": 1}, nested(900)):
        yield Kind(f"reached = {shown(value)}", lambda update, value=value: with_metric(update, ("reached",), value))
    for value in ("x", None, 5, [], {"a": [1]}, {}, nested(900)):
        yield Kind(f"routed = {shown(value)}", metric("routed", value=value))
    for value in (
        [],
        [1],
        [-1] * 8,
        [0.5] * 8,
        ["x"] * 8,
        [10**400] * 8,
        [True] * 8,
        [math.nan] * 8,
        "12345678",
        None,
        [10**30] * 100_000,
    ):
        yield Kind(f"tokens of a block = {shown(value)}", in_first_block(value))
    for name in ("validation_loss", "qualified", "sent"):
        for value in (math.nan, -1, 1e30, "x", None, True, 10**400, [1]):
            yield Kind(f"{name} = {shown(value)}", metric(name, value=value))


def absent(update: Update, name: str) -> Update:
    if name in update.metrics:
        raise Absent
    return update


def in_first_block(value: object) -> Callable[[Update], object]:
    def change(update: Update) -> object:
        if not update.metrics.get("routed"):
            raise Absent
        return with_metric(update, ("routed", next(iter(update.metrics["routed"]))), value)

    return change


def of_first_task(*path: Any, value: object) -> Callable[[Update], object]:
    """As `metric`, in the scores of the first task."""

    def change(update: Update) -> object:
        if not update.metrics.get("scores"):
            raise Absent
        return metric("scores", next(iter(update.metrics["scores"])), *path, value=value)(update)

    return change


def renamed(*path: Any, name: object) -> Callable[[Update], object]:
    """The first of what the object at `path` holds, under another name."""

    def made(before: Mapping[Any, Any]) -> object:
        (_, value), *rest = before.items()
        return {name: value, **dict(rest)}

    return metric(*path, value=made)


def scores() -> Iterator[Kind]:
    for value in (None, 5, "x", [], {}, {"t": 1}, nested(900), {"double": {}}):
        yield Kind(f"scores = {shown(value)}", metric("scores", value=value))
    yield Kind("no scores", metric("scores", value=REMOVED))
    for name in ("another", "", "\ud800", "\x1b[31m", "x" * 3_000, 5, None, "<script>alert(1)</script>"):
        yield Kind(f"scores of a task {name!r:.20}", renamed("scores", name=name))
    yield Kind("a task more, of whose scores others have fewer", metric("scores", value=split_in_two))
    for value in ("perplexity", "accuracy", "nonsense", "loss", None, 5, ["verbatim"]):
        yield Kind(f"metric of a task = {shown(value)}", of_first_task("metric", value=value))
    for value in (0, -1, 10**9, 1.0, "1", None, True, 10**400):
        yield Kind(f"examples of a task = {shown(value)}", of_first_task("examples", value=value), harmless=False)
    for value in (-1, -0.5, math.nan, math.inf, 1e30, "1", None, 10**400):
        yield Kind(f"nll of a task = {shown(value)}", of_first_task("nll", value=value))
    for value in (-1, 1.5, math.nan, "1", None, 10**400, True):
        yield Kind(f"tokens of a task = {shown(value)}", of_first_task("tokens", value=value))
    for value in (
        None,
        5,
        [],
        {},
        {"verbatim": 10**6},
        {"verbatim": -1},
        {"verbatim": math.nan},
        {"nonsense": 1},
        {"perplexity": 1},
    ):
        yield Kind(f"sums of a task = {shown(value)}", of_first_task("sums", value=value))
    labels = (
        None,
        5,
        [],
        {"a": 1},
        {"a": [1, 2]},
        {"a": [1, 2, -1]},
        {"a": [0, 0, 0]},
        {"a": [10**9, 10**9, 10**9]},
        {5: [1, 0, 0]},
    )
    for value in (
        *labels,
        {"\ud800": [1, 0, 0]},
        {"a": [math.nan, 0, 0]},
        {"a": [True, 0, 0]},
        {str(n): [1, 0, 0] for n in range(20_000)},
    ):
        yield Kind(f"labels of a task = {shown(value)}", of_first_task("labels", value=value))
    yield Kind("a field more in a task's scores", of_first_task(value=lambda before: {**before, "more": 1}))
    yield Kind("a field less in a task's scores", of_first_task("nll", value=REMOVED))


def predictions() -> Iterator[Kind]:
    for value in (None, 5, "x", {}, [1], [{}], nested(900), ["x" * 3_000_000]):
        yield Kind(f"predictions = {shown(value)}", metric("predictions", value=value))
    yield Kind("predictions = []", metric("predictions", value=[]), harmless=True)
    yield Kind("no predictions", metric("predictions", value=REMOVED), harmless=True)
    yield Kind("more predictions than asked for", metric("predictions", value=lambda rows: rows * 1_000))
    wrong: Mapping[str, Sequence[object]] = {
        "task": (None, 5, "invented", ["double"], "\ud800"),
        "prompt": (None, 5, "another", "", "\ud800", "x" * 6_000),
        "reference": (None, 5, "another", "\x1b[2J", "x" * 6_000),
        "answer": (None, 5, "\ud800", "\x1b[2J", "x" * 6_000, ["x"], nested(900)),
        "score": (-1, 2, math.nan, math.inf, 10**400, "1", True, [0.5]),
        "more": (1,),
    }
    for name, values in wrong.items():
        for value in values:
            yield Kind(f"{name} of a prediction = {shown(value)}", of_first_prediction(name, value))
    yield Kind("a prediction without its answer", of_first_prediction("answer", REMOVED))
    yield Kind("another answer", of_first_prediction("answer", "<script>alert(1)</script>"), harmless=True)


def of_first_prediction(name: str, value: object) -> Callable[[Update], object]:
    def change(update: Update) -> object:
        if not update.metrics.get("predictions"):
            raise Absent
        return with_metric(update, ("predictions", 0, name), value)

    return change


def split_in_two(before: Mapping[str, Any]) -> object:
    task, scores = next(iter(before.items()))
    if scores["examples"] < 2:
        raise Absent
    half = {**scores, "examples": 1, "sums": dict.fromkeys(scores["sums"], 0.0)}
    return {**before, task: {**half, "examples": scores["examples"] - 1}, "invented": half}


def against_base() -> Iterator[Kind]:
    for name in ("retained", "drift"):
        for value in (None, 5, "x", [], {}, {"t": 1}, nested(900)):
            yield Kind(f"{name} = {shown(value)}", metric(name, value=value))
        yield Kind(f"no {name}", metric(name, value=REMOVED))
        for key in ("another", "\ud800", 5):
            yield Kind(f"{name} of {key!r}", renamed(name, name=key))
    for value in (math.nan, -1, 1e30, "x", None, 10**400, True, [1]):
        yield Kind(f"drift of a block = {shown(value)}", in_all("drift", value))
        yield Kind(f"value of a retained task = {shown(value)}", in_all("retained", value, "value"))
    for value in (0, -1, 10**6, 0.5, "1", None, True):
        yield Kind(f"examples of a retained task = {shown(value)}", in_all("retained", value, "examples"))
    for value in (None, 5, "x", [], [1.0], [1.0] * 10**5, [math.nan], ["x"], {"a": 1}):
        yield Kind(f"values of a retained task = {shown(value)}", in_all("retained", value, "values"))
    for value in ("accuracy", "nonsense", None, 5):
        yield Kind(f"metric of a retained task = {shown(value)}", in_all("retained", value, "metric"))
    yield Kind("a field more in a retained task", in_all("retained", lambda before: {**before, "more": 1}))


def in_all(name: str, value: object, *path: Any) -> Callable[[Update], object]:
    """As `metric`, in everything that the object `name` holds."""

    def change(update: Update) -> object:
        if not update.metrics.get(name):
            raise Absent
        changed: Any = update
        for key in update.metrics[name]:
            changed = metric(name, key, *path, value=value)(changed)
        return changed

    return change


__all__ = ["examples", "put"]
