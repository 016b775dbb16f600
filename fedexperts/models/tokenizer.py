"""The tokenizers of the models that we pretrain: bytes with a token per instruction word, or byte pairs learned from text."""

from collections.abc import Iterable
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedexperts.data.synthetic import INSTRUCTIONS, SEPARATOR

PAD, START, END = "<pad>", "<s>", "</s>"


def make_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    """A token per byte and per instruction word; it reads any text without an unknown token."""
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens([PAD, START, END])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in (SEPARATOR, *INSTRUCTIONS)])
    return wrapped(tokenizer, max_tokens)


def learn_tokenizer(max_tokens: int, merges: int, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token per byte, and `merges` byte pairs learned from `texts`; it reads any text without an unknown token.

    Digits are never merged.
    """
    tokenizer = bytes_tokenizer()
    special, alphabet = [PAD, START, END], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = cast("Any", trainers.BpeTrainer)(
        vocab_size=len(special) + len(alphabet) + merges,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer, max_tokens)


def bytes_tokenizer() -> Tokenizer:
    """A token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate([PAD, START, END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def wrapped(tokenizer: Tokenizer, max_tokens: int) -> PreTrainedTokenizerFast:
    """`tokenizer` as one of transformers, which puts the start token before a text."""
    start = tokenizer.token_to_id(START)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, start)])
    wrap = cast("Any", PreTrainedTokenizerFast)
    return cast(
        "PreTrainedTokenizerFast",
        wrap(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            bos_token=START,
            eos_token=END,
            model_max_length=max_tokens,
            clean_up_tokenization_spaces=False,
        ),
    )
