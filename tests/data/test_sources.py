"""Where examples come from."""

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from fedexperts.data.pack import PACKS
from fedexperts.data.readers import read
from fedexperts.data.settings import DataSettings, PartitionSettings
from fedexperts.data.sources import load
from fedexperts.errors import BadData, BadValue
from fedexperts.types import Example

ROWS = [{"prompt": f"{number} + 1 =", "response": str(number + 1)} for number in range(20)]


def source(name: object, **others: object):
    settings = DataSettings(sources=[{"name": str(name), **others}])
    return load(settings.sources[0], settings)


def jsonl(path: Path, rows: list[dict]) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def csv(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    return path


def parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = {"sums.jsonl": jsonl, "sums.jsonl.gz": jsonl, "sums.csv": csv, "sums.parquet": parquet}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_each_format_give_the_same_examples(tmp_path, name):
    path = WRITERS[name](tmp_path / name, ROWS)
    loaded = source(path)
    assert (len(loaded.train), len(loaded.test)) == (18, 2)
    assert Example("3 + 1 =", "4", "sums", "rougeL") in loaded.train + loaded.test
    assert loaded == source(path)


def test_the_hash_is_of_the_bytes_that_were_read(tmp_path):
    path = jsonl(tmp_path / "sums.jsonl", ROWS)
    before = source(path).hash
    jsonl(path, ROWS[:-1])
    assert len(before) == 64 and source(path).hash != before


def test_a_test_file_beside_the_training_file_is_found(tmp_path):
    path = jsonl(tmp_path / "sums.train.jsonl", ROWS[:15])
    jsonl(tmp_path / "sums.test.jsonl", ROWS[15:])
    loaded = source(path)
    assert [example.prompt for example in loaded.test] == [row["prompt"] for row in ROWS[15:]]
    assert len(loaded.train) == 15


def test_a_test_file_can_be_named(tmp_path):
    path, other = jsonl(tmp_path / "sums.jsonl", ROWS[:15]), csv(tmp_path / "test.csv", ROWS[15:])
    assert len(source(path, test=str(other)).test) == 5


def test_a_limit_draws_the_same_examples_each_time(tmp_path):
    path = jsonl(tmp_path / "sums.jsonl", ROWS)
    few = source(path, limit=5)
    assert len(few.train) == 5 and few == source(path, limit=5)
    assert {example.prompt for example in few.train} <= {example.prompt for example in source(path).train}


def test_fields_can_be_named_and_classes_go_by_name_or_number(tmp_path):
    rows = [
        {"says": f"text {number}", "mood": ("sad", "glad")[number % 2], "grade": str(3 * (number % 2))} for number in range(20)
    ]
    path = csv(tmp_path / "moods.csv", rows)
    by_name, by_number = (
        source(path, prompt="says", label="mood"),
        source(path, prompt="Hear: {says}", label="grade", task="grade"),
    )
    assert {(example.response, example.label) for example in by_name.train} == {("glad", 0), ("sad", 1)}
    assert {example.choices for example in by_name.train + by_name.test} == {("glad", "sad")}
    assert {(example.response, example.label) for example in by_number.train} == {("0", 0), ("3", 1)}
    assert by_number.train[0].prompt.startswith("Hear: text") and by_number.train[0].task == "grade"


def test_a_response_alone_is_plain_text(tmp_path):
    loaded = source(jsonl(tmp_path / "tales.jsonl", [{"story": f"Tale {number}"} for number in range(20)]), response="story")
    assert {(example.prompt, example.metric) for example in loaded.train} == {("", "perplexity")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "line 1: the file is empty"),
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt"', "line 2: not JSON"),
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n\n[1]', "line 3: a list, but a row is an object"),
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": "a"}', "line 2: it has no field response"),
        ("a.jsonl", b'{"prompt": "a", "response": ""}\n' * 2, "line [12]: its field response is empty"),
        ("a.jsonl", b'{"prompt": "\xff"}', "line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": "a"}', "line 2: it has no field label"),
        ("a.jsonl.gz", b"not packed at all", "line 1: the compressed file is damaged"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 99, mtime=0)[:-9],
            "line 100: the compressed file is damaged",
        ),
        ("a.csv", b"prompt,response\na,b\nc,d,e\n", "line 3: not the 2 fields"),
        ("a.csv", b"prompt,response\na\n", "line 2: not the 2 fields"),
        ("a.csv", b"", "line 1: the file is empty"),
        ("a.parquet", b"PAR1", "row 1: not a parquet file"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadData, match=f"{path}, {message}"):
        source(path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(BadData, match="does not exist; check the path"):
        source(tmp_path / "none.jsonl")
    with pytest.raises(BadData, match=r"is no \.jsonl, \.json, \.csv, \.tsv or \.parquet file"):
        read(tmp_path / "none.txt")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(BadValue, match="did you mean banking77"):
        source("banking7")
    with pytest.raises(BadValue, match="did you mean sort"):
        source("synthetic/srot")


def test_without_the_pack_one_sentence_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDEXPERTS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(BadData, match="set FEDEXPERTS_DATA to its folder"):
        source("ag_news")
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(BadData, match="set FEDEXPERTS_DATA to the folder of the data pack"):
        source("ag_news")


def test_generated_tasks_have_train_and_test():
    loaded = source("synthetic/sort", limit=50)
    assert len(loaded.train) == 50 and len(loaded.test) == 200
    assert not {example.prompt for example in loaded.train} & {example.prompt for example in loaded.test}
    assert loaded == source("synthetic/sort", limit=50)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_a_set_is_loaded_through_datasets_with_its_own_test_split(tmp_path, cache):
    folder = tmp_path / "sums"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ROWS[:15])
    jsonl(folder / "test.jsonl", ROWS[15:])
    loaded = source(f"hub:{folder}", prompt="Say {prompt}", response="response", task="plus", metric="exact_match")
    assert (len(loaded.train), len(loaded.test)) == (15, 5)
    assert loaded.train[0] == Example("Say 0 + 1 =", "1", "plus", "exact_match")
    assert len(source(f"hub:{folder}", split="test").train) == 5 - 1  # no other split is for testing, so it is divided itself
    with pytest.raises(BadData, match="no split tset, only train, test; did you mean test"):
        source(f"hub:{folder}", test_split="tset")


def test_classes_of_a_hub_set_go_by_their_names(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    table = datasets.Dataset.from_dict({"text": ["bad", "good", "fine"], "label": [0, 1, 1]}, features=features)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config: datasets.DatasetDict({"train": table, "validation": table})
    )
    loaded = source("hub:someone/moods")
    assert [(example.response, example.label) for example in loaded.train] == [("neg", 0), ("pos", 1), ("pos", 1)]
    assert len(loaded.test) == 3 and loaded.train[0].task == "moods"


def test_a_set_that_cannot_be_fetched_is_refused(monkeypatch, cache):
    def offline(name: str, config: str | None) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(BadData, match=r"someone/moods cannot be loaded from the hub \(no route to host\)"):
        source("hub:someone/moods")


def test_every_set_of_the_pack_is_read(pack):
    small = {name: each for name, each in PACKS.items() if each.kind != "plain_text"} | {"stories": PACKS["stories"]}
    seen = 0
    for name in small:
        if not (pack / f"{PACKS[name].train[0]}.train.jsonl.gz").exists():
            continue
        loaded = source(name, limit=20)
        assert len(loaded.train) == 20 and loaded.test, name
        seen += 1
    assert seen >= 10


def test_the_classes_of_ag_news_are_its_choices(pack):
    loaded = source("ag_news")
    assert (len(loaded.train), len(loaded.test)) == (9599, 2000)
    assert {example.choices for example in loaded.train} == {("World", "Sports", "Business", "Sci/Tech")}
    assert all(example.response == example.choices[example.label] for example in loaded.train)


def test_tasks_of_a_pack_of_many_can_be_taken_alone(pack):
    assert Counter(example.task for example in source("quoref").train) == {"quoref": 500}
    assert Counter(example.metric for example in source("xsum").test) == {"rouge2": 99}
    assert source("superni/task363").train[0].choices == ("NEG", "POS")
    assert len({example.task for example in source("dolly").train}) == 8
    assert {(example.task, example.metric) for example in source("dolly/closed_qa").train} == {("dolly/closed_qa", "token_f1")}
    assert {example.task for example in source("mmlu", task="mmlu").train} == {"mmlu"}
    with pytest.raises(BadValue, match="did you mean closed_qa"):
        source("dolly/closedqa")


@pytest.mark.parametrize("name", ["mmlu", "piqa", "commonsenseqa"])
def test_sets_of_choices_are_asked_by_letter_or_as_cloze(pack, name):
    letters, texts = source(name).test, source(f"{name}_cloze").test
    assert len(letters) == len(texts) >= 721
    for one, other in zip(letters, texts, strict=True):
        assert len(one.choices) == len(other.choices) and one.choices[:2] == ("A", "B")
        assert other.choices[one.choices.index(one.response)] == other.response
        assert f"A. {other.choices[0]}" in one.prompt and f"\nA. {other.choices[0]}" not in other.prompt


def test_every_category_of_dolly_can_be_judged_by_rouge(pack):
    categories = ("closed_qa", "information_extraction", "classification", "summarization")
    loaded = [source(f"dolly/{name}", metric="rougeL") for name in categories]
    assert {example.metric for each in loaded for example in (*each.train, *each.test)} == {"rougeL"}
    assert [each.test[0].task for each in loaded] == [f"dolly/{name}" for name in categories]


def test_settings_have_short_forms():
    settings = DataSettings.model_validate({"sources": "ag_news", "partition": {"by": "task", "within": {"dirichlet": 0.3}}})
    assert settings.sources[0].name == "ag_news"
    assert settings.partition.within == PartitionSettings(by="dirichlet", alpha=0.3)
    assert PartitionSettings.model_validate("iid") == PartitionSettings(by="iid")
    assert PartitionSettings.model_validate({"pathological": 3}) == PartitionSettings(by="pathological", labels_per_client=3)
    assert PartitionSettings.model_validate({"dirichlet": 0.1, "clusters": 5}).clusters == 5


def test_settings_survive_being_written_and_read():
    settings = DataSettings.model_validate(
        {"sources": ["ag_news", {"name": "a.csv", "label": "b"}], "partition": {"clusters": 4}}
    )
    assert DataSettings.model_validate(settings.model_dump()) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "at least 1 item"),
        ({"sources": ["a"], "cleints": 3}, "cleints"),
        ({"sources": [{"name": "a", "promt": "b"}]}, "promt"),
        ({"sources": ["a"], "partition": {"by": "tsak"}}, "'task', 'iid'"),
        ({"sources": ["a"], "partition": {"alpha": 0.1}}, "alpha has no effect with by"),
        ({"sources": ["a"], "partition": {"by": "iid", "within": "iid"}}, "within has no effect"),
        ({"sources": ["a"], "partition": {"quantity": 0.5, "draws": 9}}, "draws has no effect"),
        ({"sources": ["a"], "partition": {"dirichlet": 0.5, "draws": 0}}, "greater than 0"),
        ({"sources": ["a"], "partition": {"by": "task", "within": "task"}}, "within divides one task"),
        ({"sources": ["a"], "partition": {"dirichlet": 0}}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DataSettings.model_validate(settings)


def write_pack(folder: Path, stem: str, rows: dict[str, list[dict]]) -> None:
    for split, content in rows.items():
        path = folder / f"{stem}.{split}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        jsonl(path, content)


def test_a_task_of_a_pack_is_named_in_full_or_by_the_start_of_its_name(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDEXPERTS_DATA", str(tmp_path))
    tasks = ("task1", "task1_long", "task1_short", "task12_other", "task875_emotion_classification")
    rows = [
        {"task": task, "instruction": "Do", "input": f"{task} {n}", "output": f"answer {n % 2}"}
        for task in tasks
        for n in range(3)
    ]
    write_pack(tmp_path, "instruct/superni", {"train": rows, "test": rows[::3]})
    assert {example.task for example in source("superni").train} == {f"superni/{task}" for task in tasks}
    assert {example.task for example in source("superni/task1").train} == {"superni/task1"}
    assert {example.task for example in source("superni/task12").train} == {"superni/task12"}
    emotions = source("superni/task875_emotion_classification", task="mood")
    assert {(each.task, each.metric, each.choices) for each in emotions.train} == {("mood", "accuracy", ("answer 0", "answer 1"))}
    with pytest.raises(BadValue, match=r"has no task 'task2', only task1, task12_other, task1_long, task1_short, … \(5 in all\)"):
        source("superni/task2")


def test_a_sample_keeps_the_order_of_its_source(tmp_path):
    path = jsonl(tmp_path / "sums.jsonl", ROWS)
    prompts = [example.prompt for example in source(path).train]
    sampled = [example.prompt for example in source(path, limit=9).train]
    assert len(sampled) == 9 and sampled == [prompt for prompt in prompts if prompt in sampled]
    assert source(path, limit=18) == source(path)


def test_at_least_one_row_is_for_testing_and_a_single_row_is_for_training(tmp_path):
    assert [len(rows) for rows in vars(source(jsonl(tmp_path / "three.jsonl", ROWS[:3]))).values() if isinstance(rows, list)] == [
        2,
        1,
    ]
    single = source(jsonl(tmp_path / "one.jsonl", ROWS[:1]))
    assert (len(single.train), single.test) == (1, [])


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path):
    (tmp_path / "excel.csv").write_bytes(b"\xef\xbb\xbfprompt,response\na,b\nc,d\n")
    assert {example.response for example in source(tmp_path / "excel.csv").train + source(tmp_path / "excel.csv").test} == {
        "b",
        "d",
    }


def test_a_hub_set_whose_test_split_is_empty_is_divided_itself(monkeypatch):
    rows = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits)
    assert [len(part) for part in (source("hub:a/b").train, source("hub:a/b").test)] == [18, 2]


@pytest.mark.parametrize(
    ("gold", "message"), [(-1, "its gold is -1"), (2, "its gold is 2, but it has 2 choices"), (None, "its field gold is null")]
)
def test_a_question_without_its_right_choice_is_refused_with_the_line(tmp_path, gold, message):
    rows = [{"instruction": "Choose.", "input": f"{n}", "choices": ["a", "b"], "gold": 0, "output": "A"} for n in range(4)]
    path = jsonl(tmp_path / "quiz.jsonl", [*rows, {**rows[0], "gold": gold}])
    with pytest.raises(BadData, match=f"quiz.jsonl, line 5: .*{message}"):
        source(path)


def test_a_row_that_breaks_its_template_is_named_in_one_sentence(tmp_path):
    path = jsonl(tmp_path / "quiz.jsonl", [{"instruction": "Choose.", "input": "?", "choices": 7, "gold": 0, "output": "A"}] * 2)
    with pytest.raises(
        BadData, match=r"quiz.jsonl, line [12]: its fields do not fit together \(TypeError: .*\); correct or remove"
    ) as refused:
        source(path)
    assert "\n" not in str(refused.value)


def test_labels_may_have_blanks_around_them(tmp_path):
    rows = [{"prompt": f"say {n}", "response": "x", "kind": (" riddle", "sum ")[n % 2]} for n in range(20)]
    loaded = source(csv(tmp_path / "kinds.csv", rows), prompt="prompt", response="response", label="kind")
    assert {(example.label, int(example.prompt[-1]) % 2) for example in loaded.train} == {(0, 0), (1, 1)}


def test_classes_that_are_numbers_keep_their_order_and_come_before_names(tmp_path):
    rows = [{"text": f"text {n}", "label": (10, 9, "b", "a")[n % 4]} for n in range(40)]
    loaded = source(jsonl(tmp_path / "mixed.jsonl", rows))
    assert loaded.train[0].choices == ("9", "10", "a", "b")


def long_names(number: int) -> dict:
    return {f"a_rather_long_name_of_a_field_{index}": "x" for index in range(number)}


def test_error_sentences_stay_short_whatever_they_name(tmp_path):
    paths = {
        "fields": jsonl(tmp_path / "fields.jsonl", [long_names(60)]),
        "missing": jsonl(tmp_path / "missing.jsonl", [{"prompt": "a", **long_names(60)}]),
    }
    sources = [{"name": str(paths["fields"])}, {"name": str(paths["missing"]), "prompt": "prompt", "response": "answer"}]
    sources += [{"name": "not/a source"}, {"name": "synthetic/srot"}]
    for settings in sources:
        with pytest.raises(BadValue) as refused:
            source(**settings)
        assert len(str(refused.value).replace(str(tmp_path), "")) <= 300
