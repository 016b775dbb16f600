"""Progress of a run: a bar on a terminal, one line per evaluation elsewhere, or nothing."""

from collections.abc import Iterator, Mapping
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from fedexperts.core.evaluation import Scores
from fedexperts.core.ledger import Entry
from fedexperts.types import Server


class Progress(Protocol):
    """Receives the events of a run."""

    shows: bool  # whether it prints anything

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def answered(self, entry: Entry) -> None: ...
    def say(self, sentence: str) -> None: ...
    def start(self, label: str, seed: int, done: int, total: int) -> None: ...
    def evaluating(self, clients: int) -> None: ...
    def scored(self, server: Server, scores: Scores) -> None: ...
    def failed(self, server: Server, reasons: Mapping[str, str]) -> None: ...
    def noted(self, server: Server, sentence: str) -> None: ...
    def round(self, server: Server) -> None: ...


class Quiet:
    """Shows nothing."""

    shows = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answered(self, entry: Entry) -> None:
        pass

    def say(self, sentence: str) -> None:
        pass

    def start(self, label: str, seed: int, done: int, total: int) -> None:
        pass

    def evaluating(self, clients: int) -> None:
        pass

    def scored(self, server: Server, scores: Scores) -> None:
        pass

    def failed(self, server: Server, reasons: Mapping[str, str]) -> None:
        pass

    def noted(self, server: Server, sentence: str) -> None:
        pass

    def round(self, server: Server) -> None:
        pass


class Bar(RichProgress):
    """The run's name, a bar of its rounds with the time left, and the last event; lines are cut to the terminal's width."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=40)),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield Text(task.fields["label"], no_wrap=True, overflow="ellipsis")
            yield self.make_tasks_table([task])
            yield Text(task.fields["now"], no_wrap=True, overflow="ellipsis")


class Shown:
    """The bar with the last answer; a line for each evaluation and each failed client."""

    shows = True

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Bar(console)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, sentence: str) -> None:
        """Prints a permanent line, without wrapping."""
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def start(self, label: str, seed: int, done: int, total: int) -> None:
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        self.label = f"{label}, seed {seed}"
        self.answers = 0  # in the current round or evaluation
        self.task = self.bar.add_task("", total=total, completed=done, label=self.label, now="")
        if done:
            self.say(f"{self.label}: {done} of {total} rounds are done already")

    def evaluating(self, clients: int) -> None:
        self.answers = 0
        self.bar.update(self.task, now=f"evaluating {clients} clients")

    def scored(self, server: Server, scores: Scores) -> None:
        by_task = ", ".join(f"{task} {scores.main(task):.3f}" for task in scores.tasks)
        self.say(f"{self.label}, round {server.round}: {by_task}")

    def failed(self, server: Server, reasons: Mapping[str, str]) -> None:
        for client, reason in reasons.items():
            self.say(f"round {server.round}: {client} failed in {server.task} and is left out: {reason}")

    def noted(self, server: Server, sentence: str) -> None:
        self.say(f"{self.label}, round {server.round}: {sentence}")

    def round(self, server: Server) -> None:
        self.answers = 0
        if server.round:  # a setup task is no round
            self.bar.advance(self.task)

    def answered(self, entry: Entry) -> None:
        self.answers += 1
        parts = [f"round {entry.round}, {entry.task}: {entry.client}, {self.answers} answered"]
        if entry.failed:
            parts.append("failed")
        else:
            parts += [f"loss {entry.loss:.3f}"] if entry.loss is not None else []
            parts += [f"{entry.tokens / entry.seconds:,.0f} tokens/s"] if entry.tokens and entry.seconds else []
        self.bar.update(self.task, now=", ".join(parts))
