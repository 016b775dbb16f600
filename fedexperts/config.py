"""A run as nested frozen models, read from one TOML file; every default lives here or in a method's fields."""

import dataclasses
from collections.abc import Mapping, Sequence
from math import cos, pi
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from fedexperts.core.devices import UTILISATION, Profile, profiles
from fedexperts.data.settings import DataSettings, Sources
from fedexperts.errors import BadValue, nearest
from fedexperts.io.toml import Tree, checked, read_tree, sentence, with_new_names, without_none
from fedexperts.methods import METHODS, enter_installed
from fedexperts.methods.server_optimizers import SERVER_OPTIMIZERS, WithServerOptimizer
from fedexperts.moe.tuning import Part, Tuning
from fedexperts.types import Method, Training

Kind = TypeVar("Kind")
RENAMED = {"training.balance": "training.router_aux_loss_coef", "training.clip": "training.max_grad_norm"}
"""Former name of a setting → its name now."""

METHOD, OPTIMIZER = "method", "federation.server_optimizer"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(Settings):
    """The base model. `name`: "tiny", "small", a folder, or a name on the hub."""

    name: str = "tiny"
    trust_remote_code: bool = False


class TrainingSettings(Settings):
    """How every client trains, whatever the method; the defaults are those of `Training` and `Tuning`."""

    train: Literal["full", "lora"] = "full"
    parts: tuple[Part, ...] | None = None  # None: all that `train` reaches
    rank: int = Field(Tuning.rank, ge=1)
    alpha: float = Field(Tuning.alpha, gt=0)
    attention_modules: tuple[str, ...] = Tuning.attention_modules  # that get LoRA
    dropout: float = Field(Tuning.dropout, ge=0, lt=1)  # of what LoRA's adapters read while they are trained
    lr: float = Field(Training.lr, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate, over rounds; inside a round it is constant
    final_lr: float = Field(1e-6, gt=0)  # where the cosine ends
    batch_size: int = Field(Training.batch_size, ge=1)
    local_steps: int = Field(Training.local_steps, ge=1)
    optimizer: Literal["adamw", "sgd"] = Training.optimizer
    weight_decay: float = Field(Training.weight_decay, ge=0)
    max_grad_norm: float = Field(Training.max_grad_norm, ge=0)  # largest norm of the gradient; 0: no clipping
    label_smoothing: float = Field(Training.label_smoothing, ge=0, lt=1)
    router_aux_loss_coef: float = Field(Training.router_aux_loss_coef, ge=0)  # weight of the load-balance loss
    validation_examples: int = Field(Training.validation_examples, ge=1)
    threads: int = Field(Training.threads, ge=1)  # of each worker; the bits of a result depend on it

    def build(self) -> Training:
        tuning = {"train", "parts", "rank", "alpha", "attention_modules", "dropout"}
        of_the_run = {"schedule", "final_lr"}
        return Training(tuning=Tuning(**self.model_dump(include=tuning)), **self.model_dump(exclude=tuning | of_the_run))

    def lr_in(self, round: int, rounds: int) -> float:
        """The learning rate of a round: under "cosine" `lr` in the first one, and in stages before it; `final_lr` in the last."""
        if self.schedule == "constant" or round <= 1:
            return self.lr
        return self.final_lr + (self.lr - self.final_lr) * (1 + cos(pi * (round - 1) / (rounds - 1))) / 2

    @model_validator(mode="after")
    def tuning_is_possible(self) -> Self:
        self.build().tuning.check()
        return self

    @model_validator(mode="after")
    def cosine_falls(self) -> Self:
        if self.schedule == "cosine" and self.final_lr > self.lr:
            raise BadValue(
                f"training.final_lr = {self.final_lr:g} is above training.lr = {self.lr:g}, but the cosine falls from lr to it; "
                "lower it"
            )
        return self


class FederationSettings(Settings):
    rounds: int = Field(10, ge=1)
    clients_per_round: int | None = Field(None, ge=1)  # None: all
    sampling: Literal["random", "by task"] = "random"  # by task: of different tasks, as far as there are
    engine: Literal["local", "flower"] = "local"
    workers: int = Field(1, ge=1)
    gpus_per_worker: float = Field(0.0, ge=0)  # that Flower's simulation gives each worker; 0.25: four share one
    min_clients: int = Field(1, ge=0)  # a round that fewer answer stops the run; 0: one that nobody answers changes nothing
    round_seconds: float | None = Field(None, gt=0)  # of real time that a client has for its answer; needs the engine flower
    server_optimizer: Tree | None = None  # its name and its fields: what a round's merge is a step of; None: it is taken as it is

    @field_validator("server_optimizer", mode="before")
    @classmethod
    def may_be_a_name(cls, given: object) -> object:
        """A name alone has the defaults; "none" is none."""
        asked = {"name": given} if isinstance(given, str) else given
        return None if isinstance(asked, dict) and asked.get("name") == "none" else asked

    @model_validator(mode="after")
    def flowers_own(self) -> Self:
        """What only Flower's engine does is asked of no other."""
        for name, given in (("gpus_per_worker", self.gpus_per_worker), ("round_seconds", self.round_seconds)):
            if given and self.engine != "flower":
                raise BadValue(f'federation.{name} = {given:g} needs federation.engine = "flower"; set that, or leave it out')
        return self

    @model_validator(mode="after")
    def enough_are_asked(self) -> Self:
        if self.clients_per_round is not None and self.min_clients > self.clients_per_round:
            raise BadValue(
                f"federation.min_clients = {self.min_clients}, but a round asks federation.clients_per_round = "
                f"{self.clients_per_round}; lower the one or raise the other"
            )
        return self


class DeviceSettings(Settings):
    """The clients' devices.

    `profile`: how fast they are and what they hold (forms in `devices.profiles`); with it a run has a clock. `memory_gb` or
    `memory_share`: their memory, in gigabytes or in shares of the full model's need, whatever the profile says: a number, a
    list, or { uniform = [low, high] }.
    """

    profile: Any = None
    utilisation: float = Field(UTILISATION, gt=0, le=1)  # what training sustains of a preset's peak
    memory_gb: Any = None
    memory_share: Any = None
    deadline_seconds: float | None = Field(None, gt=0)  # of virtual time in a round; who would answer later is left out
    out_of_memory: Literal["fail", "train anyway"] = "fail"  # what becomes of a job whose measured peak is above the memory

    def profiles(self, clients: Sequence[str], seed: str) -> dict[str, Profile]:
        """The device of each client; none where there is no `profile`."""
        return profiles(self.profile, clients, seed, self.utilisation)

    @model_validator(mode="after")
    def deadline_has_a_clock(self) -> Self:
        if self.deadline_seconds is not None and self.profile is None:
            raise BadValue(
                "devices.deadline_seconds needs a clock; give devices.profile too, such as a preset: jetson_agx_xavier"
            )
        return self


class EvaluationSettings(Settings):
    """When and on what models are scored.

    `score`: "after_aggregation" scores each client with what the server sends it then and what it keeps to itself;
    "before_aggregation" right after its local training, with what it is about to send (the public code of FLEx does so).
    `retained`: sources as in `data.sources`, on whose test examples (at most `limit` of each) the untouched base is scored
    before the first round and every client's model after the last; nobody trains on them.
    `drift`: whether the routing of the clients' models is then held against the base's.
    """

    every: int = Field(5, ge=1)  # rounds; after the last one always
    generate_tokens: int = Field(32, ge=1)
    batch_size: int = Field(32, ge=1)
    split: Literal["test", "validation"] = "test"  # validation: to choose settings by, so that none is chosen on test examples
    score: Literal["after_aggregation", "before_aggregation"] = "after_aggregation"
    retained: Sources = ()
    drift: bool = False


class TrackSettings(Settings):
    """Where else the numbers of the logs go while a run is under way."""

    to: Literal["tensorboard", "mlflow", "wandb"] | None = None


class RunConfig(Settings):
    seed: int = 0
    model: ModelSettings = ModelSettings()
    method: Tree = Field({"name": "fedmoe"})
    training: TrainingSettings = TrainingSettings()
    federation: FederationSettings = FederationSettings()
    data: DataSettings
    devices: DeviceSettings = DeviceSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    track: TrackSettings = TrackSettings()

    @model_validator(mode="before")
    @classmethod
    def former_names(cls, tree: Any) -> Any:
        """Results of older versions and older run files call some settings and methods otherwise."""
        if not isinstance(tree, dict):
            return tree
        method = tree.get("method")
        if isinstance(method, dict) and method.get("name") == "centralised":
            tree = {**tree, "method": {**method, "name": "centralized"}}
        return with_new_names(tree, RENAMED)

    @model_validator(mode="after")
    def method_can_be_built(self) -> Self:
        self.build_method()
        return self

    def build_method(self) -> Method:
        """The method with its hyperparameters, and the server's optimiser around it where there is one.

        Raises:
            BadValue: no such method or optimiser, a field that it does not have or allow, or an installed package whose methods
                cannot be had.
        """
        enter_installed()
        method, optimizer = built(METHODS, self.method, METHOD), self.federation.server_optimizer
        return method if optimizer is None else WithServerOptimizer(method, built(SERVER_OPTIMIZERS, optimizer, OPTIMIZER))

    def resolved(self) -> Tree:
        """All settings, defaults included, the method's and the server optimiser's too; as TOML can hold them."""
        tree = {**self.model_dump(mode="json"), "method": spelled_out(METHODS, self.method, METHOD)}
        if (optimizer := self.federation.server_optimizer) is not None:
            tree["federation"]["server_optimizer"] = spelled_out(SERVER_OPTIMIZERS, optimizer, OPTIMIZER)
        resolved: Tree = without_none(tree)
        return resolved


def built(kinds: Mapping[str, type[Kind]], asked: Tree, place: str) -> Kind:
    """The one of `kinds` that the settings at `place`, `asked`, name, with the fields that they give it.

    Raises:
        BadValue: no such name, or a field that it does not have or allow.
    """
    fields = dict(asked)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        raise BadValue(f"{place}.name = {name!r} is not one of {', '.join(kinds)}{nearest(str(name), kinds)}")
    allowed = [field.name for field in dataclasses.fields(kinds[name])]  # type: ignore[arg-type]  # all are dataclasses
    for key in fields:
        if key not in allowed:
            raise BadValue(
                f"{place}.{key} is not a setting of {name}, which has {', '.join(allowed) or 'none'}{nearest(key, allowed)}"
            )
    try:
        return TypeAdapter(kinds[name]).validate_python(fields)
    except ValidationError as error:
        raise BadValue(sentence(error, RunConfig, tuple(place.split(".")))) from None


def spelled_out(kinds: Mapping[str, type[Kind]], asked: Tree, place: str) -> Tree:
    """`asked` with all fields, defaults included."""
    return {"name": asked["name"], **dataclasses.asdict(built(kinds, asked, place))}  # type: ignore[call-overload]  # likewise


def read(path: Path, settings: Sequence[str] = ()) -> RunConfig:
    """The run of the file, with each `a.b=c` of `settings` in place of what the file says.

    Raises:
        BadValue: no such file, no TOML, an unknown key (names the nearest), or a value that is not allowed.
    """
    return from_tree(read_tree(path, "runs/quickstart.toml", settings))


def from_tree(tree: Tree) -> RunConfig:
    """The run that a run file's content says; former names of settings are warned of, once each.

    Raises:
        BadValue: an unknown key (names the nearest), or a value that is not allowed.
    """
    return checked(RunConfig, with_new_names(tree, RENAMED, warn=True))
