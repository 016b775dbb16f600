"""What a run shows while it works: a bar on a terminal, a line a round elsewhere, or nothing."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from fedexperts.evaluate import Scores
from fedexperts.types import Engine, Failure, Job, Server, Update


class Progress(Protocol):
    """Told of everything that happens in a run."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def watch(self, engine: Engine) -> Engine: ...
    def start(self, label: str, seed: int, done: int, total: int) -> None: ...
    def evaluating(self, clients: int) -> None: ...
    def scored(self, server: Server, scores: Scores) -> None: ...
    def failed(self, server: Server, reasons: Mapping[str, str]) -> None: ...
    def noted(self, server: Server, sentence: str) -> None: ...
    def round(self, server: Server) -> None: ...


class Quiet:
    """Nothing is shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def watch(self, engine: Engine) -> Engine:
        return engine

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


class Shown:
    """A bar of the rounds with the client that answered last; a line for each evaluation and each failed client."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = RichProgress(
            TextColumn("{task.fields[label]}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def watch(self, engine: Engine) -> Engine:
        return Watched(engine, self)

    def start(self, label: str, seed: int, done: int, total: int) -> None:
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        self.label = f"{label}, seed {seed}"
        self.task = self.bar.add_task("", total=total, completed=done, label=self.label, now="")
        if done:
            self.console.print(f"{self.label}: {done} of {total} rounds are done already", markup=False, highlight=False)

    def evaluating(self, clients: int) -> None:
        self.bar.update(self.task, now=f"evaluating {clients} clients")

    def scored(self, server: Server, scores: Scores) -> None:
        by_task = ", ".join(f"{task} {scores.main(task):.3f}" for task in scores.tasks)
        self.console.print(f"{self.label}, round {server.round}: {by_task}", markup=False, highlight=False)

    def failed(self, server: Server, reasons: Mapping[str, str]) -> None:
        for client, reason in reasons.items():
            self.console.print(
                f"round {server.round}: {client} failed in {server.task} and is left out: {reason}", highlight=False, markup=False
            )

    def noted(self, server: Server, sentence: str) -> None:
        self.console.print(f"{self.label}, round {server.round}: {sentence}", highlight=False, markup=False)

    def round(self, server: Server) -> None:
        self.bar.advance(self.task)

    def answered(self, answer: Update | Failure) -> None:
        if isinstance(answer, Failure):
            return
        cost = answer.cost
        speed = f" {cost.tokens / cost.seconds:,.0f} tokens/s" if cost.seconds else ""
        loss = f" loss {answer.metrics['loss']:.3f}" if "loss" in answer.metrics else ""
        self.bar.update(self.task, now=f"{answer.task} {answer.client}{loss}{speed}")


class Watched:
    """An engine whose answers are shown as they pass."""

    def __init__(self, engine: Engine, shown: Shown) -> None:
        self.engine, self.shown = engine, shown

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        for answer in self.engine.run(jobs):
            self.shown.answered(answer)
            yield answer
            del answer  # or it would be held until the next one has come
