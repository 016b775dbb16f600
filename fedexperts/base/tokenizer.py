"""The tokenizer of the bases we make: bytes, merges learnt from text if there is any, and a token per instruction word."""

from collections.abc import Iterable
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedexperts.data.synthetic import INSTRUCTIONS, SEPARATOR

PAD, START, END = "<pad>", "<s>", "</s>"


def make_tokenizer(max_tokens: int, merges: int = 0, texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Reads any text without an unknown token; `merges` byte pairs are learnt from `texts`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, START, END]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if merges:
        size = len(special) + len(alphabet) + merges
        trainer = cast("Any", trainers.BpeTrainer)(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in (SEPARATOR, *INSTRUCTIONS)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, special.index(START))])
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
