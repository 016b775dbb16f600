"""The command `upcycle`: what it writes, and what it says to mistakes."""

import json

import pytest

from fedexperts.errors import BadValue
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.models.upcycle.checkpoint import open_dense
from fedexperts.models.upcycle.texts import cut


def test_the_command_writes_the_folder_and_shows_the_report(fedexperts, saved, text, tmp_path):
    _, folder = saved("llama")
    options = ("--split", 2, "--shared", 32, "--text", text(), "--tokens", 1024, "--dtype", "bfloat16")
    code, out, err = fedexperts("upcycle", folder, *options, "--to", tmp_path / "moe")
    assert (code, err) == (0, "")
    assert "layer 2 of 2" in out and "KL to the dense model" in out and "routed, random, oracle" in out
    report = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    assert (report["class"], report["top_k"], report["shared_neurons"]) == ("Qwen2MoeForCausalLM", 1, 32)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"


def test_expert_models_follow_the_base_model(fedexperts, saved, text, tmp_path):
    _, folder = saved("qwen2")
    some = ("--text", text("a.txt", "abc"), "--text", text("b.txt", "xyz"))
    code, out, err = fedexperts("upcycle", folder, "--to", tmp_path / "moe", "--experts", folder, folder, *some, "--tokens", 512)
    assert (code, err) == (0, "")
    assert "first choice is the" in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "none of --copy, --split and --experts given"),
        (("--copy", 2, "--split", 2), "--copy and --split given; give exactly one"),
        (("--copy", 1), "1 experts given; give at least 2"),
        (("--experts",), "0 experts given; give at least 2"),
        (("--copy", 4, "--top-k", 5), "--top-k 5 is not between 1 and the number of experts, 4"),
        (("--copy", 2, "--shared", 8), "--shared was given without --split"),
        (("--split", 2, "--noise", 0.1), "--noise was given without --copy"),
        (("--copy", 2, "--reinit", 1.5), "--reinit 1.5 is not between 0 and 1"),
        (("--copy", 2, "--dtype", "int8"), "--dtype int8 is not one of"),
        (("also", "--copy", 2), "2 models were given without --experts"),
        (("--copy", 2), "/nowhere is not a folder"),
    ],
)
def test_a_mistake_is_explained_in_one_sentence(fedexperts, tmp_path, options, sentence):
    code, out, err = fedexperts("upcycle", "/nowhere", *options, "--to", tmp_path / "moe")
    assert (code, out) == (2, "")
    assert err.startswith("fedexperts: ") and sentence in err
    assert len(err.splitlines()) == 1 and len(err) < 320


def test_a_folder_that_is_not_empty_is_left_alone(fedexperts, tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "mine").write_text("")
    code, _, err = fedexperts("upcycle", "/nowhere", "--copy", 2, "--to", tmp_path / "moe")
    assert code == 2 and "exists and is not empty" in err


def test_a_damaged_file_is_a_sentence_and_so_is_a_tokenizer_with_too_many_tokens(saved):
    _, folder = saved("llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadValue, match=r"cannot be read \(.+\); give the folder of a dense model"):
        open_dense(str(folder))
    _, folder = saved("llama", name="few", vocab_size=16)
    make_tokenizer(128).save_pretrained(folder)
    with pytest.raises(BadValue, match=r"has a tokenizer with \d+ tokens, but the model has embeddings for 16"):
        open_dense(str(folder))


@pytest.mark.parametrize("text", ["字" * 30 + "文" * 30 + "書" * 30, " ".join(f"word{number}" for number in range(15))])
def test_pieces_of_a_text_are_spread_over_it_also_without_spaces(text):
    pieces = cut(text, 3, 20)
    assert len(set(pieces)) == len(pieces) == 3
    starts = [text.index(piece) for piece in pieces]
    assert starts == sorted(starts) and starts[-1] >= len(text) // 2
    if " " in text:
        assert all(start == 0 or text[start - 1] == " " for start in starts)
