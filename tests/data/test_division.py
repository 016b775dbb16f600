"""Dividing examples among clients, by hand: ties, remainders and the smallest clients."""

from collections import Counter

import pytest

from fedexperts.data import partition
from fedexperts.data.clients import clients_from
from fedexperts.data.division import Circle, Dealer, Groups, group_examples
from fedexperts.data.partition import Partition
from fedexperts.data.pool import Pool
from fedexperts.data.settings import DataSettings, PartitionSettings
from fedexperts.types import Example


def of_task(task: str, number: int, **fields: object) -> list[Example]:
    return [Example(f"{task} {index}", "x", task, **fields) for index in range(number)]


def test_of_equal_remainders_the_first_are_rounded_up():
    assert partition.apportion([1] * 100, 50) == [1] * 50 + [0] * 50
    assert partition.apportion([1, 2, 1], 2) == [1, 1, 0]  # 0.5, 1, 0.5
    assert partition.apportion([1, 3, 1] * 33, 7) == [0, 1, 0] * 7 + [0] * 78


def test_the_largest_client_gives_from_its_most_frequent_label_and_of_equals_the_first_does():
    parts = [{"a": [0, 1], "b": [2, 3, 4]}, {"b": [5, 6, 7, 8]}, {}, {"c": [9, 10, 11, 12, 13]}]
    partition.fill_up(parts, minimum=3)
    # First of the clients with five examples, client 0 gives its last b; then client 3 its last c; then client 0 of four.
    assert parts == [{"a": [0], "b": [2, 3]}, {"b": [5, 6, 7, 8]}, {"b": [4], "c": [13], "a": [1]}, {"c": [9, 10, 11, 12]}]


def test_no_client_gives_away_what_it_needs_itself():
    parts = [{"a": [0, 1, 2]}, {"a": [3]}, {"a": [4, 5]}]
    partition.fill_up(parts, minimum=2)
    assert [sum(map(len, part.values())) for part in parts] == [2, 2, 2]


def test_the_largest_tasks_get_one_client_more_and_of_equal_tasks_the_first():
    members = {"small": [0], "first": [1, 2], "second": [3, 4], "large": [5, 6, 7]}
    assert partition.spread_clients(members, 6) == {"small": 1, "first": 2, "second": 1, "large": 2}


def test_a_task_that_clients_per_task_leaves_out_has_no_clients():
    parts = partition.by_task(["sort"] * 4 + ["add"] * 6, 2, "0", {"add": 2})
    assert sorted(index for part in parts for index in part) == [4, 5, 6, 7, 8, 9]


def test_positions_become_the_members_at_them():
    assert partition.members_at([7, 3, 9], [[2, 0], [], [1]]) == [[9, 7], [], [3]]


def test_a_circle_starts_again_only_after_its_last_member():
    circle = Circle([5, 3, 8])
    assert (circle.take(2), circle.take(2), circle.take(5)) == ([5, 3], [8, 5], [3, 8, 5])
    assert circle.take(2, except_for={3, 8}) == [5]
    assert circle.take(0) == Circle().take(3) == []


def test_test_examples_that_were_dealt_already_are_not_dealt_to_a_client_twice():
    """Group 1 has one test example, so another comes from the task; it must not be one that group 0 gave."""
    pool = Pool(tuple(of_task("t", 4)), tuple(of_task("t", 3)), {})
    dealer = Dealer(pool, Groups([0, 0, 1, 1], [0, 0, 1]), seed="0")
    assert dealer.like([0, 1, 2, 3], 4) == [0, 1, 2]


@pytest.mark.parametrize(("examples", "share", "validation"), [(2, 0.99, 1), (2, 0.01, 1), (10, 0.99, 9), (10, 0.15, 2)])
def test_each_client_trains_and_validates_on_at_least_one_example(examples, share, validation):
    settings = DataSettings(sources="any", clients=1, validation=share)
    part = tuple(range(examples))
    indices = clients_from(of_task("t", examples), Partition((part,)), [Example("test", "x", "t")], settings).shares["c01"]
    assert (len(indices.validation), len(indices.train)) == (validation, examples - validation)


def test_of_two_clients_with_the_same_example_the_first_keeps_it():
    train = [*of_task("t", 4), Example("T  0", "x", "t"), *of_task("u", 3)]
    clients = clients_from(
        train,
        Partition(((0, 1, 2, 3), (4, 5, 6, 7))),
        [Example("test", "x", "t"), Example("other", "x", "u")],
        DataSettings(sources="any", clients=2),
    )
    prompts = [{clients.pool.train[index].prompt for index in part} for part in clients.partition.indices]
    assert prompts == [{"t 0", "t 1", "t 2", "t 3"}, {"u 0", "u 1", "u 2"}]
    assert clients.pool.left_out == 1


def test_the_task_of_a_client_is_the_most_frequent_of_its_training_examples():
    train = [*of_task("rare", 3), *of_task("frequent", 9)]
    clients = clients_from(
        train, Partition((tuple(range(12)),)), [Example("test", "x", "rare")], DataSettings(sources="any", clients=1)
    )
    assert list(clients.tasks("c01")) == ["frequent", "rare"]
    assert clients.client("c01").task == "frequent"


def test_more_than_99_clients_have_numbers_of_three_digits():
    parts = Partition(tuple((2 * client, 2 * client + 1) for client in range(100)))
    clients = clients_from(of_task("t", 200), parts, [Example("test", "x", "t")], DataSettings(sources="any", clients=100))
    assert next(iter(clients)) == "c001" and [*clients][-1] == "c100"


def test_clusters_of_texts_take_the_place_of_labels_only_where_all_have_the_same():
    texts = [Example(f"{word} {number}", "x", "t") for number in range(9) for word in ("goal team", "bank share")]
    pool = Pool(tuple(texts), tuple(texts[:4]), {})
    groups = group_examples(pool, PartitionSettings(by="dirichlet", clusters=2), "0")
    assert Counter(groups.train) == {0: 9, 1: 9} and len(groups.test) == 4
    labeled = Pool(tuple(Example(str(n), "x", "t", label=n % 2) for n in range(6)), (), {})
    assert set(group_examples(labeled, PartitionSettings(by="dirichlet"), "0").train) == {("t", 0), ("t", 1)}
    assert set(group_examples(pool, PartitionSettings(by="iid"), "0").train) == {("t", None)}
