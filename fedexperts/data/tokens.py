"""Text as token ids."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens: text that reads like one is split like any other."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    written = re.compile("|".join(map(re.escape, sorted(special.values(), key=len, reverse=True))) or "(?!)")
    forbidden = special.keys() - {tokenizer.unk_token_id}
    # Some vocabularies have special tokens as ordinary words (Unigram, WordLevel), so that splitting gives them again
    return [
        [id for id in row if id not in forbidden] if not forbidden.isdisjoint(row) and written.search(text) else row
        for row, text in zip(ids, texts, strict=True)
    ]
