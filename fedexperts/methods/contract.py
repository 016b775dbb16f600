"""What a federated method is: four functions on values, and what it declares to the rest of the system.

No module outside `methods/` knows a method's name, or a key that a method invented: whatever they must know of it stands in its
`Declaration`. What a method does not declare is refused, never ignored.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from fedexperts.core.training import fit, load_weights, sub_model
from fedexperts.errors import Leak, Undeclared, quoted
from fedexperts.methods.base import all_experts, answer, by_examples, mean_rows
from fedexperts.moe import rows
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Tensors, Update

Wrapping = Literal["server_optimizer", "robust_merging", "masking"]
"""What can be put around a method whose merge is a mean of the weights that clients send."""

CORE_METRICS = ("loss", "routed", "reached")
"""Metrics that any method may report: the mean loss; the tokens that each expert got, by MoE block; the experts that backward
reached in a step, on average, for each block."""

LARGEST = 1e6
"""Largest magnitude of a number in an extra tensor or a metric, unless the field says otherwise."""


@dataclass(frozen=True)
class ExtraTensor:
    """A tensor that clients send beside their weights.

    shape: of the tensor, from the server that sent the job and the job.
    low, high: bounds of its elements, both allowed.
    tasks: the tasks whose answers have it. required: whether all such answers must have it.
    """

    shape: Callable[[Server, Job], tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    low: float = -LARGEST
    high: float = LARGEST
    required: bool = True
    tasks: tuple[str, ...] = ("train",)

    def expected(self, name: str, server: Server, job: Job) -> dict[str, "Expected"]:
        """Name → what the boundary checks."""
        return {name: Expected(self.dtype, self.shape(server, job), self.low, self.high, self.required)}


@dataclass(frozen=True)
class ExtraTensors:
    """Several such tensors, whose names begin alike: the declared name ends in "/".

    like: the rest of each name → a tensor of the shape and dtype that is expected (its numbers do not count).
    """

    like: Callable[[Server, Job], Tensors]
    low: float = -LARGEST
    high: float = LARGEST
    required: bool = True
    tasks: tuple[str, ...] = ("train",)

    def expected(self, name: str, server: Server, job: Job) -> dict[str, "Expected"]:
        """Name → what the boundary checks."""
        return {
            f"{name}{rest}": Expected(tensor.dtype, tuple(tensor.shape), self.low, self.high, self.required)
            for rest, tensor in self.like(server, job).items()
        }


@dataclass(frozen=True)
class Expected:
    """An extra tensor of one answer, as it must be."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    low: float
    high: float
    required: bool


@dataclass(frozen=True)
class Metric:
    """A number that clients report of their work, or a list of numbers.

    low, high: bounds, both allowed. whole: only integers. length: of the list, from the server and the job; None: one number.
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


@dataclass(frozen=True)
class Declaration:
    """What the rest of the system must know of a method.

    A name that ends in "/" stands for all names that begin with it.

    setup_tasks: tasks that every client does once, in this order, before the first round.
    centralized: whether all clients' training data lie in one place, which then is the only participant of a round.
    reference: whether it is a floor or a ceiling that federated methods are compared with, and sets no target.
    extra: name → a tensor that clients send beside their weights.
    metrics: name → a number that clients report (`loss` and `routed` are core's, and every method's).
    job_extra: names of the tensors that jobs bring beside weights.
    client_state: names of what clients keep beside weights.
    keeps_weights: whether clients keep trained weights under their own names.
    personal_experts: experts that each client has beside every MoE block; plans count their memory and their FLOPs.
    selects_experts: whether a client may send fewer experts than its job brought.
    if_no_expert_is_sent: what a user can do when no client sends an expert, as the end of a sentence.
    lowers_rank: whether a client may send adapters of a lower rank than its job brought.
    local_files: hyperparameters that name a file which every machine has for itself; its hash is noted with the run.
    wrappers: what can be put around the method.
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
    wrappers: frozenset[Wrapping] = frozenset({"server_optimizer", "robust_merging", "masking"})


@dataclass(frozen=True)
class Extension:
    """A change of a model's structure that the library does not know: `apply(model, **settings)` makes it, in place.

    apply: a function of a module's top level that uses nothing but its arguments and what it imports itself: its source travels
    with an exported model. Parameters that it adds are trained where they require gradients. settings: JSON values.
    """

    apply: Callable[..., None]
    settings: Mapping[str, Any] = field(default_factory=dict)


class Method:
    """A federated method: functions on values, its hyperparameters as fields of a frozen dataclass, and no state.

    What the server must remember between rounds goes into `server.method_state`, what a client keeps to itself into
    `context.client_state`: named tensors. The defaults are federated averaging of the whole model.
    """

    def declare(self) -> Declaration:
        """What others must know of it."""
        return Declaration()

    @property
    def setup_tasks(self) -> tuple[str, ...]:
        """Tasks that every client does once, before the first round."""
        return self.declare().setup_tasks

    @property
    def centralized(self) -> bool:
        """Whether all clients' training data lie in one place."""
        return self.declare().centralized

    @property
    def is_ours(self) -> bool:
        """Whether the library knows its models, since it comes with it."""
        return type(self).__module__.startswith("fedexperts.")

    def assign(self, server: Server, client: Client) -> Assignment | None:
        """What `client` works with for `server.task`; None when it has no part in it."""
        return all_experts(server)

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """The model of `job`, with what came and what the client keeps: the very one that is trained, scored and exported."""
        model = sub_model(job, context)
        if (extension := self.extension(job)) is not None:
            extension.apply(model, **extension.settings)
        return load_weights(model, job, context)

    def extension(self, job: Job) -> Extension | None:
        """What the method changes of a model beyond its experts, adapters and personal experts; an export carries it along."""
        return None

    def train(self, job: Job, context: ClientContext) -> Update:
        """The client's side: what it trains and sends. Here all that came, trained on its own examples."""
        model = self.build_model(job, context)
        return answer(job, context, model, fit(model, context, seed=job.seed))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """The next server. `updates` is a stream, one at a time: read it once. Here each row's mean, by examples."""
        return mean_rows(server, updates, by_examples)

    def global_model(self, base: nn.Module, tuning: Tuning, server: Server | None, seed: str) -> nn.Module:
        """The whole model whose trained weights clients share, in the state of `server`; None: as it starts, from `seed`."""
        model = prepare(shrink(base, anatomy(base).all_experts), tuning, seed=seed)
        if server is not None:
            rows.write(model, server.weights)
        return model

    def budget_of(self, assignment: Assignment) -> int | None:
        """How many experts of the whole model backward reaches at a time on a client that has `assignment`; None: all."""
        return None


@dataclass(frozen=True)
class Wrapper(Method):
    """A method around another: whatever it does not define itself is the other's, its declaration too."""

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

    def budget_of(self, assignment: Assignment) -> int | None:
        return self.method.budget_of(assignment)

    def extension(self, job: Job) -> Extension | None:
        return self.method.extension(job)


def require_declared(method: Method, job: Job, update: Update, client_state: Tensors) -> None:
    """What leaves a client, and what it keeps, is what the method declares; checked where the method's code ran.

    Raises:
        Undeclared: a name that the method does not declare.
        Leak: a weight that did not come with the job, which is the client's own.
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
    """The first of `names` that is not `declared`, where a declared name that ends in "/" stands for all that begin with it."""
    known = tuple(declared)
    prefixes = tuple(each for each in known if each.endswith("/"))
    return next((name for name in names if name not in known and not name.startswith(prefixes)), None)


def number_of_experts(server: Server, job: Job) -> tuple[int]:
    """The shape of a vector over all experts of a job, layer after layer."""
    return (sum(map(len, job.experts.values())),)
