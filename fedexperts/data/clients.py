"""From the `data` table of a run to clients, each with its own training, validation and test examples.

Nothing leaks: no test prompt of any client is among the training or validation prompts of any client (see `pool`), and no two
clients share a training prompt, unless they draw with replacement (`partition.draws`): then one client may validate on what
another trains on.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedexperts.data.division import Dealer, Groups, divide_train, group_examples
from fedexperts.data.fields import Row
from fedexperts.data.partition import Partition, Partitioner, from_object, shuffled
from fedexperts.data.pool import Pool, check_metric, deduplicated_pool, duplicate_key, load_pool
from fedexperts.data.readers import LocatedRow
from fedexperts.data.settings import DataSettings, SourceSettings
from fedexperts.data.sources import examples_from
from fedexperts.data.templates import rows_with_label_names
from fedexperts.errors import BadData
from fedexperts.io.files import write_text
from fedexperts.types import Client, Example, Split


@dataclass(frozen=True)
class Shares:
    """Indices of one client: training and validation into the training examples of the pool, test into its test examples."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class Clients(Mapping[str, Split]):
    """Name → examples. Holds indices into one pool; the Split of a client is made on each access."""

    pool: Pool
    shares: Mapping[str, Shares]
    partition: Partition
    task_metrics: Mapping[str, str] = field(default_factory=dict)  # of examples that are not here: task → its main metric

    def __getitem__(self, name: str) -> Split:
        share = self.shares[name]
        return Split(
            train=tuple(self.pool.train[index] for index in share.train),
            validation=tuple(self.pool.train[index] for index in share.validation),
            test=tuple(self.pool.test[index] for index in share.test),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.shares)

    def __len__(self) -> int:
        return len(self.shares)

    def tasks(self, name: str) -> dict[str, int]:
        """Task → number of training examples of the client, the largest first."""
        return dict(Counter(self.pool.train[index].task for index in self.shares[name].train).most_common())

    def metrics(self) -> dict[str, str]:
        """Task → its main metric, of all examples that clients are scored on."""
        scored = (example for split in self.values() for part in (split.validation, split.test) for example in part)
        return dict(self.task_metrics) or {example.task: example.metric for example in scored}

    def client(self, name: str) -> Client:
        """What the server may know of the client's data; its device is not described."""
        return Client(name, len(self.shares[name].train), task=next(iter(self.tasks(name))))

    def as_one_client(self) -> "Clients":
        """One client with the examples of all in their order, named after the first and the last: c01-c30, or c01 if alone."""
        names, shares = list(self.shares), self.shares.values()
        union = Shares(
            train=tuple(index for share in shares for index in share.train),
            validation=tuple(index for share in shares for index in share.validation),
            test=tuple(index for share in shares for index in share.test),
        )
        return replace(self, shares={"-".join(dict.fromkeys((names[0], names[-1]))): union})

    @property
    def hashes(self) -> Mapping[str, str]:
        """Source → sha256 of what was read."""
        return self.pool.hashes

    def manifest(self) -> dict[str, Any]:
        """Which client has which examples of what data, as JSON: the partition, and three lists of indices for each client."""
        return {
            "hashes": dict(self.hashes),
            "left_out": self.pool.left_out,
            "partition": self.partition.as_json(),
            "clients": {name: vars(share) for name, share in self.shares.items()},
            "prompts": self.prompts(),
        }

    def prompts(self) -> dict[str, Any]:
        """Task → how it is asked, as JSON: what its prompts begin and end with (None: a text is continued), its choices, and,
        where turns are rendered, their chat template (None: the tokenizer's) and the system message if all have the same.
        """
        first: dict[str, Example] = {}
        systems: dict[str, set[str | None]] = {}
        for example in self.pool.train:
            first.setdefault(example.task, example)
            systems.setdefault(example.task, set()).add(_system(example))
        frames = self.pool.frames
        forms: dict[str, dict[str, Any]] = {
            task: {"frame": frames[task], "choices": example.choices} for task, example in first.items() if task in frames
        }
        for task in forms:
            if first[task].turns:
                system = next(iter(systems[task])) if len(systems[task]) == 1 else None
                forms[task]["chat"] = {"template": first[task].template, "system": system}
        return forms

    def save(self, path: Path) -> None:
        """Writes the manifest; a reader sees the old file or the whole new one."""
        write_text(path, json.dumps(self.manifest()))


def make_clients(settings: DataSettings, seed: int | str, pool: Pool | None = None) -> Clients:
    """Loads all sources, unless `pool` has their examples already, and divides them among clients.

    The seed decides which client gets which examples, never which examples are loaded.

    Raises:
        BadData: data that cannot be read, or too little of it for so many clients.
    """
    pool = pool or load_pool(settings)
    groups = group_examples(pool, settings.partition, str(seed))
    indices = divide_train(pool, groups, settings, str(seed))
    partition = Partition(tuple(map(tuple, indices)), str(seed), settings.partition.model_dump())
    return _clients(pool, partition, groups, settings)


def divide(pool: Pool, partition: Partition, settings: DataSettings) -> Clients:
    """Clients of a partition that was made before; its indices are those of `pool.train`.

    Raises:
        BadData: the partition has indices beyond the pool, or a client with too few examples.
    """
    if max((index for part in partition.indices for index in part), default=-1) >= len(pool.train):
        raise BadData(
            f"the partition has indices beyond the {len(pool.train)} training examples, so it was made of other data;"
            " give the data that it was made of, or make a new partition"
        )
    return _clients(pool, partition, group_examples(pool, settings.partition, partition.seed), settings)


def clients_from_object(partitioner: Partitioner, source: SourceSettings, test: Iterable[Row], settings: DataSettings) -> Clients:
    """Clients whose rows come from `partitioner.load_partition(i)`, for i from 0 to `settings.clients` - 1.

    Rows (of a `datasets.Dataset` or any other iterable of mappings) become examples as those of a file do: by the fields that
    `source` names, or by their own. The task is `source.task`, or else `source.name`, by which nothing is loaded; limits do not
    apply. Of `settings` neither the sources nor the partition are used; the examples of `test` are dealt as always.

    Raises:
        BadValue: no `load_partition`, or a metric that does not exist.
        BadData: a client without rows, or a row that cannot be read, named by client and row.
    """
    check_metric(source)
    rows, partition = from_object(partitioner, settings.clients, source.label)
    train = [
        LocatedRow(rows[index], f"load_partition({client}), row {number}")
        for client, part in enumerate(partition.indices)
        for number, index in enumerate(part, 1)
    ]
    tests = [LocatedRow(row, f"test row {number}") for number, row in enumerate(rows_with_label_names(test, source.label), 1)]
    examples = examples_from(source, train, tests)
    return clients_from(examples.train, partition, examples.test, settings, {source.name: examples.hash})


def clients_from(
    train: Sequence[Example],
    partition: Partition,
    test: Sequence[Example],
    settings: DataSettings,
    hashes: Mapping[str, str] | None = None,
) -> Clients:
    """Clients of a partition made elsewhere (`partition.from_object`); its indices are those of `train`.

    Repeats are left out here too: of two clients with the same example the first keeps it.
    """
    pool = deduplicated_pool(train, test, hashes)
    pool_indices = {duplicate_key(example): index for index, example in enumerate(pool.train)}
    new_indices = [pool_indices.pop(duplicate_key(example), None) for example in train]
    indices = tuple(tuple(new for index in part if (new := new_indices[index]) is not None) for part in partition.indices)
    return divide(pool, replace(partition, indices=indices), settings)


def _system(example: Example) -> str | None:
    """The system message of an example with turns, if it has one."""
    return next((turn.content for turn in example.turns[:1] if turn.role == "system"), None)


def _clients(pool: Pool, partition: Partition, groups: Groups, settings: DataSettings) -> Clients:
    """Each client's indices divided into training and validation, with test examples that resemble them."""
    digits = max(2, len(str(len(partition.indices))))
    names = settings.names or [f"c{number:0{digits}}" for number in range(1, len(partition.indices) + 1)]
    test_examples = Dealer(pool, groups, partition.seed)
    shares = {}
    for name, part in zip(names, partition.indices, strict=True):
        different = list(dict.fromkeys(part))
        if len(different) < 2:
            raise BadData(
                f"client {name} has {len(different)} examples, but needs 1 for training and 1 for validation; use fewer clients"
                " or give more data"
            )
        number = min(max(1, round(settings.validation * len(different))), len(different) - 1)
        validation = set(shuffled(different, f"{partition.seed}/{name}/validation")[:number])
        test = test_examples.like(part, settings.test_examples)
        if not test:
            raise BadData(f"client {name} has no test example of its tasks; give its source a test split")
        train = tuple(sorted(index for index in part if index not in validation))
        shares[name] = Shares(train, tuple(sorted(validation)), tuple(test))
    return Clients(pool, shares, partition)
