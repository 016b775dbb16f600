"""The values that travel between server, engine and clients, and the client's context, which stays with it."""

import json
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from math import cos, pi
from typing import Annotated, Any, Literal, Protocol

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from fedexperts.moe.anatomy import Anatomy, Experts
from fedexperts.moe.flops import Footprint
from fedexperts.moe.tuning import Tuning

Tensors = Mapping[str, Tensor]
METRIC_NAMES: tuple[str, ...] = (
    "accuracy",
    "macro_f1",
    "exact_match",
    "token_f1",
    "verbatim",
    "rouge1",
    "rouge2",
    "rougeL",
    "likelihood",
    "perplexity",
)
"""The keys of evaluate.METRICS, for those who must not import it."""


@dataclass(frozen=True)
class Example:
    """One thing to learn: what is asked, what should be answered, how the answer is judged."""

    prompt: str
    response: str
    task: str  # results are reported by task
    metric: str = "exact_match"  # the task's main metric, one of METRIC_NAMES
    label: int | None = None  # the class, where there is one: what a Dirichlet partition looks at
    choices: tuple[str, ...] = ()  # the closed set of answers, where there is one


@dataclass(frozen=True)
class Split:
    """A client's own examples; no example stands in two of the three."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]


@dataclass(frozen=True)
class Patch:
    """Some rows of the server's tensors; a name absent from `rows` is sent whole, as its only row."""

    tensors: Tensors  # name → [rows, ...]
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # name → int64 [rows], ascending

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and row ids; ids that several names share are sent once."""
        return size(self.tensors) + sum({id(ids): ids.nbytes for ids in self.rows.values()}.values())


@dataclass(frozen=True)
class Client:
    """What the server knows of a client."""

    name: str
    examples: int  # in its training split
    task: str = ""  # the task of most of its examples
    memory_bytes: int | None = None  # None: as much as it takes


@dataclass(frozen=True)
class Server:
    """The state of a federation between two rounds: replaced, never changed."""

    weights: Tensors  # everything that is trained and shared, row-first
    layout: Mapping[str, str | None]  # name of a weight → the MoE block whose experts are its rows; None: a single row
    anatomy: Anatomy
    footprint: Footprint
    clients: Mapping[str, Client]
    seed: str = "0"
    method_state: Tensors = field(default_factory=dict)  # what the method must remember
    round: int = 0
    task: str = "start"  # of the round under way, or of the last one: a setup task of the method, or "train"
    accepted: Mapping[str, str] = field(default_factory=dict)  # client → `job_key` of its last job whose answer was merged


@dataclass(frozen=True)
class Assignment:
    """What a client works with: its experts in each MoE block, and what else the method tells it."""

    experts: Experts
    names: frozenset[str] | None = None  # the weights that travel; None: all
    extra: Tensors = field(default_factory=dict)
    patch: Patch | None = None  # what goes down in place of the server's weights as they are


@dataclass(frozen=True)
class Job:
    """A client's work in one round, as it is sent."""

    client: str
    round: int
    task: str
    seed: str
    experts: Experts
    patch: Patch
    extra: Tensors = field(default_factory=dict)
    accepted: str = ""  # `job_key` of the client's last job whose answer was merged: the client goes on from its state after that

    most_bytes_up: int = 0  # that its answer may take in all; stays on the server

    @property
    def key(self) -> str:
        return job_key(self.round, self.task)

    @property
    def nbytes(self) -> int:
        """Bytes that go down to the client."""
        return self.patch.nbytes + size(self.extra)


@dataclass(frozen=True)
class Cost:
    """What a client's work took: measured, unless the name says estimated."""

    seconds: float = 0.0  # of the whole job, as the engine saw it
    tokens: int = 0  # trained on, padding left out
    peak_bytes: int = 0  # largest sum of tensors alive in a training step, weights included
    flops_estimated: float = 0.0  # of the training steps, or of the pass that a stage is


@dataclass(frozen=True)
class Update:
    """A client's answer, as it is sent."""

    client: str
    round: int
    task: str
    patch: Patch
    examples: int  # in the client's training split: its weight in a mean
    extra: Tensors = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)  # JSON values
    cost: Cost = Cost()

    @property
    def nbytes(self) -> int:
        """Bytes that go up to the server."""
        return self.patch.nbytes + size(self.extra) + len(json.dumps(dict(self.metrics)))


@dataclass(frozen=True)
class Failure:
    """A client that gave no usable answer, and why."""

    client: str
    round: int
    task: str
    reason: str
    bytes_up: int = 0  # of an answer that came and cannot be used


class Encoder(Protocol):
    """Examples as tensors (data.encode.Encoder)."""

    eos: int  # the id that ends a response

    def batch(self, examples: Sequence[Example]) -> Mapping[str, Tensor]: ...
    def prompts(self, examples: Sequence[Example]) -> Mapping[str, Tensor]: ...
    def decode(self, ids: Tensor) -> list[str]: ...


@dataclass(frozen=True)
class Training(Tuning):
    """How a client trains: what is trained (`Tuning`), and with which steps. A run file's `[training]` table, key by key."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    lr: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate, over rounds; it is constant inside a round
    final_lr: Annotated[float, Field(gt=0)] = 1e-6  # where the cosine ends
    batch_size: Annotated[int, Field(ge=1)] = 8
    local_steps: Annotated[int, Field(ge=1)] = 20
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # largest norm of the gradient; 0: no clipping
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.01  # weight of the load-balance loss, c_lb of FedMoE
    validation_examples: Annotated[int, Field(ge=1)] = 64  # at most, in each round
    threads: Annotated[int, Field(ge=1)] = 1  # of each worker process; the bits of a result depend on it

    @property
    def tuning(self) -> Tuning:
        """What is trained, without the steps."""
        return Tuning(**{each.name: getattr(self, each.name) for each in fields(Tuning)})

    def lr_in(self, round: int, rounds: int) -> float:
        """The learning rate of a round: under "cosine" `lr` in the first one and in setup tasks, `final_lr` in the last."""
        if self.schedule == "constant" or round <= 1:
            return self.lr
        return self.final_lr + (self.lr - self.final_lr) * (1 + cos(pi * (round - 1) / (rounds - 1))) / 2


@dataclass(frozen=True)
class ClientContext:
    """What a client works with; of all this only its update leaves it."""

    client: Client
    model: nn.Module  # the base, shared by all clients of a process, never written
    data: Split
    encoder: Encoder
    training: Training
    client_state: MutableMapping[str, Tensor]  # what this client keeps to itself, from round to round


class Engine(Protocol):
    """Carries jobs out and updates back, and decides nothing."""

    def run(self, jobs: Iterable[Job]) -> Iterable[Update | Failure]: ...


def job_key(round: int, task: str) -> str:
    """What a client's job of a round is called; keys sort as jobs follow one another."""
    return f"{round:06d}-{task}"


def size(tensors: Tensors) -> int:
    """Bytes of all `tensors`."""
    return sum(tensor.nbytes for tensor in tensors.values())
