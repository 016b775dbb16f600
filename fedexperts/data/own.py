"""Clients that bring their own data: what such a client reports of it, and what the server works with in its place."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import Field

from fedexperts.data.clients import Clients, Shares, make_clients
from fedexperts.data.division import IID
from fedexperts.data.partition import Partition
from fedexperts.data.pool import Pool, Retained, load_pool, without_retained
from fedexperts.data.settings import PLAIN, DataSettings, SourceSettings
from fedexperts.data.templates import Frame, Hints, asked
from fedexperts.types import Example

Part = Annotated[str, Field(max_length=10_000)]


@dataclass(frozen=True)
class Counts:
    """What a client that brings its own data reports of it to the server."""

    train: Mapping[str, int]  # task → number of examples
    validation: int
    test: int
    longest_response: int  # in tokens, its end token included
    metrics: Mapping[str, str] = field(default_factory=dict)  # task → the main metric that validation and test examples have
    frames: Mapping[str, tuple[Part, Part] | None] = field(default_factory=dict)  # task → what its prompts begin and end with


def own_clients(
    name: str,
    files: Sequence[str],
    settings: DataSettings,
    seed: int | str,
    retained: Retained,
    fitting: Callable[[Pool], Pool] = lambda pool: pool,
) -> Clients:
    """The client `name` alone, with all rows of `files`, which are read as the only source of `settings` says.

    fitting: what becomes of examples that are too long.

    Raises:
        BadData: files that cannot be read, too few examples in them, or examples that are too long and not to be cut.
    """
    sources = tuple(settings.sources[0].model_copy(update={"name": file, "test": None, "folder": None}) for file in files)
    own = settings.model_copy(update={"sources": sources, "clients": 1, "names": (name,), "partition": IID})
    return make_clients(own, f"{seed}/{name}", fitting(without_retained(load_pool(own), retained)))


def counts(clients: Clients, name: str, longest_response: int) -> Counts:
    """The counts of the examples of client `name`."""
    share = clients.shares[name]
    return Counts(
        clients.tasks(name), len(share.validation), len(share.test), longest_response, clients.metrics(), frames(clients)
    )


def frames(clients: Clients) -> dict[str, Frame | None]:
    """The frame of each task whose prompts have nothing of the rows in it: of questions with options it may have their text."""
    with_options = {example.task for example in clients.pool.train if example.choices and example.label is None}
    return {task: frame for task, frame in clients.pool.frames.items() if task not in with_options}


def placeholder_clients(reported: Mapping[str, Counts], source: SourceSettings | None = None) -> Clients:
    """Clients of which the server knows only the reported counts: each example is an empty one of its task.

    source: says how all clients' rows are asked, with a template of its own; None: as plain prompts.
    """
    hints = Hints("", system=source.system, template=source.template or PLAIN) if source else Hints("")
    train: list[Example] = []
    test: list[Example] = []
    shares: dict[str, Shares] = {}
    for name, count in reported.items():
        start, main_task = len(train), max(count.train, key=lambda task: count.train[task])
        train += [_placeholder(task, count, hints) for task, number in count.train.items() for _ in range(number)]
        validation_start = len(train)
        train += [_placeholder(main_task, count, hints)] * count.validation
        test_indices = range(len(test), len(test) + count.test)
        test += [Example("", "", main_task)] * count.test
        shares[name] = Shares(
            tuple(range(start, validation_start)), tuple(range(validation_start, len(train))), tuple(test_indices)
        )
    indices = tuple(share.train + share.validation for share in shares.values())
    metrics = {task: metric for count in reported.values() for task, metric in count.metrics.items()}
    pool = Pool(tuple(train), tuple(test), {}, frames=_agreed_frames(reported.values()))
    return Clients(pool, shares, Partition(indices, "", {"by": "own"}), metrics)


def _placeholder(task: str, count: Counts, hints: Hints) -> Example:
    """An empty example, with an empty question where a chat template asks it."""
    if hints.plain or count.frames.get(task) is None:
        return Example("", "", task)
    return replace(asked(Example("?", "", task), hints), prompt="")


def _agreed_frames(reported: Collection[Counts]) -> dict[str, Frame | None]:
    """The frames that all clients with the task reported."""
    frames: dict[str, set[Frame | None]] = {}
    for count in reported:
        for task in count.train:
            frames.setdefault(task, set()).add(count.frames.get(task))
    known = {task for count in reported for task in count.frames}
    return {task: next(iter(some)) for task, some in frames.items() if task in known and len(some) == 1}
