"""Comparisons: run files × varied settings × methods × seeds, each run in its own folder, in one or several processes."""

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
from fedexperts.experiment.process_pool import Died, in_parallel
from fedexperts.experiment.progress import Progress, Shown
from fedexperts.experiment.runner import claim, require_same_inputs, run
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.io.toml import checked, with_settings
from fedexperts.methods import FORMER_NAMES, METHODS, enter_installed

REPORTS = ("report.html", "report.csv", "report.md")
DEEPEST = 4  # levels of subfolders in which a report searches for runs
SAME = ("data", "devices", "evaluation", "seed")  # settings that all methods of a comparison share
LONGEST = 200  # characters of a folder's name; file systems allow 255 bytes
PARTS = Parts()
"""Cache of a process that executes runs of a comparison."""


@dataclass(frozen=True)
class Variant:
    """A method of a comparison: its label, and the settings that it changes."""

    label: str
    method: str
    changes: tuple[str, ...] = ()  # each a.b=c

    @property
    def folder(self) -> str:
        """The label as a folder name, unique for each label."""
        return as_folder(self.label)

    def of(self, config: RunConfig) -> RunConfig:
        """`config` with this method; the run file's settings of the same method are preserved.

        Raises:
            BadValue: an unknown key, or a value that is not allowed.
        """
        method = dict(config.method) if config.method["name"] == self.method else {"name": self.method}
        tree = config.model_dump(mode="json", exclude_none=True)
        changes = [with_new_name(change, self.method) for change in self.changes]
        return checked(RunConfig, with_settings({**tree, "method": method}, changes))


def with_new_name(change: str, method: str) -> str:
    """`a.b=c` with the current name of the setting if a.b is its former name, with `method`."""
    key, equals, value = change.partition("=")
    return f"{configs.renamed(method).get(key.strip(), key)}{equals}{value}"


@dataclass(frozen=True)
class Planned:
    """A run of a comparison."""

    config: RunConfig
    setting: str
    label: str
    folder: Path
    together: Path  # folder of the comparison


@dataclass(frozen=True)
class Compared:
    """Results of a comparison: its runs, those left to another process, and the reasons of those that failed."""

    folders: tuple[Path, ...]  # in the order in which settings and methods were named
    left: tuple[Path, ...]
    failed: Mapping[Path, str]


@dataclass(frozen=True)
class Outcome:
    """Result of an attempt to execute a run."""

    left: bool = False  # another process is executing it
    failed: str | None = None


def compare(
    settings: Mapping[str, RunConfig],
    variants: Sequence[Variant],
    seeds: int,
    out: Path,
    progress: Progress | None = None,
    jobs: int = 1,
) -> Compared:
    """Runs each variant in each setting with `seeds` seeds, counted from the run file's, on the same data and clients.

    Results are in `out`/<setting>/<variant>/seed-<seed>; with a single setting, in `out`/<variant>/seed-<seed>. Finished runs are
    not repeated, interrupted runs are resumed, runs of another process are left to it, and a run that fails does not stop the
    others. `jobs` processes execute the runs, each with its own base model in memory; if 1, this process does.

    Raises:
        FedExpertsError: a run cannot be prepared; raised before the first run starts.
        BadRun: `out` contains runs that no comparison of this form wrote.
    """
    require_room(out, len(settings))
    runs = [
        planned(config, setting, variant, config.seed + number, out, several=len(settings) > 1)
        for number in range(seeds)
        for setting, config in settings.items()
        for variant in variants
    ]
    parts = Parts()
    for each in runs:  # so that an error of the last method is raised before the first run starts
        claim(each.config, each.folder, resume=True)
        require_same_inputs(prepare_run(each.config, each.label, parts=parts), each.folder)
    if jobs > 1:
        work = partial(attempt_elsewhere, shows=progress is not None and progress.shows)
        outcomes = {
            each.folder: Outcome(failed=result) if isinstance(result, Died) else result
            for each, result in in_parallel(work, runs, jobs)
        }
    else:
        outcomes = {each.folder: attempt(each, parts, progress) for each in runs}
    # Runs that were left to other processes may be finished or stopped by now
    outcomes |= {each.folder: attempt(each, parts, progress) for each in runs if outcomes[each.folder].left}
    folders = tuple(each.folder for each in runs)
    failed = {folder: reason for folder in folders if (reason := outcomes[folder].failed) is not None}
    return Compared(folders, tuple(folder for folder in folders if outcomes[folder].left), failed)


def attempt(planned: Planned, parts: Parts, progress: Progress | None) -> Outcome:
    """Executes a run, unless another process is executing it. An error does not stop the other runs of the comparison."""
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
    except Exception as error:  # an unexpected error, which may affect this run alone
        traceback.print_exc(file=sys.stderr)
        return Outcome(failed=f"{type(error).__name__}: {error}")
    return Outcome()


def attempt_elsewhere(planned: Planned, *, shows: bool) -> Outcome:
    """`attempt` in a worker process, which shows only the permanent lines of the progress, if any."""
    return attempt(planned, PARTS, Shown(Console(force_terminal=False)) if shows else None)


def planned(config: RunConfig, setting: str, variant: Variant, seed: int, out: Path, *, several: bool) -> Planned:
    """The run of one variant, setting and seed; `several`: whether the comparison has several settings."""
    seeded = variant.of(config).model_copy(update={"seed": seed})
    parent = out / as_folder(setting) if several else out
    return Planned(seeded, setting, variant.label, parent / variant.folder / f"seed-{seed}", out)


def read_settings(run_files: Sequence[Path], changes: Sequence[str] = (), vary: Sequence[str] = ()) -> dict[str, RunConfig]:
    """Name without `.toml` → settings of each run file, with `changes` (a.b=c) applied to all of them.

    Each of `vary` is a key and its values, a.b=c,d. Every run file is combined with every combination of values, which is
    appended to its name.

    Raises:
        BadValue: two run files have the same name; or as in `grid` and `config.read`.
    """
    names = [path.stem for path in run_files]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadValue(f"two run files are called {twice[0]}, and reports tell settings apart by these names; rename one")
    return {
        " ".join([path.stem, *chosen]): configs.read(path, [*changes, *chosen]) for path in run_files for chosen in grid(vary)
    }


def grid(vary: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations of one value (a.b=c) per key; without keys, a single empty one.

    Raises:
        BadValue: a key without values, twice, or varied by `--methods` or `--seeds`.
    """
    values: dict[str, list[str]] = {}
    for option in vary:
        key, _, text = (part.strip() for part in option.partition("="))
        settings = [f"{key}={value.strip()}" for value in pieces(text, ",") if value.strip()]
        if not key or not settings:
            raise BadValue(
                f"{option!r} is not of the form a.b=c,d; write a setting, = and its values, such as training.lr=1e-3,3e-3"
            )
        if key in values:
            raise BadValue(f"{key} is varied twice; give all its values at once: {key}=…,…")
        if key.partition(".")[0] in ("method", "seed"):
            instead = (
                "--seeds says how many" if key == "seed" else f"--methods takes variants: NAME:{key.partition('.')[2]}=…,NAME:…"
            )
            raise BadValue(f"{key} is not varied by --vary; {instead}")
        values[key] = list(dict.fromkeys(settings))
    combinations = list(product(*values.values()))
    if long := [option for option in combinations if len(as_folder(" ".join(option))) > LONGEST]:
        raise BadValue(f"{' '.join(long[0])} is too long for the name of a folder; write a run file for each instead")
    return combinations


def read_variants(text: str) -> list[Variant]:
    """The variants in a comma-separated list, without repeats.

    A variant is `method`, `method:key=value:key=value` or, with a name for tables and folders, `name=method:…`. A key without a
    dot is a setting of the method; a key with a dot is a setting of `model`, `training` or `federation`. Commas and colons in
    brackets or quotes do not separate.

    Raises:
        BadValue: no method, an unknown method, two variants of one name, or a setting that all methods of a comparison share.
    """
    enter_installed()
    variants: dict[str, Variant] = {}
    for each in pieces(text, ","):
        if each.strip():
            variant = read_variant(each.strip())
            if variants.setdefault(variant.label, variant) != variant:
                raise BadValue(f"two methods are called {variant.label}, and reports tell them apart by these names; rename one")
    if not variants:
        raise BadValue(f"no method was named to compare; name some of {', '.join(METHODS)}")
    return list(variants.values())


def read_variant(text: str) -> Variant:
    """The variant that `text` describes; see `read_variants`."""
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


def require_room(out: Path, settings: int) -> None:
    """Raises BadRun if `out` contains results that a comparison of `settings` run files would not have written."""
    if out.exists() and not out.is_dir():
        raise BadRun(f"{out} is a file; give a folder with --out")
    if (out / "resolved.json").exists():
        raise BadRun(f"{out} holds a single run, so a comparison cannot be put there; give another folder with --out")
    kind, depth = ("over several run files", 3) if settings > 1 else ("over a single run file", 2)
    ours, *others = (runs_at(out, each) for each in (depth, *(each for each in range(1, DEEPEST + 1) if each != depth)))
    if other := next(filter(None, others), None):
        raise BadRun(f"{out} holds the run {other[0]}, which no comparison {kind} wrote; give another folder with --out")
    reports = [name for name in REPORTS if (out / name).exists()]
    if reports and not ours:
        raise BadRun(f"{out} holds {reports[0]} and no run, and a comparison would write over it; give another folder with --out")


def runs_at(out: Path, depth: int) -> list[Path]:
    """Runs `depth` levels below `out`, as relative paths."""
    resolved = out.glob("/".join([*["*"] * depth, "resolved.json"]))
    return sorted(path.parent.relative_to(out) for path in resolved)
