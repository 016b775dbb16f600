"""Formats of the user's own files: what they become, and how bad ones are refused."""

import csv
import gzip
import json
from pathlib import Path
from random import Random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from fedexperts import config
from fedexperts.data import conversations
from fedexperts.data.pool import load_pool
from fedexperts.data.settings import DataSettings
from fedexperts.data.sources import Source, load
from fedexperts.errors import BadData
from fedexperts.types import Example, Turn

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Capital?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "Thanks"},
]
TURNS = (Turn("system", "Be kind."), Turn("user", "Capital?"), Turn("assistant", "Paris"), Turn("user", "Sure?"))


def source(name: object, **others: object) -> Source:
    settings = DataSettings(sources=[{"name": str(name), **others}])
    return load(settings.sources[0], settings)


def written(path: Path, *rows: object) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.name.lower().endswith("gz") else text)
    return path


def first(path: Path, **others: object) -> Example:
    return source(path, **others).train[0]


def test_chat_messages_are_turns_up_to_the_last_answer(tmp_path):
    example = first(written(tmp_path / "chat.jsonl", {"messages": CHAT}))
    assert (example.turns, example.response, example.template) == (TURNS, "Yes", conversations.PLAIN_CHAT)
    assert (example.prompt, example.metric, example.task) == ("Be kind.\nCapital?\nParis\nSure?", "rougeL", "chat")


def test_sharegpt_rows_have_other_names_for_the_same(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    row = {"conversations": [{"from": names[each["role"]], "value": each["content"]} for each in CHAT]}
    assert first(written(tmp_path / "a.jsonl", row)).turns == TURNS
    without = {"conversations": row["conversations"][1:], "system": "Be kind."}
    assert first(written(tmp_path / "b.jsonl", without)).turns == TURNS


def test_alpaca_rows_keep_their_frame(tmp_path):
    row = {"instruction": "Translate.", "input": "chat", "output": "cat", "text": "### Instruction: …"}
    example = first(written(tmp_path / "a.json.gz", row))
    assert example == Example("### Instruction:\nTranslate.\n\n### Input:\nchat\n\n### Response:\n", "cat", "a", "rougeL")


def test_a_system_message_of_the_settings_is_for_rows_without_their_own(tmp_path):
    path = written(tmp_path / "a.jsonl", {"messages": CHAT})
    assert first(path, system="Be brief.").turns == TURNS
    path = written(tmp_path / "b.jsonl", {"messages": [{"role": "system", "content": ""}, *CHAT[1:]]})
    assert first(path).turns == TURNS[1:]
    assert first(path, system="Be brief.").turns == (Turn("system", "Be brief."), *TURNS[1:])


def test_a_format_or_a_field_is_named_where_several_fit(tmp_path):
    path = written(tmp_path / "a.jsonl", {"messages": CHAT, "prompt": "P", "response": "R", "talk": CHAT[1:3]})
    with pytest.raises(BadData, match=r"a.jsonl, line 1: its fields .* fit several formats; say which one to read with format"):
        source(path)
    assert first(path, format="messages").turns == TURNS
    assert first(path, format="prompt_response").prompt == "P"
    assert first(path, messages="talk").turns == (Turn("user", "Capital?"),)
    with pytest.raises(ValidationError, match="format"):
        source(path, format="massages")


def test_endings_may_be_in_any_case_and_files_may_be_json_or_tsv(tmp_path):
    rows = [{"prompt": f"{number} + 1 =", "response": str(number + 1)} for number in range(5)]
    (tmp_path / "sums.JSON").write_text(json.dumps(rows))
    written(tmp_path / "sums.JsonL.GZ", *rows)
    written(tmp_path / "sums.json", *rows)  # one object a line
    (tmp_path / "sums.TSV").write_text("prompt\tresponse\n" + "".join(f"{row['prompt']}\t{row['response']}\n" for row in rows))
    examples = [source(path).train + source(path).test for path in sorted(tmp_path.iterdir())]
    assert len(examples) == 4
    assert all(sorted(each, key=str) == sorted(examples[0], key=str) for each in examples) and len(examples[0]) == 5


def test_fields_longer_than_the_parsers_default_are_read(tmp_path):
    (tmp_path / "long.csv").write_text(f"prompt,response\n{'a' * 200_000},b\nc,d\n")
    before = csv.field_size_limit()
    loaded = source(tmp_path / "long.csv")
    assert max(len(example.prompt) for example in loaded.train + loaded.test) == 200_000 and csv.field_size_limit() == before


GOOD = '{"prompt": "a", "response": "b"}\n'
MESSAGE = '{"messages": [%s, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + '{"prompt": "a"}', "line 2: it has no field response, only prompt; add it or name another field"),
        ("a.jsonl", GOOD + '{"prompt": "a", "response": null}', "line 2: its field response is null; give it a value"),
        ("a.jsonl", GOOD + '{"prompt": "a", "response": " "}', "line 2: its field response is empty; fill it in"),
        ("a.jsonl", GOOD + '{"prompt": "a", "response": ["b"]}', "line 2: its field response is a list, but text is needed"),
        ("a.jsonl", GOOD + '{"prompt": "a", "response": NaN}', r"line 2: not JSON \(NaN is no value of JSON\)"),
        ("a.jsonl", GOOD + '{"prompt": ' + "1" * 5000 + "}", r"line 2: not JSON \(a number of more than 4300 digits\)"),
        (
            "a.jsonl",
            GOOD + '{"prompt": ' + "[" * 99999 + "]" * 99999 + "}",
            "line 2: its lists and objects are nested too deeply",
        ),
        ("a.jsonl", GOOD + r'{"prompt": "\ud800", "response": "b"}', r"line 2: it has \\ud800, half of a surrogate pair"),
        ("a.json", "[\n" + GOOD.strip() + ",\n{]", "line 3: not JSON"),
        ("a.json", '"text"', "line 1: a str, but a .json file is a list of objects"),
        ("a.json", "[1]", "row 1: a int, but a row is an object of fields"),
        ("a.json", "[]", "line 1: the file is empty"),
        ("a.csv", "prompt,response,prompt\na,b,c\n", "line 1: the field 'prompt' stands twice in the first line"),
        ("a.csv", 'prompt,response\na,b\n"c,d\ne,f\n', "line 3: unexpected end of data"),
        ("a.csv", "text,label\nx,0\ny,\nz,1\n", "line 3: its field label is empty"),
        ("a.jsonl", '{"messages": "hi"}', "line 1: its field messages is a str, but a conversation is a list of messages"),
        ("a.jsonl", '{"messages": []}', "line 1: its field messages is empty"),
        ("a.jsonl", MESSAGE % "1", "line 1: its message 1 is a int"),
        ("a.jsonl", MESSAGE % '{"role": "user"}', "line 1: message 1: it has no field content"),
        ("a.jsonl", MESSAGE % '{"role": "user", "content": null}', "line 1: message 1: its field content is null"),
        ("a.jsonl", MESSAGE % '{"role": "user", "content": ""}', "line 1: message 1: its field content is empty"),
        ("a.jsonl", MESSAGE % '{"role": "tool", "content": "a"}', "line 1: message 1: its role is 'tool', but known are system"),
        (
            "a.jsonl",
            MESSAGE % '{"role": "assistant", "content": "a"}',
            "line 1: the roles of its messages .* are assistant, assistant",
        ),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "line 1: the roles of its messages .* are none"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(BadData, match=f"{path}, {message}") as error:
        source(path)
    assert len(str(error.value)) <= 300


def test_an_unrelated_column_label_name_does_not_name_the_classes_of_another_field(tmp_path):
    rows = [{"text": f"t{n}", "domain": ("law", "art")[n % 2], "label_name": ("neg", "pos")[n // 2 % 2]} for n in range(12)]
    loaded = source(written(tmp_path / "a.jsonl", *rows), label="domain")
    assert {(example.response, example.choices) for example in loaded.train} == {("law", ("art", "law")), ("art", ("art", "law"))}


def test_named_classes_of_a_table_are_those_of_the_field_that_is_the_label(monkeypatch):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "domain": datasets.ClassLabel(names=["law", "art"]),
            "label_name": datasets.Value("string"),
        }
    )
    columns = {"text": ["a", "b", "c"], "domain": [0, 1, 1], "label_name": ["neg", "pos", "neg"]}
    table = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict({"train": table, "test": table}))
    assert [example.response for example in source("hub:someone/texts", label="domain").train] == ["law", "art", "art"]


def test_a_message_about_columns_names_only_columns_of_the_file(tmp_path):
    path = written(tmp_path / "a.jsonl", {"text": "a", "label": 0}, {"txt": "b", "label": 1})
    with pytest.raises(BadData, match="line 2: it has no field text, only txt, label; add it"):
        source(path)


def test_labels_of_a_test_split_that_no_training_row_has_are_refused(tmp_path):
    train = written(tmp_path / "a.train.jsonl", *({"text": f"t{n}", "label": n % 2} for n in range(6)))
    written(tmp_path / "a.test.jsonl", {"text": "x", "label": 1}, {"text": "y", "label": -1})
    with pytest.raises(BadData, match=r"a.test.jsonl, line 2: its label is '-1', which no training row has \(they have 0, 1\)"):
        source(train)


def test_files_are_found_beside_the_run_file_or_else_in_the_working_directory(tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    for folder, answer in ((there, "there"), (here, "here")):
        folder.mkdir()
        written(folder / "mine.jsonl", *({"prompt": f"{n}", "response": answer} for n in range(9)))
    run_file = there / "run.toml"
    run_file.write_text('data = { sources = ["mine.jsonl"], clients = 2, partition = "iid" }\n')
    monkeypatch.chdir(here)
    settings = config.read(run_file)
    assert {example.response for example in load_pool(settings.data).train} == {"there"}
    prompts = [example.prompt for example in load_pool(settings.data).train]
    (there / "mine.jsonl").unlink()
    assert {example.response for example in load_pool(config.read(run_file).data).train} == {"here"}
    monkeypatch.chdir(there)
    written(there / "mine.jsonl", *({"prompt": f"{n}", "response": "there"} for n in range(9)))
    again = config.read(run_file)
    assert again.data.sources[0].folder is None  # as results of runs that were started there have it
    assert [example.prompt for example in load_pool(again.data).train] == prompts


def test_a_content_in_parts_is_their_text(tmp_path):
    parts = [{"type": "text", "text": "Capital "}, {"type": "text", "text": "of France?"}]
    path = written(tmp_path / "parts.jsonl", *({"messages": [{"role": "user", "content": parts}, CHAT[2]]} for _ in range(3)))
    assert {example.prompt for split in (source(path).train, source(path).test) for example in split} == {"Capital of France?"}
    picture = [*parts, {"type": "image_url", "image_url": {"url": "https://a"}}]
    written(path, {"messages": [{"role": "user", "content": picture}, CHAT[2]]})
    with pytest.raises(BadData, match="line 1: message 1: its field content is a list, but text is needed"):
        source(path)


def mutated(content: bytes, chance: Random) -> bytes:
    """`content` with one to three accidents: cut, bytes of other encodings, quotes, numbers, nesting, nulls, joined lines."""
    junk = [b"\xff\xfe", b"\x00", b'"', b"'", b"NaN", b"null", b"\xef\xbb\xbf", b"9" * 5000, b"[" * 3000, b"{", b"\\ud83d"]
    junk += [b"", b"\r", b"\t", b",", b"1e999", b"-1", b"a" * 150_000, b"\x93", '"ü"'.encode("utf-16"), b"true", b"[[]]", b"\n\n"]
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(content) + 1)
        end = min(len(content), start + chance.choice((0, 0, 1, 5, 40)))
        content = content[:start] + chance.choice(junk) + content[end:]
        content = content[: chance.randrange(len(content) + 1)] if chance.random() < 0.15 else content
    return content


def originals(folder: Path) -> list[Path]:
    """A good file of each kind and format."""
    pairs = [{"prompt": f"{n} + 1 =", "response": str(n + 1)} for n in range(6)]
    chats = [{"messages": CHAT}, {"messages": CHAT[1:]}, {"messages": CHAT[1:3]}]
    classes = [{"text": f"text {n}", "label": n % 3} for n in range(6)]
    paths = [
        written(folder / f"{name}.jsonl", *rows) for name, rows in (("pairs", pairs), ("chats", chats), ("classes", classes))
    ]
    (folder / "list.json").write_text(json.dumps(chats))
    paths += [folder / "list.json", written(folder / "pairs.jsonl.gz", *pairs)]
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        with (folder / f"classes.{ending}").open("w") as file:
            table = csv.DictWriter(file, list(classes[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
            table.writeheader()
            table.writerows(classes)
        paths.append(folder / f"classes.{ending}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), folder / "chats.parquet")
    return [*paths, folder / "chats.parquet"]


def test_damaged_files_are_read_or_refused_in_one_sentence_that_names_the_file(tmp_path):
    chance, refused, read, good = Random(0), 0, 0, originals(tmp_path)
    for number in range(900):
        original = good[number % len(good)]
        path = tmp_path / f"bad{number}.{original.name.partition('.')[2]}"
        path.write_bytes(mutated(original.read_bytes(), chance))
        try:
            loaded = source(path)
        except BadData as error:
            assert len(str(error)) <= 300 and path.name in str(error) and "\n" not in str(error), str(error)
            refused += 1
        else:
            json.dumps([vars(example) for example in loaded.train], default=vars, ensure_ascii=False).encode()
            read += 1
    assert refused > 450 and read > 60 and refused + read == 900
