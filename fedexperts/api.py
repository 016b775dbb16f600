"""The Python API: `run` and `compare` as functions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedexperts import config
from fedexperts.config import RunConfig
from fedexperts.experiment import runner, sweep
from fedexperts.experiment.on_round import OnRound, Telling
from fedexperts.experiment.sweep import Compared
from fedexperts.io.toml import with_settings

RunFile = Path | str | Mapping[str, Any] | RunConfig
"""A run: the path of a run file, the content of such a file, or the settings read from one."""


def run(run: RunFile, out: Path | str, *, set: Sequence[str] = (), resume: bool = False, on_round: OnRound | None = None) -> Path:
    """Executes a run, as `fedexperts run` does, and returns its results folder, `out`.

    `fedexperts.results(folder)` has what it wrote as DataFrames.

    Args:
        run: a run file or its content.
        out: the results folder.
        set: settings that replace those of the run file, such as "training.lr=1e-3".
        resume: whether to continue the run in `out`.
        on_round: called after each round with a `RoundDone`, what the round added to the results. If it raises an exception, the
            run ends with that exception and can be resumed after this round; so does KeyboardInterrupt at any time.

    Raises:
        BadValue: the settings, the data or the model do not allow the run.
        BadRun: `out` contains another run, or all clients of a round failed.
    """
    settings, folder = settings_of(run, set).of_its_method(), Path(out)
    progress = Telling(on_round, folder, settings.federation.rounds) if on_round else None
    return runner.run(settings, folder, resume=resume, progress=progress)


def compare(
    runs: RunFile | Mapping[str, RunFile],
    methods: Sequence[str],
    seeds: int = 1,
    *,
    out: Path | str,
    set: Sequence[str] = (),
    jobs: int = 1,
) -> Compared:
    """Runs several methods on the same data and clients, as `fedexperts compare` does; completed runs are not repeated.

    A notebook shows the table of results, as does `print`; `compare(…).results` has all rounds and scores as DataFrames. After
    `from fedexperts import report`, `report.write([out], html=…)` writes the page.

    Args:
        runs: one run, or several by name; each is a setting of the comparison.
        methods: names, or variants such as "slow=fedavg:training.lr=1e-4".
        seeds: number of seeds, counted from the seed of the run.
        out: the results folder.
        set: settings that replace those of all runs.
        jobs: number of runs executed in parallel, each in its own process; with more than one, the call must be below
            `if __name__ == "__main__":`, because these processes import the script.

    Raises:
        BadValue: the settings of a run are not valid; raised before the first run starts.
    """
    settings = {name: settings_of(run, set) for name, run in by_name(runs).items()}
    variants = sweep.read_variants(",".join(methods), sweep.named(settings))
    return sweep.compare(settings, variants, seeds, Path(out), jobs=jobs)


def by_name(runs: RunFile | Mapping[str, RunFile]) -> Mapping[str, RunFile]:
    """Runs by name: a mapping of several runs is returned unchanged; a single run is named after its file, or `run`.

    A mapping with a `data` key is a single run.
    """
    if isinstance(runs, Path | str):
        return {Path(runs).stem: runs}
    return {"run": runs} if isinstance(runs, RunConfig) or "data" in runs else runs


def settings_of(run: RunFile, set: Sequence[str]) -> RunConfig:
    """The settings of a run file or of its content, with those of `set` in place of its own, and all tables of `[methods]`.

    Raises:
        BadValue: an unknown setting, or a value that is not allowed.
    """
    if isinstance(run, Path | str):
        return config.read_for_all(Path(run), set)
    tree = run.model_dump(mode="json", exclude_none=True) if isinstance(run, RunConfig) else dict(run)
    return config.from_tree(config.replaced_in_methods(with_settings(tree, set), set))
