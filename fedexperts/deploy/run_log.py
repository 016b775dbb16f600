"""The events of a run in the log of a deployment."""

import logging
from collections.abc import Mapping
from time import perf_counter
from typing import Any, Self

from fedexperts.core.evaluation import Scores
from fedexperts.core.ledger import Entry
from fedexperts.deploy.logs import say
from fedexperts.deploy.status import Status
from fedexperts.io.manifest import finite
from fedexperts.types import Server


class RunLog:
    """Logs the events of a run (a `Progress`): a line for each round and evaluation, and, at the level DEBUG, for each answer.

    It keeps `status` up to date.
    """

    shows = True

    def __init__(self, status: Status | None = None) -> None:
        self.status = status or Status()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, sentence: str) -> None:
        note(logging.INFO, sentence)

    def start(self, label: str, seed: int, done: int, total: int) -> None:
        self.entries: list[Entry] = []
        self.started = perf_counter()
        with self.status.changing() as status:
            status.method, status.seed = label, seed
            status.steps_done, status.steps = done, total
        note(
            logging.INFO,
            f"{label}, seed {seed}: {done} of {total} rounds are done",
            method=label,
            seed=seed,
            done=done,
            total=total,
        )

    def connected(self) -> None:
        """Clients need not be waited for any more."""
        with self.status.changing() as status:
            status.state = "running"

    def answered(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.status.answered(entry)
        what = f"round {entry.round}, {entry.task}: {entry.client}"
        if entry.failed is None:
            note(
                logging.DEBUG,
                f"{what} answered: {amounts(entry.loss, entry.bytes_down, entry.bytes_up, entry.seconds)}",
                **fields(entry),
            )
        else:
            note(logging.DEBUG, f"{what} failed: {entry.failed}", **fields(entry))

    def evaluating(self, clients: int) -> None:
        note(logging.DEBUG, f"evaluating {clients} clients", clients=clients)

    def scored(self, server: Server, scores: Scores) -> None:
        by_task = {task: scores.main(task) for task in scores.tasks}
        with self.status.changing() as status:
            status.scores = by_task
        text = ", ".join(f"{task} {score:.3f}" for task, score in by_task.items())
        note(logging.INFO, f"round {server.round}, scores: {text}", round=server.round, scores=by_task)
        self.entries, self.started = [], perf_counter()  # the next round begins here

    def failed(self, server: Server, reasons: Mapping[str, str]) -> None:
        for client, reason in reasons.items():
            sentence = f"round {server.round}: {client} failed in {server.task} and is left out: {reason}"
            note(logging.WARNING, sentence, round=server.round, task=server.task, client=client, failed=reason)

    def noted(self, server: Server, sentence: str) -> None:
        note(logging.WARNING, f"round {server.round}: {sentence}", round=server.round)

    def round(self, server: Server) -> None:
        entries, seconds = [entry for entry in self.entries if entry.task == server.task], perf_counter() - self.started
        losses = [entry.loss for entry in entries if entry.loss is not None and not entry.failed]
        loss = sum(losses) / len(losses) if losses else None
        down, up = sum(entry.bytes_down for entry in entries), sum(entry.bytes_up for entry in entries)
        failures = {entry.client: entry.failed for entry in entries if entry.failed}
        clients = {entry.client for entry in entries}
        with self.status.changing() as status:
            status.round, status.loss, status.round_seconds = server.round, loss, seconds
            status.steps_done += server.task == "train"
        numbers = {"loss": loss, "bytes_down": down, "bytes_up": up, "seconds": round(seconds, 3), "failures": failures}
        sentence = f"round {server.round}, {server.task}: {len(clients)} clients, {len(failures)} failed, "
        note(
            logging.INFO,
            sentence + amounts(loss, down, up, seconds),
            round=server.round,
            task=server.task,
            clients=sorted(clients),
            **numbers,
        )
        self.entries, self.started = [], perf_counter()


def fields(entry: Entry) -> dict[str, Any]:
    """What the JSON line of an answer has of it."""
    names = ("round", "task", "client", "loss", "bytes_down", "bytes_up", "seconds", "tokens", "failed")
    return {name: getattr(entry, name) for name in names}


def amounts(loss: float | None, bytes_down: int, bytes_up: int, seconds: float) -> str:
    """Loss, traffic and time, as a line has them; without the loss where there is none."""
    numbers = f"{bytes_down / 1e6:.2f} MB down, {bytes_up / 1e6:.2f} MB up, {seconds:.1f} s"
    return numbers if loss is None else f"loss {loss:.4f}, {numbers}"


def note(level: int, sentence: str, **numbers: Any) -> None:
    say(level, sentence, **finite(numbers))
