"""Reads a results folder into frozen values, also while its run is still writing to it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedexperts.errors import BadRun
from fedexperts.io.manifest import require_undamaged
from fedexperts.types import WireDtype

Holds = Mapping[str, Sequence[int]]  # MoE block → ids of its experts that a client was assigned, or sent

DEPTH = 4  # folders below a given one that are searched for runs: `compare` writes OUT/<setting>/<method>/seed-<s>/
NO_SETTING = "no setting"  # the setting of a single run that is reported beside comparisons of several settings


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
    """A client as planned before the run."""

    name: str
    task: str = ""
    examples: int = 0
    validation: int = 0
    test: int = 0
    memory_bytes: int | None = None  # None: unlimited
    experts_fit: int | None = None
    full_fits: bool = True
    tasks: Mapping[str, int] = field(default_factory=dict)  # training examples of each task
    labels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # task → class → training examples
    lengths: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # "prompt", "answer" → quantiles of characters


@dataclass(frozen=True)
class Weighed:
    """Bytes of everything but the experts, and of one expert of each MoE block with its router row."""

    dense_bytes: int
    expert_bytes: Mapping[str, int]
    activation_bytes: int = 0
    wire_dtype: WireDtype = "float32"  # in which weights travel

    def of(self, holds: Holds) -> int:
        """Bytes for the experts in `holds`, without activations."""
        return self.dense_bytes + sum(len(set(experts)) * self.expert_bytes.get(block, 0) for block, experts in holds.items())


@dataclass(frozen=True)
class Lost:
    """What is lost of a task's data, in shares of its examples."""

    task: str
    examples: int  # of training, all
    prompts_cut: float  # training prompts that lose their middle
    prompt_tokens_lost: float  # share of all tokens of training prompts
    answers_cut: float  # training answers that lose their end, and with it their end token
    references_cut: float  # test references, of which an answer is generated, longer than evaluation.generate_tokens
    tested_on_training: float  # test examples whose prompt and answer are training examples
    majority: float  # training examples with the most frequent answer
    dropped: int = 0  # training and test examples that are left out since they are too long

    @property
    def shares(self) -> tuple[float, ...]:
        """All shares, in their order."""
        return astuple(self)[2:-1]


@dataclass(frozen=True)
class Plan:
    """plan.json: what was planned before the run."""

    method: str
    seed: int
    model: ModelPlan
    clients: tuple[ClientPlan, ...] = ()
    setting: str = ""  # the run file of a comparison, by its name
    reference: bool = False  # not a federated method but a reference for them: a floor or a ceiling
    partition: Mapping[str, Any] = field(default_factory=dict)
    full_bytes: int | None = None  # memory for training with all experts
    personal_bytes: int = 0  # memory for a client's personal experts on top of it
    patch: Weighed | None = None  # weights that are sent
    memory: Weighed | None = None  # weights, gradients, optimizer state and activations in training
    round_flops_estimated: float | None = None  # for a client's round on the whole model and examples of full length
    lost: tuple[Lost, ...] = ()  # what of each task's data is lost
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Round:
    """A line of rounds.jsonl; the setup tasks before the first round are round 0."""

    round: int
    task: str = "train"
    clients: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)  # client → reason
    loss: float | None = None  # mean over the clients that answered
    seconds: float = 0.0
    clock_seconds: float | None = None  # virtual; None: no clock
    holds: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)  # client → its assigned experts
    sends: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)  # client → the experts it sent, if others
    uses: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)  # client → tokens of each assigned expert
    undone: str | None = None  # why the round was undone
    suspects: tuple[str, ...] = ()  # clients that stood out in an undone round


@dataclass(frozen=True)
class LedgerRow:
    """A line of ledger.jsonl: the cost of one client's job in one round."""

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
    loss: float | None = None  # mean over the client's training steps
    clock_seconds: float | None = None  # virtual; None: no clock
    metrics: Mapping[str, Any] = field(default_factory=dict)  # reported by the client


@dataclass(frozen=True)
class OnRetained:
    """A model's score on the retained examples of a task."""

    metric: str
    examples: int
    value: float | None
    values: tuple[
        float, ...
    ] = ()  # one per example, in the same order for all models of a run; empty if the metric is not a mean


@dataclass(frozen=True)
class Evaluation:
    """A line of evals.jsonl: of a client and task, of a task (client None), or overall (both None).

    A line with `retained` or `drift` has no value: it is about a client's model after the last round or, with client None, about
    the base model.
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
    stopped: str | None = None  # why the run stopped after this evaluation of all clients


@dataclass(frozen=True)
class ReferenceLine(Evaluation):
    """A line of reference_lines.jsonl: what `line`, an answer that needs no model, scores; round 0."""

    line: str = ""


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl: the answer of a client's model to one of the client's examples, at one evaluation."""

    round: int
    client: str
    task: str
    source: str  # where the examples of the task come from
    metric: str  # the task's main one
    prompt: str
    reference: str
    answer: str | None  # generated, or the choice with the highest likelihood; None: scored by perplexity
    score: float | None  # of this example, by the metric; None: not a number


@dataclass(frozen=True)
class RunResults:
    """All that a report needs to know about one run."""

    folder: Path
    plan: Plan
    rounds: tuple[Round, ...] = ()
    ledger: tuple[LedgerRow, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    run_file: str = ""  # run.toml, as resolved
    versions: Mapping[str, Any] = field(default_factory=dict)
    reference_lines: tuple[ReferenceLine, ...] = ()

    @cached_property
    def predictions(self) -> Sequence[Prediction]:
        """The answers in predictions.jsonl, read when they are first asked for; empty if the run writes none.

        Raises:
            BadRun: the file does not have the format that a run writes.
        """
        return tuple(_lines(TypeAdapter(Prediction), self.folder / "predictions.jsonl"))

    @cached_property
    def evaluations_of(self) -> Mapping[tuple[str | None, str | None], Sequence[Evaluation]]:
        """(client, task) → its evaluations, in the order of the file."""
        rows: dict[tuple[str | None, str | None], list[Evaluation]] = {}
        for row in self.evaluations:
            rows.setdefault((row.client, row.task), []).append(row)
        return rows

    @cached_property
    def client_names(self) -> Sequence[str]:
        """The names of all clients: the planned ones, then any that are only in the ledger."""
        return list(dict.fromkeys([*(client.name for client in self.plan.clients), *self.work_of]))

    @cached_property
    def work_of(self) -> Mapping[str, Sequence[LedgerRow]]:
        """Client → its rows of the ledger, in the order of the file."""
        rows: dict[str, list[LedgerRow]] = {}
        for row in self.ledger:
            rows.setdefault(row.client, []).append(row)
        return rows


Groups = Mapping[str, Sequence[RunResults]]  # method → its runs, one of each seed
Settings = Mapping[str, Groups]  # setting → method → its runs; all settings name the same methods, some without runs
Row = TypeVar("Row")


def read(folder: Path) -> RunResults:
    """The run in `folder`; files that a run in progress has not written yet are read as empty.

    Raises:
        BadRun: the folder is not a run's, or one of its files cannot be read or is damaged.
    """
    plan = folder / "plan.json"
    if not plan.is_file():
        raise BadRun(f"{folder} is not the folder of a run (it has no plan.json); give a folder that `fedexperts run` wrote")
    require_undamaged(folder)
    return RunResults(
        folder=folder,
        plan=_parse(TypeAdapter(Plan), _text(plan), str(plan)),
        rounds=tuple(_lines(TypeAdapter(Round), folder / "rounds.jsonl")),
        ledger=tuple(_lines(TypeAdapter(LedgerRow), folder / "ledger.jsonl")),
        evaluations=tuple(_lines(TypeAdapter(Evaluation), folder / "evals.jsonl")),
        run_file=_text(folder / "run.toml"),
        versions=_parse(TypeAdapter(dict[str, Any]), _text(folder / "versions.json") or "{}", str(folder / "versions.json")),
        reference_lines=tuple(_lines(TypeAdapter(ReferenceLine), folder / "reference_lines.jsonl")),
    )


def read_all(folders: Sequence[Path]) -> tuple[RunResults, ...]:
    """The runs of all `folders`, each once; a folder that is not a run's stands for the runs below it.

    Raises:
        BadRun: a folder does not exist, or has no run in it.
    """
    paths = {path.resolve(): path for folder in folders for path in run_folders(Path(folder))}
    if not paths:
        raise BadRun("no results folder was given, and a report needs at least one; give a folder that `fedexperts run` wrote")
    return tuple(read(path) for path in paths.values())


def run_folders(folder: Path) -> list[Path]:
    """`folder` itself if it is a run's, else those of the runs below it, in order of their names (seed-2 before seed-10)."""
    if not folder.is_dir():
        raise BadRun(f"{folder} is not a folder; give one that `fedexperts run` or `fedexperts compare` wrote")
    paths = sorted(_below(folder, DEPTH), key=lambda path: _natural(str(path)))
    if not paths:
        raise BadRun(f"{folder} contains no run (no plan.json in it or below); give a folder that `fedexperts run` wrote")
    return paths


def grouped(runs: Sequence[RunResults]) -> dict[str, tuple[RunResults, ...]]:
    """Method → its runs, one per seed, in the order in which the methods first come.

    If a method was run twice with the same seed (with different settings, then), the folder of its runs joins the label.
    """
    keys = [(run.plan.method, run.plan.seed) for run in runs]
    twice = {method for method, seed in keys if keys.count((method, seed)) > 1}
    groups: dict[str, list[RunResults]] = {}
    for run in runs:
        method = run.plan.method
        groups.setdefault(f"{method} ({_home(run)})" if method in twice else method, []).append(run)
    return {label: tuple(sorted(members, key=lambda run: run.plan.seed)) for label, members in groups.items()}


def by_setting(runs: Sequence[RunResults]) -> dict[str, dict[str, tuple[RunResults, ...]]]:
    """Setting → method → its runs. Every setting lists all methods in the same order; one that was not run there has no runs.

    Runs of fewer than two settings form a single one, whose name is empty.
    """
    names = dict.fromkeys(run.plan.setting for run in runs)
    if len([name for name in names if name]) < 2:
        return {"": grouped(runs)}
    by_name = {name or NO_SETTING: grouped([run for run in runs if run.plan.setting == name]) for name in names}
    methods = dict.fromkeys(method for groups in by_name.values() for method in groups)
    return {name: {method: groups.get(method, ()) for method in methods} for name, groups in by_name.items()}


def by_label(settings: Settings) -> dict[str, Sequence[RunResults]]:
    """`setting: method`, or the method alone in a setting without a name → its runs, where there are any."""
    return {
        f"{name}: {method}" if name else method: runs
        for name, groups in settings.items()
        for method, runs in groups.items()
        if runs
    }


def all_runs(groups: Groups) -> list[RunResults]:
    """The runs of all methods."""
    return [run for runs in groups.values() for run in runs]


def _home(run: RunResults) -> Path:
    """The folder that the seeds of a comparison share."""
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
    """The text of `path`, empty if it does not exist yet; bytes that are not UTF-8 are replaced."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _lines(adapter: TypeAdapter[Row], path: Path) -> Iterator[Row]:
    """The rows of a jsonl file. A last line without a newline is still being written and is left out."""
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
        raise BadRun(
            f"{where} does not have the format that a run writes ({reason}); repair it, or run again into a new folder"
        ) from error
