"""The contract of a federated method: four functions on values, and what it declares to the rest of the system.

No module outside `methods/` knows a method's name or its keys: everything that they need is in its `Declaration`. Anything that
a method does not declare is refused, never ignored.
"""

import builtins
import dis
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, Literal

import torch
from torch import nn

from fedexperts.core.training import fit, load_weights, sub_model
from fedexperts.errors import BadValue, Leak, Undeclared, quoted
from fedexperts.methods.base import all_experts, answer, by_examples, mean_rows
from fedexperts.moe import rows
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.flops import Batch, FlopsEstimate
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Tensors, Training, Update

Wrapping = Literal["server_optimizer", "robust_merging", "masking"]
"""Wrappers of methods whose merge is a mean of the weights that clients send."""

CORE_METRICS = ("loss", "routed", "reached", "skipped_steps")
"""Metrics that any method may report: the mean loss; the tokens per expert, by MoE block; the mean number of experts that
backward reached in a step, per block; in float16, the number of steps that were left out since their gradients overflowed."""

LARGEST = 1e6
"""Default bound of the magnitude of numbers in extra tensors and metrics."""


@dataclass(frozen=True)
class ExtraTensor:
    """A tensor that clients send in addition to weights.

    shape: of the tensor, from the server that sent the job and the job.
    low, high: inclusive bounds of its elements.
    tasks: the tasks whose answers contain it. required: whether all such answers must contain it.
    """

    shape: Callable[[Server, Job], tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    low: float = -LARGEST
    high: float = LARGEST
    required: bool = True
    tasks: tuple[str, ...] = ("train",)

    def expected(self, name: str, server: Server, job: Job) -> dict[str, "Expected"]:
        """Name → what the boundary validates."""
        return {name: Expected(self.dtype, self.shape(server, job), self.low, self.high, self.required)}


@dataclass(frozen=True)
class ExtraTensors:
    """Several extra tensors with a common prefix: the declared name, which ends in "/".

    like: the rest of each name → a tensor of the expected shape and dtype (its values are not used).
    """

    like: Callable[[Server, Job], Tensors]
    low: float = -LARGEST
    high: float = LARGEST
    required: bool = True
    tasks: tuple[str, ...] = ("train",)

    def expected(self, name: str, server: Server, job: Job) -> dict[str, "Expected"]:
        """Name → what the boundary validates."""
        return {
            f"{name}{rest}": Expected(tensor.dtype, tuple(tensor.shape), self.low, self.high, self.required)
            for rest, tensor in self.like(server, job).items()
        }


@dataclass(frozen=True)
class Expected:
    """What one extra tensor of an answer must be."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    low: float
    high: float
    required: bool


@dataclass(frozen=True)
class Metric:
    """A number that clients report about a job, or a list of numbers.

    low, high: inclusive bounds. whole: only integers. length: of the list, from the server and the job; None: one number.
    """

    low: float = -LARGEST
    high: float = LARGEST
    whole: bool = False
    length: Callable[[Server, Job], int] | None = None
    tasks: tuple[str, ...] = ("train",)

    def error(self, value: object, server: Server, job: Job) -> str | None:
        """Why `value` is not such a number or list; None where it is."""
        if self.length is None:
            return self.number_error(value)
        wanted = self.length(server, job)
        if not isinstance(value, list) or len(value) != wanted:
            return f"is {quoted(value)}, and should be a list of {wanted} numbers"
        return next((error for each in value if (error := self.number_error(each))), None)

    def number_error(self, value: object) -> str | None:
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return f"is {quoted(value)}, and should be {'a whole number' if self.whole else 'a number'}"
        if not self.low <= value <= self.high:
            return f"is {quoted(value)}, and should be from {self.low:g} to {self.high:g}"
        return None


def as_the_run_says(training: Training) -> Training:
    """`training`: the method trains whatever a run says."""
    return training


@dataclass(frozen=True)
class Declaration:
    """What other modules must know about a method.

    A name that ends in "/" is a prefix and stands for all names that begin with it.

    setup_tasks: tasks that every client executes once, in this order, before the first round.
    centralized: whether a single participant trains on all clients' data.
    reference: whether it is a lower or upper bound that federated methods are compared with, and defines no target.
    extra: name → a tensor that clients send in addition to weights.
    metrics: name → a number that clients report (CORE_METRICS need no declaration).
    job_extra: names of the tensors that jobs contain in addition to weights.
    client_state: names of the tensors that clients keep in addition to weights.
    keeps_weights: whether clients keep trained weights, under the weights' names.
    personal_experts: number of personal experts per MoE block; plans count their memory and their FLOPs.
    selects_experts: whether a client may send fewer experts than those of its job.
    if_no_expert_is_sent: what a user can do if no client sends an expert, as the end of a sentence.
    lowers_rank: whether a client may send adapters of a lower rank than those of its job.
    local_files: hyperparameters that name a file on each machine; its hash is recorded with the run.
    training: how clients train in a comparison whose run file says the given training: that one, if the method can train so.
    wrappers: the wrappers that the method supports.
    """

    setup_tasks: tuple[str, ...] = ()
    centralized: bool = False
    reference: bool = False
    extra: Mapping[str, ExtraTensor | ExtraTensors] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    job_extra: tuple[str, ...] = ()
    client_state: tuple[str, ...] = ()
    keeps_weights: bool = False
    personal_experts: int = 0
    selects_experts: bool = False
    if_no_expert_is_sent: str = "look at the method's settings that say which experts clients send"
    lowers_rank: bool = False
    local_files: tuple[str, ...] = ()
    training: Callable[[Training], Training] = as_the_run_says
    wrappers: frozenset[Wrapping] = frozenset({"server_optimizer", "robust_merging", "masking"})

    def __post_init__(self) -> None:
        """Raises BadValue if a string stands where a tuple of names belongs: `("a")` is a string, `("a",)` a tuple."""
        for name in ("setup_tasks", "job_extra", "client_state", "local_files"):
            if isinstance(value := getattr(self, name), str):
                raise BadValue(f"{name} = {value!r} of a Declaration is a string; give a tuple: ({value!r},)")


@dataclass(frozen=True)
class Extension:
    """A method's own change of the model's structure: `apply(model, **settings)` makes it, in place.

    apply: a top-level function that uses only its arguments and what it imports itself, because its source is copied into
    exported models. Parameters that it adds are trained if they require gradients. settings: JSON values.

    Raises:
        BadValue: `apply` is not a function or uses other names of its module, or `settings` has a value that JSON cannot hold.
    """

    apply: Callable[..., None]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.apply, FunctionType):
            raise BadValue(f"an extension cannot apply {quoted(self.apply)}, which has no source to copy; give a function")
        if strange := sorted(names_from_outside(self.apply.__code__)):
            raise BadValue(
                f"{self.apply.__name__} uses {strange[0]} from outside of itself, which an exported model would not have; "
                "import or define it inside the function, or pass it in the extension's settings"
            )
        try:
            json.dumps(dict(self.settings))
        except TypeError as error:
            raise BadValue(
                f"the extension's settings cannot be written as JSON ({error}); give numbers, strings, lists or tables, such as "
                "tensor.item()"
            ) from None


def names_from_outside(code: CodeType) -> set[str]:
    """The global names and closure variables that `code`, or a function inside it, reads; without Python's built-in ones."""
    names = {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
    inner = [names_from_outside(each) - set(code.co_cellvars) for each in code.co_consts if isinstance(each, CodeType)]
    return names.union(code.co_freevars, *inner) - set(dir(builtins))


class Method:
    """A federated method: functions on values, its hyperparameters as fields of a frozen dataclass, and no state.

    State of the server is kept in `server.method_state`, and state of a client in `context.client_state`: named tensors. The
    defaults are federated averaging of the whole model.
    """

    def declare(self) -> Declaration:
        """What other modules must know about the method."""
        return Declaration()

    @property
    def setup_tasks(self) -> tuple[str, ...]:
        """Tasks that every client executes once, before the first round."""
        return self.declare().setup_tasks

    @property
    def centralized(self) -> bool:
        """Whether a single participant trains on all clients' data."""
        return self.declare().centralized

    @property
    def is_ours(self) -> bool:
        """Whether the method is part of this library, so that exports know its models."""
        return type(self).__module__.startswith("fedexperts.")

    def assign(self, server: Server, client: Client) -> Assignment | None:
        """The assignment of `client` for `server.task`; None if it does not take part."""
        return all_experts(server)

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """The model of `job`, with the received weights and the client state; the same for training, evaluation and export."""
        model = sub_model(job, context)
        if (extension := self.extension(job)) is not None:
            extension.apply(model, **extension.settings)
        return load_weights(model, job, context)

    def extension(self, job: Job) -> Extension | None:
        """The method's own change of the model's structure, which exports include; None for most methods."""
        return None

    def train(self, job: Job, context: ClientContext) -> Update:
        """Trains on the client and returns its update. Default: trains all received weights on the client's examples."""
        model = self.build_model(job, context)
        added = rows.layout(model).keys() - rows.layout(sub_model(job, context)) if self.extension(job) else set()
        if lost := added - job.patch.tensors.keys():
            raise Undeclared(
                f"{type(self).__name__}.extension adds the trained weight {min(lost)}, which is neither in the job nor kept by "
                "the client, so it would be lost after each job; let global_model add it too, or train with "
                "fedexperts.methods.personal.train_and_keep and declare keeps_weights"
            )
        return answer(job, context, model, fit(model, context, seed=job.seed))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """The next server. `updates` is a stream that can be read once. Default: each row's mean, weighted by examples."""
        return mean_rows(server, updates, by_examples)

    def global_model(self, base: nn.Module, tuning: Tuning, server: Server | None, seed: str) -> nn.Module:
        """The whole model with the shared weights of `server`; None: with the initial weights, from `seed`."""
        model = prepare(shrink(base, anatomy(base).all_experts), tuning, seed=seed)
        if server is not None:
            rows.write(model, server.weights)
        return model

    def round_flops(self, model: nn.Module, batch: Batch, training: Training) -> float:
        """An upper bound of the FLOPs of a client's job in a round, without setup tasks: its training steps, and all else.

        model: the whole model, prepared for training; it may be on the meta device. batch: the largest batch.
        """
        estimate = FlopsEstimate(model)
        return estimate.step(estimate.size(batch)) * training.local_steps * training.gradient_accumulation_steps

    def budget_of(self, assignment: Assignment) -> int | None:
        """Number of experts that backward reaches in a step on a client with `assignment`; None: all."""
        return None


@dataclass(frozen=True)
class Wrapper(Method):
    """A method around another: delegates to `method` all that a subclass does not override, including the declaration."""

    method: Method

    @property
    def is_ours(self) -> bool:
        return self.method.is_ours

    def declare(self) -> Declaration:
        return self.method.declare()

    def assign(self, server: Server, client: Client) -> Assignment | None:
        return self.method.assign(server, client)

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        return self.method.build_model(job, context)

    def train(self, job: Job, context: ClientContext) -> Update:
        return self.method.train(job, context)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        return self.method.merge(server, updates)

    def global_model(self, base: nn.Module, tuning: Tuning, server: Server | None, seed: str) -> nn.Module:
        return self.method.global_model(base, tuning, server, seed)

    def round_flops(self, model: nn.Module, batch: Batch, training: Training) -> float:
        return self.method.round_flops(model, batch, training)

    def budget_of(self, assignment: Assignment) -> int | None:
        return self.method.budget_of(assignment)

    def extension(self, job: Job) -> Extension | None:
        return self.method.extension(job)


def require_declared(method: Method, job: Job, update: Update, client_state: Tensors) -> None:
    """Checks, on the client, that the update and the client state contain only what the method declares.

    Raises:
        Undeclared: a name that the method does not declare.
        Leak: a weight that was not in the job, and so is personal.
    """
    name, declared = type(method).__name__, method.declare()
    extra = [key for key, each in declared.extra.items() if job.task in each.tasks]
    metrics = [*CORE_METRICS, *(key for key, each in declared.metrics.items() if job.task in each.tasks)]
    if own := sorted(update.patch.tensors.keys() - job.patch.tensors.keys()):
        raise Leak(
            f"client {update.client} would send {own[0]}, which is not among the weights that it got: what is its own must not "
            "leave it; let the method's train answer with the names in job.patch only"
        )
    if strange := undeclared(update.extra, extra):
        raise Undeclared(
            f"{name} sends an extra tensor {strange} for task {job.task}, which it does not declare; name it in declare().extra, "
            "with its shape and bounds"
        )
    if strange := undeclared(update.metrics, metrics):
        raise Undeclared(
            f"{name} reports a metric {strange} for task {job.task}, which it does not declare; name it in declare().metrics"
        )
    if strange := undeclared((key for key in client_state if "/" in key or not declared.keeps_weights), declared.client_state):
        raise Undeclared(
            f"{name} keeps {strange} at a client, which it does not declare; name it in declare().client_state, or set "
            "keeps_weights where it is a trained weight"
        )


def undeclared(names: Iterable[str], declared: Iterable[str]) -> str | None:
    """The first of `names` that is not `declared`; a declared name that ends in "/" is a prefix."""
    known = tuple(declared)
    prefixes = tuple(each for each in known if each.endswith("/"))
    return next((name for name in names if name not in known and not name.startswith(prefixes)), None)


def number_of_experts(server: Server, job: Job) -> tuple[int]:
    """The shape of a vector over all experts of a job, layer by layer."""
    return (sum(map(len, job.experts.values())),)
