"""A run as nested frozen models, read from one TOML file; every default lives here or in a method's fields."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from fedexperts.core.devices import UTILISATION, Profile, profiles
from fedexperts.data.settings import DataSettings, Sources
from fedexperts.errors import BadValue, nearest
from fedexperts.io.toml import Tree, checked, read_tree, sentence, with_new_names, without_none
from fedexperts.methods import FORMER_NAMES, METHODS, enter_installed
from fedexperts.methods.contract import Method
from fedexperts.methods.server_optimizers import SERVER_OPTIMIZERS, WithServerOptimizer
from fedexperts.types import Training

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


def possible(training: Training) -> Training:
    """`training`, where a model can be trained so.

    Raises:
        BadValue: parts or adapters that do not go together, or a cosine that rises.
    """
    training.check()
    if training.schedule == "cosine" and training.final_lr > training.lr:
        raise BadValue(
            f"training.final_lr = {training.final_lr:g} is above training.lr = {training.lr:g}, but the cosine falls from lr to "
            "final_lr; lower it"
        )
    return training


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
    training: Annotated[Training, AfterValidator(possible)] = Training()
    federation: FederationSettings = FederationSettings()
    data: DataSettings
    devices: DeviceSettings = DeviceSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    track: TrackSettings = TrackSettings()

    @model_validator(mode="before")
    @classmethod
    def former_names(cls, tree: Any) -> Any:
        """Accepts the former names of settings and methods."""
        return with_current_names(tree) if isinstance(tree, dict) else tree

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


def with_current_names(tree: Tree) -> Tree:
    """`tree`, the settings of a run, with the names that settings and methods have now.

    Raises:
        BadValue: a setting under both of its names.
    """
    method = tree.get("method")
    if isinstance(method, dict) and method.get("name") in FORMER_NAMES:
        tree = {**tree, "method": {**method, "name": FORMER_NAMES[method["name"]]}}
    return with_new_names(tree, RENAMED)


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
