"""A run of one round whose answers can be changed on their way to the server: honest clients play it once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedexperts.config import RunConfig
from fedexperts.core.evaluation import Scores, merge
from fedexperts.core.ledger import Entry, Ledger
from fedexperts.engines.base import Expectation, expectation, reorder_and_validate
from fedexperts.engines.local import ClientRuntime
from fedexperts.engines.wire import decode
from fedexperts.experiment import runner
from fedexperts.experiment.runtime import runtime_for
from fedexperts.experiment.setup import Parts, Prepared, prepare_run
from fedexperts.federation import answers, federate, steps
from fedexperts.io.toml import checked
from fedexperts.types import Job, Server, Update

WHO = "c02"
"""Whose answers are changed, where there are several clients."""
PARTS = Parts()

Change = Callable[[Update], object]


@dataclass
class Changing:
    """An engine of honest clients in this process, whose answers `change` makes others of; it notes what went either way."""

    runtime: ClientRuntime
    change: Callable[[Job, Any], object] = lambda job, answer: answer
    jobs: dict[tuple[str, str], Job] = field(default_factory=dict)  # (client, task) → the last one
    answers: dict[tuple[str, str], Any] = field(default_factory=dict)

    def run(self, jobs: Iterable[Job]) -> Iterator[Any]:
        for job in jobs:
            answer = self.runtime.answer(job)
            started = replace(job, patch=decode(job.patch, job.patch.wire_dtype))
            self.jobs[job.client, job.task], self.answers[job.client, job.task] = started, answer
            yield self.change(job, answer)


def changing(change: Callable[[Job, Any], object]) -> Callable[[Prepared, Path], Any]:
    """An engine for `runner.run`: honest clients whose answers `change` makes others of."""
    return lambda prepared, out: nullcontext(Changing(runtime_for(prepared, out), change))


@dataclass(frozen=True)
class Task:
    """A task of a run: the server before it, and how all clients answered."""

    prepared: Prepared
    server: Server
    task: str
    honest: Changing

    @property
    def who(self) -> str:
        """Whose answer is changed: where all data are in one place, a single client trains."""
        clients = [client for client, task in self.honest.jobs if task == self.task]
        return WHO if WHO in clients else clients[0]

    @property
    def answer(self) -> Update:
        """The honest one."""
        return self.honest.answers[self.who, self.task]

    @cached_property
    def expected(self) -> Expectation:
        """What the boundary expects of the answer."""
        job = self.honest.jobs[self.who, self.task]
        sender = replace(self.server, round=job.round, task=self.task)
        return expectation(sender, self.prepared.method, runner.reports_of(self.prepared), job)

    def received(self, answer: object) -> Entry:
        """The ledger's entry when the changed client alone is asked, and `answer` comes."""
        ledger = Ledger()
        job = self.honest.jobs[self.who, self.task]
        used = list(reorder_and_validate(lambda jobs: (answer for _ in jobs), [job], lambda _: self.expected, ledger))
        (entry,) = ledger.entries
        assert len(used) == (entry.failed is None)
        return entry

    def merged(self, answer: object) -> Server:
        """The server after this task, when `answer` comes with the honest ones of the others.

        Raises:
            AssertionError: scores of an evaluation that cannot be merged.
        """
        engine, ledger, reports = Replaying(self, answer), Ledger(), runner.reports_of(self.prepared)
        method = self.prepared.method
        if self.task != "evaluate":
            return next(federate(self.server, method, engine, ledger, rounds=1, clients_per_round=9, reports=reports))
        found = answers(self.server, method, engine, ledger, self.server.clients.values(), reports)
        together = merge(Scores.from_json(update.metrics.get("scores", {})) for update in found)
        assert all(0 <= value < 1e308 for values in together.by_task().values() for value in values.values())
        assert not together.tasks or 0 <= together.overall() < 1e308
        return self.server


@dataclass(frozen=True)
class Replaying:
    """An engine that brings the answers of before, but for `answer` in place of one."""

    task: Task
    answer: object

    def run(self, jobs: Iterable[Job]) -> Iterator[Any]:
        for job in jobs:
            honest = self.task.honest.answers[job.client, job.task]
            yield self.answer if job.client == self.task.who else honest


def played(tree: Mapping[str, Any], folder: Path) -> list[Task]:
    """All tasks of a run of one round with `tree`, whose clients keep what they keep in `folder`."""
    prepared = prepare_run(checked(RunConfig, dict(tree)), None, "", PARTS)
    honest, server, found = Changing(runtime_for(prepared, folder)), prepared.server, []
    reports = runner.reports_of(prepared)
    for _, task in steps(prepared.method, 1):
        asked = replace(server, clients=prepared.participants)
        found.append(Task(prepared, asked, task, honest))
        server = next(federate(asked, prepared.method, honest, Ledger(), rounds=1, clients_per_round=9, reports=reports))
    asked = replace(server, clients=prepared.server.clients, task="evaluate")
    list(answers(asked, prepared.method, honest, Ledger(), asked.clients.values(), reports))
    return [*found, Task(prepared, asked, "evaluate", honest)]


def tree_of(tree: Mapping[str, Any], **evaluation: Any) -> dict[str, Any]:
    """`tree` as a run of one round of three clients, which are measured in all ways; `evaluation`: other settings of that."""
    scoring = {"every": 1, "generate_tokens": 2, "retained": ["synthetic/sort"], "drift": True, **evaluation}
    federation, data = {**tree["federation"], "rounds": 1, "clients_per_round": 3}, {**tree["data"], "clients": 3}
    devices = {} if tree["method"]["name"] == "centralized" else {"memory_share": {"uniform": [1.0, 1.4]}}
    return {**tree, "federation": federation, "evaluation": scoring, "data": data, "devices": devices}
