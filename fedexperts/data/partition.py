"""Who gets which examples: pure functions from labels and a seed to lists of indices, one list per client.

Each index is given at most once, but by dirichlet_draws. iid, dirichlet, clusters and quantity give every index away, and so does
by_task if its `within` does; pathological leaves out what belongs to labels that nobody holds.

Dirichlet over labels: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, https://arxiv.org/abs/1909.06335. Pathological: McMahan et al., 2017, https://arxiv.org/abs/1602.05629.
Draws with replacement: as in the public code of FLEx, Liu et al., 2025, https://arxiv.org/abs/2506.00965.
Dirichlet over clusters of texts: Lin et al., "FedNLP", 2022, https://arxiv.org/abs/2104.08815 (there sentence embeddings;
here TF-IDF, which needs no model).
"""

import hashlib
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from fedexperts.data.templates import rows_of
from fedexperts.errors import BadData, BadValue, nearest
from fedexperts.io.files import write_text

Indices = list[list[int]]
Divide = Callable[[Sequence[int], int, str], Indices]
"""From the indices of one task, a number of clients and a seed to their shares."""


def iid(number: int, clients: int, seed: str, minimum: int = 1) -> Indices:
    """Shuffled and dealt out; sizes differ by one at most."""
    enough(number, clients, minimum)
    order = shuffled(range(number), seed)
    return [sorted(order[client::clients]) for client in range(clients)]


def quantity(number: int, clients: int, alpha: float, seed: str, minimum: int = 1) -> Indices:
    """Contents at random; sizes are `minimum` plus a share of the rest drawn from Dirichlet(`alpha`)."""
    enough(number, clients, minimum)
    shares = generator(seed).dirichlet([alpha] * clients)
    sizes = [minimum + more for more in apportion(shares, number - minimum * clients)]
    return [sorted(part) for part in pieces(shuffled(range(number), seed), sizes)]


def pathological(labels: Sequence[Hashable], clients: int, labels_per_client: int, seed: str, minimum: int = 1) -> Indices:
    """Each client holds `labels_per_client` labels, the least held ones first; holders share a label evenly."""
    members = by_value(labels)
    if labels_per_client > len(members):
        raise BadData(
            f"each client was to hold {labels_per_client} labels, but there are {len(members)}; give fewer labels_per_client"
        )
    rng, held = Random(seed), Counter[Hashable]()
    holders = defaultdict(list)
    for client in range(clients):
        for label in sorted(members, key=lambda label: (held[label], rng.random()))[:labels_per_client]:
            held[label] += 1
            holders[label].append(client)
    parts: Indices = [[] for _ in range(clients)]
    for place, (label, who) in enumerate(holders.items()):
        order = shuffled(members[label], f"{seed}/{place}")
        for turn, client in enumerate(who):
            parts[client] += order[turn :: len(who)]
    smallest = min(map(len, parts))
    if smallest < minimum:
        raise BadData(
            f"a client would get {smallest} of {len(labels)} examples when {clients} clients hold {labels_per_client} labels"
            f" each, but each needs {minimum}; ask for fewer clients or give more data"
        )
    return [sorted(part) for part in parts]


def dirichlet(labels: Sequence[Hashable], clients: int, alpha: float, seed: str, minimum: int = 1) -> Indices:
    """Each label's examples go to clients in shares drawn from Dirichlet(`alpha`): the smaller, the more lopsided.

    A client left with fewer than `minimum` is filled up by the largest client at that time, from its most frequent label.
    """
    enough(len(labels), clients, minimum)
    rng = generator(seed)
    parts: list[dict[int, list[int]]] = [{} for _ in range(clients)]
    for place, members in enumerate(by_value(labels).values()):
        sizes = apportion(rng.dirichlet([alpha] * clients), len(members))
        for client, piece in enumerate(pieces(shuffled(members, f"{seed}/{place}"), sizes)):
            if piece:
                parts[client][place] = piece
    fill_up(parts, minimum)
    return [sorted(index for piece in part.values() for index in piece) for part in parts]


def dirichlet_draws(labels: Sequence[Hashable], clients: int, alpha: float, draws: int, seed: str, minimum: int = 1) -> Indices:
    """Each client draws `draws` examples with replacement, labels in shares of its own from Dirichlet(`alpha`).

    So all have as many, several have the same, and in one client an example may come again.
    """
    enough(len(labels), 1, minimum)
    if draws < minimum:
        raise BadData(f"each client would draw {draws} examples, but needs {minimum}; raise draws")
    members = list(by_value(labels).values())
    parts = []
    for client in range(clients):
        rng = generator(f"{seed}/{client}")
        counts = rng.multinomial(draws, rng.dirichlet([alpha] * len(members)))
        drawn = (rng.choice(each, count) for each, count in zip(members, counts, strict=True))
        parts.append(sorted(index for piece in drawn for index in piece.tolist()))
    return parts


def by_task(
    tasks: Sequence[str],
    clients: int,
    seed: str,
    clients_per_task: Mapping[str, int] | None = None,
    within: Divide | None = None,
    minimum: int = 1,
) -> Indices:
    """Each client gets one task, tasks in the order they appear; `within` divides a task among its clients, iid unless told."""
    members = by_value(tasks)
    counts = clients_per_task or spread(members, clients)
    if unknown := set(counts) - set(members):
        name = sorted(unknown)[0]
        raise BadValue(f"clients_per_task names {name}, but the tasks are {', '.join(members)}{nearest(name, members)}")
    if sum(counts.values()) != clients:
        raise BadValue(f"clients_per_task gives {sum(counts.values())} clients, but there are {clients}; make them equal")
    parts: Indices = []
    for task in members:
        if count := counts.get(task, 0):
            parts += _one_task(members[task], task, count, f"{seed}/{task}", within, minimum)
    return parts


def _one_task(members: list[int], task: str, clients: int, seed: str, within: Divide | None, minimum: int) -> Indices:
    try:
        return within(members, clients, seed) if within else at(members, iid(len(members), clients, seed, minimum))
    except BadData as error:
        raise BadData(f"task {task}: {error}") from error


def spread(members: Mapping[str, Sequence[int]], clients: int) -> dict[str, int]:
    """Clients per task, as even as it goes; what is left over goes to the largest tasks."""
    if clients < len(members):
        raise BadData(
            f"{clients} clients cannot cover {len(members)} tasks when each has one; ask for at least {len(members)} clients,"
            ' name fewer sources, give them one `task` name, or divide by "dirichlet" or "iid"'
        )
    largest = sorted(members, key=lambda task: -len(members[task]))[: clients % len(members)]
    return {task: clients // len(members) + (task in largest) for task in members}


class Clusters:
    """K-means clusters of texts (TF-IDF, 50 singular directions), fitted once; other texts go to the nearest.

    One thread: with more, sums come in another order and a text on the border may change sides.
    """

    def __init__(self, texts: Sequence[str], clusters: int, seed: str) -> None:
        state = Random(seed).getrandbits(31)
        self.words = TfidfVectorizer(token_pattern=r"\S+", max_features=20_000, sublinear_tf=True)
        with threadpool_limits(limits=1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct texts than clusters: some stay empty
            counted = self.words.fit_transform(texts)
            width = min(50, counted.shape[1] - 1, len(texts) - 1)
            self.directions = TruncatedSVD(width, random_state=state).fit(counted) if width > 0 else None
            self.means = KMeans(min(clusters, len(texts)), n_init=3, random_state=state).fit(self._embedded(counted))

    def of(self, texts: Sequence[str]) -> list[int]:
        """The cluster of each text."""
        if not texts:
            return []
        with threadpool_limits(limits=1):
            return [int(cluster) for cluster in self.means.predict(self._embedded(self.words.transform(texts)))]

    def _embedded(self, counted: Any) -> Any:
        return normalize(self.directions.transform(counted) if self.directions else counted)


@dataclass(frozen=True)
class Partition:
    """Indices per client, with the seed and settings that made them: what a manifest saves."""

    indices: tuple[tuple[int, ...], ...]
    seed: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # JSON values

    @property
    def hash(self) -> str:
        """sha256 of the indices."""
        return hashlib.sha256(json.dumps(self.indices).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """What `save` writes."""
        return {"seed": self.seed, "settings": dict(self.settings), "hash": self.hash, "indices": self.indices}

    def save(self, path: Path) -> None:
        """Writes the manifest; a reader sees the old file or the whole new one."""
        write_text(path, json.dumps(self.as_json()))

    @classmethod
    def load(cls, path: Path) -> "Partition":
        """The partition in a manifest.

        Raises:
            BadData: no manifest, or its indices are not the ones its hash was made of.
        """
        try:
            read = json.loads(path.read_text())
            indices = tuple(tuple(map(int, part)) for part in read["indices"])
            partition = cls(indices, read["seed"], read["settings"])
            if partition.hash != read["hash"]:
                raise ValueError("its indices do not match its hash")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadData(f"{path} is not a partition manifest ({error}); make it again with Partition.save") from error
        return partition


@runtime_checkable
class Loads(Protocol):
    """Anything that hands out rows client by client, such as a partitioner of flwr-datasets."""

    def load_partition(self, partition_id: int) -> Iterable[Mapping[str, Any]]: ...


def from_object(partitioner: Loads, clients: int, label: str | None = None) -> tuple[list[dict[str, Any]], Partition]:
    """All rows that `partitioner` hands to clients 0 … `clients` - 1, and who has which.

    `load_partition(i)` must give client i's rows: mappings from field to value, in any iterable. A `datasets.Dataset` is one;
    where it knows the names of the classes in the field `label`, a row gets its `label_name`.
    `clients.clients_from_object` makes clients of it; who makes Examples of the rows alone gives them to `clients.clients_from`.
    """
    if not isinstance(partitioner, Loads):
        raise BadValue(f"{type(partitioner).__name__} has no load_partition(i), which gives client i's rows; add it")
    parts = [rows_of(partitioner.load_partition(client), label) for client in range(clients)]
    if not all(parts):
        raise BadData(
            f"load_partition({parts.index([])}) gave no rows, but each of {clients} clients needs some; ask for fewer clients"
        )
    ends = [0, *accumulate(map(len, parts))]
    name = type(partitioner).__name__
    indices = tuple(tuple(range(start, end)) for start, end in pairwise(ends))
    return [row for part in parts for row in part], Partition(indices, settings={"by": name})


def fill_up(parts: Sequence[dict[int, list[int]]], minimum: int) -> None:
    """Moves examples, in place, from the largest parts to those below `minimum`; enough of them must be there."""
    sizes = [sum(map(len, part.values())) for part in parts]
    richest = [(-size, client) for client, size in enumerate(sizes) if size > minimum]
    heapify(richest)
    for client, size in enumerate(sizes):
        for _ in range(size, minimum):
            surplus, donor = richest[0]
            label = max(parts[donor], key=lambda label: len(parts[donor][label]))
            parts[client].setdefault(label, []).append(parts[donor][label].pop())
            if -surplus - 1 > minimum:
                heapreplace(richest, (surplus + 1, donor))
            else:
                heappop(richest)


def enough(number: int, clients: int, minimum: int) -> None:
    """Raises BadData when `number` examples cannot give each client its minimum."""
    if number < minimum:
        raise BadData(
            f"a client needs at least {minimum} different examples, but there are {number} for all {clients} of them;"
            " give more data"
        )
    if number < clients * minimum:
        raise BadData(
            f"{clients} clients of at least {minimum} examples need {clients * minimum}, but there are {number};"
            f" ask for at most {number // minimum} clients or give more data"
        )


def apportion(shares: Iterable[float], number: int) -> list[int]:
    """Whole numbers close to `number` times `shares`, with that sum: largest remainders are rounded up."""
    exact = np.asarray(list(shares), dtype=np.float64)
    exact = exact / exact.sum() * number
    whole = np.floor(exact).astype(int)
    up = np.argsort(whole - exact, kind="stable")[: number - whole.sum()]
    whole[up] += 1
    return [int(count) for count in whole]


def by_value(values: Sequence[Hashable]) -> dict[Any, list[int]]:
    """The indices of each value, values in the order they appear."""
    members = defaultdict(list)
    for index, value in enumerate(values):
        members[value].append(index)
    return dict(members)


def at(members: Sequence[int], parts: Indices) -> Indices:
    """Parts of positions in `members` as parts of its values."""
    return [[members[place] for place in part] for part in parts]


def pieces(order: Sequence[int], sizes: Sequence[int]) -> Indices:
    """`order` cut into consecutive pieces."""
    ends = [0, *accumulate(sizes)]
    return [list(order[start:end]) for start, end in pairwise(ends)]


def shuffled(values: Iterable[int], seed: str) -> list[int]:
    """`values` in an order that only `seed` decides."""
    order = list(values)
    Random(seed).shuffle(order)
    return order


def generator(seed: str) -> np.random.Generator:
    """numpy's generator for a seed in words."""
    return np.random.default_rng(Random(seed).getrandbits(64))
