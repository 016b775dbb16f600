"""From the `data` table of a run to clients: each with its own training, validation and test examples.

No leak, by the normalised prompt (case and blanks aside; the response where there is no prompt): a training example that
repeats another, or any test example of any source, is left out before anything is divided. So no client's training or validation
holds a test prompt of any client, and no two clients share a prompt to train on, unless they draw with replacement
(`partition.draws`): then one may also validate on what another trains on.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedexperts.data import partition as divide_by
from fedexperts.data.partition import Clusters, Indices, Loads, Partition, apportion, from_object, shuffled
from fedexperts.data.settings import DataSettings, PartitionSettings, SourceSettings
from fedexperts.data.sources import Placed, Source, drawn, examples_from, load
from fedexperts.data.templates import Frame, Row, rows_of
from fedexperts.errors import BadData, BadValue, nearest
from fedexperts.io.files import write_text
from fedexperts.types import METRIC_NAMES, Client, Example, Split

IID = PartitionSettings(by="iid")


@dataclass(frozen=True)
class Shares:
    """Indices of one client: training and validation into the training pool, test into the test pool."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class Pool:
    """All examples there are to divide, without repeats, and the sha256 of each source they came from."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]
    hashes: Mapping[str, str]
    left_out: int = 0  # examples that repeated others
    frames: Mapping[str, Frame | None] = field(default_factory=dict)  # task → what its prompts begin and end with


@dataclass(frozen=True)
class Retained:
    """Examples that show what a model still knows: nobody trains on them. And the sha256 of each source they came from."""

    examples: tuple[Example, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Clients(Mapping[str, Split]):
    """Name → examples. Holds indices into one pool; a client's Split is made when it is asked for."""

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
        """Training examples of each task, most first."""
        return dict(Counter(self.pool.train[index].task for index in self.shares[name].train).most_common())

    def metrics(self) -> dict[str, str]:
        """Task → its main metric, of all examples that clients are scored on."""
        scored = (example for split in self.values() for part in (split.validation, split.test) for example in part)
        return dict(self.task_metrics) or {example.task: example.metric for example in scored}

    def client(self, name: str) -> Client:
        """What the server may know of a client; its memory is for others to say."""
        return Client(name, len(self.shares[name].train), task=next(iter(self.tasks(name))))

    def together(self) -> "Clients":
        """One client with the examples of all, in their order, called after the first and the last: c01-c30, or c01 if alone."""
        names, shares = list(self.shares), self.shares.values()
        whole = Shares(
            train=tuple(index for share in shares for index in share.train),
            validation=tuple(index for share in shares for index in share.validation),
            test=tuple(index for share in shares for index in share.test),
        )
        return replace(self, shares={"-".join(dict.fromkeys((names[0], names[-1]))): whole})

    @property
    def hashes(self) -> Mapping[str, str]:
        """Source → sha256 of what was read."""
        return self.pool.hashes

    def manifest(self) -> dict[str, Any]:
        """Who has which examples of what data, as JSON: the partition, and each client's three lists of indices."""
        return {
            "hashes": dict(self.hashes),
            "left_out": self.pool.left_out,
            "partition": self.partition.as_json(),
            "clients": {name: vars(share) for name, share in self.shares.items()},
            "prompts": self.prompts(),
        }

    def prompts(self) -> dict[str, Any]:
        """Task → what its prompts begin and end with (None: a text is continued) and its first example's choices, as JSON."""
        first: dict[str, Example] = {}
        for example in self.pool.train:
            first.setdefault(example.task, example)
        frames = self.pool.frames
        return {task: {"frame": frames[task], "choices": each.choices} for task, each in first.items() if task in frames}

    def save(self, path: Path) -> None:
        """Writes the manifest, all of it or nothing."""
        write_text(path, json.dumps(self.manifest()))


def make_clients(settings: DataSettings, seed: int | str, pool: Pool | None = None) -> Clients:
    """Loads all sources, unless their `pool` is there already, and divides them.

    The seed decides who gets what, never which examples there are.

    Raises:
        BadData: data that cannot be read, or too little of it for so many clients.
    """
    pool = pool or load_pool(settings)
    groups = _groups(pool, settings.partition, str(seed))
    parts = _parts(pool, groups, settings, str(seed))
    made = Partition(tuple(map(tuple, parts)), str(seed), settings.partition.model_dump())
    return _clients(pool, made, groups, settings)


def divide(pool: Pool, made: Partition, settings: DataSettings) -> Clients:
    """Clients of a partition that was made before; its indices are those of `pool.train`."""
    if max((index for part in made.indices for index in part), default=-1) >= len(pool.train):
        raise BadData(f"the partition names examples beyond the {len(pool.train)} there are; it was made of other data")
    return _clients(pool, made, _groups(pool, settings.partition, made.seed), settings)


def clients_from_object(partitioner: Loads, source: SourceSettings, test: Iterable[Row], settings: DataSettings) -> Clients:
    """Clients whose rows `partitioner.load_partition(i)` gives, i from 0 to `settings.clients` - 1; `test` is divided as always.

    Rows (in a `datasets.Dataset` or any other iterable of mappings) become examples as those of a file do: by the fields
    `source` names, or by their own. `source.name` is the task's name where it has no `task`; nothing is loaded by it, and no
    limit applies. Of `settings`, its sources are not read, and how the data is divided is the partitioner's to say.

    Raises:
        BadValue: no `load_partition`, or a metric there is none of.
        BadData: a client without rows, or a row that cannot be read, named by client and row.
    """
    check_metric(source)
    rows, made = from_object(partitioner, settings.clients, source.label)
    train = [
        Placed(rows[index], f"load_partition({client}), row {number}")
        for client, part in enumerate(made.indices)
        for number, index in enumerate(part, 1)
    ]
    tests = [Placed(row, f"test row {number}") for number, row in enumerate(rows_of(test, source.label), 1)]
    read = examples_from(source, train, tests)
    return clients_from(read.train, made, read.test, settings, {source.name: read.hash})


def clients_from(
    train: Sequence[Example],
    made: Partition,
    test: Sequence[Example],
    settings: DataSettings,
    hashes: Mapping[str, str] | None = None,
) -> Clients:
    """Clients of a partition from elsewhere (`partition.from_object`); its indices are those of `train`.

    Repeats are left out here too: of two clients with the same example the first keeps it.
    """
    pool = centralized(train, test, hashes)
    places = {key(example): place for place, example in enumerate(pool.train)}
    kept = [places.pop(key(example), None) for example in train]
    indices = tuple(tuple(place for index in part if (place := kept[index]) is not None) for part in made.indices)
    return divide(pool, replace(made, indices=indices), settings)


@dataclass(frozen=True)
class Counts:
    """What a client that brings its own data tells of it."""

    train: Mapping[str, int]  # task → examples
    validation: int
    test: int
    longest_response: int  # in tokens, its end token included
    metrics: Mapping[str, str] = field(default_factory=dict)  # task → the main metric that validation and test examples have


def own_clients(name: str, files: Sequence[str], settings: DataSettings, seed: int | str, retained: Retained) -> Clients:
    """The only client that a process knows which brings its own data: all rows of `files`, read as the run's source says.

    Raises:
        BadData: files that cannot be read, or too little in them.
    """
    sources = tuple(settings.sources[0].model_copy(update={"name": file, "test": None}) for file in files)
    own = settings.model_copy(update={"sources": sources, "clients": 1, "names": (name,), "partition": IID})
    return make_clients(own, f"{seed}/{name}", without(load_pool(own), retained))


def counts(clients: Clients, name: str, longest_response: int) -> Counts:
    """What the client may tell of its data."""
    share = clients.shares[name]
    return Counts(clients.tasks(name), len(share.validation), len(share.test), longest_response, clients.metrics())


def stand_ins(told: Mapping[str, Counts]) -> Clients:
    """Clients of which only counts are known: each of their examples is an empty one of its task."""
    train: list[Example] = []
    test: list[Example] = []
    shares: dict[str, Shares] = {}
    for name, count in told.items():
        first, most = len(train), max(count.train, key=lambda task: count.train[task])
        train += [Example("", "", task) for task, number in count.train.items() for _ in range(number)]
        held = len(train)
        train += [Example("", "", most)] * count.validation
        tests = range(len(test), len(test) + count.test)
        test += [Example("", "", most)] * count.test
        shares[name] = Shares(tuple(range(first, held)), tuple(range(held, len(train))), tuple(tests))
    indices = tuple(share.train + share.validation for share in shares.values())
    metrics = {task: metric for count in told.values() for task, metric in count.metrics.items()}
    return Clients(Pool(tuple(train), tuple(test), {}), shares, Partition(indices, "", {"by": "own"}), metrics)


def load_pool(settings: DataSettings) -> Pool:
    """The examples of all sources.

    Raises:
        BadValue: a metric there is none of.
        BadData: sources that cannot be read, that add nothing, or whose tasks are called the same but are not the same.
    """
    for told in settings.sources:
        check_metric(told)
    sources = [load(source, settings) for source in settings.sources]
    _same_task_only_where_told(settings.sources, sources)
    _tasks_agree(sources)
    train = [example for source in sources for example in source.train]
    test = [example for source in sources for example in source.test]
    pool = replace(centralized(train, test, {source.name: source.hash for source in sources}), frames=_frames(sources))
    left = {id(example) for example in pool.train}
    for source in sources:
        rows = [*source.train, *source.test]
        if len(rows) > 1 and len({key(example) for example in rows}) == 1:
            raise BadData(
                f"source {source.name} has {len(rows)} rows, all with the same prompt, and repeats count once;"
                " give rows that differ, or a prompt that names the field in which they do"
            )
        if not any(id(example) in left for example in source.train):
            raise BadData(f"source {source.name} has no training example that no other source or test set has; leave it out")
    return pool


def _frames(sources: Iterable[Source]) -> dict[str, Frame | None]:
    """The frame of each task; where sources of one task ask differently, an empty one."""
    found: dict[str, Frame | None] = {}
    for source in sources:
        for task, frame in source.frames.items():
            found[task] = frame if found.setdefault(task, frame) == frame else ("", "")
    return found


def load_retained(sources: Sequence[SourceSettings], settings: DataSettings) -> Retained:
    """Test examples of `sources`, of each at most its limit, drawn at random; each source is one task.

    Where no metric is told, examples with choices are judged by likelihood.

    Raises:
        BadValue: a metric there is none of.
        BadData: sources that cannot be read, have no test examples, or mix metrics.
    """
    for told in sources:
        check_metric(told)
    found = [_retained(told, load(told, settings)) for told in sources]
    _tasks_agree(found)
    examples = centralized([], [example for source in found for example in source.test]).test
    return Retained(examples, {f"retained/{source.name}": source.hash for source in found})


def _retained(told: SourceSettings, source: Source) -> Source:
    """`source` with only what was drawn of its test examples, as one task."""
    if not source.test:
        raise BadData(f"source {source.name} has no test examples, and only those are scored as retained; give it a test split")
    tasks = tasks_of(source)
    task = told.task or (tasks[0] if len(tasks) == 1 else told.name)
    test = [
        replace(each, task=task, metric=told.metric or ("likelihood" if each.choices else each.metric))
        for each in drawn(source.test, told.limit, source.name)
    ]
    return replace(source, train=[], test=test)


def without(pool: Pool, retained: Retained) -> Pool:
    """`pool` with no training example that repeats one of `retained`."""
    held = {key(example) for example in retained.examples}
    train = tuple(example for example in pool.train if key(example) not in held)
    return replace(pool, train=train, left_out=pool.left_out + len(pool.train) - len(train))


def check_metric(source: SourceSettings) -> None:
    """Raises BadValue for a metric there is none of."""
    if source.metric is not None and source.metric not in METRIC_NAMES:
        near = nearest(source.metric, METRIC_NAMES)
        raise BadValue(f"metric {source.metric!r} of source {source.name} is not one of {', '.join(METRIC_NAMES)}{near}")


def _same_task_only_where_told(settings: Sequence[SourceSettings], sources: Sequence[Source]) -> None:
    """Raises BadData for two sources of one task, unless both were told that name."""
    first: dict[str, SourceSettings] = {}
    for told, source in zip(settings, sources, strict=True):
        for task in tasks_of(source):
            other = first.setdefault(task, told)
            if other is not told and not (other.task and told.task):
                raise BadData(
                    f"sources {other.name} and {told.name} both have a task {task}; write task = … in each:"
                    " two names, or the same one if they are one task"
                )


def _tasks_agree(sources: Sequence[Source]) -> None:
    """Raises BadData for a task with two metrics, or whose labels do not mean the same everywhere."""
    metrics: dict[str, tuple[str, str]] = {}
    classes: dict[str, tuple[tuple[str, ...], str]] = {}
    for source in sources:
        for example in (*source.train, *source.test):
            metric, where = metrics.setdefault(example.task, (example.metric, source.name))
            if metric != example.metric:
                raise BadData(
                    f"task {example.task} has metric {metric} in source {where} and {example.metric} in source {source.name};"
                    " write the same metric = … in each, or another task = …"
                )
            if metric == "likelihood" and example.response not in example.choices:
                raise BadData(
                    f"task {example.task} of source {source.name} is judged by likelihood, which needs choices with the right "
                    "answer among them; give rows with choices and gold, or another metric"
                )
            if example.label is None:
                continue
            names, where = classes.setdefault(example.task, (example.choices, source.name))
            if names != example.choices:
                raise BadData(
                    f"task {example.task} has classes {_few(names)} in source {where} and {_few(example.choices)} in source"
                    f" {source.name}; write another task = … in one of them, or put their rows into one file"
                )


def _few(names: Sequence[str]) -> str:
    """The first of some names, and how many there are."""
    return f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} ({len(names)})"


def tasks_of(source: Source) -> list[str]:
    """The tasks of a source, in the order they appear."""
    return list(dict.fromkeys(example.task for example in (*source.train, *source.test)))


def centralized(train: Sequence[Example], test: Sequence[Example], hashes: Mapping[str, str] | None = None) -> Pool:
    """`train` and `test` without repeats; of a pair across the two, the test example stays."""
    tests = {key(example): example for example in reversed(test)}
    trains = {key(example): example for example in reversed(train) if key(example) not in tests}
    left_out = len(train) + len(test) - len(tests) - len(trains)
    return Pool(tuple(reversed(trains.values())), tuple(reversed(tests.values())), dict(hashes or {}), left_out)


def key(example: Example) -> str:
    """Two examples with one key are the same to us."""
    return " ".join((example.prompt or example.response).casefold().split())


@dataclass(frozen=True)
class Groups:
    """What a client's test examples must resemble its training examples in: the group of each example of a pool."""

    train: Sequence[Hashable]
    test: Sequence[Hashable]


def _kinds(pool: Pool) -> Groups:
    """Task and label."""
    return Groups(*([(example.task, example.label) for example in side] for side in (pool.train, pool.test)))


def _parts(pool: Pool, groups: Groups, settings: DataSettings, seed: str) -> Indices:
    """Who gets what."""
    how, minimum = settings.partition, settings.minimum
    if how.by != "task":
        return _one_level(groups.train, how, settings.clients, seed, minimum)

    def within(members: Sequence[int], clients: int, seed: str) -> Indices:
        chosen = [groups.train[index] for index in members]
        return divide_by.at(members, _one_level(chosen, how.within or IID, clients, seed, minimum))

    tasks = [example.task for example in pool.train]
    return divide_by.by_task(tasks, settings.clients, seed, how.clients_per_task, within)


def _one_level(groups: Sequence[Hashable], settings: PartitionSettings, clients: int, seed: str, minimum: int) -> Indices:
    """Examples of these groups, divided as `settings` say."""
    if settings.by == "iid":
        return divide_by.iid(len(groups), clients, seed, minimum)
    if settings.by == "quantity":
        return divide_by.quantity(len(groups), clients, settings.alpha, seed, minimum)
    if settings.by == "pathological":
        return divide_by.pathological(groups, clients, settings.labels_per_client, seed, minimum)
    if settings.draws is not None:
        return divide_by.dirichlet_draws(groups, clients, settings.alpha, settings.draws, seed, minimum)
    return divide_by.dirichlet(groups, clients, settings.alpha, seed, minimum)


def _groups(pool: Pool, settings: PartitionSettings, seed: str) -> Groups:
    """Task and label; clusters of texts where they are asked for, or where a label is needed and all have the same."""
    if settings.by == "task":
        return _groups_by_task(pool, settings.within or IID, seed)
    kinds = _kinds(pool)
    needed = settings.by in ("dirichlet", "pathological") and len(set(kinds.train)) == 1
    if settings.by != "clusters" and not needed:
        return kinds
    clusters = Clusters([_text(example) for example in pool.train], settings.clusters, f"{seed}/clusters")
    return Groups(*(clusters.of([_text(example) for example in side]) for side in (pool.train, pool.test)))


def _groups_by_task(pool: Pool, within: PartitionSettings, seed: str) -> Groups:
    """The groups of each task's own examples, told apart by the task."""
    train, test = (divide_by.by_value([example.task for example in side]) for side in (pool.train, pool.test))
    kinds = _kinds(pool)
    of_train, of_test = list(kinds.train), list(kinds.test)
    for task, members in train.items():
        tests = test.get(task, [])
        own = Pool(tuple(pool.train[index] for index in members), tuple(pool.test[index] for index in tests), {})
        groups = _groups(own, within, f"{seed}/{task}")
        for index, group in zip(members, groups.train, strict=True):
            of_train[index] = (task, group)
        for index, group in zip(tests, groups.test, strict=True):
            of_test[index] = (task, group)
    return Groups(of_train, of_test)


def _text(example: Example) -> str:
    return example.prompt or example.response


def _clients(pool: Pool, made: Partition, groups: Groups, settings: DataSettings) -> Clients:
    """Each client's part divided into training and validation, and a test set that resembles it."""
    width = max(2, len(str(len(made.indices))))
    names = settings.names or [f"c{number:0{width}}" for number in range(1, len(made.indices) + 1)]
    tests = Tests(pool, groups, made.seed)
    shares = {}
    for name, part in zip(names, made.indices, strict=True):
        different = list(dict.fromkeys(part))
        if len(different) < 2:
            raise BadData(
                f"client {name} has {len(different)} examples, but needs 1 to train and 1 to validate; ask for fewer clients"
            )
        number = min(max(1, round(settings.validation * len(different))), len(different) - 1)
        held = set(shuffled(different, f"{made.seed}/{name}/validation")[:number])
        test = tests.like(part, settings.test_examples)
        if not test:
            raise BadData(f"client {name} has no test example of its tasks; give its source a test split")
        train = tuple(sorted(index for index in part if index not in held))
        shares[name] = Shares(train, tuple(sorted(held)), tuple(test))
    return Clients(pool, shares, made)


class Tests:
    """Deals out test examples, group by group in a shuffled circle: one comes again only when all of its group were dealt."""

    def __init__(self, pool: Pool, groups: Groups, seed: str) -> None:
        self.groups = groups
        self.tasks = [example.task for example in pool.train]
        self.of_group = _circles(groups.test, seed)
        self.of_task = _circles([example.task for example in pool.test], seed)

    def like(self, part: Sequence[int], number: int) -> list[int]:
        """At most `number` different test examples whose groups stand to each other as those of `part` do.

        What a group cannot give, the tasks of `part` give.
        """
        wanted = Counter(self.groups.train[index] for index in part)
        found: dict[int, None] = {}
        for group, count in zip(wanted, apportion(wanted.values(), number), strict=True):
            found.update(dict.fromkeys(self.of_group[group].take(count)))
        for task, _ in Counter(self.tasks[index] for index in part).most_common():
            found.update(dict.fromkeys(self.of_task[task].take(number - len(found), but=found)))
        return sorted(found)


class Circle:
    """Indices that are dealt out in turn, from the start again when they are used up."""

    def __init__(self, members: Sequence[int] = ()) -> None:
        self.members, self.dealt = members, 0

    def take(self, number: int, but: Mapping[int, None] | None = None) -> list[int]:
        """The next `number` different ones outside `but`, or as many as there are."""
        found: list[int] = []
        for _ in self.members:
            if len(found) == number:
                break
            index = self.members[self.dealt % len(self.members)]
            self.dealt += 1
            if index not in (but or {}):
                found.append(index)
        return found


def _circles(values: Sequence[Hashable], seed: str) -> defaultdict[Hashable, Circle]:
    circles: defaultdict[Hashable, Circle] = defaultdict(Circle)
    for value, members in divide_by.by_value(values).items():
        circles[value] = Circle(shuffled(members, f"{seed}/test/{value}"))
    return circles
