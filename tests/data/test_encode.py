"""Examples as tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedexperts.data import encode
from fedexperts.data.encode import IGNORED, Encoder, without_middle
from fedexperts.data.pool import load_pool
from fedexperts.data.settings import DataSettings
from fedexperts.data.tokens import text_ids
from fedexperts.errors import BadValue
from fedexperts.models.load import load
from fedexperts.testing import tiny_tokenizer
from fedexperts.types import Example

TEXT = ["What is this news about?\nStocks rose sharply on Monday.\nAnswer:\nBusiness", "Reverse the word lemon: nomel"]


def byte_pairs(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as OLMoE and Qwen have, 300 tokens large."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "</s>", "pad_token": "<pad>"} | special))


def with_template(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around a text by itself, as those of Mixtral (<s>) and Switch (</s>) do."""
    tokenizer = byte_pairs(bos_token="<s>")
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


PLAIN, STARTS, ENDS = byte_pairs(), with_template("<s> $A"), with_template("$A </s>")
QUESTION = Example("What is this news about?\nAnswer:\n", "Business", "ag_news")
texts = st.text(max_size=80)


def unmasked(row: torch.Tensor, mask: torch.Tensor) -> list[int]:
    return row[mask.bool()].tolist()


@pytest.mark.parametrize("tokenizer", [PLAIN, STARTS], ids=["plain", "with a start token"])
@given(prompt=texts, response=texts, max_tokens=st.integers(4, 60), choices=st.sampled_from([(), ("a", "bcd"), ("x" * 70,)]))
@settings(max_examples=60, deadline=None)
def test_training_sees_the_prompt_that_generation_sees_and_then_the_response(tokenizer, prompt, response, max_tokens, choices):
    encoder = Encoder(tokenizer, max_tokens)
    example = Example(prompt, response, "any", choices=choices)
    batch, encoded = encoder.batch([example]), encoder.prompts([example])
    ids, labels, prompt_ids = (
        batch["input_ids"][0],
        batch["labels"][0],
        unmasked(encoded["input_ids"][0], encoded["attention_mask"][0]),
    )
    answer = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    assert len(ids) <= max_tokens
    assert ids.tolist() == prompt_ids + answer[: max_tokens - len(prompt_ids)]
    assert labels.tolist() == [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :].tolist()
    assert len(prompt_ids) >= 1 and (labels != IGNORED).any()


@given(responses=st.tuples(texts, texts))
@settings(max_examples=30, deadline=None)
def test_the_length_of_a_cut_prompt_does_not_depend_on_its_response(responses):
    examples = [Example("word " * 100, response, "any") for response in responses]
    first, second = Encoder(PLAIN, 40).prompts(examples)["input_ids"]
    assert torch.equal(first, second)


def test_only_response_and_end_token_have_labels_and_padding_is_on_the_right():
    batch = Encoder(PLAIN, 64).batch([QUESTION, Example("a", "b", "any")])
    short = batch["labels"][1]
    answer = PLAIN("b")["input_ids"]
    assert short[short != IGNORED].tolist() == [*answer, PLAIN.eos_token_id]
    assert batch["attention_mask"][1].tolist() == [1] * 3 + [0] * (batch["input_ids"].shape[1] - 3)
    assert batch["input_ids"][1, 3:].unique().tolist() == [PLAIN.pad_token_id]
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )


def test_prompts_are_padded_on_the_left():
    encoded = Encoder(PLAIN, 64).prompts([QUESTION, Example("a", "b", "any")])
    assert encoded["attention_mask"][1].tolist() == [0] * (encoded["input_ids"].shape[1] - 1) + [1]


def test_without_a_pad_token_the_end_token_pads_and_is_still_learned():
    tokenizer = byte_pairs(pad_token=None)
    batch = Encoder(tokenizer, 64).batch([QUESTION, Example("a", "b", "any")])
    assert batch["input_ids"][1, -1] == tokenizer.eos_token_id and batch["attention_mask"][1, -1] == 0
    assert (batch["labels"][1] == tokenizer.eos_token_id).sum() == 1


def test_a_long_prompt_loses_its_middle():
    example = Example("first " + "word " * 200 + "last", "yes", "any", choices=("yes", "no"))
    encoder = Encoder(PLAIN, 32)
    text = encoder.tokenizer.decode(encoder.prompts([example])["input_ids"][0])
    assert text.startswith("first") and text.endswith("last")
    assert encoder.batch([example])["input_ids"].shape == (1, 32)
    assert without_middle([1, 2, 3, 4, 5, 6], 4) == [1, 2, 5, 6]


def test_room_for_the_answer_is_what_the_longest_choice_needs():
    prompt, choices = "word " * 200, ("yes", "perhaps not")
    longest = max(len(ids) for ids in PLAIN(list(choices))["input_ids"])
    encoded = Encoder(PLAIN, 64).prompts([Example(prompt, "yes", "any", choices=choices)])
    assert encoded["input_ids"].shape[1] == 64 - longest - 1


def test_a_free_answer_has_a_quarter_of_the_tokens_for_itself_or_response_tokens():
    free = Example("word " * 200, "yes", "any")
    assert Encoder(PLAIN, 64).prompts([free])["input_ids"].shape[1] == 48
    assert Encoder(PLAIN, 64, response_tokens=40).prompts([free])["input_ids"].shape[1] == 24


def test_a_response_that_was_cut_has_no_end_token():
    batch = Encoder(PLAIN, 16).batch([Example("a", "word " * 50, "any")])
    assert batch["input_ids"].shape == (1, 16)
    assert PLAIN.eos_token_id not in batch["labels"]


def test_plain_text_starts_from_an_end_token_and_fills_the_rest():
    batch = Encoder(PLAIN, 32).batch([Example("", "word " * 50, "text", metric="perplexity")])
    assert batch["input_ids"][0, 0] == PLAIN.eos_token_id
    assert batch["labels"][0, 0] == IGNORED and (batch["labels"] != IGNORED).sum() == 31


def test_a_start_token_is_put_before_the_prompt_once():
    ids = Encoder(STARTS, 64).batch([QUESTION])["input_ids"][0].tolist()
    assert ids[0] == STARTS.bos_token_id and ids.count(STARTS.bos_token_id) == 1


def test_a_decoder_never_sees_an_end_token_between_prompt_and_response():
    ids = Encoder(ENDS, 64).batch([QUESTION])["input_ids"][0].tolist()
    assert ids.count(ENDS.eos_token_id) == 1 and ids[-1] == ENDS.eos_token_id


def test_an_encoder_decoder_reads_the_prompt_and_learns_the_response():
    encoder = Encoder(ENDS, 64, encoder_decoder=True)
    batch = encoder.batch([QUESTION, Example("a", "b", "any")])
    assert unmasked(batch["input_ids"][0], batch["attention_mask"][0]) == ENDS(QUESTION.prompt)["input_ids"]
    assert batch["labels"][0].tolist() == ENDS(QUESTION.response)["input_ids"]
    assert batch["labels"][1, 2:].unique().tolist() == [IGNORED]
    encoded = encoder.prompts([QUESTION])
    assert encoded["input_ids"][0].tolist() == ENDS(QUESTION.prompt)["input_ids"]


def test_prompt_and_response_of_an_encoder_decoder_have_all_tokens_each():
    batch = Encoder(ENDS, 16, encoder_decoder=True).batch([Example("word " * 50, "word " * 50, "any")])
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 16)
    assert batch["input_ids"][0, -1] == ENDS.eos_token_id


def test_decoding_stops_at_the_first_end_token():
    ids = PLAIN(" Business")["input_ids"]
    end = PLAIN.eos_token_id
    assert Encoder(PLAIN, 64).decode(torch.tensor([[*ids, end, *ids], [end, *ids, *ids], [*ids, *ids, end]])) == [
        "Business",
        "",
        "Business Business",
    ]


def test_decoding_what_was_encoded_gives_the_response():
    encoder = Encoder(PLAIN, 64)
    labels = encoder.batch([QUESTION])["labels"][0]
    assert encoder.decode(labels[labels != IGNORED][None]) == ["Business"]


def test_cached_prompts_change_nothing(monkeypatch):
    monkeypatch.setattr(encode, "CACHED_PROMPTS", 3)
    examples = [Example(f"ask {number}", "yes", "any", choices=("yes", "no")[: number % 3]) for number in range(6)]
    encoder, equal = Encoder(PLAIN, 16), 0
    for start in (0, 1, 0, 4, 2):
        batch, fresh = (one.batch(examples[start : start + 2]) for one in (encoder, Encoder(PLAIN, 16)))
        equal += all(torch.equal(batch[name], fresh[name]) for name in fresh)
    assert equal == 5


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(BadValue, match="no end token"):
        Encoder(byte_pairs(eos_token=None), 64)


def test_a_batch_of_nothing_and_too_few_tokens_are_refused():
    with pytest.raises(BadValue, match="no examples"):
        Encoder(PLAIN, 64).batch([])
    with pytest.raises(BadValue, match="at least 4 tokens"):
        Encoder(PLAIN, 3)


def test_choices_longer_than_all_tokens_leave_the_prompt_a_quarter():
    example = Example("word " * 200, "yes", "any", choices=("yes", "no " * 100))
    assert Encoder(PLAIN, 64).prompts([example])["input_ids"].shape[1] == 16


def test_a_response_may_reserve_all_but_two_tokens():
    free = Example("word " * 200, "yes", "any")
    assert Encoder(PLAIN, 7, response_tokens=99).prompts([free])["input_ids"].shape[1] == 2


def test_of_an_odd_number_of_tokens_the_end_of_a_prompt_has_one_more():
    assert without_middle([1, 2, 3, 4, 5, 6], 5) == [1, 2, 4, 5, 6]
    assert without_middle([1, 2, 3], 3) == [1, 2, 3]
    assert without_middle([1, 2, 3], 1) == [3]


def test_the_end_token_with_which_an_encoder_decoder_starts_does_not_end_its_answer():
    ids, end = PLAIN(" Business")["input_ids"], PLAIN.eos_token_id
    assert Encoder(PLAIN, 64, encoder_decoder=True).decode(torch.tensor([[end, *ids, end, *ids]])) == ["Business"]
    assert Encoder(PLAIN, 64, encoder_decoder=True).decode(torch.tensor([[end, *ids, *ids]])) == ["Business Business"]


MARKS = st.sampled_from(["</s>", "<s>", "<pad>", "</s", ">", "<", "s>", " ", "\n", "a"])
with_marks = st.lists(MARKS | texts, max_size=8).map("".join)


@pytest.mark.parametrize("tokenizer", [PLAIN, STARTS, ENDS], ids=["plain", "with a start token", "with an end token"])
@given(prompt=with_marks, response=with_marks, choices=st.sampled_from([(), ("</s>", "b")]))
@settings(max_examples=100, deadline=None)
def test_special_tokens_are_only_those_that_we_add(tokenizer, prompt, response, choices):
    encoder = Encoder(tokenizer, 8000)
    example = Example(prompt, response, "any", choices=choices)
    ids = encoder.batch([example])["input_ids"][0].tolist()
    added = [*encoder.before, *([] if prompt or encoder.before else [encoder.eos]), encoder.eos]
    assert [id for id in ids if id in tokenizer.all_special_ids] == added
    assert encoder.decode(torch.tensor([text_ids(tokenizer, [response])[0]])) == [response.strip()]


def test_a_response_with_the_text_of_an_end_token_is_learned_to_its_end():
    labels = Encoder(PLAIN, 64).batch([Example("Is it?\n", "ok</s> 1", "any")])["labels"][0]
    learned = labels[labels != IGNORED].tolist()
    assert (
        PLAIN.decode(learned[:-1]) == "ok</s> 1" and learned.count(PLAIN.eos_token_id) == 1 and learned[-1] == PLAIN.eos_token_id
    )


def test_the_text_of_a_special_token_that_is_a_word_of_the_vocabulary_is_left_out():
    tokenizer = tiny_tokenizer()
    assert text_ids(tokenizer, ["w3 </s> w4", "w5 unknown"]) == [[3, 4], [5, 0]]  # 0: its unknown token


def test_texts_without_marks_have_the_ids_that_they_always_had(pack):
    names = ["synthetic/sort", "synthetic/shout", "ag_news", "trec6", "dolly", "superni/task875", "gsm8k", "mbpp", "piqa_cloze"]
    pool = load_pool(DataSettings(sources=names, limit=60))
    different = {text for example in (*pool.train[::2], *pool.test[::40]) for text in (example.prompt, example.response)}
    for base in ("tiny", "small"):
        tokenizer = load(base).tokenizer
        before = tokenizer(sorted(different), add_special_tokens=False, verbose=False)["input_ids"]
        assert len(different) > 300 and text_ids(tokenizer, sorted(different)) == before
