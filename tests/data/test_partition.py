"""Who gets which examples."""

import json
import time
from collections import Counter

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexperts.data import partition
from fedexperts.data.clusters import Clusters
from fedexperts.data.partition import Partition, from_object
from fedexperts.errors import BadData, BadValue

seeds = st.text(max_size=5)
alphas = st.floats(0.01, 100)
WORDS = {"sport": "goal team match player", "money": "bank share price market", "sky": "star planet moon orbit"}


def labels_of(number: int, kinds: int) -> list[int]:
    return [index * 7 % 11 % kinds for index in range(number)]


def everything_once(parts: list[list[int]], number: int) -> bool:
    return sorted(index for part in parts for index in part) == list(range(number))


@given(number=st.integers(1, 300), clients=st.integers(1, 30), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_iid_gives_every_index_once_and_sizes_differ_by_one_at_most(number, clients, seed):
    if number < clients:
        with pytest.raises(BadData):
            partition.iid(number, clients, seed)
        return
    parts = partition.iid(number, clients, seed)
    assert len(parts) == clients and everything_once(parts, number)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(number=st.integers(60, 300), clients=st.integers(1, 20), kinds=st.integers(1, 10), alpha=alphas, seed=seeds)
@settings(max_examples=50, deadline=None)
def test_dirichlet_gives_every_index_once_and_nobody_less_than_the_minimum(number, clients, kinds, alpha, seed):
    parts = partition.dirichlet(labels_of(number, kinds), clients, alpha, seed, minimum=3)
    assert len(parts) == clients and everything_once(parts, number)
    assert min(map(len, parts)) >= 3


@given(number=st.integers(60, 300), clients=st.integers(1, 20), alpha=alphas, seed=seeds)
@settings(max_examples=50, deadline=None)
def test_quantity_gives_every_index_once_and_nobody_less_than_the_minimum(number, clients, alpha, seed):
    parts = partition.quantity(number, clients, alpha, seed, minimum=3)
    assert len(parts) == clients and everything_once(parts, number)
    assert min(map(len, parts)) >= 3


@given(clients=st.integers(1, 20), kinds=st.integers(1, 10), labels_per_client=st.integers(1, 10), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_pathological_gives_each_client_its_number_of_labels_and_no_index_twice(clients, kinds, labels_per_client, seed):
    labels = labels_of(1100, kinds)
    labels_per_client = min(labels_per_client, kinds)
    parts = partition.pathological(labels, clients, labels_per_client, seed)
    used = [index for part in parts for index in part]
    assert len(parts) == clients and len(used) == len(set(used))
    assert {len({labels[index] for index in part}) for part in parts} == {labels_per_client}
    clients_of = Counter(label for part in parts for label in {labels[index] for index in part})
    assert max(clients_of.values()) - min(clients_of[label] for label in range(kinds)) <= 1


TEXTS = [f"word{index % 9} and{index % 7}" for index in range(400)]

MAKERS = {
    "iid": lambda seed: partition.iid(400, 7, seed),
    "dirichlet": lambda seed: partition.dirichlet(labels_of(400, 5), 7, 0.5, seed),
    "draws": lambda seed: partition.dirichlet_draws(labels_of(400, 5), 7, 0.5, 50, seed),
    "quantity": lambda seed: partition.quantity(400, 7, 0.5, seed),
    "pathological": lambda seed: partition.pathological(labels_of(400, 5), 7, 2, seed),
    "task": lambda seed: partition.by_task(["sort"] * 250 + ["add"] * 150, 7, seed),
    "clusters": lambda seed: partition.dirichlet(Clusters(TEXTS, 4, seed).of(TEXTS), 7, 0.5, seed),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_gives_the_same_parts_again_and_another_seed_others(name):
    assert MAKERS[name]("0/a") == MAKERS[name]("0/a")
    assert MAKERS[name]("0/a") != MAKERS[name]("1/a")


def test_each_client_draws_its_number_with_replacement_and_labels_count_alike_however_rare():
    labels = ["often"] * 900 + ["rare"] * 100
    even = partition.dirichlet_draws(labels, 5, 1e6, 2000, "0")
    assert {len(part) for part in even} == {2000}
    assert all(850 < sum(index >= 900 for index in part) < 1150 for part in even)  # half; by size it were 200
    assert all(len(set(part)) < 1000 and max(part) < 1000 and part == sorted(part) for part in even)
    lopsided = partition.dirichlet_draws(labels, 40, 0.05, 100, "0")
    assert sum(max(Counter(labels[index] for index in part).values()) > 95 for part in lopsided) > 25
    with pytest.raises(BadData, match="each client would draw 3 examples, but needs 4; set draws to at least 4"):
        partition.dirichlet_draws(labels, 2, 0.5, 3, "0", minimum=4)


def test_small_alpha_is_more_lopsided_than_large():
    def commonest(alpha: float) -> float:
        labels = labels_of(4000, 10)
        parts = partition.dirichlet(labels, 20, alpha, "0")
        return sum(Counter(labels[index] for index in part).most_common(1)[0][1] / len(part) for part in parts) / 20

    assert commonest(0.05) > 0.6
    assert commonest(100.0) < 0.3


def test_a_thousand_clients_at_alpha_a_tenth_take_seconds_and_all_have_data():
    start = time.perf_counter()
    parts = partition.dirichlet(labels_of(10_000, 11), 1000, 0.1, "0", minimum=4)
    assert time.perf_counter() - start < 5
    assert len(parts) == 1000 and everything_once(parts, 10_000) and min(map(len, parts)) >= 4


def test_the_minimum_may_be_all_there_is():
    parts = partition.dirichlet(labels_of(40, 4), 10, 0.01, "0", minimum=4)
    assert {len(part) for part in parts} == {4}


def test_each_client_has_one_task_and_tasks_share_clients_evenly():
    tasks = ["sort"] * 90 + ["add"] * 10 + ["count"] * 50
    parts = partition.by_task(tasks, 7, "0")
    assert everything_once(parts, 150)
    assert [{tasks[index] for index in part} for part in parts] == [{"sort"}] * 3 + [{"add"}] * 2 + [{"count"}] * 2


def test_the_number_of_clients_of_each_task_can_be_set():
    tasks = ["sort"] * 90 + ["add"] * 10
    parts = partition.by_task(tasks, 3, "0", {"add": 2, "sort": 1})
    assert [len(part) for part in parts] == [90, 5, 5]
    with pytest.raises(BadValue, match="gives 4 clients, but there are 3"):
        partition.by_task(tasks, 3, "0", {"add": 2, "sort": 2})
    with pytest.raises(BadValue, match="did you mean sort"):
        partition.by_task(tasks, 3, "0", {"add": 2, "srot": 1})


def test_more_clients_than_data_is_refused_with_the_numbers():
    with pytest.raises(BadData, match="50 clients of at least 2 examples need 100, but there are 60; use at most 30 clients"):
        partition.iid(60, 50, "0", minimum=2)
    with pytest.raises(BadData, match="task add: 4 clients of at least 1 examples need 4, but there are 3"):
        partition.by_task(["sort"] * 90 + ["add"] * 3, 8, "0")
    with pytest.raises(BadData, match="2 clients cannot cover 3 tasks"):
        partition.by_task(["sort", "add", "count"], 2, "0")
    with pytest.raises(BadData, match="a client would get 1 of 6 examples"):
        partition.pathological([0, 0, 0, 1, 1, 1], 6, 1, "0", minimum=2)
    with pytest.raises(
        BadData, match="labels_per_client = 3, but the examples have 2 labels; set labels_per_client to at most 2"
    ):
        partition.pathological([0, 1], 1, 3, "0")


def test_texts_about_one_thing_fall_into_one_cluster():
    texts = [f"{words} {extra}" for extra in range(20) for words in WORDS.values()]
    clusters = Clusters(texts, 3, "0")
    numbers = clusters.of(texts)
    assert len(set(numbers)) == 3
    assert all(len(set(numbers[kind::3])) == 1 for kind in range(3))
    assert clusters.of(["the player of this team"]) == [numbers[0]]
    assert clusters.of([]) == []


@pytest.mark.parametrize("texts", [["a"], ["same", "same", "same"], ["?!", "..", "a"]], ids=["one", "all the same", "no words"])
def test_odd_texts_can_be_clustered_too(texts):
    assert len(Clusters(texts, 5, "0").of(texts)) == len(texts)


def test_apportioned_counts_add_up():
    assert partition.apportion([0.5, 0.3, 0.2], 11) == [6, 3, 2]
    assert partition.apportion([1, 1, 1], 0) == [0, 0, 0]


def test_a_partition_is_saved_and_loaded_whole(tmp_path):
    made = Partition(((0, 2), (1,)), "7", {"by": "iid"})
    made.save(tmp_path / "partition.json")
    assert Partition.load(tmp_path / "partition.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["partition.json"]


def test_a_manifest_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "partition.json"
    Partition(((0, 2), (1,))).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"indices": [[0, 1], [2]]}))
    with pytest.raises(BadData, match="do not match its hash"):
        Partition.load(path)
    path.write_text("{")
    with pytest.raises(BadData, match="is no partition manifest"):
        Partition.load(path)


class Halves:
    """What a partitioner of flwr-datasets looks like from here."""

    rows = tuple({"prompt": f"{number} + 1", "response": str(number + 1)} for number in range(10))

    def load_partition(self, partition_id: int):
        return datasets.Dataset.from_list(list(self.rows[partition_id * 5 : partition_id * 5 + 5]))


def test_anything_with_load_partition_is_a_partition():
    rows, made = from_object(Halves(), clients=2)
    assert rows == list(Halves.rows)
    assert made.indices == ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))


def test_objects_without_rows_are_refused():
    with pytest.raises(BadValue, match="list has no load_partition"):
        from_object([], clients=2)
    empty = type("Empty", (), {"load_partition": lambda self, partition_id: []})()
    with pytest.raises(BadData, match=r"load_partition\(0\) gave no rows"):
        from_object(empty, clients=2)
