"""A results folder as frozen values, also while its run is still writing to it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedexperts.errors import BadRun

Holds = Mapping[str, Sequence[int]]  # MoE block → the experts a client works with there

DEPTH = 4  # how far below a given folder runs are looked for: `compare` writes OUT/<setting>/<method>/seed-<s>/
NO_SETTING = "no setting"  # what a run is in that no comparison made, beside those of several settings


@dataclass(frozen=True)
class BlockPlan:
    """One MoE layer of the base model."""

    num_experts: int
    top_k: int


@dataclass(frozen=True)
class ModelPlan:
    """The base model."""

    name: str
    parameters: int = 0
    blocks: Mapping[str, BlockPlan] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientPlan:
    """What was planned for a client before the run."""

    name: str
    task: str = ""
    examples: int = 0
    validation: int = 0
    test: int = 0
    memory_bytes: int | None = None  # None: as much as it takes
    experts_fit: int | None = None
    full_fits: bool = True
    tasks: Mapping[str, int] = field(default_factory=dict)  # training examples of each task


@dataclass(frozen=True)
class Weighed:
    """Bytes of all that is no expert, and of one expert of each MoE block with its router row."""

    dense_bytes: int
    expert_bytes: Mapping[str, int]
    activation_bytes: int = 0

    def of(self, holds: Holds) -> int:
        """Bytes of a client that works with `holds`, activations apart."""
        return self.dense_bytes + sum(len(set(experts)) * self.expert_bytes.get(block, 0) for block, experts in holds.items())


@dataclass(frozen=True)
class Plan:
    """plan.json: what was asked."""

    method: str
    seed: int
    model: ModelPlan
    clients: tuple[ClientPlan, ...] = ()
    setting: str = ""  # the run file of a comparison, by its name
    reference: bool = False  # no federated method, but what those are held against
    partition: Mapping[str, Any] = field(default_factory=dict)
    full_bytes: int | None = None  # memory that training with all experts takes
    personal_bytes: int = 0  # that a client's personal experts take beside it
    patch: Weighed | None = None  # what travels
    memory: Weighed | None = None  # weights, gradients and optimiser state in training, and activations
    round_flops_estimated: float | None = None  # of a client's round on the whole model and full-length examples
    warnings: tuple[str, ...] = ()  # what was said not to fit


@dataclass(frozen=True)
class Round:
    """A line of rounds.jsonl; round 0 holds the stages before the rounds."""

    round: int
    task: str = "train"
    clients: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)  # client → reason
    loss: float | None = None
    seconds: float = 0.0
    clock_seconds: float | None = None  # virtual; None: no clock
    holds: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)  # client → Holds
    sends: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)  # client → what it sent, where not that
    uses: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)  # client → tokens of each expert that it held
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LedgerRow:
    """A line of ledger.jsonl: what one client's work of one round took."""

    round: int
    client: str
    task: str
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    tokens: int = 0
    peak_bytes: int = 0
    flops_estimated: float = 0.0
    experts: int = 0
    failed: str | None = None
    clock_seconds: float | None = None  # virtual; None: no clock
    metrics: Mapping[str, Any] = field(default_factory=dict)  # what the method told of itself


@dataclass(frozen=True)
class OnRetained:
    """What a model scored on the retained examples of a task."""

    metric: str
    examples: int
    value: float | None
    values: tuple[float, ...] = ()  # of each example, in one order for all models of a run; none where the metric is no mean


@dataclass(frozen=True)
class Evaluation:
    """A line of evals.jsonl: of a client and task, of a task (client None), or overall (both None).

    A line that has `retained` or `drift` has no value: it tells of a client's model at the end, or (client None) of the base.
    """

    round: int
    client: str | None = None
    task: str | None = None
    examples: int = 0
    metric: str | None = None  # the main one
    value: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    retained: Mapping[str, OnRetained] = field(default_factory=dict)  # task → scores
    drift: Mapping[str, float] = field(default_factory=dict)  # MoE block → nats


@dataclass(frozen=True)
class RunResults:
    """Everything a report says about one run."""

    folder: Path
    plan: Plan
    rounds: tuple[Round, ...] = ()
    ledger: tuple[LedgerRow, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    run_file: str = ""  # run.toml, as resolved
    versions: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def evaluations_of(self) -> Mapping[tuple[str | None, str | None], Sequence[Evaluation]]:
        """(client, task) → its evaluations, as they were written."""
        found: dict[tuple[str | None, str | None], list[Evaluation]] = {}
        for row in self.evaluations:
            found.setdefault((row.client, row.task), []).append(row)
        return found

    @cached_property
    def client_names(self) -> Sequence[str]:
        """All clients by name: the planned ones, then any that only the ledger knows."""
        return list(dict.fromkeys([*(client.name for client in self.plan.clients), *self.work_of]))

    @cached_property
    def work_of(self) -> Mapping[str, Sequence[LedgerRow]]:
        """Client → its rows of the ledger, as they were written."""
        found: dict[str, list[LedgerRow]] = {}
        for row in self.ledger:
            found.setdefault(row.client, []).append(row)
        return found


Groups = Mapping[str, Sequence[RunResults]]  # method → its runs, one of each seed
Settings = Mapping[str, Groups]  # setting → method → its runs; all settings name the same methods, some without runs
Row = TypeVar("Row")


def read(folder: Path) -> RunResults:
    """The run in `folder`; what a run in progress has not written yet is empty.

    Raises:
        BadRun: no run is there, or one of its files cannot be read.
    """
    plan = folder / "plan.json"
    if not plan.is_file():
        raise BadRun(f"{folder} holds no run (it has no plan.json); give a folder that `fedexperts run` wrote")
    return RunResults(
        folder=folder,
        plan=_parse(TypeAdapter(Plan), _text(plan), str(plan)),
        rounds=tuple(_lines(TypeAdapter(Round), folder / "rounds.jsonl")),
        ledger=tuple(_lines(TypeAdapter(LedgerRow), folder / "ledger.jsonl")),
        evaluations=tuple(_lines(TypeAdapter(Evaluation), folder / "evals.jsonl")),
        run_file=_text(folder / "run.toml"),
        versions=_parse(TypeAdapter(dict[str, Any]), _text(folder / "versions.json") or "{}", str(folder / "versions.json")),
    )


def read_all(folders: Sequence[Path]) -> tuple[RunResults, ...]:
    """The runs of all `folders`, each once; a folder that is no run stands for the runs below it.

    Raises:
        BadRun: a folder does not exist, or holds no run.
    """
    found = {path.resolve(): path for folder in folders for path in run_folders(Path(folder))}
    if not found:
        raise BadRun("a report needs at least one results folder, got none; name the folder that `fedexperts run` wrote")
    return tuple(read(path) for path in found.values())


def run_folders(folder: Path) -> list[Path]:
    """`folder` when it is a run, else the runs below it, in order of their names (seed-2 before seed-10)."""
    if not folder.is_dir():
        raise BadRun(f"{folder} is not a folder; give one that `fedexperts run` or `fedexperts compare` wrote")
    found = sorted(_below(folder, DEPTH), key=lambda path: _natural(str(path)))
    if not found:
        raise BadRun(f"{folder} holds no run (no plan.json in it or below); give a folder that `fedexperts run` wrote")
    return found


def grouped(runs: Sequence[RunResults]) -> dict[str, tuple[RunResults, ...]]:
    """Runs of one method as its seeds, in the order in which the methods first come.

    Where a method was run twice with one seed (with other settings, then), its runs are told apart by their folders.
    """
    keys = [(run.plan.method, run.plan.seed) for run in runs]
    twice = {method for method, seed in keys if keys.count((method, seed)) > 1}
    groups: dict[str, list[RunResults]] = {}
    for run in runs:
        method = run.plan.method
        groups.setdefault(f"{method} ({_home(run)})" if method in twice else method, []).append(run)
    return {label: tuple(sorted(members, key=lambda run: run.plan.seed)) for label, members in groups.items()}


def by_setting(runs: Sequence[RunResults]) -> dict[str, dict[str, tuple[RunResults, ...]]]:
    """Setting → method → its runs. Every setting names all methods in one order; one that was not run there has no runs.

    Runs of fewer than two settings are all of one, which has no name.
    """
    names = dict.fromkeys(run.plan.setting for run in runs)
    if len([name for name in names if name]) < 2:
        return {"": grouped(runs)}
    found = {name or NO_SETTING: grouped([run for run in runs if run.plan.setting == name]) for name in names}
    methods = dict.fromkeys(method for groups in found.values() for method in groups)
    return {name: {method: groups.get(method, ()) for method in methods} for name, groups in found.items()}


def all_runs(groups: Groups) -> list[RunResults]:
    """The runs of all methods."""
    return [run for runs in groups.values() for run in runs]


def _home(run: RunResults) -> Path:
    """The folder that the seeds of one comparison have in common."""
    seeded = re.fullmatch(r"seed-?\d+", run.folder.name)
    return run.folder.parent if seeded else run.folder


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "plan.json").is_file():
        yield folder
    elif depth:
        for child in folder.iterdir():
            if child.is_dir() and not child.is_symlink():
                yield from _below(child, depth - 1)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers inside names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _text(path: Path) -> str:
    """What stands in `path`; nothing when it is not there yet. Bytes that are no UTF-8 are shown as such."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _lines(adapter: TypeAdapter[Row], path: Path) -> Iterator[Row]:
    """The rows of a jsonl file; a last line without its end is still being written and is left out."""
    complete = _text(path).split("\n")[:-1]
    for number, line in enumerate(complete, start=1):
        if line.strip():
            yield _parse(adapter, line, f"{path}, line {number},")


def _parse(adapter: TypeAdapter[Row], text: str, where: str) -> Row:
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = f"{key}: {first['msg']}" if key else first["msg"]
        raise BadRun(f"{where} is not what a run writes ({reason}); mend it, or run again into a new folder") from error
