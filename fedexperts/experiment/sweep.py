"""Comparisons: run files × varied settings × methods × seeds, each run in its own folder, in one or several processes."""

import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import product
from pathlib import Path

from rich.console import Console

from fedexperts import config as configs
from fedexperts.config import RunConfig
from fedexperts.errors import BadRun, BadValue, Busy, FedExpertsError, shortened
from fedexperts.experiment.process_pool import Died, in_parallel
from fedexperts.experiment.progress import Progress, Quiet, Shown
from fedexperts.experiment.runner import claim, require_same_inputs, run
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.experiment.variants import LONGEST, Variant, as_folder, named, pieces, read_variants, training_notes
from fedexperts.report.results import Results, results

REPORTS = ("report.html", "report.csv", "report.md", "report.tex")
DEEPEST = 4  # levels of subfolders in which a report searches for runs
__all__ = ["Compared", "Variant", "compare", "named", "read_settings", "read_variants"]
PARTS = Parts()
"""Cache of a process that executes runs of a comparison."""


@dataclass(frozen=True)
class Planned:
    """A run of a comparison."""

    config: RunConfig
    setting: str
    label: str
    folder: Path
    together: Path  # folder of the comparison


@dataclass(frozen=True, repr=False)
class Compared:
    """Results of a comparison: its runs, those left to another process, and the reasons of those that failed.

    A notebook shows the table of results, as does `print`.
    """

    folders: tuple[Path, ...]  # in the order in which settings and methods were named
    left: tuple[Path, ...]
    failed: Mapping[Path, str]
    notes: tuple[str, ...] = ()  # what each method trains, and a warning where these are different parts

    @property
    def results(self) -> Results:
        """The results of its runs, as `fedexperts.results` reads them.

        Raises:
            BadRun: no run has started, or a file is damaged.
        """
        return results(self.started)

    @property
    def started(self) -> Sequence[Path]:
        """The folders of its runs that have begun."""
        return [folder for folder in self.folders if (folder / "plan.json").exists()]

    @property
    def remarks(self) -> tuple[str, ...]:
        """Its notes, the runs that were left to another process, and those that failed."""
        left = (f"left to another process: {folder}" for folder in self.left)
        return (*self.notes, *left, *(f"{folder} failed: {reason}" for folder, reason in self.failed.items()))

    def __repr__(self) -> str:
        return "\n".join([*([repr(self.results)] if self.started else []), *self.remarks])

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{escape(remark)}</p>" for remark in self.remarks)
        return (self.results._repr_html_() if self.started else "") + lines


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
    parts, notes = Parts(), tuple(training_notes(settings, variants))
    for each in runs:  # so that an error of the last method is raised before the first run starts
        claim(each.config, each.folder, resume=True)
        require_same_inputs(prepare_run(each.config, each.label, parts=parts), each.folder)
    for note in notes:
        (progress or Quiet()).say(note)
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
    return Compared(folders, tuple(folder for folder in folders if outcomes[folder].left), failed, notes)


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
    except OSError as error:  # of the disk, for one
        return Outcome(failed=f"{error.filename or planned.folder} cannot be read or written ({error.strerror or error})")
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
    former = None if variant.former is None or not (parent / as_folder(variant.former)).is_dir() else variant.former
    label = variant.label if former is None else former
    return Planned(seeded, setting, label, parent / as_folder(label) / f"seed-{seed}", out)


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
        " ".join([path.stem, *chosen]): configs.read_for_all(path, [*changes, *chosen])
        for path in run_files
        for chosen in grid(vary)
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
        raise BadValue(f"{shortened(' '.join(long[0]))} is too long for the name of a folder; write a run file for each instead")
    return combinations


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
