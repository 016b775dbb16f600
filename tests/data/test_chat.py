"""Conversations as ids and labels, and rows that become conversations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedexperts.data.chat import ChatTemplate
from fedexperts.data.conversations import PLAIN_CHAT
from fedexperts.data.encode import IGNORED, Encoder
from fedexperts.errors import BadData, BadValue
from fedexperts.types import Example, Turn

CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN3 = """\
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MISTRAL = """\
{{- bos_token }}{% for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}
{%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}
{%- else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"""
PHI = """\
{%- for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "qwen3": QWEN3, "mistral": MISTRAL, "phi": PHI, "plain": PLAIN_CHAT}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """Byte pairs, the special tokens of all templates here, `<think>` as an ordinary added token, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["assistant\nParis is the capital\n\nof France", "user\nWhat is it?"], trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    wrapped.chat_template = template
    return wrapped


BASES = {name: tokenizer_with(template) for name, template in TEMPLATES.items()}
words = st.text(st.characters(exclude_categories=("Cs", "Co")), min_size=1, max_size=20).filter(lambda text: text.strip())
marks = st.sampled_from(["</s>", "<|im_end|>", "<|im_start|>", "<|user|>", "<think>", "<s>", "<|im_", "end|>", "<", "\n", " "])
texts_with_marks = st.lists(marks | words, min_size=1, max_size=6)
dialogues = st.lists(st.tuples(words, words), min_size=1, max_size=3)


def turns_of(pairs: list[tuple[str, str]], system: str | None = None) -> list[Turn]:
    turns = [Turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*([Turn("system", system)] if system else []), *turns]


def example(turns: list[Turn], template: str | None = None) -> Example:
    return Example("", turns[-1].content, "chat", turns=tuple(turns[:-1]), template=template)


def encoded(tokenizer: PreTrainedTokenizerFast, turns: list[Turn], tokens: int = 4000) -> tuple[list[int], list[int]]:
    batch = Encoder(tokenizer, tokens).batch([example(turns)])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


def test_of_a_conversation_the_answers_are_learned_with_their_end_tokens():
    tokenizer = BASES["chatml"]
    ids, labels = encoded(tokenizer, turns_of([("Capital?", "Paris"), ("Sure?", "Yes")], system="Be kind."))
    question, second = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
    )
    pieces = [(question, False), ("Paris<|im_end|>", True), (second, False), ("Yes<|im_end|>", True)]
    by_hand = [(id, id if learned else IGNORED) for text, learned in pieces for id in tokenizer(text)["input_ids"]]
    assert list(zip(ids, labels, strict=True)) == by_hand


@pytest.mark.parametrize("name", TEMPLATES)
@given(pairs=dialogues)
@settings(max_examples=40, deadline=None)
def test_ids_are_those_of_the_template_itself_unless_prompt_and_answer_would_join(name, pairs):
    tokenizer, pairs = BASES[name], [(question, f"x{answer}") for question, answer in pairs]
    turns = turns_of(pairs)
    ids, labels = encoded(tokenizer, turns)
    whole = tokenizer.apply_chat_template(
        [vars(turn) for turn in turns], tokenize=True, return_dict=False, chat_template=TEMPLATES[name]
    )
    if name == "plain":
        assert Encoder(tokenizer, 4000).batch([example(turns, PLAIN_CHAT)])["input_ids"][0].tolist() == ids
    assert whole[: len(ids)] == ids and tokenizer.decode(whole[len(ids) :]).strip() in ("", "</s>")
    ends = [at for at, label in enumerate(labels) if label in ChatTemplate(tokenizer, None).ends]
    assert len(ends) == len(pairs) and labels[-1] != IGNORED
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    expected = "".join(answer + tokenizer.decode([labels[ends[0]]]) for _, answer in pairs)
    assert learned.replace("<think>\n\n</think>\n\n", "").replace(" ", "") == expected.replace(" ", "")


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    parts=st.lists(
        st.tuples(st.lists(marks | words, min_size=1, max_size=6), st.lists(marks | words, min_size=1)), min_size=1, max_size=2
    )
)
@settings(max_examples=40, deadline=None)
def test_messages_never_give_special_tokens(name, parts):
    tokenizer = BASES[name]
    turns = turns_of([(f"q{''.join(question)}", f"a{''.join(answer)}") for question, answer in parts])
    ids, _ = encoded(tokenizer, turns)
    plain, _ = encoded(tokenizer, [Turn(turn.role, "x") for turn in turns])
    special = {tokenizer.convert_tokens_to_ids(token) for token in [*SPECIAL, *(["<think>"] if name == "qwen3" else [])]}
    assert [id for id in ids if id in special] == [id for id in plain if id in special]
    assert turns[-1].content.strip() in tokenizer.decode(ids)


def test_a_prompt_is_the_same_in_training_and_generation():
    turns = turns_of([("Capital?", "Paris"), ("Sure?", "\nYes")])  # a tokenizer would join the line break with the prompt's
    for tokenizer in BASES.values():
        encoder = Encoder(tokenizer, 400)
        prompt = encoder.prompts([example(turns)])["input_ids"][0].tolist()
        whole = encoder.batch([example(turns)])["input_ids"][0].tolist()
        assert whole[: len(prompt)] == prompt
        assert encoder.decode(torch.tensor([whole[len(prompt) :]]))[0].endswith("Yes")


def test_where_system_messages_are_refused_they_stand_before_the_first_question():
    mistral = ChatTemplate(BASES["mistral"], None)
    assert mistral.prompt([Turn("system", "Be kind."), Turn("user", "Hi")]).text == "<s>[INST] Be kind.\n\nHi [/INST]"


def test_a_conversation_that_is_too_long_loses_the_middle_of_what_is_before_the_last_answer():
    turns = turns_of([("Capital? " * 30, "Paris"), ("Sure?", "Yes")])
    whole, _ = encoded(BASES["chatml"], turns)
    ids, labels = encoded(BASES["chatml"], turns, tokens=64)
    assert len(ids) <= 64 and ids[:20] == whole[:20] and ids[-20:] == whole[-20:] and len(ids) == len(labels)
    assert all(label in (IGNORED, id) for id, label in zip(ids, labels, strict=True))


def test_templates_without_end_and_bases_without_template_are_refused():
    with pytest.raises(BadValue, match="writes no special token after an answer"):
        ChatTemplate(BASES["chatml"], "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(BadValue, match="has no chat template"):
        ChatTemplate(tokenizer_with(None), None)
    with pytest.raises(BadData, match=r"cannot render turns of user, user \(roles must alternate"):
        ChatTemplate(BASES["mistral"], None).prompt([Turn("user", "a"), Turn("user", "b")])


def test_all_answers_of_a_conversation_count_as_targets():
    encoder = Encoder(BASES["chatml"], 4)
    examples = [example(turns_of([("Capital?", "Paris"), ("Sure?", "Yes")])), Example("a", "Yes", "any")]
    ids = [len(BASES["chatml"](text)["input_ids"]) for text in ("Paris<|im_end|>", "Yes<|im_end|>")]
    assert encoder.targets(examples) == [sum(ids), ids[1]]


@pytest.mark.parametrize("name", ["chatml", "phi"])
def test_a_whole_conversation_has_the_ids_of_the_template_and_special_tokens_only_from_it(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    turns = (Turn("user", "Capital?"), Turn("assistant", "Paris"))
    ids = tokenizer.apply_chat_template([vars(turn) for turn in turns], tokenize=True, return_dict=False)
    assert ChatTemplate(tokenizer, None).whole(turns) == ids
    written = ChatTemplate(tokenizer, None).whole((turns[0], Turn("assistant", "ok</s><|im_end|> 1")))
    special = set(tokenizer.all_special_ids)
    assert sum(id in special for id in written) == sum(id in special for id in ids)
    assert "ok</s><|im_end|> 1" in tokenizer.decode(written)
