"""The methods of a comparison: which they are, what each changes, and what each trains."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import quote

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue, nearest, shortened
from fedexperts.methods import FORMER_NAMES, METHODS, enter_installed
from fedexperts.moe.tuning import PARTS
from fedexperts.types import Training

SAME = ("data", "devices", "evaluation", "seed")  # settings that all methods of a comparison share
LONGEST = 200  # characters of a folder's name; file systems allow 255 bytes
READABLE = 40  # characters of a label; that of a longer variant without a name leaves out the tables of its settings


@dataclass(frozen=True)
class Variant:
    """A method of a comparison: its label, and the settings that it changes.

    table: the `[methods.NAME]` of the run file with its settings, if NAME is not the method's. former: the label that older
    versions gave it, whose folders are continued.
    """

    label: str
    method: str
    changes: tuple[str, ...] = ()  # each a.b=c
    table: str | None = None
    former: str | None = None

    @property
    def folder(self) -> str:
        """The label as a folder name, unique for each label."""
        return as_folder(self.label)

    def of(self, config: RunConfig) -> RunConfig:
        """`config` with this method; the run file's settings of the same method are preserved.

        Raises:
            BadValue: an unknown key, a value that is not allowed, or no such table in the run file.
        """
        if self.table is not None and self.table not in config.methods:
            raise BadValue(f"a run file has no [methods.{self.table}], which another one has; add it, or leave {self.label} out")
        return config.for_method(self.table or self.method, self.changes)


def named(settings: Mapping[str, RunConfig]) -> dict[str, str]:
    """The name of each table of `[methods]` in the run files → the method that it is about."""
    tables = [(name, table) for config in settings.values() for name, table in config.methods.items()]
    return {name: str(table.get("name", name)) for name, table in tables}


def read_variants(text: str, tables: Mapping[str, str] | None = None) -> list[Variant]:
    """The variants in a comma-separated list, without repeats.

    A variant is `method`, `method:key=value:key=value` or, with a name for tables and folders, `name=method:…`. A key without a
    dot is a setting of the method; a key with a dot is a setting of `model`, `training` or `federation`. Commas and colons in
    brackets or quotes do not separate. tables: name → method of the run files' `[methods.NAME]`; a name stands for a method.

    Raises:
        BadValue: no method, an unknown method, two variants of one name, or a setting that all methods of a comparison share.
    """
    enter_installed()
    variants: dict[str, Variant] = {}
    for each in pieces(text, ","):
        if each.strip():
            variant = read_variant(each.strip(), tables or {})
            if variants.setdefault(variant.label, variant) != variant:
                raise BadValue(f"two methods are called {variant.label}, and reports tell them apart by these names; rename one")
    if not variants:
        raise BadValue(f"no method was named to compare; name some of {', '.join(METHODS)}")
    return list(variants.values())


def read_variant(text: str, tables: Mapping[str, str]) -> Variant:
    """The variant that `text` describes; see `read_variants`."""
    head, *settings = pieces(text, ":")
    name, equals, method = (part.strip() for part in head.rpartition("="))
    table = method if method in tables and method not in METHODS else None
    method = tables.get(method, FORMER_NAMES.get(method, method))
    if method not in METHODS:
        known = (*METHODS, *tables)
        raise BadValue(f"{method!r} is not one of {', '.join(known)}{nearest(method, known)}")
    if equals and not re.match(r"\w", name):
        raise BadValue(f"{text} calls its method {name!r}; a name begins with a letter or a digit")
    for setting in settings:
        if setting.partition("=")[0].partition(".")[0].strip() in SAME:
            raise BadValue(
                f"{text} sets {setting.strip()}, but the methods of a comparison share data, devices, evaluation and seeds; "
                "set it for all with --set, or give another run file, as a setting of its own"
            )
    keyed = tuple(setting if "." in setting.partition("=")[0] else f"method.{setting}" for setting in settings)
    label = name if equals else text
    if not equals and len(text) > READABLE:
        return Variant(short_label(head, keyed, text), method, keyed, table, text if len(as_folder(text)) <= LONGEST else None)
    if len(as_folder(label)) > LONGEST:
        raise BadValue(f"{shortened(text)} is too long for the name of a folder; give it a short one: name=METHOD:…")
    return Variant(label, method, keyed, table)


def short_label(head: str, settings: Sequence[str], text: str) -> str:
    """`flex:train=lora:parts=attention`; if that is longer than READABLE, its beginning and a hash of `text`."""
    pairs = (setting.partition("=") for setting in settings)
    short = ":".join(
        [head, *(key.strip().rpartition(".")[2] + "=" + re.sub(r"[\[\]\"' ]", "", value) for key, _, value in pairs)]
    )
    if len(short) <= READABLE:
        return short
    return f"{short[: READABLE - 7]} {sha256(text.encode()).hexdigest()[:6]}"


def as_folder(name: str) -> str:
    """`name` as a folder name, unique for each name."""
    return quote(name, safe="=+ :").replace(":", ",")


def pieces(text: str, separator: str) -> list[str]:
    """`text` split at each `separator` outside brackets and quotes."""
    parts, depth, quoted = [""], 0, ""
    for letter in text:
        if letter in "\"'":
            quoted = letter if not quoted else "" if quoted == letter else quoted
        depth += 0 if quoted else (letter in "[{") - (letter in "]}")
        if letter == separator and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def trains(training: Training) -> str:
    """What a client trains, in words."""
    parts = ", ".join(part for part in training.trained if training.train == "full" or part != "router")
    if training.train == "full":
        return "the whole model" if {*training.trained} == {*PARTS} else f"all weights of {parts}"
    router = "all weights of the router" if "router" in training.trained else ""
    return " and ".join(filter(None, [f"adapters of rank {training.rank} on {parts}" if parts else "", router]))


def training_notes(settings: Mapping[str, RunConfig], variants: Sequence[Variant]) -> Iterator[str]:
    """A line for each method of each setting that says what it trains; and a warning where methods train different parts."""
    for setting, config in settings.items():
        prefix = f"{setting}: " if len(settings) > 1 else ""
        chosen = {variant: variant.of(config).training for variant in variants}
        for variant, training in chosen.items():
            asked, given = trains(config.training), trains(training)
            why = "as the run file says" if given == asked else f"as its method or settings need; the run file says {asked}"
            yield f"{prefix}{variant.label} trains {given} ({why})"
        groups: dict[tuple[str, tuple[str, ...]], list[Variant]] = {}
        for variant, training in chosen.items():
            groups.setdefault((training.train, training.trained), []).append(variant)
        if len(groups) > 1:
            told = "; ".join(
                f"{', '.join(each.label for each in group)}: {trains(chosen[group[0]])}" for group in groups.values()
            )
            yield f"{prefix}warning: the compared methods train different parts ({told}){alike(chosen)}"


def alike(chosen: Mapping[Variant, Training]) -> str:
    """`; to compare … on equal terms, add '…'`: a variant of one method that trains as another one does, if there is one."""
    kinds = {(variant.method, training.train, training.trained) for variant, training in chosen.items()}
    for variant in reversed([*chosen]):
        for other, theirs in chosen.items():
            wanted = (theirs.train, theirs.trained)
            if (variant.method, *wanted) in kinds or {variant.table, other.table} != {None} or variant.changes or other.changes:
                continue
            if METHODS[variant.method]().declare().training(theirs) == theirs:
                parts = "[" + ",".join(f'"{part}"' for part in theirs.trained) + "]"
                added = f"{variant.method}:training.train={theirs.train}:training.parts={parts}"
                return f"; to compare {variant.label} with {other.label} on equal terms, add '{added}' to the methods"
    return ""
