"""Which client gets which examples of a pool: training examples as the settings say, test examples that resemble them."""

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

from fedexperts.data import partition
from fedexperts.data.partition import Indices, apportion, indices_by_value, shuffled
from fedexperts.data.pool import Pool
from fedexperts.data.settings import DataSettings, PartitionSettings
from fedexperts.types import Example

IID = PartitionSettings(by="iid")


@dataclass(frozen=True)
class Groups:
    """The group of each example of a pool: a client's test examples come from the groups of its training examples."""

    train: Sequence[Hashable]
    test: Sequence[Hashable]


def divide_train(pool: Pool, groups: Groups, settings: DataSettings, seed: str) -> Indices:
    """The indices of the training examples of each client."""
    how, minimum = settings.partition, settings.minimum
    if how.by != "task":
        return _divide_one_level(groups.train, how, settings.clients, seed, minimum)

    def within_task(members: Sequence[int], clients: int, seed: str) -> Indices:
        task_groups = [groups.train[index] for index in members]
        return partition.members_at(members, _divide_one_level(task_groups, how.within or IID, clients, seed, minimum))

    tasks = [example.task for example in pool.train]
    return partition.by_task(tasks, settings.clients, seed, how.clients_per_task, within_task)


def _divide_one_level(groups: Sequence[Hashable], settings: PartitionSettings, clients: int, seed: str, minimum: int) -> Indices:
    """Examples of these groups, divided by any rule of `settings` but by task."""
    if settings.by == "iid":
        return partition.iid(len(groups), clients, seed, minimum)
    if settings.by == "quantity":
        return partition.quantity(len(groups), clients, settings.alpha, seed, minimum)
    if settings.by == "pathological":
        return partition.pathological(groups, clients, settings.labels_per_client, seed, minimum)
    if settings.draws is not None:
        return partition.dirichlet_draws(groups, clients, settings.alpha, settings.draws, seed, minimum)
    return partition.dirichlet(groups, clients, settings.alpha, seed, minimum)


def group_examples(pool: Pool, settings: PartitionSettings, seed: str) -> Groups:
    """Groups by task and label, or by clusters of texts if `settings` say so, or if a label is needed and all have the same."""
    if settings.by == "task":
        return _group_within_tasks(pool, settings.within or IID, seed)
    task_and_label = _by_task_and_label(pool)
    labels_missing = settings.by in ("dirichlet", "pathological") and len(set(task_and_label.train)) == 1
    if settings.by != "clusters" and not labels_missing:
        return task_and_label
    from fedexperts.data.clusters import Clusters  # the libraries behind it take seconds to import, and few runs need them

    clusters = Clusters([_text(example) for example in pool.train], settings.clusters, f"{seed}/clusters")
    return Groups(*(clusters.of([_text(example) for example in examples]) for examples in (pool.train, pool.test)))


def _group_within_tasks(pool: Pool, within: PartitionSettings, seed: str) -> Groups:
    """Each task's examples grouped by themselves; a group is a pair of the task and the group in it."""
    train, test = (indices_by_value([example.task for example in examples]) for examples in (pool.train, pool.test))
    task_and_label = _by_task_and_label(pool)
    train_groups, test_groups = list(task_and_label.train), list(task_and_label.test)
    for task, train_indices in train.items():
        test_indices = test.get(task, [])
        task_pool = Pool(
            tuple(pool.train[index] for index in train_indices), tuple(pool.test[index] for index in test_indices), {}
        )
        groups = group_examples(task_pool, within, f"{seed}/{task}")
        for index, group in zip(train_indices, groups.train, strict=True):
            train_groups[index] = (task, group)
        for index, group in zip(test_indices, groups.test, strict=True):
            test_groups[index] = (task, group)
    return Groups(train_groups, test_groups)


def _by_task_and_label(pool: Pool) -> Groups:
    return Groups(*([(example.task, example.label) for example in examples] for examples in (pool.train, pool.test)))


def _text(example: Example) -> str:
    return example.prompt or example.response


class Dealer:
    """Deals the test examples of a pool to clients; an example is dealt again only after all others of its group."""

    def __init__(self, pool: Pool, groups: Groups, seed: str) -> None:
        self._train_groups = groups.train
        self._train_tasks = [example.task for example in pool.train]
        self._by_group = _circles(groups.test, seed)
        self._by_task = _circles([example.task for example in pool.test], seed)

    def like(self, train_indices: Sequence[int], number: int) -> list[int]:
        """At most `number` different test examples, in the proportions that the groups have among `train_indices`.

        If a group has too few, others of the same tasks take their place.
        """
        group_counts = Counter(self._train_groups[index] for index in train_indices)
        dealt: dict[int, None] = {}
        for group, count in zip(group_counts, apportion(group_counts.values(), number), strict=True):
            dealt.update(dict.fromkeys(self._by_group[group].take(count)))
        for task, _ in Counter(self._train_tasks[index] for index in train_indices).most_common():
            dealt.update(dict.fromkeys(self._by_task[task].take(number - len(dealt), except_for=dealt)))
        return sorted(dealt)


class Circle:
    """Indices that are dealt in turn, and from the start again after the last."""

    def __init__(self, members: Sequence[int] = ()) -> None:
        self._members, self._turns = members, 0

    def take(self, number: int, except_for: Collection[int] = ()) -> list[int]:
        """The next `number` different ones that are not in `except_for`, or as many as there are."""
        taken: list[int] = []
        for _ in self._members:
            if len(taken) == number:
                break
            index = self._members[self._turns % len(self._members)]
            self._turns += 1
            if index not in except_for:
                taken.append(index)
        return taken


def _circles(values: Sequence[Hashable], seed: str) -> defaultdict[Hashable, Circle]:
    """For each value its indices as a circle in shuffled order; for any other value an empty circle."""
    circles: defaultdict[Hashable, Circle] = defaultdict(Circle)
    for value, members in indices_by_value(values).items():
        circles[value] = Circle(shuffled(members, f"{seed}/test/{value}"))
    return circles
