"""Clients that bring their own data."""

import json
from dataclasses import replace

import pytest

from fedexperts.data.clients import make_clients
from fedexperts.data.own import Counts, counts, own_clients, placeholder_clients
from fedexperts.data.pool import Retained
from fedexperts.data.settings import DataSettings
from fedexperts.errors import BadData
from fedexperts.types import Example


def settings(**changes: object) -> DataSettings:
    source = {"name": "theirs", "prompt": "Say {word}", "response": "word", "task": "say"}
    return DataSettings.model_validate({"sources": [source], "names": ["north", "east"], "own": True, **changes})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"word": f"word{number}"}) + "\n" for number in range(40)))
    return str(path)


def test_a_client_reads_all_rows_of_its_files_as_the_source_of_the_run_says(file):
    clients = own_clients("east", [file], settings(), 0, Retained())
    assert list(clients) == ["east"]
    split = clients["east"]
    assert len(split.train) + len(split.validation) == 36 and split.test
    assert {example.task for example in (*split.train, *split.validation, *split.test)} == {"say"}
    assert all(example.prompt == f"Say {example.response}" for example in split.train)


def test_a_client_does_not_train_on_a_retained_example(file):
    known = own_clients("east", [file], settings(), 0, Retained()).pool.train[3]
    pool = own_clients("east", [file], settings(), 0, Retained((Example(known.prompt, "", "other"),))).pool
    assert known not in pool.train and len(pool.train) == 35


def test_a_client_reports_counts_and_the_server_works_with_as_many_empty_examples():
    clients = make_clients(DataSettings(sources=["synthetic/sort", "synthetic/add"], clients=2, limit=40, partition="iid"), 0)
    reported = {name: counts(clients, name, longest_response=5) for name in clients}
    placeholders = placeholder_clients(reported)
    for name in clients:
        assert reported[name].longest_response == 5
        assert placeholders.tasks(name) == clients.tasks(name) == reported[name].train
        assert placeholders.client(name) == clients.client(name)
        own, other = placeholders.shares[name], clients.shares[name]
        assert [len(getattr(own, part)) for part in vars(own)] == [len(getattr(other, part)) for part in vars(other)]
    examples = {(each.prompt, each.response) for name in placeholders for each in placeholders[name].train}
    assert examples == {("", "")}
    assert sorted(index for part in placeholders.partition.indices for index in part) == list(range(80))


def test_validation_and_test_placeholders_are_of_the_most_frequent_task():
    split = placeholder_clients({"c": Counts({"rare": 1, "frequent": 3}, validation=2, test=1, longest_response=1)})["c"]
    assert [example.task for example in split.train] == ["rare", "frequent", "frequent", "frequent"]
    assert {example.task for example in (*split.validation, *split.test)} == {"frequent"}
    assert (len(split.validation), len(split.test)) == (2, 1)


def test_too_few_own_rows_are_refused(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"word": "a"}\n{"word": "b"}\n')
    with pytest.raises(BadData, match="client needs at least 4 different examples, but there are 1"):
        own_clients("east", [str(tmp_path / "one.jsonl")], settings(), 0, Retained())


def test_the_server_learns_how_clients_with_data_of_their_own_are_asked(file):
    source = settings(template="chat").sources[0].model_copy(update={"template": "chat", "system": "Be kind."})
    reported = {}
    for name in ("north", "east"):
        clients = own_clients(name, [file], settings(), 0, Retained())
        reported[name] = counts(clients, name, longest_response=5)
    assert reported["east"].frames == {"say": ("Say ", "")}
    assert placeholder_clients(reported).prompts() == {"say": {"frame": ("Say ", ""), "choices": ()}}
    chat = placeholder_clients(reported, source).prompts()["say"]["chat"]
    assert chat == {"template": None, "system": "Be kind."}
    other = {**reported, "north": replace(reported["north"], frames={"say": ("Answer: ", "")})}
    assert placeholder_clients(other).prompts() == {}


def test_a_client_reports_no_words_of_its_rows(tmp_path):
    quiz = [
        {"instruction": "Choose secretly.", "input": f"{n}", "choices": ["a", "b"], "gold": 0, "output": "A"} for n in range(9)
    ]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    plain = DataSettings.model_validate({"sources": [{"name": "theirs", "task": "quiz"}], "names": ["east"], "own": True})
    clients = own_clients("east", [str(tmp_path / "quiz.jsonl")], plain, 0, Retained())
    assert "secretly" in clients.pool.frames["quiz"][0] and counts(clients, "east", 2).frames == {}
