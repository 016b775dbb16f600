"""Which client gets which examples: pure functions from labels and a seed to lists of indices, one list per client.

Each index goes to at most one client, except in dirichlet_draws. iid, dirichlet and quantity use every index, and so does by_task
if its `within` does; pathological leaves out the examples of labels that no client has.

Dirichlet over labels: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, https://arxiv.org/abs/1909.06335. Pathological: McMahan et al., 2017, https://arxiv.org/abs/1602.05629.
Draws with replacement: as in the public code of FLEx, Liu et al., 2025, https://arxiv.org/abs/2506.00965.
Dirichlet over clusters of texts: see clusters.py.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedexperts.data.templates import rows_with_label_names
from fedexperts.errors import BadData, BadValue, listed, nearest, shortened
from fedexperts.io.files import write_text

Indices = list[list[int]]
Divide = Callable[[Sequence[int], int, str], Indices]
"""From the indices of one task, a number of clients and a seed to their shares."""


def iid(number: int, clients: int, seed: str, minimum: int = 1) -> Indices:
    """Shuffled and dealt in turn; sizes differ by one at most."""
    require_enough(number, clients, minimum)
    order = shuffled(range(number), seed)
    return [sorted(order[client::clients]) for client in range(clients)]


def quantity(number: int, clients: int, alpha: float, seed: str, minimum: int = 1) -> Indices:
    """Examples at random; sizes are `minimum` plus a share of the rest, drawn from Dirichlet(`alpha`)."""
    require_enough(number, clients, minimum)
    shares = numpy_generator(seed).dirichlet([alpha] * clients)
    sizes = [minimum + more for more in apportion(shares, number - minimum * clients)]
    return [sorted(part) for part in consecutive_parts(shuffled(range(number), seed), sizes)]


def pathological(labels: Sequence[Hashable], clients: int, labels_per_client: int, seed: str, minimum: int = 1) -> Indices:
    """Each client gets `labels_per_client` labels, those of the fewest clients first; clients share a label evenly."""
    members = indices_by_value(labels)
    if labels_per_client > len(members):
        raise BadData(
            f"labels_per_client = {labels_per_client}, but the examples have {len(members)} labels; set labels_per_client to at"
            f" most {len(members)}"
        )
    rng, client_counts = Random(seed), Counter[Hashable]()
    clients_of_label = defaultdict(list)
    for client in range(clients):
        for label in sorted(members, key=lambda label: (client_counts[label], rng.random()))[:labels_per_client]:
            client_counts[label] += 1
            clients_of_label[label].append(client)
    parts: Indices = [[] for _ in range(clients)]
    for number, (label, label_clients) in enumerate(clients_of_label.items()):
        order = shuffled(members[label], f"{seed}/{number}")
        for turn, client in enumerate(label_clients):
            parts[client] += order[turn :: len(label_clients)]
    smallest = min(map(len, parts))
    if smallest < minimum:
        raise BadData(
            f"a client would get {smallest} of {len(labels)} examples if {clients} clients have {labels_per_client} labels each,"
            f" but each needs {minimum}; use fewer clients or give more data"
        )
    return [sorted(part) for part in parts]


def dirichlet(labels: Sequence[Hashable], clients: int, alpha: float, seed: str, minimum: int = 1) -> Indices:
    """Each label's examples go to clients in shares drawn from Dirichlet(`alpha`): the smaller alpha, the more uneven.

    A client with fewer than `minimum` is filled up, one example at a time, from the most frequent label of the largest client.
    """
    require_enough(len(labels), clients, minimum)
    rng = numpy_generator(seed)
    parts: list[dict[int, list[int]]] = [{} for _ in range(clients)]
    for label, members in enumerate(indices_by_value(labels).values()):
        sizes = apportion(rng.dirichlet([alpha] * clients), len(members))
        for client, share in enumerate(consecutive_parts(shuffled(members, f"{seed}/{label}"), sizes)):
            if share:
                parts[client][label] = share
    fill_up(parts, minimum)
    return [sorted(index for share in part.values() for index in share) for part in parts]


def dirichlet_draws(labels: Sequence[Hashable], clients: int, alpha: float, draws: int, seed: str, minimum: int = 1) -> Indices:
    """Each client draws `draws` examples with replacement, with its own shares of labels from Dirichlet(`alpha`).

    So all clients have equally many, several clients may have the same example, and one client may have it several times.
    """
    require_enough(len(labels), 1, minimum)
    if draws < minimum:
        raise BadData(f"each client would draw {draws} examples, but needs {minimum}; set draws to at least {minimum}")
    members = list(indices_by_value(labels).values())
    parts = []
    for client in range(clients):
        rng = numpy_generator(f"{seed}/{client}")
        counts = rng.multinomial(draws, rng.dirichlet([alpha] * len(members)))
        drawn = (rng.choice(indices, count) for indices, count in zip(members, counts, strict=True))
        parts.append(sorted(index for indices in drawn for index in indices.tolist()))
    return parts


def by_task(
    tasks: Sequence[str],
    clients: int,
    seed: str,
    clients_per_task: Mapping[str, int] | None = None,
    within: Divide | None = None,
    minimum: int = 1,
) -> Indices:
    """Each client gets one task, in the order of the tasks' first examples; `within` (default: iid) divides a task among clients.

    Raises:
        BadValue: `clients_per_task` names an unknown task, or its sum is not `clients`.
        BadData: fewer clients than tasks, or a task with too few examples for its clients.
    """
    members = indices_by_value(tasks)
    counts = clients_per_task or spread_clients(members, clients)
    if unknown := set(counts) - set(members):
        name = sorted(unknown)[0]
        raise BadValue(f"clients_per_task names {name}, but the tasks are {listed(members, 4)}{nearest(name, members)}")
    if sum(counts.values()) != clients:
        raise BadValue(f"clients_per_task gives {sum(counts.values())} clients, but there are {clients}; make them equal")
    parts: Indices = []
    for task in members:
        if count := counts.get(task, 0):
            parts += _one_task(members[task], task, count, f"{seed}/{task}", within, minimum)
    return parts


def _one_task(members: list[int], task: str, clients: int, seed: str, within: Divide | None, minimum: int) -> Indices:
    try:
        return within(members, clients, seed) if within else members_at(members, iid(len(members), clients, seed, minimum))
    except BadData as error:
        raise BadData(f"task {task}: {error}") from error


def spread_clients(members: Mapping[str, Sequence[int]], clients: int) -> dict[str, int]:
    """Task → number of clients, as even as possible: numbers differ by one at most, and the largest tasks have the larger one.

    Raises:
        BadData: fewer clients than tasks.
    """
    if clients < len(members):
        raise BadData(
            f"{clients} clients cannot cover {len(members)} tasks when each has one; use at least {len(members)} clients,"
            ' name fewer sources, give them one `task` name, or divide by "dirichlet" or "iid"'
        )
    largest = sorted(members, key=lambda task: -len(members[task]))[: clients % len(members)]
    return {task: clients // len(members) + (task in largest) for task in members}


@dataclass(frozen=True)
class Partition:
    """Indices per client, with the seed and the settings that they were made with."""

    indices: tuple[tuple[int, ...], ...]
    seed: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # JSON values

    @property
    def hash(self) -> str:
        """sha256 of the indices."""
        return hashlib.sha256(json.dumps(self.indices).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The manifest, as `save` writes it."""
        return {"seed": self.seed, "settings": dict(self.settings), "hash": self.hash, "indices": self.indices}

    def save(self, path: Path) -> None:
        """Writes the manifest; a reader sees the old file or the whole new one."""
        write_text(path, json.dumps(self.as_json()))

    @classmethod
    def load(cls, path: Path) -> "Partition":
        """The partition in a manifest.

        Raises:
            BadData: the file is no manifest, or its indices do not match its hash.
        """
        try:
            manifest = json.loads(path.read_text())
            indices = tuple(tuple(map(int, part)) for part in manifest["indices"])
            partition = cls(indices, manifest["seed"], manifest["settings"])
            if partition.hash != manifest["hash"]:
                raise ValueError("its indices do not match its hash")
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = shortened(f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error))
            raise BadData(f"{path} is no partition manifest ({reason}); write it again with Partition.save") from error
        return partition


@runtime_checkable
class Partitioner(Protocol):
    """Any object that gives the rows of each client, such as a partitioner of flwr-datasets."""

    def load_partition(self, partition_id: int) -> Iterable[Mapping[str, Any]]: ...


def from_object(partitioner: Partitioner, clients: int, label: str | None = None) -> tuple[list[dict[str, Any]], Partition]:
    """All rows that `partitioner` gives to clients 0 … `clients` - 1, and the partition that says which client has which.

    `load_partition(i)` must give client i's rows: mappings from field to value, in any iterable. A `datasets.Dataset` is one;
    if it has names of the classes in the field `label`, a row gets its `label_name`. `clients.clients_from_object` makes clients
    of a partitioner; to make Examples of the rows yourself, call this function and give them to `clients.clients_from`.

    Raises:
        BadValue: `partitioner` has no `load_partition`.
        BadData: a client without rows.
    """
    if not isinstance(partitioner, Partitioner):
        name = type(partitioner).__name__
        raise BadValue(f"{name} has no load_partition(i), which gives client i's rows; add it or give another object")
    parts = [rows_with_label_names(partitioner.load_partition(client), label) for client in range(clients)]
    if not all(parts):
        raise BadData(
            f"load_partition({parts.index([])}) gave no rows, but each of {clients} clients needs some; use fewer clients"
        )
    ends = [0, *accumulate(map(len, parts))]
    name = type(partitioner).__name__
    indices = tuple(tuple(range(start, end)) for start, end in pairwise(ends))
    return [row for part in parts for row in part], Partition(indices, settings={"by": name})


def fill_up(parts: Sequence[dict[int, list[int]]], minimum: int) -> None:
    """Moves examples, in place, from the largest parts to those below `minimum`; there must be enough in all.

    `parts` has for each client label → indices. Of equally large parts the first gives, of equally frequent labels the first.
    """
    sizes = [sum(map(len, part.values())) for part in parts]
    largest_first = [(-size, client) for client, size in enumerate(sizes)]
    heapify(largest_first)
    for client, size in enumerate(sizes):
        for _ in range(size, minimum):
            negative_size, donor = largest_first[0]
            label = max(parts[donor], key=lambda label: len(parts[donor][label]))
            parts[client].setdefault(label, []).append(parts[donor][label].pop())
            heapreplace(largest_first, (negative_size + 1, donor))  # while a client has too few, the largest has enough to give


def require_enough(number: int, clients: int, minimum: int) -> None:
    """Raises BadData if `number` examples are too few to give each client its minimum."""
    if number < minimum:
        raise BadData(
            f"a client needs at least {minimum} different examples, but there are {number} for {clients} clients; give more data"
        )
    if number < clients * minimum:
        raise BadData(
            f"{clients} clients of at least {minimum} examples need {clients * minimum}, but there are {number};"
            f" use at most {number // minimum} clients or give more data"
        )


def apportion(shares: Iterable[float], number: int) -> list[int]:
    """Whole numbers in proportion to `shares` with the sum `number`: the largest remainders are rounded up.

    Of equal remainders the first ones are rounded up.
    """
    exact = np.asarray(list(shares), dtype=np.float64)
    exact = exact / exact.sum() * number
    whole = np.floor(exact).astype(int)
    up = np.argsort(whole - exact, kind="stable")[: number - whole.sum()]
    whole[up] += 1
    return [int(count) for count in whole]


def indices_by_value(values: Sequence[Hashable]) -> dict[Any, list[int]]:
    """Value → its indices, in the order of the values' first occurrences."""
    members = defaultdict(list)
    for index, value in enumerate(values):
        members[value].append(index)
    return dict(members)


def members_at(members: Sequence[int], parts: Indices) -> Indices:
    """`parts`, which are lists of positions in `members`, as lists of the members themselves."""
    return [[members[position] for position in part] for part in parts]


def consecutive_parts(order: Sequence[int], sizes: Sequence[int]) -> Indices:
    """`order` cut into consecutive parts of these sizes."""
    ends = [0, *accumulate(sizes)]
    return [list(order[start:end]) for start, end in pairwise(ends)]


def shuffled(values: Iterable[int], seed: str) -> list[int]:
    """`values` in a random order that only `seed` decides."""
    order = list(values)
    Random(seed).shuffle(order)
    return order


def numpy_generator(seed: str) -> np.random.Generator:
    """numpy's generator for a seed that is a string."""
    return np.random.default_rng(Random(seed).getrandbits(64))
