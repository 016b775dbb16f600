"""What `import fedexperts` offers: the commands as functions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedexperts import config
from fedexperts.config import RunConfig
from fedexperts.experiment import runner, sweep
from fedexperts.experiment.sweep import Compared
from fedexperts.io.toml import with_settings

RunFile = Path | str | Mapping[str, Any] | RunConfig
"""A run: the path of its file, what such a file says, or the settings read from one."""


def run(run: RunFile, out: Path | str, *, set: Sequence[str] = (), resume: bool = False) -> Path:
    """Runs it and returns its results folder, `out`, as `fedexperts run` does.

    Args:
        run: a run file or its content.
        out: the results folder.
        set: settings in place of the run file's, such as "training.lr=1e-3".
        resume: whether to continue the run that `out` holds.

    Raises:
        BadValue: a setting, the data or the model does not allow the run.
        BadRun: `out` holds another run, or all clients of a round failed.
    """
    return runner.run(settings_of(run, set), Path(out), resume=resume)


def compare(
    runs: RunFile | Mapping[str, RunFile],
    methods: Sequence[str],
    seeds: int = 1,
    *,
    out: Path | str,
    set: Sequence[str] = (),
    jobs: int = 1,
) -> Compared:
    """Several methods over the same data and clients, as `fedexperts compare` does; runs that are done already stay.

    After `from fedexperts import report`, `report.table(compared.folders)` is what came out, and `report.write([out], html=…)`
    makes the page.

    Args:
        runs: a run, or several by name, each of which is a setting.
        methods: names, or variants such as "slow=fedavg:training.lr=1e-4".
        seeds: how many, from the run's own on.
        out: the results folder.
        set: settings in place of those of all runs.
        jobs: how many runs at once, each in a process of its own; a script that asks for several has its calls below
            `if __name__ == "__main__":`, since those processes import it.

    Raises:
        BadValue: a run that cannot be, before the first one starts.
    """
    settings = {name: settings_of(run, set) for name, run in by_name(runs).items()}
    return sweep.compare(settings, sweep.read_variants(",".join(methods)), seeds, Path(out), jobs=jobs)


def by_name(runs: RunFile | Mapping[str, RunFile]) -> Mapping[str, RunFile]:
    """Several runs as they are; one under its file's name, or called `run`. What has a `data` table is one: no run is without."""
    if isinstance(runs, Path | str):
        return {Path(runs).stem: runs}
    return {"run": runs} if isinstance(runs, RunConfig) or "data" in runs else runs


def settings_of(run: RunFile, set: Sequence[str]) -> RunConfig:
    """Raises BadValue for what no run can have."""
    if isinstance(run, Path | str):
        return config.read(Path(run), set)
    tree = run.model_dump(mode="json", exclude_none=True) if isinstance(run, RunConfig) else dict(run)
    return config.from_tree(with_settings(tree, set))
