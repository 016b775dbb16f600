"""Settings from TOML files: trees of values, validated by pydantic models; an error is reported as one sentence."""

import sys
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from fedexperts.errors import BadValue, listed, nearest, quoted, shortened

Tree = dict[str, Any]
DEEPEST = 20
"""Levels of tables and lists in a settings file."""


MOST_DOTS = 1000
"""In a line without text: Python's parser takes the square of the length of a key such as a.a.a."""


class RenamedSetting(FutureWarning):
    """A run file uses the former name of a setting."""


@contextmanager
def renamed_settings_as_notes() -> Iterator[None]:
    """Shows each warning about the former name of a setting once, as one line on stderr without the place in our code."""
    shown: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", RenamedSetting)
        show_other = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, RenamedSetting):
                show_other(message, category, filename, lineno, file, line)
            elif str(message) not in shown:
                shown.add(str(message))
                print(f"note: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield


Model = TypeVar("Model", bound=BaseModel)


def read_tree(path: Path, example: str, settings: Sequence[str] = ()) -> Tree:
    """The content of the file, with each `a.b=c` of `settings` applied to it.

    Raises:
        BadValue: the file cannot be read (the sentence names `example`, a valid one), or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(line.count(".") > MOST_DOTS and not {'"', "'"} & {*line} for line in text.splitlines()):
            raise RecursionError
        tree = tomllib.loads(text)
        require_shallow(tree, path)
    except RecursionError:
        raise BadValue(
            f"{path} nests tables or lists in each other without end; settings need {DEEPEST} levels at most"
        ) from None
    except OSError as error:
        raise BadValue(f"{path} cannot be read ({error.strerror}); give the path of a run file, such as {example}") from None
    except BadValue:
        raise
    except ValueError as error:  # TOML, text or a number that cannot be read
        raise BadValue(f"{path} is not TOML: {shortened(str(error))}; correct that place") from None
    return with_settings(tree, settings)


def require_shallow(tree: Any, path: Path, level: int = 0) -> None:
    """Raises BadValue if tables and lists in `tree` are nested deeper than any setting is."""
    if level > DEEPEST:
        raise BadValue(f"{path} nests tables or lists deeper than {DEEPEST} levels; no setting needs that, so remove them")
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        require_shallow(value, path, level + 1)


def checked(model: type[Model], tree: Mapping[str, Any]) -> Model:
    """`tree` as an instance of `model`.

    Raises:
        BadValue: an unknown key (the sentence names the nearest), or a value that is not allowed.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise BadValue(sentence(error, model)) from None


def with_settings(tree: Tree, settings: Sequence[str]) -> Tree:
    """`tree` with each `a.b=c` of `settings` applied; a value that is not valid TOML is taken as a string.

    Raises:
        BadValue: a setting that is not of this form.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise BadValue(
                f"{shortened(setting)!r} is not of the form a.b=c; write a setting, = and its value, such as training.lr=1e-3"
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        tree = put(tree, key.strip().split("."), value)
    return tree


def with_new_names(tree: Tree, renamed: Mapping[str, str], *, warn: bool = False) -> Tree:
    """`tree` with each former name of a setting (a key of `renamed`: old → new, full names) replaced by its new one.

    With `warn`, each replacement issues a `RenamedSetting` warning.

    Raises:
        BadValue: `tree` has a setting under both names.
    """
    for old, new in renamed.items():
        *table, key = old.split(".")
        settings: Any = tree
        for part in table:
            settings = settings.get(part) if isinstance(settings, Mapping) else None
        if not isinstance(settings, Mapping) or key not in settings:
            continue
        new_key = new.rpartition(".")[2]
        if new_key in settings:
            raise BadValue(f"{old} is the former name of {new}, and both are set; remove {old}")
        if warn:
            warnings.warn(f"{old} is now called {new}; the former name still works", RenamedSetting, stacklevel=2)
        renamed_table: Tree = {(new_key if name == key else name): value for name, value in settings.items()}
        tree = put(tree, table, renamed_table) if table else renamed_table
    return tree


def put(tree: Tree, path: Sequence[str], value: object) -> Tree:
    """A copy of `tree` with `value` at `path`; tables that are missing on the way are created."""
    head, *rest = path
    below = tree.get(head, {})
    return {**tree, head: put(below if isinstance(below, dict) else {}, rest, value) if rest else value}


def without(tree: Any, path: Sequence[str]) -> Any:
    """`tree` without the value at `path`, if it is there."""
    head, *rest = path
    if not isinstance(tree, dict) or head not in tree:
        return tree
    return {key: without(value, rest) if key == head else value for key, value in tree.items() if rest or key != head}


def sentence(error: ValidationError, root: type[BaseModel], prefix: tuple[str, ...] = ()) -> str:
    """The first mistake that `error` reports, as a sentence; `prefix` is the path of the validated settings within `root`."""
    first = error.errors()[0]
    place = (*prefix, *(shortened(str(part), 40) for part in first["loc"]))
    if first["type"] == "missing":
        return f"{'.'.join(place)} is missing; add it to the file"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{'.'.join(place)} is not a setting{closest_setting(place, root)}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "too_short":
        return f"{'.'.join(place)} is empty; give at least {first['ctx']['min_length']}"
    reason = first["msg"].removeprefix("Input ")
    return f"{'.'.join(place)} = {shortened(quoted(first['input']))} {reason[:1].lower()}{reason[1:]}" if place else first["msg"]


def closest_setting(place: tuple[str, ...], root: type[BaseModel]) -> str:
    """`; did you mean a.b?`: the key most like the unknown one at `place`, from its own table or else from all of `root`.

    In a list of tables, or if no key is similar, the keys that are allowed at `place`.
    """
    path = [part for part in place if not part.isdigit()]
    all_keys = list(keys(root))
    siblings = [key for key in all_keys if key.rpartition(".")[0] == ".".join(path[:-1])]
    if len(path) < len(place):
        return f"; settings there are {', '.join(key.rpartition('.')[2] for key in siblings)}"
    names, unknown = {key.rpartition(".")[2]: key for key in [*all_keys, *siblings]}, place[-1]
    if unknown in names:
        return f"; did you mean {names[unknown]}?"
    longer = [key for key in (*siblings, *all_keys) if len(unknown) > 3 and key.rpartition(".")[2].startswith(unknown)]
    if longer:
        return f"; did you mean {longer[0]}?"
    for name in names:
        if name == initials(unknown) or initials(name) == unknown:
            return f"; did you mean {names[name]}?"
    suggestion = nearest(unknown, [key.rpartition(".")[2] for key in siblings]) or nearest(unknown, names)
    name = suggestion.removeprefix("; did you mean ").removesuffix("?")
    if name:
        return f"; did you mean {names[name]}?"
    return f"; settings there are {listed(siblings)}" if siblings else ""


def initials(name: str) -> str:
    """`lr` of `learning_rate`."""
    return "".join(word[:1] for word in name.split("_"))


def keys(model: type, prefix: str = "") -> Iterator[str]:
    """All settings of `model`, a pydantic model or a dataclass, by their full names."""
    types: dict[str, Any] = {}
    if issubclass(model, BaseModel):
        types = {name: each.annotation for name, each in model.model_fields.items()}
    elif is_dataclass(model):
        types = {each.name: each.type for each in fields(model)}
    for name, annotation in types.items():
        yield f"{prefix}{name}"
        inner = get_args(annotation)[0] if get_origin(annotation) in (tuple, Annotated) else annotation
        if isinstance(inner, type) and (issubclass(inner, BaseModel) or is_dataclass(inner)):
            yield from keys(inner, f"{prefix}{name}.")


def different(one: Tree, other: Tree) -> list[str]:
    """The full names of all settings in which two resolved runs differ, sorted."""
    flat_one, flat_other = flattened(one), flattened(other)
    return sorted(key for key in flat_one.keys() | flat_other.keys() if flat_one.get(key) != flat_other.get(key))


def flattened(tree: Tree, prefix: str = "") -> Tree:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: Tree = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def without_none(value: Any) -> Any:
    """`value` without the keys of tables, at any depth, whose value is None, which TOML cannot express."""
    match value:
        case dict():
            return {key: without_none(inner) for key, inner in value.items() if inner is not None}
        case list() | tuple():
            return [without_none(inner) for inner in value]
    return value


def to_toml(tree: Tree) -> str:
    """`tree` as the text of a TOML file."""
    return tomli_w.dumps(tree)
