"""The values exchanged between server, engine and clients, and the client's context, which never leaves the client."""

import json
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from math import cos, pi, prod
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from fedexperts.moe.anatomy import Anatomy, Experts
from fedexperts.moe.device import Devices, validated_devices
from fedexperts.moe.footprint import Footprint
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
"""The keys of core.evaluation.METRICS, for modules that must not import it."""
WireDtype = Literal["float32", "bfloat16", "int8"]
"""What weights travel in (engines.wire)."""
BLOCK = 64
"""Elements of a row that share a scale in int8."""


@dataclass(frozen=True)
class Turn:
    """A message of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True)
class Example:
    """A prompt, its reference response, and the metric that scores an answer."""

    prompt: str
    response: str
    task: str  # results are reported by task
    metric: str = "exact_match"  # the task's main metric, one of METRIC_NAMES
    label: int | None = None  # the class, if there is one: used by Dirichlet partitions
    choices: tuple[str, ...] = ()  # the closed set of answers, if there is one
    # The conversation before the response, whose text is `prompt`, and the chat template that renders it, in Jinja (None: the
    # tokenizer's). They are no part of the repr, by which generated examples have always been hashed.
    turns: tuple[Turn, ...] = field(default=(), repr=False)
    template: str | None = field(default=None, repr=False)
    input: str = field(default="", repr=False, compare=False)  # the part of the prompt that it is about; "": the whole prompt


@dataclass(frozen=True)
class Split:
    """A client's examples in three disjoint splits."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]


@dataclass(frozen=True)
class Patch:
    """Rows of the server's tensors; a tensor that has no entry in `rows` is sent whole."""

    tensors: Tensors  # name → [rows, ...]
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # name → int64 [rows], ascending
    wire_dtype: WireDtype = "float32"  # that tensors of float32 travel in
    scales: Tensor | None = None  # while it travels in int8: float32 [blocks], in the order of `tensors`

    @property
    def nbytes(self) -> int:
        """Bytes that travel: all tensors, their scales and row ids; ids shared by several names are counted once."""
        ids = {id(ids): ids.nbytes for ids in self.rows.values()}
        scales = 0 if self.scales is None else self.scales.nbytes
        return sum(wire_bytes(tensor, self.wire_dtype) for tensor in self.tensors.values()) + scales + sum(ids.values())


@dataclass(frozen=True)
class Client:
    """What the server knows about a client."""

    name: str
    examples: int  # in its training split
    task: str = ""  # the task of most of its examples
    memory_bytes: int | None = None  # None: unlimited


@dataclass(frozen=True)
class Server:
    """The state of a federation between two rounds: replaced, never changed."""

    weights: Tensors  # all trained and shared weights, row-first
    layout: Mapping[str, str | None]  # name of a weight → the MoE block whose experts are its rows; None: a single row
    anatomy: Anatomy
    footprint: Footprint
    clients: Mapping[str, Client]
    seed: str = "0"
    method_state: Tensors = field(default_factory=dict)  # state of the method between rounds
    round: int = 0
    task: str = "start"  # of the current or last round: a setup task of the method, or "train"
    accepted: Mapping[str, str] = field(default_factory=dict)  # client → `job_key` of its last merged job
    wire_dtype: WireDtype = "float32"  # that weights travel in


@dataclass(frozen=True)
class Assignment:
    """What a client works with: its experts in each MoE block, and what the method sends besides."""

    experts: Experts
    names: frozenset[str] | None = None  # the weights that are sent; None: all
    extra: Tensors = field(default_factory=dict)
    patch: Patch | None = None  # sent in place of rows of the server's weights


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
    accepted: str = ""  # `job_key` of the client's last merged job: the client continues from its state after that job

    also: tuple[str, ...] = ()  # other clients that an evaluation scores with the same model
    most_bytes_up: int = 0  # limit of the answer's size; not sent to the client

    @property
    def key(self) -> str:
        return job_key(self.round, self.task)

    @property
    def nbytes(self) -> int:
        """Bytes sent to the client."""
        return self.patch.nbytes + size(self.extra)


@dataclass(frozen=True)
class Cost:
    """The cost of a client's job; measured, unless the name says estimated."""

    seconds: float = 0.0  # of the whole job, measured by the engine
    tokens: int = 0  # trained on, without padding
    peak_bytes: int = 0  # largest sum of tensors alive in a training step, weights included
    flops_estimated: float = 0.0  # of all matrix products of the job


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
        """Bytes sent to the server."""
        return self.patch.nbytes + size(self.extra) + len(json.dumps(dict(self.metrics)))


@dataclass(frozen=True)
class Failure:
    """A client without a usable answer, and the reason."""

    client: str
    round: int
    task: str
    reason: str
    bytes_up: int = 0  # of an answer that was received and refused


class Encoder(Protocol):
    """Examples as tensors (data.encode.Encoder)."""

    eos: int  # the id that ends a response
    ends: Collection[int]  # all ids that do: chat templates may have others
    max_tokens: int  # of an example

    def batch(self, examples: Sequence[Example]) -> Mapping[str, Tensor]: ...
    def packed(self, examples: Sequence[Example]) -> Mapping[str, Tensor]: ...
    def prompts(self, examples: Sequence[Example]) -> Mapping[str, Tensor]: ...
    def decode(self, ids: Tensor) -> list[str]: ...


@dataclass(frozen=True)
class Training(Tuning):
    """Which weights a client trains (`Tuning`) and how: the `[training]` table of a run file."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    lr: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["constant", "linear", "cosine", "cosine_annealing"] = "constant"  # of the learning rate over rounds
    final_lr: Annotated[float, Field(gt=0)] = 1e-6  # of the last round, with "cosine"; else of the one after it
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # of each job, in which the learning rate rises linearly
    batch_size: Annotated[int, Field(ge=1, le=100_000)] = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1  # batches of one optimizer step
    packing: bool = False  # several short examples of a batch in a row, whose attention is kept apart
    gradient_checkpointing: bool = False  # computes activations again in backward instead of storing them
    local_steps: Annotated[int, Field(ge=1)] = 20
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # largest norm of the gradient; 0: no clipping
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.01  # weight of the load-balance loss, c_lb of FedMoE
    validation_examples: Annotated[int, Field(ge=1)] = 64  # at most, in each round
    threads: Annotated[int, Field(ge=1)] = 1  # of each worker process; the bits of a result depend on it
    device: Annotated[Devices, BeforeValidator(validated_devices)] = "auto"  # that models compute on, or a list for the workers

    @property
    def tuning(self) -> Tuning:
        """Which weights are trained, without the optimizer settings."""
        return Tuning(**{each.name: getattr(self, each.name) for each in fields(Tuning)})

    def lr_factor(self, step: int) -> float:
        """The factor of the learning rate in an optimizer step of a job, counted from 0."""
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def lr_in(self, round: int, rounds: int) -> float:
        """The learning rate of a round, the same in all its steps; `lr` in setup tasks and the first round.

        "cosine" reaches `final_lr` in the last round, which hardly trains. "linear" and "cosine_annealing" go by (r - 1) / R, so
        that the last of R rounds still trains; the latter is torch's CosineAnnealingLR with T_max = R, and FLEx's public code.
        """
        if self.schedule == "constant" or round <= 1:
            return self.lr
        if self.schedule == "cosine":
            return self.final_lr + (self.lr - self.final_lr) * (1 + cos(pi * (round - 1) / (rounds - 1))) / 2
        done = (round - 1) / rounds
        return self.final_lr + (self.lr - self.final_lr) * (1 - done if self.schedule == "linear" else (1 + cos(pi * done)) / 2)


@dataclass(frozen=True)
class ClientContext:
    """A client's model, data and state; only its update leaves the client."""

    client: Client
    model: nn.Module  # the base model on the process's device, shared by all its clients and never modified
    data: Split
    encoder: Encoder
    training: Training
    client_state: MutableMapping[str, Tensor]  # kept by this client between rounds


class Engine(Protocol):
    """Carries jobs to clients and returns their answers; makes no decisions."""

    def run(self, jobs: Iterable[Job]) -> Iterable[Update | Failure]: ...


def job_key(round: int, task: str) -> str:
    """The key of a client's job; keys sort in the order of the jobs."""
    return f"{round:06d}-{task}"


def size(tensors: Tensors) -> int:
    """Bytes of all `tensors`."""
    return sum(tensor.nbytes for tensor in tensors.values())


def wire_bytes(tensor: Tensor, wire_dtype: WireDtype) -> int:
    """Bytes of a weight of a patch as it travels: of float32 those in `wire_dtype`, in int8 with 4 for each block's scale."""
    if wire_dtype == "float32" or tensor.dtype != torch.float32:
        return tensor.nbytes
    return 2 * tensor.numel() if wire_dtype == "bfloat16" else tensor.numel() + 4 * blocks_of(tensor)


def blocks_of(tensor: Tensor) -> int:
    """Blocks of BLOCK elements, or of the rest of a row, that `tensor` has in all its rows."""
    rows, elements = (len(tensor), prod(tensor.shape[1:])) if tensor.ndim else (1, 1)
    return rows * -(-elements // BLOCK)
