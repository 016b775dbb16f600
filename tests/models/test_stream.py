import gzip
import hashlib
import json

import pytest
import torch

from fedexperts.errors import BadData, BadValue
from fedexperts.models.settings import PretrainSettings, Stream, Texts
from fedexperts.models.stream import Windows, read_parts, read_texts, token_ids, tokens_of
from fedexperts.models.tokenizer import END, START, make_tokenizer
from fedexperts.types import Example


def windows_of(parts, *, seed=0, workers=1, batch_size=3, **stream):
    stream = Stream(window=4, texts=({"name": "never read"},), **stream)
    settings = PretrainSettings(out="never", seed=seed, workers=workers, batch_size=batch_size, stream=stream)
    return Windows(parts, settings, stream)


def read(windows, steps, ranks=1):
    """The windows of some batches, in the order of steps and ranks."""
    return [row.tolist() for step in steps for rank in range(ranks) for row in windows.batch(step, rank)["input_ids"]]


def test_each_window_is_read_once_until_all_were_read_whatever_the_number_of_workers():
    tokens = {"texts": torch.arange(51)}  # room for twelve windows of four; eleven and a shift are used
    for workers, steps in ((1, 11), (11, 1)):
        rows = read(windows_of(tokens, workers=workers, batch_size=workers), range(steps), workers)
        assert len(rows) == 11 and all(row == list(range(row[0], row[0] + 4)) for row in rows)
        assert len({token for row in rows for token in row}) == 44, "no token twice"
        assert [row[0] for row in rows] != sorted(row[0] for row in rows)


def test_the_windows_are_read_anew_in_another_order_from_another_token():
    windows = windows_of({"texts": torch.arange(51)}, batch_size=1)
    passes = [[row[0] for row in read(windows, range(start, start + 11))] for start in (0, 11, 22, 33)]
    assert all(len({start % 4 for start in starts}) == 1 for starts in passes)
    assert len({starts[0] % 4 for starts in passes}) > 1, "the cuts lie elsewhere"
    assert len({tuple(start // 4 for start in starts) for starts in passes}) == 4, "the order is another"


def test_the_workers_share_what_one_worker_reads():
    tokens = {"texts": torch.arange(500)}
    alone = read(windows_of(tokens, batch_size=6), range(5))
    assert read(windows_of(tokens, batch_size=6, workers=2), range(5), ranks=2) == alone
    assert read(windows_of(tokens, batch_size=6, seed=1), range(5)) != alone


def test_a_batch_has_its_share_of_windows_of_each_part_and_every_token_is_a_label():
    parts = {
        name: torch.full((40,), number, dtype=torch.int16) for number, name in enumerate(("texts", "instructions", "generated"))
    }
    shares = {"instructions": ("some",), "instruction_share": 0.25, "generated": ("copy",), "generated_share": 0.125}
    batch = windows_of(parts, batch_size=16, workers=2, **shares).batch(0, 0)
    assert batch["input_ids"][:, 0].tolist() == [0] * 5 + [1] * 2 + [2]
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape == (8, 4)
    assert torch.equal(batch["labels"], batch["input_ids"]) and batch["attention_mask"].all()


def test_an_example_is_its_start_prompt_response_and_end():
    tokenizer = make_tokenizer(64)
    examples = [Example("ab", "c", "t"), Example("", "d" * 20, "t")]
    letters = [START, *"abc", END, START, *"d" * 20, END]
    assert tokenizer.convert_ids_to_tokens(list(token_ids(tokenizer, examples))) == letters
    tokens = tokens_of(Stream(window=4, texts=({"name": "x"},)), tokenizer, {"texts": examples})["texts"]
    assert tokens.dtype == torch.int16 and len(tokens) == len(letters)
    with pytest.raises(BadData, match=r"stream\.texts gives 27 tokens, fewer than two windows"):
        tokens_of(Stream(window=14, texts=({"name": "x"},)), tokenizer, {"texts": examples})


def test_texts_are_read_from_a_path_and_from_the_data_pack_without_excluded_rows(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    rows = [("once", "tales / a"), ("upon", "handbook / b"), ("a time", "tales / handbook")]
    with gzip.open(tmp_path / "text" / "tales.train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text, "source": source}) + "\n" for text, source in rows)
    (tmp_path / "more.jsonl").write_text('{"text": "and more"}\n')
    monkeypatch.setenv("FEDEXPERTS_DATA", str(tmp_path))
    assert read_texts(Texts(name="text/tales")) == ["once", "upon", "a time"]
    assert read_texts(Texts(name="text/tales", without=("handbook",))) == ["once", "a time"]
    assert read_texts(Texts(name=str(tmp_path / "more.jsonl"))) == ["and more"]
    with pytest.raises(BadData, match=r"no row of text/tales has a source that begins with 'hanbook'; correct its without"):
        read_texts(Texts(name="text/tales", without=("handbook", "hanbook")))
    with pytest.raises(BadData, match="neither text/none nor"):
        read_texts(Texts(name="text/none"))


def test_the_parts_are_those_named_mixed_but_for_the_texts_and_their_hashes_are_those_of_the_files(tmp_path):
    tales, questions = tmp_path / "tales.jsonl", tmp_path / "questions.train.jsonl"
    tales.write_text("".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(9)))
    questions.write_text("".join(json.dumps({"prompt": f"{number}?", "response": f"{number}!"}) + "\n" for number in range(9)))
    questions.with_name("questions.test.jsonl").write_text('{"prompt": "held out", "response": "!"}\n')
    others = {"instructions": (str(questions),), "instruction_share": 0.5, "generated": ("copy",), "generated_share": 0.1}
    parts, hashes = read_parts(Stream(texts=({"name": str(tales)},), generated_examples=30, **others), seed=0)

    assert [example.response for example in parts["texts"]] == [f"line {number}" for number in range(9)]
    prompts = [example.prompt for example in parts["instructions"]]
    assert sorted(prompts) == [f"{number}?" for number in range(9)] != prompts
    assert len(parts["generated"]) == 30
    assert hashes[str(tales)] == hashlib.sha256(tales.read_bytes()).hexdigest() and len(hashes) == 2
    assert list(read_parts(Stream(texts=({"name": str(tales)},)), seed=0)[0]) == ["texts"]
    with pytest.raises(BadValue, match=r"'agnews' is no set of the data pack .*; did you mean ag_news"):
        read_parts(Stream(texts=({"name": str(tales)},), instructions=("agnews",), instruction_share=0.5), seed=0)
