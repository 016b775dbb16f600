"""Several runs side by side: run files × varied settings × methods × seeds, each in its folder, by one process or several."""

import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from fedexperts import config as configs
from fedexperts.config import RunConfig
from fedexperts.errors import BadRun, BadValue, Busy, FedExpertsError, nearest
from fedexperts.experiment.process_pool import Died, side_by_side
from fedexperts.experiment.progress import Progress, Shown
from fedexperts.experiment.runner import claim, require_same_inputs, run
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.io.toml import checked, with_settings
from fedexperts.methods import FORMER_NAMES, METHODS, enter_installed

REPORTS = ("report.html", "report.csv", "report.md")
DEEPEST = 4  # levels below a folder that a report looks for runs in
SAME = ("data", "devices", "evaluation", "seed")  # what no method of a comparison sets for itself
LONGEST = 200  # characters of a folder's name; file systems take 255 bytes
PARTS = Parts()
"""Of a process that does some of a comparison's runs."""


@dataclass(frozen=True)
class Variant:
    """A method of a comparison: what it is called, and what it sets in a run file."""

    label: str
    method: str
    changes: tuple[str, ...] = ()  # each a.b=c

    @property
    def folder(self) -> str:
        """The label as the name of a folder; no two labels have the same."""
        return as_folder(self.label)

    def of(self, config: RunConfig) -> RunConfig:
        """`config` with this method; what the run file says of the same method stays.

        Raises:
            BadValue: no such key, or a value that it does not take.
        """
        method = dict(config.method) if config.method["name"] == self.method else {"name": self.method}
        tree = config.model_dump(mode="json", exclude_none=True)
        changes = [with_new_name(change) for change in self.changes]
        return checked(RunConfig, with_settings({**tree, "method": method}, changes))


def with_new_name(change: str) -> str:
    """`a.b=c`, where a.b is the former name of a setting, under its new one."""
    key, equals, value = change.partition("=")
    return f"{configs.RENAMED.get(key.strip(), key)}{equals}{value}"


@dataclass(frozen=True)
class Planned:
    """A run of a comparison."""

    config: RunConfig
    setting: str
    label: str
    folder: Path
    together: Path  # of all runs of the comparison


@dataclass(frozen=True)
class Compared:
    """What became of a comparison: its runs, those that another process is at, and those that failed, with the reasons."""

    folders: tuple[Path, ...]  # in the order in which settings and methods were named
    left: tuple[Path, ...]
    failed: Mapping[Path, str]


@dataclass(frozen=True)
class Outcome:
    """What became of a run that was attempted."""

    left: bool = False  # to another process that is at it
    failed: str | None = None


def compare(
    settings: Mapping[str, RunConfig],
    variants: Sequence[Variant],
    seeds: int,
    out: Path,
    progress: Progress | None = None,
    jobs: int = 1,
) -> Compared:
    """Each variant in each setting with `seeds` seeds, from the run file's on, over the same data and clients.

    Runs are in `out`/<setting>/<variant>/seed-<seed>; with a single setting, in `out`/<variant>/seed-<seed>. Finished ones stay,
    stopped ones go on, those that another process has are left to it, and one that fails, however, does not keep the others from
    running. `jobs` processes are at them, each with a base of its own in memory; with one, this process is.

    Raises:
        FedExpertsError: before the first run starts, as every run is prepared once before.
        BadRun: `out` holds runs that no comparison of this form wrote.
    """
    require_room(out, len(settings))
    runs = [
        planned(config, setting, variant, config.seed + number, out, several=len(settings) > 1)
        for number in range(seeds)
        for setting, config in settings.items()
        for variant in variants
    ]
    parts = Parts()
    for each in runs:  # a client that has no part in the last method says so before the first one runs
        claim(each.config, each.folder, resume=True)
        require_same_inputs(prepare_run(each.config, each.label, parts=parts), each.folder)
    if jobs > 1:
        work = partial(attempt_elsewhere, shows=progress is not None and progress.shows)
        came = {
            each.folder: Outcome(failed=told) if isinstance(told, Died) else told for each, told in side_by_side(work, runs, jobs)
        }
    else:
        came = {each.folder: attempt(each, parts, progress) for each in runs}
    # Of what was left to others some is done meanwhile, or was stopped
    came |= {each.folder: attempt(each, parts, progress) for each in runs if came[each.folder].left}
    folders = tuple(each.folder for each in runs)
    failed = {folder: reason for folder in folders if (reason := came[folder].failed) is not None}
    return Compared(folders, tuple(folder for folder in folders if came[folder].left), failed)


def attempt(planned: Planned, parts: Parts, progress: Progress | None) -> Outcome:
    """Runs it, unless another process is at it. Whatever stops it, the other runs of the comparison are done all the same."""
    try:
        run(
            planned.config,
            planned.folder,
            resume=True,
            label=planned.label,
            setting=planned.setting,
            progress=progress,
            parts=parts,
            together=planned.together,
        )
    except Busy:
        return Outcome(left=True)
    except FedExpertsError as error:
        return Outcome(failed=str(error))
    except Exception as error:  # a defect, ours or of somebody's own method, which may lie in this run alone
        traceback.print_exc(file=sys.stderr)
        return Outcome(failed=f"{type(error).__name__}: {error}")
    return Outcome()


def attempt_elsewhere(planned: Planned, *, shows: bool) -> Outcome:
    """`attempt` in a process that does some of the runs: where any progress is shown, here it is the lines that stay."""
    return attempt(planned, PARTS, Shown(Console(force_terminal=False)) if shows else None)


def planned(config: RunConfig, setting: str, variant: Variant, seed: int, out: Path, *, several: bool) -> Planned:
    seeded = variant.of(config).model_copy(update={"seed": seed})
    parent = out / as_folder(setting) if several else out
    return Planned(seeded, setting, variant.label, parent / variant.folder / f"seed-{seed}", out)


def read_settings(run_files: Sequence[Path], changes: Sequence[str] = (), vary: Sequence[str] = ()) -> dict[str, RunConfig]:
    """The run files, each under its name without `.toml`, with `changes` (a.b=c) in all of them.

    Each of `vary` is a key and its values, a.b=c,d. Each run file is there with every combination of them, which its name then
    tells.

    Raises:
        BadValue: two of one name, or as `grid` and `config.read`.
    """
    names = [path.stem for path in run_files]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadValue(f"two run files are called {twice[0]}, and reports tell settings apart by these names; rename one")
    return {
        " ".join([path.stem, *chosen]): configs.read(path, [*changes, *chosen]) for path in run_files for chosen in grid(vary)
    }


def grid(vary: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations of a value (a.b=c) of each key; of no key one, which sets nothing.

    Raises:
        BadValue: no values, a key twice, or one that `--methods` or `--seeds` vary.
    """
    values: dict[str, list[str]] = {}
    for each in vary:
        key, _, text = (part.strip() for part in each.partition("="))
        given = [f"{key}={value.strip()}" for value in pieces(text, ",") if value.strip()]
        if not key or not given:
            raise BadValue(
                f"{each!r} is not of the form a.b=c,d; write a setting, = and its values, such as training.lr=1e-3,3e-3"
            )
        if key in values:
            raise BadValue(f"{key} is varied twice; give all its values at once: {key}=…,…")
        if key.partition(".")[0] in ("method", "seed"):
            instead = (
                "--seeds says how many" if key == "seed" else f"--methods takes variants: NAME:{key.partition('.')[2]}=…,NAME:…"
            )
            raise BadValue(f"{key} is not varied by --vary; {instead}")
        values[key] = list(dict.fromkeys(given))
    found = list(product(*values.values()))
    if long := [each for each in found if len(as_folder(" ".join(each))) > LONGEST]:
        raise BadValue(f"{' '.join(long[0])} is too long for the name of a folder; write a run file for each instead")
    return found


def read_variants(text: str) -> list[Variant]:
    """The methods that a comma-separated list names, each once.

    One is `method`, `method:key=value:key=value` or, with a name for tables and folders, `name=method:…`. A key without a dot
    is the method's own setting; one with a dot is a setting of the run file, of `model`, `training` or `federation`. Commas and
    colons in brackets or quotes divide nothing.

    Raises:
        BadValue: no method, one there is none of, two of one name, or a setting that all methods of a comparison share.
    """
    enter_installed()
    found: dict[str, Variant] = {}
    for each in pieces(text, ","):
        if each.strip():
            variant = read_variant(each.strip())
            if found.setdefault(variant.label, variant) != variant:
                raise BadValue(f"two methods are called {variant.label}, and reports tell them apart by these names; rename one")
    if not found:
        raise BadValue(f"no method was named to compare; name some of {', '.join(METHODS)}")
    return list(found.values())


def read_variant(text: str) -> Variant:
    """One of `read_variants`."""
    head, *settings = pieces(text, ":")
    name, equals, method = (part.strip() for part in head.rpartition("="))
    method = FORMER_NAMES.get(method, method)
    if method not in METHODS:
        raise BadValue(f"{method!r} is not one of {', '.join(METHODS)}{nearest(method, METHODS)}")
    if equals and not re.match(r"\w", name):
        raise BadValue(f"{text} calls its method {name!r}; a name begins with a letter or a digit")
    for setting in settings:
        if setting.partition("=")[0].partition(".")[0].strip() in SAME:
            raise BadValue(
                f"{text} sets {setting.strip()}, but the methods of a comparison share data, devices, evaluation and seeds; "
                "set it for all with --set, or give another run file, as a setting of its own"
            )
    keyed = (setting if "." in setting.partition("=")[0] else f"method.{setting}" for setting in settings)
    variant = Variant(name if equals else text, method, tuple(keyed))
    if len(variant.folder) > LONGEST:
        raise BadValue(f"{text} is too long for the name of a folder; give it a short one: name={text}")
    return variant


def as_folder(name: str) -> str:
    """`name` as that of a folder; no two have the same."""
    return quote(name, safe="=+ :").replace(":", ",")


def pieces(text: str, separator: str) -> list[str]:
    """`text` divided at each `separator` that stands in no bracket and no quote."""
    found, depth, quoted = [""], 0, ""
    for letter in text:
        if letter in "\"'":
            quoted = letter if not quoted else "" if quoted == letter else quoted
        depth += 0 if quoted else (letter in "[{") - (letter in "]}")
        if letter == separator and not depth and not quoted:
            found.append("")
        else:
            found[-1] += letter
    return found


def require_room(out: Path, settings: int) -> None:
    """Raises BadRun when `out` cannot take a comparison over so many run files; what holds no run may lie there too."""
    if out.exists() and not out.is_dir():
        raise BadRun(f"{out} is a file; give a folder with --out")
    if (out / "resolved.json").exists():
        raise BadRun(f"{out} holds a single run, so a comparison cannot be put there; give another folder with --out")
    kind, depth = ("over several run files", 3) if settings > 1 else ("over a single run file", 2)
    ours, *others = (runs_at(out, each) for each in (depth, *(each for each in range(1, DEEPEST + 1) if each != depth)))
    if other := next(filter(None, others), None):
        raise BadRun(f"{out} holds the run {other[0]}, which no comparison {kind} wrote; give another folder with --out")
    there = [name for name in REPORTS if (out / name).exists()]
    if there and not ours:
        raise BadRun(f"{out} holds {there[0]} and no run, and a comparison would write over it; give another folder with --out")


def runs_at(out: Path, depth: int) -> list[Path]:
    """The runs `depth` levels below `out`, relative to it."""
    found = out.glob("/".join([*["*"] * depth, "resolved.json"]))
    return sorted(path.parent.relative_to(out) for path in found)
