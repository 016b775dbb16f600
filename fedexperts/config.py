"""A run as nested frozen models, read from one TOML file; every default lives here or in a method's fields."""

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fedexperts.data.settings import DataSettings
from fedexperts.errors import BadValue, nearest
from fedexperts.methods import METHODS
from fedexperts.moe.tuning import Part, Tuning
from fedexperts.types import Method, Training

Tree = dict[str, Any]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(Settings):
    """The base model. `name`: "tiny", a folder, or a name on the hub."""

    name: str = "tiny"
    trust_remote_code: bool = False


class TrainingSettings(Settings):
    """How every client trains, whatever the method."""

    train: Literal["full", "lora"] = "full"
    parts: tuple[Part, ...] | None = None  # None: all that `train` reaches
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    attention_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # that get LoRA
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(8, ge=1)
    local_steps: int = Field(20, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0)  # largest norm of the gradient; 0: no clipping
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    balance: float = Field(0.01, ge=0)  # weight of the load-balance loss
    validation_examples: int = Field(64, ge=1)
    threads: int = Field(1, ge=1)  # of each worker; the bits of a result depend on it

    def build(self) -> Training:
        tuning = {"train", "parts", "rank", "alpha", "attention_modules"}
        return Training(tuning=Tuning(**self.model_dump(include=tuning)), **self.model_dump(exclude=tuning))

    @model_validator(mode="after")
    def tuning_is_possible(self) -> Self:
        self.build().tuning.check()
        return self


class FederationSettings(Settings):
    rounds: int = Field(10, ge=1)
    clients_per_round: int | None = Field(None, ge=1)  # None: all
    sampling: Literal["random", "by task"] = "random"  # by task: of different tasks, as far as there are
    engine: Literal["local"] = "local"
    workers: int = Field(1, ge=1)


class DeviceSettings(Settings):
    """The clients' memory, in gigabytes or in shares of the full model's need: a number, a list, or { uniform = [low, high] }."""

    memory_gb: Any = None
    memory_share: Any = None


class EvaluationSettings(Settings):
    every: int = Field(5, ge=1)  # rounds; after the last one always
    generate_tokens: int = Field(32, ge=1)
    batch_size: int = Field(32, ge=1)


class RunConfig(Settings):
    seed: int = 0
    model: ModelSettings = ModelSettings()
    method: Tree = Field({"name": "fedmoe"})
    training: TrainingSettings = TrainingSettings()
    federation: FederationSettings = FederationSettings()
    data: DataSettings
    devices: DeviceSettings = DeviceSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def method_can_be_built(self) -> Self:
        self.build_method()
        return self

    def build_method(self) -> Method:
        """The method with its hyperparameters.

        Raises:
            BadValue: no such method, or a field that it does not have or allow.
        """
        fields = dict(self.method)
        name = fields.pop("name", None)
        if not isinstance(name, str) or name not in METHODS:
            raise BadValue(f"method.name = {name!r} is not one of {', '.join(METHODS)}{nearest(str(name), METHODS)}")
        allowed = [field.name for field in dataclasses.fields(METHODS[name])]  # type: ignore[arg-type]  # all are dataclasses
        for key in fields:
            if key not in allowed:
                raise BadValue(
                    f"method.{key} is not a setting of {name}, which has {', '.join(allowed) or 'none'}{nearest(key, allowed)}"
                )
        try:
            return TypeAdapter(METHODS[name]).validate_python(fields)
        except ValidationError as error:
            raise BadValue(sentence(error, ("method",))) from None

    def resolved(self) -> Tree:
        """All settings, defaults included, the method's too; as TOML can hold them."""
        method = {"name": self.method["name"], **dataclasses.asdict(self.build_method())}  # type: ignore[call-overload]  # likewise
        resolved: Tree = without_none({**self.model_dump(mode="json"), "method": method})
        return resolved


def read(path: Path, settings: Sequence[str] = ()) -> RunConfig:
    """The run of the file, with each `a.b=c` of `settings` in place of what the file says.

    Raises:
        BadValue: no such file, no TOML, an unknown key (names the nearest), or a value that is not allowed.
    """
    try:
        tree = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadValue(
            f"{path} cannot be read ({error.strerror}); give the path of a run file, such as runs/quickstart.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadValue(f"{path} is not TOML: {error}") from None
    return build(with_settings(tree, settings))


def build(tree: Mapping[str, Any]) -> RunConfig:
    """The run that `tree` describes.

    Raises:
        BadValue: as `read`.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise BadValue(sentence(error)) from None


def with_settings(tree: Tree, settings: Sequence[str]) -> Tree:
    """`tree` with each `a.b=c` set; a value is TOML where it reads as TOML, else a string."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise BadValue(f"--set {setting} is not of the form a.b=c")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        tree = put(tree, key.strip().split("."), value)
    return tree


def put(tree: Tree, path: Sequence[str], value: object) -> Tree:
    """`tree` with `value` at `path`."""
    head, *rest = path
    below = tree.get(head, {})
    return {**tree, head: put(below if isinstance(below, dict) else {}, rest, value) if rest else value}


def sentence(error: ValidationError, prefix: tuple[str, ...] = ()) -> str:
    """The first thing wrong, in one sentence."""
    first = error.errors()[0]
    place = (*prefix, *(str(part) for part in first["loc"]))
    if first["type"] == "missing":
        return f"{'.'.join(place)} is missing; a run cannot do without it"
    if first["type"] == "extra_forbidden":
        return f"{'.'.join(place)} is not a setting{closest_setting(place)}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    said = first["msg"].removeprefix("Input ")[:1].lower() + first["msg"].removeprefix("Input ")[1:]
    return f"{'.'.join(place)} = {first['input']!r} {said}" if place else first["msg"]


def closest_setting(place: tuple[str, ...]) -> str:
    """`; did you mean a.b?`, from the keys beside the unknown one, then from all keys."""
    every = list(keys(RunConfig))
    beside = [key for key in every if key.rpartition(".")[0] == ".".join(place[:-1])]
    names = {key.rpartition(".")[2]: key for key in [*every, *beside]}
    initials = {"".join(word[:1] for word in place[-1].split("_")): place[-1]}
    for name in names:
        if name in initials or "".join(word[:1] for word in name.split("_")) == place[-1]:
            return f"; did you mean {names[name]}?"
    near = nearest(place[-1], [key.rpartition(".")[2] for key in beside]) or nearest(place[-1], names)
    found = near.removeprefix("; did you mean ").removesuffix("?")
    return f"; did you mean {names[found]}?" if found else f"; settings there are {', '.join(beside)}" if beside else ""


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All settings of `model` by their full names."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")


def different(one: Tree, other: Tree) -> list[str]:
    """The full names of all settings in which two resolved runs differ."""
    flat_one, flat_other = flattened(one), flattened(other)
    return sorted(key for key in flat_one.keys() | flat_other.keys() if flat_one.get(key) != flat_other.get(key))


def flattened(tree: Tree, prefix: str = "") -> Tree:
    flat: Tree = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def without_none(value: Any) -> Any:
    match value:
        case dict():
            return {key: without_none(inner) for key, inner in value.items() if inner is not None}
        case list() | tuple():
            return [without_none(inner) for inner in value]
    return value


def to_toml(tree: Tree) -> str:
    return tomli_w.dumps(tree)
