"""Clients that bring their own data: what such a client reports of it, and what the server works with in its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedexperts.data.clients import Clients, Shares, make_clients
from fedexperts.data.division import IID
from fedexperts.data.partition import Partition
from fedexperts.data.pool import Pool, Retained, load_pool, without_retained
from fedexperts.data.settings import DataSettings
from fedexperts.types import Example


@dataclass(frozen=True)
class Counts:
    """What a client that brings its own data reports of it to the server."""

    train: Mapping[str, int]  # task → number of examples
    validation: int
    test: int
    longest_response: int  # in tokens, its end token included
    metrics: Mapping[str, str] = field(default_factory=dict)  # task → the main metric that validation and test examples have


def own_clients(name: str, files: Sequence[str], settings: DataSettings, seed: int | str, retained: Retained) -> Clients:
    """The client `name` alone, with all rows of `files`, which are read as the only source of `settings` says.

    Raises:
        BadData: files that cannot be read, or too few examples in them.
    """
    sources = tuple(settings.sources[0].model_copy(update={"name": file, "test": None, "folder": None}) for file in files)
    own = settings.model_copy(update={"sources": sources, "clients": 1, "names": (name,), "partition": IID})
    return make_clients(own, f"{seed}/{name}", without_retained(load_pool(own), retained))


def counts(clients: Clients, name: str, longest_response: int) -> Counts:
    """The counts of the examples of client `name`."""
    share = clients.shares[name]
    return Counts(clients.tasks(name), len(share.validation), len(share.test), longest_response, clients.metrics())


def placeholder_clients(reported: Mapping[str, Counts]) -> Clients:
    """Clients of which the server knows only the reported counts: each example is an empty one of its task."""
    train: list[Example] = []
    test: list[Example] = []
    shares: dict[str, Shares] = {}
    for name, count in reported.items():
        start, main_task = len(train), max(count.train, key=lambda task: count.train[task])
        train += [Example("", "", task) for task, number in count.train.items() for _ in range(number)]
        validation_start = len(train)
        train += [Example("", "", main_task)] * count.validation
        test_indices = range(len(test), len(test) + count.test)
        test += [Example("", "", main_task)] * count.test
        shares[name] = Shares(
            tuple(range(start, validation_start)), tuple(range(validation_start, len(train))), tuple(test_indices)
        )
    indices = tuple(share.train + share.validation for share in shares.values())
    metrics = {task: metric for count in reported.values() for task, metric in count.metrics.items()}
    return Clients(Pool(tuple(train), tuple(test), {}), shares, Partition(indices, "", {"by": "own"}), metrics)
