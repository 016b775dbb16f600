"""From the data table of a run to clients."""

import json
import pickle
import time
from collections import Counter
from dataclasses import replace

import datasets
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedexperts.core import evaluation
from fedexperts.data.clients import clients_from, clients_from_object, divide, make_clients
from fedexperts.data.partition import Partition, from_object
from fedexperts.data.pool import Retained, deduplicated_pool, duplicate_key, load_pool, load_retained, without_retained
from fedexperts.data.settings import DataSettings, SourceSettings
from fedexperts.errors import BadData, BadValue
from fedexperts.types import METRIC_NAMES, Client, Example

TASKS = ["synthetic/sort", "synthetic/reverse"]


def settings(**changes: object) -> DataSettings:
    return DataSettings.model_validate({"sources": TASKS, "clients": 6, "limit": 200, **changes})


def no_leak(clients) -> bool:
    """No key stands in the training or validation of two clients, nor in those of one and the test set of any."""
    own = [duplicate_key(example) for name in clients for example in (*clients[name].train, *clients[name].validation)]
    tests = {duplicate_key(example) for name in clients for example in clients[name].test}
    return len(own) == len(set(own)) and not tests & set(own) and bool(tests)


PARTITIONS = [
    {"by": "task"},
    "iid",
    {"quantity": 0.5},
    {"dirichlet": 0.3},
    {"pathological": 1},
    {"clusters": 3},
    {"by": "task", "within": {"dirichlet": 0.3, "clusters": 3}},
    {"by": "task", "within": {"pathological": 2, "clusters": 3}},
]


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_no_partition_leaks(partition):
    clients = make_clients(settings(partition=partition, test_examples=20), 0)
    assert list(clients) == ["c01", "c02", "c03", "c04", "c05", "c06"]
    assert no_leak(clients)
    for name in clients:
        split = clients[name]
        assert len(split.train) + len(split.validation) >= 4 and split.validation and len(split.test) == 20
        assert len({duplicate_key(example) for example in split.test}) == 20


@given(seed=st.integers(0, 1000), number=st.integers(1, 6))
@hypothesis_settings(max_examples=10, deadline=None)
def test_repeats_never_leak(seed, number):
    train = [Example(f"Say  {index % 40}", str(index), "say", label=index % 3) for index in range(120)]
    test = [Example(f"say {index}", str(index), "say", label=index % 3) for index in range(30, 90)]
    parts = Partition(tuple(tuple(range(client, 120, number)) for client in range(number)), str(seed))
    clients = clients_from(train, parts, test, settings(test_examples=5))
    assert len(clients) == number and no_leak(clients)
    assert clients.pool.left_out == 80 + 10  # 40 different prompts to train on, of which tests hold 30 to 39


def test_of_a_pair_across_train_and_test_the_test_example_stays():
    pool = deduplicated_pool(
        [Example("A  b", "1", "t"), Example("c", "2", "t"), Example("C", "3", "t")], [Example("a B", "4", "t")]
    )
    assert [example.response for example in pool.train] == ["2"]
    assert [example.response for example in pool.test] == ["4"]
    assert pool.left_out == 2


def test_plain_texts_are_compared_by_their_text():
    assert len(deduplicated_pool([Example("", "one", "t"), Example("", "two", "t"), Example("", "One", "t")], []).train) == 2


def test_a_seed_gives_the_same_clients_again_and_another_seed_others():
    first, again, other = (make_clients(settings(), seed) for seed in (0, 0, 1))
    assert first.manifest() == again.manifest()
    assert first.manifest() != other.manifest()
    assert first.hashes == other.hashes and set(first.hashes) == set(TASKS)


def test_each_client_has_one_task_and_is_described_by_it():
    clients = make_clients(settings(), 0)
    assert [list(clients.tasks(name)) for name in clients] == [["sort"]] * 3 + [["reverse"]] * 3
    assert clients.client("c01") == Client("c01", len(clients["c01"].train), "sort")
    assert {example.task for name in ("c01", "c02", "c03") for example in clients[name].test} == {"sort"}


def test_one_client_has_the_examples_of_all_clients_in_their_order():
    clients = make_clients(settings(), 0)
    pool = clients.as_one_client()
    assert list(pool) == ["c01-c06"]
    for part in ("train", "validation", "test"):
        whole = getattr(pool["c01-c06"], part)
        assert list(whole) == [example for name in clients for example in getattr(clients[name], part)]
    assert pool.client("c01-c06").examples == sum(clients.client(name).examples for name in clients)
    alone = make_clients(settings(sources=TASKS[:1], clients=1), 0)
    assert dict(alone.as_one_client()) == dict(alone)


def test_examples_drawn_with_replacement_repeat_in_training_and_not_in_validation_or_tests():
    clients = make_clients(settings(partition={"dirichlet": 0.5, "draws": 300}, limit=60, test_examples=20), 0)
    for name in clients:
        share = clients.shares[name]
        drawn = Counter(clients.partition.indices[list(clients).index(name)])
        assert drawn.total() == 300 and len(drawn) < 120
        assert len(share.validation) == len(set(share.validation)) == round(0.15 * len(drawn))
        assert Counter(share.train) == {index: count for index, count in drawn.items() if index not in share.validation}
        assert not {duplicate_key(each) for each in clients[name].test} & {duplicate_key(each) for each in clients[name].train}


def test_validation_has_the_share_that_the_settings_say():
    split = make_clients(settings(clients=2, validation=0.25), 0)["c01"]
    assert len(split.validation) == round(0.25 * (len(split.train) + len(split.validation)))


def labeled(number: int, of: str) -> list[Example]:
    return [Example(f"{of} {index}", "x", "class", label=index % 4) for index in range(number)]


def test_a_test_set_has_the_label_shares_of_its_client():
    train, test = labeled(400, "train"), labeled(400, "test")
    odd = tuple(index for index in range(400) if index % 4 == 1)
    mixed = tuple(index for index in range(400) if index % 4 == 2) + tuple(index for index in range(100) if index % 4 == 3)
    clients = clients_from(train, Partition((odd, mixed)), test, settings(partition="iid", test_examples=50))
    assert Counter(example.label for example in clients["c01"].test) == {1: 50}
    assert Counter(example.label for example in clients["c02"].test) == {2: 40, 3: 10}


def test_test_sets_share_an_example_only_when_the_source_has_no_more():
    train, test = labeled(400, "train"), labeled(100, "test")
    parts = Partition(tuple(tuple(range(client * 100, client * 100 + 100)) for client in range(4)))
    apart = clients_from(train, parts, test, settings(partition="iid", test_examples=24))
    assert len({example.prompt for name in apart for example in apart[name].test}) == 4 * 24
    shared = clients_from(train, parts, test, settings(partition="iid", test_examples=40))
    assert len({example.prompt for name in shared for example in shared[name].test}) == 100
    assert {len(shared[name].test) for name in shared} == {40}


def test_where_a_label_has_too_few_test_examples_others_of_its_task_take_their_place():
    test = [example for example in labeled(100, "test") if example.label != 1]
    odd = tuple(range(1, 400, 4))
    clients = clients_from(labeled(400, "train"), Partition((odd,)), test, settings(partition="iid", test_examples=10))
    assert len(clients["c01"].test) == 10


def test_a_task_without_test_examples_is_refused():
    with pytest.raises(BadData, match="client c01 has no test example"):
        clients_from(
            labeled(40, "train"), Partition((tuple(range(40)),)), [Example("a", "b", "other")], settings(partition="iid")
        )


def test_a_saved_partition_gives_the_same_clients(tmp_path):
    data = settings(partition={"by": "task", "within": {"dirichlet": 0.5, "clusters": 3}})
    clients = make_clients(data, 3)
    clients.partition.save(tmp_path / "partition.json")
    again = divide(load_pool(data), Partition.load(tmp_path / "partition.json"), data)
    assert again.manifest()["clients"] == clients.manifest()["clients"]
    with pytest.raises(BadData, match="made of other data"):
        divide(deduplicated_pool([], []), clients.partition, data)


def test_the_manifest_has_the_prompt_frame_of_each_task():
    clients = make_clients(DataSettings(sources=["synthetic/double", "synthetic/room"], clients=2, limit=40), seed=0)
    prompts = json.loads(json.dumps(clients.manifest()))["prompts"]
    assert prompts["double"] == {"frame": ["Double: ", "=>"], "choices": []}
    assert prompts["room"]["frame"] == ["Room: ", "=>"]
    assert "kitchen" in prompts["room"]["choices"]
    assert all(each.prompt.startswith("Room: ") for each in clients.pool.train if each.task == "room")


def test_the_manifest_is_json_and_saved_whole(tmp_path):
    clients = make_clients(settings(), 0)
    clients.save(tmp_path / "data.json")
    saved = json.loads((tmp_path / "data.json").read_text())
    assert list(saved["clients"]) == list(clients) and saved["hashes"] == dict(clients.hashes)
    assert saved["partition"]["hash"] == clients.partition.hash
    assert len(saved["clients"]["c01"]["train"]) == len(clients["c01"].train)


def test_rows_of_another_partitioner_become_clients_by_its_indices():
    class Halves:
        def load_partition(self, partition_id: int) -> list[dict]:
            return [{"ask": f"{number} + 1", "answer": number + 1} for number in range(partition_id * 5, partition_id * 5 + 5)]

    rows, made = from_object(Halves(), clients=2)
    train = [Example(row["ask"], str(row["answer"]), "sums") for row in rows]
    clients = clients_from(train, made, [Example("0+1", "1", "sums")], settings(partition="iid"))
    second = clients["c02"]
    assert {example.response for example in (*second.train, *second.validation)} == {"6", "7", "8", "9", "10"}


CLASSES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good_mood", "bad_mood"])})


def moods(prefix: str, number: int) -> datasets.Dataset:
    """Texts whose classes go by turns."""
    rows = [{"text": f"{prefix} {row}", "label": row % 2} for row in range(number)]
    return datasets.Dataset.from_list(rows, features=CLASSES)


class InOrder:
    """A partitioner as flwr-datasets has them: consecutive pieces of one Dataset."""

    def __init__(self, dataset: datasets.Dataset, clients: int) -> None:
        self.dataset, self.clients = dataset, clients

    def load_partition(self, partition_id: int) -> datasets.Dataset:
        return self.dataset.shard(self.clients, partition_id, contiguous=True)


def test_a_partitioner_of_datasets_becomes_clients_by_the_templates_of_files():
    data = settings(clients=3, test_examples=4)
    clients = clients_from_object(InOrder(moods("train", 30), 3), SourceSettings(name="moods"), moods("test", 20), data)
    assert list(clients) == ["c01", "c02", "c03"] and no_leak(clients)
    for client, name in enumerate(clients):
        split = clients[name]
        own = {example.prompt for example in (*split.train, *split.validation)}
        assert own == {f"train {row}\nAnswer:\n" for row in range(10 * client, 10 * client + 10)}
        assert Counter(example.response for example in split.test) == {"good mood": 2, "bad mood": 2}
        assert {(example.task, example.metric, example.choices) for example in split.test} == {
            ("moods", "accuracy", ("good mood", "bad mood"))
        }
    assert list(clients.hashes) == ["moods"] and json.loads(json.dumps(clients.manifest()))["partition"]["settings"] == {
        "by": "InOrder"
    }


def test_a_partitioner_of_dicts_may_have_fields_of_any_name():
    class Sums:
        def load_partition(self, partition_id: int) -> list[dict]:
            return [{"ask": f"{number} + {partition_id}", "sum": number + partition_id} for number in range(5)]

    source = SourceSettings(name="any", prompt="What is {ask}?", response="sum", task="sums", metric="exact_match")
    test = [{"ask": "7 + 7", "sum": 14}]
    clients = clients_from_object(Sums(), source, test, settings(clients=2))
    assert clients["c02"].test == (Example("What is 7 + 7?", "14", "sums", "exact_match"),)
    assert {example.response for example in (*clients["c02"].train, *clients["c02"].validation)} == {"1", "2", "3", "4", "5"}


def test_a_bad_row_of_a_partitioner_is_named():
    table = moods("train", 30).to_list()
    table[13]["label"] = -1  # how sets on the hub say that there is no label
    partitioner = InOrder(datasets.Dataset.from_list(table, features=CLASSES), 3)
    with pytest.raises(BadData, match=r"^load_partition\(1\), row 4: its field label is null"):
        clients_from_object(partitioner, SourceSettings(name="moods"), moods("test", 20), settings(clients=3))
    with pytest.raises(BadValue, match="list has no load_partition"):
        clients_from_object([], SourceSettings(name="moods"), [], settings(clients=3))


def test_more_clients_than_data_is_refused_with_the_numbers():
    with pytest.raises(BadData, match="task sort: 75 clients of at least 4 examples need 300, but there are 200"):
        make_clients(settings(clients=150), 0)


def test_a_source_that_only_repeats_another_is_refused(tmp_path):
    rows = [{"prompt": f"ask {number}", "response": str(number)} for number in range(20)]
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / f"{name}_test.jsonl").write_text(json.dumps({"prompt": f"test {name}", "response": "1"}))
    sources = [{"name": str(tmp_path / f"{name}.jsonl"), "test": str(tmp_path / f"{name}_test.jsonl")} for name in ("one", "two")]
    with pytest.raises(BadData, match=r"source .*two\.jsonl has no training example that no other"):
        make_clients(settings(sources=sources, clients=2), 0)


def test_a_source_of_one_prompt_is_refused(tmp_path):
    rows = [{"prompt": "Say it", "response": str(number)} for number in range(40)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadData, match=r"one\.jsonl has 40 rows, all with the same prompt"):
        load_pool(settings(sources=str(tmp_path / "one.jsonl")))


def table(folder, head: str, rows: list[str]) -> str:
    """The path of data.csv in a folder of its own."""
    folder.mkdir()
    (folder / "data.csv").write_text("\n".join([head, *rows]))
    return str(folder / "data.csv")


def classes(folder, *names: str) -> str:
    """A table of texts, thirty of each class."""
    rows = [f"{folder.name} {name} {number},{name}" for name in names for number in range(30)]
    return table(folder, "text,label", rows)


def test_two_sources_with_one_task_name_are_refused_unless_both_set_it(tmp_path):
    pets, moods = classes(tmp_path / "a", "cat", "dog"), classes(tmp_path / "b", "anger", "joy")
    with_task = {"name": moods, "task": "data"}
    for sources in ([pets, moods], [pets, with_task], [pets, pets], ["synthetic/sort", "synthetic/sort"]):
        with pytest.raises(BadData, match=r"^sources .* both have a task (data|sort); write task = … in each") as refused:
            load_pool(settings(sources=sources))
        assert all((source if isinstance(source, str) else source["name"]) in str(refused.value) for source in sources)
    apart = load_pool(settings(sources=[pets, {"name": moods, "task": "moods"}]))
    assert {example.task for example in apart.train} == {"data", "moods"}


def test_sources_that_set_one_task_become_one_if_their_classes_are_the_same(tmp_path):
    names = classes(tmp_path / "a", "cat", "dog"), classes(tmp_path / "b", "dog", "cat"), classes(tmp_path / "c", "anger", "dog")
    one, same, other = ({"name": name, "task": "pets"} for name in names)
    pool = load_pool(settings(sources=[one, same]))
    assert {(example.task, example.label, example.response) for example in pool.train} == {("pets", 0, "cat"), ("pets", 1, "dog")}
    with pytest.raises(BadData, match=r"task pets has 2 classes \(cat, dog\) in source .* and 2 \(anger, dog\) in source"):
        load_pool(settings(sources=[one, other]))


def test_two_metrics_for_one_task_are_refused_before_a_run_starts(tmp_path):
    one, two = (table(tmp_path / name, "prompt,response", [f"{name} {row},x" for row in range(30)]) for name in "ab")
    with pytest.raises(
        BadData, match=r"task t has metric rougeL in source .*a/data\.csv and exact_match in source .*b/data\.csv"
    ):
        load_pool(settings(sources=[{"name": one, "task": "t"}, {"name": two, "task": "t", "metric": "exact_match"}]))
    both = [{"name": name, "task": "t", "metric": "exact_match"} for name in (one, two)]
    assert {(example.task, example.metric) for example in load_pool(settings(sources=both)).train} == {("t", "exact_match")}


def test_a_metric_that_does_not_exist_is_refused_before_anything_is_read():
    with pytest.raises(BadValue, match=r"metric 'rougel' of source nowhere\.csv is not one of accuracy, .*; did you mean rougeL"):
        load_pool(settings(sources={"name": "nowhere.csv", "metric": "rougel"}))


def source_settings(*sources: dict) -> tuple:
    return settings(sources=list(sources)).sources


def test_retained_examples_are_a_sample_of_the_test_examples_and_choices_are_scored_by_likelihood(tmp_path):
    rows = [
        {"instruction": "Choose.", "input": f"{n}?\nA. x\nB. y", "output": "A", "choices": ["x", "y"], "gold": 0}
        for n in range(9)
    ]
    for split in ("train", "test"):
        (tmp_path / f"quiz.{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    quiz = {"name": str(tmp_path / "quiz.train.jsonl"), "limit": 4}
    sources = source_settings(quiz, {"name": "synthetic/sort", "task": "order", "limit": 7})
    retained = load_retained(sources, settings())
    assert Counter((example.task, example.metric) for example in retained.examples) == {
        ("quiz", "likelihood"): 4,
        ("order", "verbatim"): 7,
    }
    assert retained == load_retained(sources, settings())
    assert {name.partition("/")[0] for name in retained.hashes} == {"retained"} and len(retained.hashes) == 2
    with_metric = load_retained(source_settings({**quiz, "metric": "accuracy"}), settings())
    assert {example.metric for example in with_metric.examples} == {"accuracy"}


def test_a_task_whose_sources_have_different_prompts_has_an_empty_frame(tmp_path):
    for name, form in (("one", "Say {}"), ("two", "Tell {}"), ("same", "Say {}")):
        rows = [json.dumps({"word": f"{name} {number}", "answer": "x"}) for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        (tmp_path / f"{name}.form").write_text(form.format("{word}"))

    def frames(*names):
        sources = [
            {
                "name": str(tmp_path / f"{name}.jsonl"),
                "prompt": (tmp_path / f"{name}.form").read_text(),
                "response": "answer",
                "task": "t",
            }
            for name in names
        ]
        return load_pool(settings(sources=sources)).frames

    assert frames("one", "same") == {"t": ("Say ", "")}
    assert frames("one", "two") == frames("one", "two", "same") == {"t": ("", "")}


def test_clients_are_as_many_as_their_names():
    assert settings(clients=2, names=["a", "b"]).clients == 2
    data = DataSettings.model_validate({"sources": TASKS, "names": ["north", "east", "south"]})
    assert data.clients == 3 and list(make_clients(data, 0)) == ["north", "east", "south"]
    with pytest.raises(ValidationError, match="names gives 1 different names for 2 clients; give each its own"):
        settings(clients=2, names=["a", "a"])


def test_no_client_trains_on_a_retained_example():
    pool = load_pool(settings(sources="synthetic/sort", limit=40))
    retained = tuple(replace(example, task="other") for example in pool.train[:5])
    rest = without_retained(pool, Retained(retained))
    assert rest.train == pool.train[5:] and rest.test == pool.test
    assert rest.left_out == pool.left_out + 5


def test_a_source_scored_by_likelihood_needs_choices():
    with pytest.raises(BadData, match="scored by likelihood, which needs choices with the right answer among them"):
        load_pool(settings(sources={"name": "synthetic/sort", "metric": "likelihood"}))
    with pytest.raises(BadData, match="scored by likelihood, which needs choices with the right answer among them"):
        load_retained(source_settings({"name": "synthetic/sort", "metric": "likelihood"}), settings())


def test_the_names_of_metrics_are_those_of_evaluation():
    assert tuple(evaluation.METRICS) == METRIC_NAMES


def test_a_generated_task_takes_the_name_and_metric_of_its_source():
    pool = load_pool(settings(sources={"name": "synthetic/sort", "task": "order", "metric": "token_f1"}))
    assert {(example.task, example.metric) for example in (*pool.train, *pool.test)} == {("order", "token_f1")}


def test_clients_of_each_task_must_be_some_and_add_up():
    with pytest.raises(ValidationError, match="greater than 0"):
        settings(clients=2, partition={"by": "task", "clients_per_task": {"sort": 3, "reverse": -1}})
    with pytest.raises(ValidationError, match="clients_per_task gives 3 clients, but clients = 6"):
        settings(clients=6, partition={"by": "task", "clients_per_task": {"sort": 2, "reverse": 1}})
    clients = make_clients(settings(clients=3, partition={"by": "task", "clients_per_task": {"sort": 2, "reverse": 1}}), 0)
    assert [clients.client(name).task for name in clients] == ["sort", "sort", "reverse"]


def test_data_for_no_client_at_all_is_refused_with_the_numbers():
    with pytest.raises(BadData, match="a client needs at least 4 different examples, but there are 3 for 2 clients"):
        make_clients(settings(sources="synthetic/sort", clients=2, limit=3, partition="iid"), 0)


def test_a_split_travels_without_the_rest_of_the_data():
    clients = make_clients(settings(clients=50, limit=600), 0)
    assert len(pickle.dumps(clients["c01"])) < len(pickle.dumps(clients.pool)) / 5


def test_a_thousand_clients_are_made_in_seconds():
    start = time.perf_counter()
    train, test = labeled(10_000, "train"), labeled(1000, "test")
    parts = Partition(tuple(tuple(range(client * 10, client * 10 + 10)) for client in range(1000)))
    clients = clients_from(train, parts, test, settings(partition="iid"))
    assert next(iter(clients)) == "c0001" and list(clients)[-1] == "c1000"
    assert time.perf_counter() - start < 5


def test_a_thousand_clients_over_two_real_sets(pack):
    clients = make_clients(settings(sources=["trec6", "banking77"], limit=None, clients=1000, partition={"dirichlet": 0.1}), 0)
    assert len(clients) == 1000 and no_leak(clients)


def test_twelve_clients_over_three_real_tasks_four_each(pack):
    data = settings(
        sources=["ag_news", "banking77", "quoref"], clients=12, limit=400, partition={"by": "task", "within": {"dirichlet": 0.5}}
    )
    clients = make_clients(data, 0)
    assert [clients.client(name).task for name in clients] == ["ag_news"] * 4 + ["banking77"] * 4 + ["quoref"] * 4
    assert no_leak(clients) and {len(clients[name].test) for name in clients} == {50}
