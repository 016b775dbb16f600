"""Settings from TOML files: trees of values, checked against pydantic models, with one sentence for what is wrong."""

import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from fedexperts.errors import BadValue, nearest

Tree = dict[str, Any]


class RenamedSetting(FutureWarning):
    """Someone used a setting's former name."""


Model = TypeVar("Model", bound=BaseModel)


def read_tree(path: Path, example: str, settings: Sequence[str] = ()) -> Tree:
    """What the file says, with each `a.b=c` of `settings` in its place.

    Raises:
        BadValue: no such file (an `example` of one is named), or no TOML.
    """
    try:
        tree = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadValue(f"{path} cannot be read ({error.strerror}); give the path of a run file, such as {example}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadValue(f"{path} is not TOML: {error}; mend that place") from None
    return with_settings(tree, settings)


def checked(model: type[Model], tree: Mapping[str, Any]) -> Model:
    """`tree` as a `model`.

    Raises:
        BadValue: an unknown key (names the nearest), or a value that is not allowed.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise BadValue(sentence(error, model)) from None


def with_settings(tree: Tree, settings: Sequence[str]) -> Tree:
    """`tree` with each `a.b=c` set; a value is TOML where it reads as TOML, else a string."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise BadValue(f"{setting!r} is not of the form a.b=c; write a setting, = and its value, such as training.lr=1e-3")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        tree = put(tree, key.strip().split("."), value)
    return tree


def with_new_names(tree: Tree, renamed: Mapping[str, str], *, warn: bool = False) -> Tree:
    """`tree` with each setting that has its former name (a key of `renamed`: old → new, full names) under its new one.

    Raises:
        BadValue: both names are there.
    """
    for old, new in renamed.items():
        *table, key = old.split(".")
        held: Any = tree
        for part in table:
            held = held.get(part) if isinstance(held, Mapping) else None
        if not isinstance(held, Mapping) or key not in held:
            continue
        last = new.rpartition(".")[2]
        if last in held:
            raise BadValue(f"{old} is the former name of {new}, and both are given; leave {old} out")
        if warn:
            warnings.warn(f"{old} is now called {new}; the former name still works", RenamedSetting, stacklevel=2)
        moved: Tree = {(last if name == key else name): value for name, value in held.items()}
        tree = put(tree, table, moved) if table else moved
    return tree


def put(tree: Tree, path: Sequence[str], value: object) -> Tree:
    """`tree` with `value` at `path`."""
    head, *rest = path
    below = tree.get(head, {})
    return {**tree, head: put(below if isinstance(below, dict) else {}, rest, value) if rest else value}


def sentence(error: ValidationError, root: type[BaseModel], prefix: tuple[str, ...] = ()) -> str:
    """The first thing wrong in the settings that `root` holds, in one sentence; an unknown one gets the nearest."""
    first = error.errors()[0]
    place = (*prefix, *(str(part) for part in first["loc"]))
    if first["type"] == "missing":
        return f"{'.'.join(place)} is missing; a run cannot do without it"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{'.'.join(place)} is not a setting{closest_setting(place, root)}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    said = first["msg"].removeprefix("Input ")[:1].lower() + first["msg"].removeprefix("Input ")[1:]
    return f"{'.'.join(place)} = {first['input']!r} {said}" if place else first["msg"]


def closest_setting(place: tuple[str, ...], root: type[BaseModel]) -> str:
    """`; did you mean a.b?`, from the keys beside the unknown one, then from all keys. In a list of tables: all keys there."""
    path = [part for part in place if not part.isdigit()]
    every = list(keys(root))
    beside = [key for key in every if key.rpartition(".")[0] == ".".join(path[:-1])]
    if len(path) < len(place):
        return f"; settings there are {', '.join(key.rpartition('.')[2] for key in beside)}"
    names = {key.rpartition(".")[2]: key for key in [*every, *beside]}
    initials = {"".join(word[:1] for word in place[-1].split("_")): place[-1]}
    for name in names:
        if name in initials or "".join(word[:1] for word in name.split("_")) == place[-1]:
            return f"; did you mean {names[name]}?"
    near = nearest(place[-1], [key.rpartition(".")[2] for key in beside]) or nearest(place[-1], names)
    found = near.removeprefix("; did you mean ").removesuffix("?")
    if found:
        return f"; did you mean {names[found]}?"
    return f"; settings there are {', '.join(beside)}" if beside else ""


def keys(model: type, prefix: str = "") -> Iterator[str]:
    """All settings of `model`, a pydantic model or a dataclass, by their full names."""
    types = {name: each.annotation for name, each in model.model_fields.items()} if issubclass(model, BaseModel) else {}
    types |= {each.name: each.type for each in fields(model)} if is_dataclass(model) else {}
    for name, annotation in types.items():
        yield f"{prefix}{name}"
        inner = get_args(annotation)[0] if get_origin(annotation) in (tuple, Annotated) else annotation
        if isinstance(inner, type) and (issubclass(inner, BaseModel) or is_dataclass(inner)):
            yield from keys(inner, f"{prefix}{name}.")


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
