"""The boundary: an answer from a client is foreign input, and this is the one place that checks it.

What an answer may hold is drawn up when its job is sent (`expectation`): the job's own names, shapes and rows, what the method
declares, and the metrics that the run asks for. An answer that does not fit is that client's failure, with the reason; nothing
behind the boundary checks again.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedexperts.core.ledger import Ledger
from fedexperts.engines.wire import decode, encode
from fedexperts.errors import BadMessage, quoted
from fedexperts.methods.contract import Declaration, Expected, ExtraTensor, ExtraTensors, Method, Metric
from fedexperts.moe import factors
from fedexperts.types import Cost, Failure, Job, Patch, Server, Tensors, Update

Check = Callable[[object], str | None]
"""Of a metric's value: why it is none, as the rest of a sentence; None where it is one."""


@dataclass(frozen=True)
class Report:
    """A metric that a run, rather than its method, asks for."""

    check: Check
    required: bool = True  # whether an answer without it is refused
    characters: int = 0  # as JSON, that it may take in addition to MOST_JSON of all others


Reports = Callable[[Job], Mapping[str, Report]]
"""What a run asks for in the answer to a job."""

LARGEST_NORM = 100.0
"""A weight may come back with at most this many times the norm that it would have with all elements at 1; one that has as much
already, with once that norm more than it had: so no client makes it grow by a factor in every round."""

LOSS = Metric(low=-1e9, high=1e9)
STEPS = Metric(low=0, high=1e9, whole=True)
MOST_TOKENS = 10**15
COSTS = {
    "seconds": Metric(low=0, high=1e9),
    "tokens": Metric(low=0, high=MOST_TOKENS, whole=True),
    "peak_bytes": Metric(low=0, high=10**15, whole=True),
    "flops_estimated": Metric(low=0, high=1e30),
}
MOST_JSON = 2**20
"""Characters of an answer's metrics as JSON, without those that have room of their own (`Report.characters`)."""
FRAMING = 2**16
"""Bytes that the form of an answer may take beside its tensors and metrics."""
LONGEST_REASON = 500


@dataclass(frozen=True)
class Expectation:
    """What an answer to one job may hold."""

    job: Job  # its outline: names, dtypes, shapes and row ids, without numbers
    declaration: Declaration
    start: Patch | None = None  # the weights of the job, where its answer brings their change
    examples: int | None = None  # of the client's training split; None: not known
    norms: Mapping[str, float] = field(default_factory=dict)  # of each weight of the job
    extra: Mapping[str, Expected] = field(default_factory=dict)
    metrics: Mapping[str, Check] = field(default_factory=dict)
    reports: frozenset[str] = frozenset()  # those of the metrics that must be there
    most_json: int = MOST_JSON  # characters of the metrics

    @property
    def most_bytes(self) -> int:
        """Bytes that the answer may take in all: known before anything of it is decoded."""
        extra = sum(math.prod(each.shape) * each.dtype.itemsize for each in self.extra.values())
        names = sum(len(name) + 200 for name in (*self.job.patch.tensors, *self.extra))  # headers of as many small files
        return self.job.patch.nbytes + extra + names + self.most_json + FRAMING


def expectation(
    server: Server, method: Method, reports: Reports, job: Job, known_norms: dict[str, float] | None = None
) -> Expectation:
    """What an answer to `job`, as `server` sends it, may hold.

    known_norms: of weights of `server`, which the jobs of a round have in common; those that are missing are added.
    """
    declaration, client = method.declare(), server.clients.get(job.client)
    training = job.task != "evaluate"
    fields = {name: each for name, each in declaration.extra.items() if job.task in each.tasks}
    checks: dict[str, Check] = {
        "loss": LOSS.number_error,
        "routed": counts_of_tokens(job),
        "reached": numbers_of_experts(job),
        "skipped_steps": STEPS.number_error,
    }
    checks |= {
        name: lambda value, each=each: each.error(value, server, job)  # type: ignore[misc]
        for name, each in declaration.metrics.items()
        if job.task in each.tasks
    }
    asked = reports(job)
    return Expectation(
        outline(job),
        declaration,
        None if job.patch.wire_dtype == "float32" else job.patch,
        client.examples if client else None,
        norms_of(job, server, {} if known_norms is None else known_norms),
        {} if not training else expected_extra(fields, server, job),
        {**(checks if training else {}), **{name: report.check for name, report in asked.items()}},
        frozenset(name for name, report in asked.items() if report.required),
        MOST_JSON + sum(report.characters for report in asked.values()),
    )


def expected_extra(fields: Mapping[str, ExtraTensor | ExtraTensors], server: Server, job: Job) -> dict[str, Expected]:
    """Name → the extra tensor of the answer to `job`."""
    return {full: each for name, field in fields.items() for full, each in field.expected(name, server, job).items()}


def answer_limit(job: Job) -> int:
    """Bytes that an answer to `job` may take in all, as the boundary wrote into the job; else a multiple of the job's."""
    return job.most_bytes_up or 2 * job.nbytes + MOST_JSON + FRAMING


def reorder_and_validate(
    run: Callable[[Iterable[Job]], Iterable[Update | Failure]],
    jobs: Iterable[Job],
    expect: Callable[[Job], Expectation],
    ledger: Ledger,
) -> Iterator[Update]:
    """The updates that `run` brings and that can be used, in the order of their jobs; all answers are entered in `ledger`.

    An answer that names no client under way is dropped. A client of which no answer came fails.

    A sum in float64 shows the order of its terms once in some 10⁸ elements, and a large model has more than that; so one that
    comes early waits for its turn.
    """
    waiting: list[str] = []
    sent: dict[str, Expectation] = {}
    early: dict[str, Update | Failure] = {}

    def note(job: Job) -> Job:
        encoded = replace(job, patch=encode(job.patch, job.patch.wire_dtype))
        ledger.sent(encoded)
        waiting.append(job.client)
        sent[job.client] = expect(job)
        return replace(encoded, most_bytes_up=sent[job.client].most_bytes)

    def admit(answer: object) -> None:
        client = answer.client if isinstance(answer, Update | Failure) else None
        if isinstance(client, str) and client in sent:
            early[client] = validate_update(sent.pop(client), answer)

    for _ in map(admit, run(map(note, jobs))):  # no answer is bound to a name here, where it would outlive its turn
        while waiting and waiting[0] in early:
            yield from ledger.received(early.pop(waiting.pop(0)))
    for client in waiting:
        if client in sent:
            early[client] = failure(sent.pop(client).job, "no answer that names it came")
        yield from ledger.received(early.pop(client))


def validate_update(expected: Expectation, answer: object) -> Update | Failure:
    """`answer` with its weights decoded, or the failure of its client, with the reason, where it does not fit."""
    if not isinstance(answer, Update):
        return failure(expected.job, answer.reason if isinstance(answer, Failure) else f"its answer is {quoted(answer)}")
    sent = answer
    try:
        why = form_error(sent)
        if why is None:
            answer = decoded(expected, sent)
            why = update_error(expected, answer)
    except BadMessage as error:
        why = str(error)
    except Exception as error:  # foreign input may break any assumption of the checks themselves
        why = f"its update cannot be checked ({type(error).__name__})"
    return answer if why is None else failure(expected.job, why, sent_bytes(sent))


def decoded(expected: Expectation, update: Update) -> Update:
    """`update` with the weights that it stands for; `update` itself where these travel as they are.

    Raises:
        BadMessage: its weights or their scales are not what the job's dtype on the wire asks for.
    """
    patch = decode(update.patch, expected.job.patch.wire_dtype, expected.start)
    return update if patch is update.patch else replace(update, patch=patch)


def failure(job: Job, reason: object, bytes_up: int = 0) -> Failure:
    """The failure of the client of `job`; it always has a reason."""
    line = printable(reason) if isinstance(reason, str) else ""
    return Failure(job.client, job.round, job.task, line or "it failed and gave no reason", bytes_up)


def sent_bytes(update: Update) -> int:
    """Bytes of an update that does not fit; 0 where it is of things that no message carries."""
    try:
        return update.nbytes
    except Exception:  # it may hold anything
        return 0


def update_error(expected: Expectation, update: Update) -> str | None:
    """Why `update` cannot be used; None where it can."""
    job = expected.job
    if (update.client, update.round, update.task) != (job.client, job.round, job.task):
        answered = f"{quoted(update.client)} in round {quoted(update.round)}, {quoted(update.task)}"
        return f"it answered for {answered}, which is not the job it was sent"
    return (
        count_error(expected, update)
        or cost_error(update.cost)
        or names_error(expected, update.patch)
        or weights_error(expected, update.patch)
        or extra_error(expected, update.extra)
        or metrics_error(expected, update.metrics)
    )


def form_error(update: Update) -> str | None:
    """Whether each part is what it is called: an engine may hand on anything."""
    forms = {"patch": Patch, "extra": Mapping, "metrics": Mapping, "cost": Cost}
    for name, form in forms.items():
        if not isinstance(part := getattr(update, name), form):
            return f"its update has {quoted(part)} as its {name}"
    scales = {} if update.patch.scales is None else {"scales": update.patch.scales}
    for tensors in (update.patch.tensors, update.patch.rows, scales, update.extra):
        if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
            return f"its update has {quoted(tensors)} in place of named tensors"
        if strange := [each for each in tensors.values() if not isinstance(each, Tensor) or each.layout != torch.strided]:
            return f"its update has {quoted(strange[0])} in place of a tensor"
    return None


def count_error(expected: Expectation, update: Update) -> str | None:
    """Examples weigh a client in means, so they must be those that it came with."""
    if type(update.examples) is not int or update.examples < 0:
        return f"it says it has {quoted(update.examples)} training examples, and that is no count"
    if expected.examples is not None and update.examples != expected.examples:
        return f"it says it has {quoted(update.examples)} training examples, and when it came it had {expected.examples}"
    return None


def cost_error(cost: Cost) -> str | None:
    errors = {name: bounds.number_error(getattr(cost, name)) for name, bounds in COSTS.items()}
    return next((f"its cost has {name} that {error}" for name, error in errors.items() if error), None)


def names_error(expected: Expectation, patch: Patch) -> str | None:
    """Which weights come back: all of the job when it trained, none after an evaluation."""
    wanted = expected.job.patch.tensors
    if strange := sorted(patch.tensors.keys() - wanted.keys()):
        return f"its update has {strange[0]}, which was not in its job"
    if strange := sorted(patch.rows.keys() - patch.tensors.keys()):
        return f"its update has rows of {strange[0]}, and not the weight itself"
    if expected.job.task == "evaluate" and patch.tensors:
        return f"its update has {next(iter(patch.tensors))}, and an evaluation sends no weights"
    missing = sorted(wanted.keys() - patch.tensors.keys())
    if missing and (expected.job.task == "train" or patch.tensors) and expected.job.task != "evaluate":
        return f"its update lacks {missing[0]}"
    return None


def weights_error(expected: Expectation, patch: Patch) -> str | None:
    """Rows, dtypes, shapes, then finite numbers of a likely size."""
    ranks = factors.rank_axes(expected.job.patch.tensors) if expected.declaration.lowers_rank else {}
    for name, tensor in patch.tensors.items():
        if why := rows_error(expected, name, patch.rows) or shape_error(expected, name, tensor, patch, ranks):
            return f"its update has {why}"
    sent = {patch.tensors[name].shape[axis] for name, axis in ranks.items() if name in patch.tensors}
    if len(sent) > 1:
        return "its update has adapters of different ranks"
    step = factors.rank_step(expected.job.patch.tensors) if sent else 1
    uneven = next((rank for rank in sent if rank % step), None)
    if uneven:
        return f"its update has adapters of rank {uneven}, and a multiple of {step} would fit its job"
    return norms_error(expected, patch.tensors)


def rows_error(expected: Expectation, name: str, rows: Tensors) -> str | None:
    """Why `rows` has no row ids that can come back of the weight `name`; None where it has."""
    brought = expected.job.patch.rows.get(name)
    if brought is None:
        return f"rows of {name}, which its job brought whole" if name in rows else None
    if name not in rows:
        return f"{name} and does not say which of its rows"
    ids = rows[name]
    if ids.dtype != torch.int64 or ids.ndim != 1:
        return f"rows of {name} that are no list of whole numbers"
    if len(ids) > 1 and not bool((ids[1:] > ids[:-1]).all()):
        return f"rows of {name} that do not ascend"
    if not bool(torch.isin(ids, brought).all()):
        return f"rows of {name} that were not in its job"
    if len(ids) < len(brought) and not expected.declaration.selects_experts:
        return f"{len(ids)} of the {len(brought)} rows of {name}, and its method sends all"
    return None


def shape_error(expected: Expectation, name: str, tensor: Tensor, patch: Patch, ranks: Mapping[str, int]) -> str | None:
    """Why `tensor` cannot come back as the weight `name`, whatever its numbers; None where it can."""
    wanted, chosen = expected.job.patch.tensors[name], patch.rows.get(name)
    if tensor.dtype != wanted.dtype:
        return f"{name} as {tensor.dtype}, and its job had it as {wanted.dtype}"
    fits = [*wanted.shape] if chosen is None else [len(chosen), *wanted.shape[1:]]
    if name in ranks and tensor.ndim == len(fits):
        axis = ranks[name]
        fits[axis] = min(max(tensor.shape[axis], 1), fits[axis])
    return None if [*tensor.shape] == fits else f"{name} of shape {[*tensor.shape]}, and {fits} would fit its job"


def norms_error(expected: Expectation, tensors: Tensors) -> str | None:
    """Whether weights have norms that training can give them; of an adapter so must the product of its factors."""
    norms = {name: norm_of(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    for name, norm in norms.items():
        if not math.isfinite(norm):
            finite = bool(torch.isfinite(tensors[name]).all())
            return f"its update has {f'{name} with numbers too large to add' if finite else f'NaN or infinity in {name}'}"
        if norm > (most := largest_norm(expected, name)):
            return f"its update has {name} with a norm of {norm:.3g}, and at most {most:.3g} would be a change of what it got"
    for a, b in factors.pairs(norms).items():
        if b in norms and (norm := norms[a] * norms[b]) > (most := largest_norm(expected, a, b)):
            return f"its update has {a} and {b} with norms of product {norm:.3g}, and at most {most:.3g} would be a change"
    return None


def largest_norm(expected: Expectation, *names: str) -> float:
    """Of a weight that comes back, or the largest product of the norms of several."""
    ones = math.prod(math.sqrt(expected.job.patch.tensors[name].numel()) for name in names)
    return max(LARGEST_NORM * ones, math.prod(expected.norms[name] for name in names) + ones)


def norms_of(job: Job, server: Server, known: dict[str, float]) -> dict[str, float]:
    """The norm of each weight of `job`. Those of the server's own tensors are taken from `known`, or added to it."""
    norms = {}
    for name, tensor in job.patch.tensors.items():
        if tensor is not server.weights.get(name):
            norms[name] = norm_of(tensor)
            continue
        if name not in known:
            known[name] = norm_of(tensor)
        norms[name] = known[name]
    return norms


def norm_of(tensor: Tensor) -> float:
    """The 2-norm over all elements, summed in float64."""
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


def extra_error(expected: Expectation, extra: Tensors) -> str | None:
    """Whether the extra tensors are those that the method declares."""
    if strange := sorted(extra.keys() - expected.extra.keys()):
        return f"its update has an extra tensor {strange[0]}, which its method does not declare"
    for name, wanted in expected.extra.items():
        if name not in extra:
            if wanted.required:
                return f"its update lacks the extra tensor {name}"
            continue
        tensor = extra[name]
        if (tensor.dtype, tuple(tensor.shape)) != (wanted.dtype, wanted.shape):
            return (
                f"its update has the extra tensor {name} as {tensor.dtype} {[*tensor.shape]}, and it should be "
                f"{wanted.dtype} {[*wanted.shape]}"
            )
        if not bool(torch.isfinite(tensor).all()):
            return f"its update has NaN or infinity in the extra tensor {name}"
        if tensor.numel() and not (wanted.low <= tensor.min().item() and tensor.max().item() <= wanted.high):
            return f"its update has numbers in the extra tensor {name} beyond {wanted.low:g} to {wanted.high:g}"
    return None


def metrics_error(expected: Expectation, metrics: Mapping[str, Any]) -> str | None:
    """Whether the metrics are known ones with values that they can have."""
    if strange := [name for name in metrics if name not in expected.metrics]:
        return f"its update reports {quoted(strange[0])}, a metric that neither the run nor its method declares"
    if missing := sorted(expected.reports - metrics.keys()):
        return f"its update does not report {missing[0]}, which the run asks for"
    for name, value in metrics.items():
        if why := expected.metrics[name](value):
            return f"its metric {name} {why}"
    length = len(json.dumps(dict(metrics)))
    most = expected.most_json
    return None if length <= most else f"its metrics take {length:,} characters, and may take {most:,}"


def counts_of_tokens(job: Job) -> Check:
    """Of `routed`: MoE block → tokens that each of the job's experts got."""

    def check(value: object) -> str | None:
        if not isinstance(value, Mapping) or value.keys() != job.experts.keys():
            return f"is {quoted(value)}, and should hold the blocks of its job"
        for block, ids in job.experts.items():
            counts = value[block]
            fit = isinstance(counts, list) and len(counts) == len(ids)
            if not fit or not all(type(each) is int and 0 <= each <= MOST_TOKENS for each in counts):
                return f"should hold {len(ids)} counts for {block}"
        return None

    return check


def numbers_of_experts(job: Job) -> Check:
    """Of `reached`: experts that backward reached in a step, on average, one number a block."""
    most = [len(ids) for ids in job.experts.values()]

    def check(value: object) -> str | None:
        fit = isinstance(value, list) and len(value) == len(most)
        if fit and all(is_number(each) and 0 <= each <= number for each, number in zip(list(value), most, strict=True)):  # type: ignore[call-overload]
            return None
        return f"is {quoted(value)}, and should be a number of experts for each of {len(most)} blocks"

    return check


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def outline(job: Job) -> Job:
    """`job` without its numbers: names, dtypes, shapes and row ids."""
    return replace(job, patch=replace(job.patch, tensors=shapes(job.patch.tensors), scales=None), extra=shapes(job.extra))


def shapes(tensors: Tensors) -> dict[str, Tensor]:
    """`tensors` without their numbers."""
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def printable(reason: str) -> str:
    """`reason` as one line of text that a terminal and a report can show."""
    line = " ".join("".join(each if each.isprintable() else " " for each in reason[: 10 * LONGEST_REASON]).split())
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 1]}…"
