import json
import math

import pytest
import torch

from fedexperts.models.load import Base
from fedexperts.models.measure import (
    Bigram,
    bits_per_byte,
    held_out_bits,
    held_out_file,
    held_out_texts,
    loads,
    routing,
    token_bytes,
)
from fedexperts.models.settings import PretrainSettings, Stream, Texts
from fedexperts.models.stream import Windows
from fedexperts.models.tokenizer import learn_tokenizer, make_tokenizer
from fedexperts.moe.routing import Routing
from fedexperts.testing import tiny_model

MIXED = "Reverse: naïve ☂\n\ttwo  spaces => the plain, the plain"


def test_a_bigram_falls_back_on_tokens_as_witten_and_bell_say():
    bigram = Bigram(torch.tensor([0, 1, 0, 1, 1], dtype=torch.int16), vocabulary=3)  # 0→1 twice, 1→0 and 1→1 once
    tokens = [3 / 8, 4 / 8, 1 / 8]  # counts 2, 3, 0, and one more of each
    windows = torch.tensor([[0, 1, 0, 2, 0]])
    expected = [(2 + 1 * tokens[1]) / (2 + 1), (1 + 2 * tokens[0]) / (2 + 2), (0 + 1 * tokens[2]) / (2 + 1), tokens[0]]
    assert bigram.nats(windows).exp().reciprocal()[0].tolist() == pytest.approx(expected)
    assert bigram.unigram_nats(windows).exp().reciprocal()[0].tolist() == pytest.approx(
        [tokens[1], tokens[0], tokens[2], tokens[0]]
    )


def test_the_probabilities_after_each_token_add_up_to_one():
    bigram = Bigram(torch.randint(0, 7, (50,), generator=torch.Generator().manual_seed(0)), vocabulary=9)
    windows = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    assert torch.allclose((-bigram.nats(windows)).exp().view(9, 9).sum(1), torch.ones(9, dtype=torch.float64))


def uniform_base(tokenizer):
    """A base that finds every token of its vocabulary as likely."""
    model = tiny_model("olmoe", vocab_size=-(-len(tokenizer) // 8) * 8)
    torch.nn.init.zeros_(model.lm_head.weight)
    return Base(model, tokenizer, encoder_decoder=False, name="uniform", hash="")


def test_bits_per_byte_are_those_of_all_tokens_but_each_windows_first_over_the_bytes_they_stand_for():
    base = uniform_base(make_tokenizer(64))
    bigram = Bigram(torch.arange(len(base.tokenizer)), len(base.tokenizer))  # each token once
    # <s> a b c d e | f g h i j </s>: ten tokens have one before them, of which </s> stands for no byte
    bits = bits_per_byte(base, bigram, ["abcdefghij"] * 20, window=6)
    assert bits["bytes"] == 20 * 9
    assert bits["model"] == pytest.approx(10 * math.log2(base.model.config.vocab_size) / 9, abs=1e-4)
    assert bits["unigram"] == pytest.approx(10 * math.log2(len(base.tokenizer)) / 9, abs=1e-4)


def test_a_text_shorter_than_a_window_is_measured_whole_and_the_rest_after_the_last_window_is_not():
    base = uniform_base(make_tokenizer(64))
    bigram = Bigram(torch.arange(len(base.tokenizer)), len(base.tokenizer))
    assert bits_per_byte(base, bigram, ["abc"], window=50)["bytes"] == 3
    assert bits_per_byte(base, bigram, ["abcdefghij"], window=7)["bytes"] == 6


@pytest.mark.parametrize("tokenizer", [make_tokenizer(64), learn_tokenizer(64, 30, [MIXED] * 3)], ids=["bytes", "pairs"])
def test_the_bytes_of_the_tokens_of_a_text_are_the_text_s(tokenizer):
    ids = tokenizer(MIXED)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert int(token_bytes(tokenizer)[ids].sum()) == len(MIXED.encode()) > len(MIXED)


def test_held_out_texts_are_beside_a_file_or_in_the_pack_and_are_spread_evenly_over_it(tmp_path, monkeypatch):
    rows = [{"text": f"line {number}", "source": "odd" if number == 4 else "even"} for number in range(9)]
    for name in ("tales.test.jsonl", "tales.train.jsonl", "alone.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside = held_out_file(str(tmp_path / "tales.train.jsonl"))
    assert beside == tmp_path / "tales.test.jsonl" and held_out_file(str(tmp_path / "alone.jsonl")) is None
    texts = Texts(name="tales", without=("odd",))
    assert held_out_texts(beside, texts, 3) == ["line 0", "line 3", "line 7"]
    assert len(held_out_texts(beside, texts, 8)) == len(held_out_texts(beside, texts, 100)) == 8
    assert held_out_texts(beside, texts, 0) == []

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "books2.test.jsonl.gz").touch()
    monkeypatch.setenv("FEDEXPERTS_DATA", str(tmp_path))
    assert held_out_file("text/books2a") == held_out_file("text/books2b") == tmp_path / "text" / "books2.test.jsonl.gz"
    assert held_out_file("text/stories") is None


def test_the_load_of_an_expert_is_a_part_of_a_fair_share():
    measured = loads(Routing({"layer": torch.tensor([6, 1, 1, 0])}, {"layer": 4}))
    assert measured["each expert, of a fair share"] == {"layer": [3.0, 0.5, 0.5, 0.0]}
    assert measured["least used expert, of a fair share"] == {"layer": 0.0}
    assert measured["most used expert, of a fair share"] == {"layer": 3.0}


def test_the_load_is_that_of_batches_which_come_after_the_last_step(monkeypatch):
    stream = Stream(window=4, texts=({"name": "never read"},))
    settings = PretrainSettings(out="never", batch_size=6, workers=2, steps=3, stream=stream)
    windows, steps_and_ranks = Windows({"texts": torch.arange(3, 64)}, settings, stream), []
    batch = windows.batch
    monkeypatch.setattr(windows, "batch", lambda step, rank: steps_and_ranks.append((step, rank)) or batch(step, rank))
    recorded = routing(tiny_model("olmoe"), windows, settings)
    assert steps_and_ranks == [(step, rank) for step in range(3, 11) for rank in (0, 1)]
    assert set(recorded.tokens.values()) == {8 * 6 * 4} and {int(counts.sum()) for counts in recorded.counts.values()} == {
        2 * 8 * 6 * 4
    }


def test_texts_without_held_out_ones_have_no_bits_per_byte(tmp_path):
    (tmp_path / "alone.jsonl").write_text('{"text": "once"}\n')
    base = uniform_base(make_tokenizer(64))
    assert held_out_bits(base, Bigram(torch.arange(9), 300), Stream(texts=({"name": str(tmp_path / "alone.jsonl")},)), 5) == {}
