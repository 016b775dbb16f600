"""The settings of a run as nested frozen models, read from one TOML file; defaults are defined here or in a method's fields."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from fedexperts.core.devices import UTILIZATION, Profile, profiles
from fedexperts.data.settings import DataSettings, Sources
from fedexperts.errors import BadValue, listed, nearest, quoted, shortened
from fedexperts.io.toml import Tree, checked, read_tree, sentence, with_new_names, with_settings, without, without_none
from fedexperts.methods import FORMER_FIELDS, FORMER_NAMES, METHODS, enter_installed
from fedexperts.methods.contract import Method, as_the_run_says
from fedexperts.methods.robust import RobustMerging, WithRobustMerging
from fedexperts.methods.server_optimizers import SERVER_OPTIMIZERS, WithServerOptimizer
from fedexperts.models.files import BUNDLED
from fedexperts.types import Training, WireDtype

Kind = TypeVar("Kind")
RENAMED = {
    "training.balance": "training.router_aux_loss_coef",
    "training.clip": "training.max_grad_norm",
    "devices.utilisation": "devices.utilization",
}
"""Former name of a setting → its name now."""

METHOD, OPTIMIZER = "method", "federation.server_optimizer"
OWN_METHOD = "; for one of your own, install its package (docs/extending.md)"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(Settings):
    """The base model. `name`: "tiny", "small", a folder, or a name on the hub.

    dtype: of the weights that are not trained; "auto": as stored (the bundled bases: float32). Trained weights are float32.
    revision: branch, tag or commit on the hub. attention, experts: implementations of transformers, such as "eager" or
    "flash_attention_2" and "grouped_mm" or "sonicmoe"; None: the best that always runs. quantize: "nf4": experts and dense linear
    layers are stored in 4 bits. adapter: a folder with an adapter of peft, from which the run's adapters start.
    """

    name: str = "tiny"
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    attention: str | None = None
    experts: str | None = None
    quantize: Literal["nf4"] | None = None
    adapter: str | None = None

    @model_validator(mode="after")
    def bundled_dtype(self) -> Self:
        """Writes down which dtype "auto" is for a bundled base, so that results say it."""
        if self.name in BUNDLED and self.dtype == "auto":
            object.__setattr__(self, "dtype", "float32")
        return self


def consistent(training: Training) -> Training:
    """`training`, if its settings are consistent.

    Raises:
        BadValue: parts and adapters that cannot be combined, or a schedule that rises.
    """
    training.check()
    if training.schedule != "constant" and training.final_lr > training.lr:
        raise BadValue(
            f"training.final_lr = {training.final_lr:g} is above training.lr = {training.lr:g}, but the {training.schedule} "
            "falls from lr to final_lr; lower it"
        )
    return training


class StopSettings(Settings):
    """When a run ends before its last round, by its score on the clients' validation examples at each evaluation."""

    patience: int | None = Field(None, ge=1)  # evaluations in a row without a better score
    min_delta: float = Field(0.0, ge=0)  # by which a better score must be better
    target: float | None = None  # score that is enough

    @property
    def given(self) -> bool:
        """Whether a run may stop early."""
        return self.patience is not None or self.target is not None


class FederationSettings(Settings):
    rounds: int = Field(10, ge=1, le=999_999)  # six digits, in the order of which checkpoints and client states are sorted
    clients_per_round: int | None = Field(None, ge=1)  # None: all
    sampling: Literal["random", "by task"] = "random"  # by task: clients of different tasks, as far as possible
    engine: Literal["local", "flower"] = "local"
    workers: int = Field(1, ge=1)
    gpus_per_worker: float = Field(0.0, ge=0)  # assigned to each worker of Flower's simulation; 0.25: four workers share a GPU
    min_clients: int = Field(1, ge=0)  # fewer answers stop the run; 0: a round without answers leaves the server unchanged
    round_seconds: float | None = Field(None, gt=0)  # wall-clock limit of a client's answer
    wire_dtype: WireDtype = "float32"  # that weights travel in (engines.wire)
    stop: StopSettings = StopSettings()
    server_optimizer: Tree | None = None  # its name and fields; None: the merged weights are used as they are
    robust: RobustMerging | None = None  # a rule that limits what single clients can do to a merge; None: the method's mean
    undo: float | None = Field(None, gt=1)  # a round is undone if the clients' validation loss grows by more than this factor

    @field_validator("server_optimizer", "robust", mode="before")
    @classmethod
    def from_name(cls, value: object) -> object:
        """A name alone stands for the optimizer, or the rule, with its defaults; "none" for none."""
        settings = {"name": value} if isinstance(value, str) else value
        return None if isinstance(settings, dict) and settings.get("name") == "none" else settings

    @model_validator(mode="after")
    def only_with_flower(self) -> Self:
        """Refuses a setting of the engine flower if another engine is selected."""
        if self.gpus_per_worker and self.engine != "flower":
            given = f"federation.gpus_per_worker = {self.gpus_per_worker:g}"
            raise BadValue(f'{given} needs federation.engine = "flower"; set that, or leave it out')
        return self

    @model_validator(mode="after")
    def enough_clients_per_round(self) -> Self:
        if self.clients_per_round is not None and self.min_clients > self.clients_per_round:
            raise BadValue(
                f"federation.min_clients = {self.min_clients} is larger than federation.clients_per_round = "
                f"{self.clients_per_round}; lower min_clients or raise clients_per_round"
            )
        return self


class DeviceSettings(Settings):
    """The clients' devices.

    `profile`: compute speed, bandwidth and memory (forms in `devices.profiles`); it gives the run a virtual clock. `memory_gb` or
    `memory_share`: their memory in gigabytes, or as a share of what training the full model takes, in place of the profile's: a
    number, a list with one per client, or { uniform = [low, high] }.
    """

    profile: Any = None
    utilization: float = Field(UTILIZATION, gt=0, le=1)  # share of a preset's peak FLOP/s that training sustains
    memory_gb: Any = None
    memory_share: Any = None
    deadline_seconds: float | None = Field(None, gt=0)  # virtual seconds per round; clients that would answer later are left out
    out_of_memory: Literal["fail", "train anyway"] = "fail"  # a job whose measured peak exceeds the memory

    def profiles(self, clients: Sequence[str], seed: str) -> dict[str, Profile]:
        """Client → its device; empty without `profile`."""
        return profiles(self.profile, clients, seed, self.utilization)

    @model_validator(mode="after")
    def deadline_needs_a_clock(self) -> Self:
        if self.deadline_seconds is not None and self.profile is None:
            raise BadValue(
                "devices.deadline_seconds needs a clock; give devices.profile too, such as a preset: jetson_agx_xavier"
            )
        return self


EVERY = 1_000_000
"""More answers than a client has examples."""


class EvaluationSettings(Settings):
    """When and on what models are scored.

    `score`: "after_aggregation" scores each client's model from the server's new weights and the client state;
    "before_aggregation" scores it right after local training, with the weights that it is about to send (as the public code of
    FLEx does). `retained`: sources as in `data.sources`, on whose test examples (at most `limit` of each) the base model is
    scored before the first round and every client's model after the last; no client trains on them.
    `perplexity`: whether answers that are judged by another metric are scored by their perplexity, too, which takes one more
    forward pass. `drift`: whether the routing of the clients' models is compared with the base model's after the last round.
    `clients`: number of clients that are evaluated, the same ones at each evaluation; None: all. `pooled`: whether clients whose
    model is the same are scored in passes over the examples of all of them; None: if a run has at least MANY_CLIENTS clients.
    `predictions`: how many answers of each client are kept at each evaluation, with their prompts and references, or "all".
    """

    every: int = Field(5, ge=1)  # rounds; the last round is always evaluated
    generate_tokens: int = Field(32, ge=1)
    batch_size: int = Field(32, ge=1)
    split: Literal["test", "validation"] = "test"  # validation: for tuning settings without the test examples
    score: Literal["after_aggregation", "before_aggregation"] = "after_aggregation"
    retained: Sources = ()
    perplexity: bool = True
    drift: bool = False
    clients: int | None = Field(None, ge=1)
    pooled: bool | None = None
    predictions: Annotated[int, Field(ge=0, le=EVERY, strict=True)] | Literal["all"] | None = (
        None  # None: see RunConfig.predictions
    )


class CheckpointSettings(Settings):
    """Which checkpoints of a run stay."""

    keep: int = Field(2, ge=1)  # the last ones; the one before is used if the last is damaged
    best: bool = False  # whether the one with the best score on validation examples stays, too


OWN_TABLES = ("training", "federation", "model")
"""Tables of a run file that `[methods.NAME]` may have of its own; its other keys are hyperparameters."""


class TrackSettings(Settings):
    """The tracker that receives the metrics of a run, in addition to the logs."""

    to: Literal["tensorboard", "mlflow", "wandb"] | None = None


class RunConfig(Settings):
    seed: int = 0
    model: ModelSettings = ModelSettings()
    method: Tree = Field({"name": "fedmoe"})
    methods: dict[str, Tree] = Field({})  # settings of one method, or of a named variant of it, in place of the run's
    training: Annotated[Training, AfterValidator(consistent)] = Training()
    federation: FederationSettings = FederationSettings()
    data: DataSettings
    devices: DeviceSettings = DeviceSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    track: TrackSettings = TrackSettings()

    @model_validator(mode="before")
    @classmethod
    def former_names(cls, tree: Any) -> Any:
        """Accepts the former names of settings and methods, which older results and run files have."""
        return with_current_names(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def method_can_be_built(self) -> Self:
        self.build_method()
        return self

    @model_validator(mode="after")
    def validation_is_scored_after_aggregation(self) -> Self:
        asked = {"federation.stop": self.federation.stop.given, "checkpoint.best": self.checkpoint.best}
        chooses = next((name for name, given in {**asked, "federation.undo": self.federation.undo}.items() if given), "")
        if chooses and self.evaluation.score == "before_aggregation":
            raise BadValue(
                f"{chooses} goes by the score of the aggregated weights on validation examples, but evaluation.score = "
                f'"before_aggregation" scores others; set evaluation.score = "after_aggregation", or leave {chooses} out'
            )
        return self

    @model_validator(mode="after")
    def own_data_are_scored_where_they_are(self) -> Self:
        if self.evaluation.pooled and self.data.own:
            raise BadValue(
                "evaluation.pooled = true scores the examples of several clients in one process, but with data.own = true no "
                "process has those of others; leave evaluation.pooled out"
            )
        return self

    @model_validator(mode="after")
    def quantized_weights_stay_frozen(self) -> Self:
        whole = [part for part in self.training.trained if part != "router" and self.training.train == "full"]
        if self.model.quantize and whole:
            raise BadValue(
                f'model.quantize = "{self.model.quantize}" keeps weights in 4 bits, but training.train = "full" trains '
                f'{whole[0]} whole; set training.train = "lora" (or training.parts = ["router"]), or leave quantize out'
            )
        return self

    @model_validator(mode="after")
    def own_settings_are_valid(self) -> Self:
        for name in self.methods:
            try:
                self.for_method(name)
            except BadValue as error:
                raise BadValue(f"[methods.{name}]: {error}") from None
        return self

    @property
    def predictions(self) -> int:
        """How many answers of each client are kept at each evaluation, by default 5; 0 if clients bring their own data."""
        match self.evaluation.predictions:
            case None:
                return 0 if self.data.own else 5
            case "all":
                return EVERY
            case number:
                return number

    def of_its_method(self) -> "RunConfig":
        """The settings of a run: those of `[methods.NAME]` for its method in place of the others, and no such tables."""
        name = str(self.method["name"])
        return self.with_own(name) if name in self.methods else self.model_copy(update={"methods": {}})

    def for_method(self, name: str, changes: Sequence[str] = ()) -> "RunConfig":
        """The settings of a comparison for `name`, a method or a table of `methods`: see `with_own`.

        If the method cannot train as these say, it trains as it declares, with its own settings and `changes` on top.

        Raises:
            BadValue: an unknown method or key, or a value that is not allowed.
        """
        kind = METHODS.get(str(self.methods.get(name, {}).get("name", name)))
        declared = as_the_run_says if kind is None else kind().declare().training
        training = declared(self.training)
        if training != self.training:
            with suppress(BadValue):
                given = self.with_own(name, changes)
                if declared(given.training) == given.training:
                    return given
        return self.model_copy(update={"training": training}).with_own(name, changes)

    def with_own(self, name: str, changes: Sequence[str] = ()) -> "RunConfig":
        """The settings with those of `[methods.name]`, then each a.b=c of `changes`, in place of the others.

        The hyperparameters of the run file are preserved if its method is the same. `name` in the table is the method's, if the
        table's own name is that of a variant.
        """
        own = dict(self.methods.get(name, {}))
        method = str(own.pop("name", name))
        tables = with_new_names({table: own.pop(table) for table in OWN_TABLES if table in own}, RENAMED)
        own = with_new_names({METHOD: own}, renamed(method))[METHOD]
        if shared := own.keys() & (RunConfig.model_fields.keys() - {METHOD, "methods"}):
            raise BadValue(
                f"{min(shared)} is the same for all methods of a run file; only {listed(OWN_TABLES)} can be set for one"
            )
        if wrong := [table for table, settings in tables.items() if not isinstance(settings, dict)]:
            raise BadValue(f"{wrong[0]} = {quoted(tables[wrong[0]])} should be a table, such as {wrong[0]} = {{ … }}")
        tree = self.model_dump(mode="json", exclude={"methods"}, exclude_none=True)
        own = {**(self.method if self.method["name"] == method else {"name": method}), **own}
        merged = {**tree, **{table: {**tree[table], **settings} for table, settings in tables.items()}, METHOD: own}
        return checked(RunConfig, with_settings(merged, [with_new_name(change, method) for change in changes]))

    def build_method(self) -> Method:
        """The method with its hyperparameters, wrapped in the server optimizer if there is one.

        Raises:
            BadValue: no such method or optimizer, a field that it does not have or allow, or an installed package whose methods
                cannot be imported.
        """
        enter_installed()
        method, optimizer, robust = built(METHODS, self.method, METHOD), self.federation.server_optimizer, self.federation.robust
        method = method if robust is None else WithRobustMerging(method, robust)
        return method if optimizer is None else WithServerOptimizer(method, built(SERVER_OPTIMIZERS, optimizer, OPTIMIZER))

    def resolved(self) -> Tree:
        """All settings as TOML types, including the defaults of the method and of the server optimizer."""
        tree = {**self.model_dump(mode="json", exclude={"methods"}), "method": with_defaults(METHODS, self.method, METHOD)}
        if (optimizer := self.federation.server_optimizer) is not None:
            tree["federation"]["server_optimizer"] = with_defaults(SERVER_OPTIMIZERS, optimizer, OPTIMIZER)
        resolved: Tree = without_none(tree)
        return resolved


def with_current_names(tree: Tree) -> Tree:
    """`tree`, the settings of a run, with the current names of settings and methods.

    Raises:
        BadValue: a setting under both of its names.
    """
    method = tree.get("method")
    if isinstance(method, dict) and isinstance(name := method.get("name"), str) and name in FORMER_NAMES:
        tree = {**tree, "method": {**method, "name": FORMER_NAMES[name]}}
    return with_new_names(tree, renamed_in(tree))


def with_new_name(change: str, method: str) -> str:
    """`a.b=c` with the current name of the setting if a.b is its former name, with `method`."""
    key, equals, value = change.partition("=")
    return f"{renamed(method).get(key.strip(), key)}{equals}{value}"


def renamed(method: object) -> dict[str, str]:
    """Former name of a setting → its name now, including those of the hyperparameters of `method`."""
    fields = FORMER_FIELDS.get(method, {}) if isinstance(method, str) else {}
    return {**RENAMED, **{f"{METHOD}.{old}": f"{METHOD}.{new}" for old, new in fields.items()}}


def renamed_in(tree: Tree) -> dict[str, str]:
    """`renamed` of the method that `tree` names, or of the default method."""
    method = tree.get("method", {})
    return renamed(method.get("name", "fedmoe") if isinstance(method, dict) else None)


def built(kinds: Mapping[str, type[Kind]], settings: Tree, table: str) -> Kind:
    """The entry of `kinds` that `settings["name"]` names, constructed from the other keys; `table` is used in errors.

    Raises:
        BadValue: no such name, or a field that it does not have or allow.
    """
    fields = dict(settings)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        hint = OWN_METHOD if table == METHOD else ""
        raise BadValue(f"{table}.name = {quoted(name)} is not one of {', '.join(kinds)}{nearest(str(name), kinds) or hint}")
    allowed = [field.name for field in dataclasses.fields(kinds[name])]  # type: ignore[arg-type]  # all are dataclasses
    for key in fields:
        if key not in allowed:
            key = shortened(key, 40)
            raise BadValue(
                f"{table}.{key} is not a setting of {name}, which has {', '.join(allowed) or 'none'}{nearest(key, allowed)}"
            )
    try:
        return TypeAdapter(kinds[name]).validate_python(fields)
    except ValidationError as error:
        raise BadValue(sentence(error, RunConfig, tuple(table.split(".")))) from None


def with_defaults(kinds: Mapping[str, type[Kind]], settings: Tree, table: str) -> Tree:
    """`settings` with all fields, including defaults."""
    return {"name": settings["name"], **dataclasses.asdict(built(kinds, settings, table))}  # type: ignore[call-overload]  # likewise


def read(path: Path, settings: Sequence[str] = ()) -> RunConfig:
    """The settings of the run in a run file, with those of its method; see `read_for_all`."""
    return read_for_all(path, settings).of_its_method()


def read_for_all(path: Path, settings: Sequence[str] = ()) -> RunConfig:
    """The settings in a run file, with the tables of `[methods]` for a comparison.

    Each `a.b=c` of `settings` replaces the value in the file, and in those tables. Files of data are found beside it.

    Raises:
        BadValue: no such file, no TOML, an unknown key (names the nearest), or a value that is not allowed.
    """
    config = from_tree(replaced_in_methods(read_tree(path, "the one that fedexperts init writes", settings), settings))
    data, evaluation = config.data, config.evaluation
    sources, retained = (tuple(source.beside(path) for source in some) for some in (data.sources, evaluation.retained))
    return config.model_copy(
        update={
            "data": data.model_copy(update={"sources": sources}),
            "evaluation": evaluation.model_copy(update={"retained": retained}),
        }
    )


def replaced_in_methods(tree: Tree, settings: Sequence[str]) -> Tree:
    """`tree` without the settings of `[methods]` that each a.b=c of `settings` replaces for all."""
    if not isinstance(methods := tree.get("methods"), dict):
        return tree
    paths = [setting.partition("=")[0].strip().removeprefix(f"{METHOD}.").split(".") for setting in settings]
    return {**tree, "methods": {name: reduce(without, paths, table) for name, table in methods.items()}}


def from_tree(tree: Tree) -> RunConfig:
    """The settings in the content of a run file; warns once about each former name.

    Raises:
        BadValue: an unknown key (names the nearest), or a value that is not allowed.
    """
    return checked(RunConfig, with_new_names(tree, renamed_in(tree), warn=True))
