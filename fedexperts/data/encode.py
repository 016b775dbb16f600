"""Examples as tensors, with any fast tokenizer of transformers.

The text of a special token in an example, such as `</s>`, stays text: special tokens are only those that we add.

Prompt and response are tokenized separately and joined as ids, so a model is trained on exactly the prompt ids that it gets for
generation. How much of a prompt stays never depends on its response: else the length of a cut prompt would reveal the answer.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedexperts.errors import BadValue
from fedexperts.moe.logits import IGNORED
from fedexperts.types import Example

CACHED_PROMPTS = 4096  # of at most max_tokens ids each


class Encoder:
    """Tokenizes examples, pads them, and hides the prompt from the loss.

    A sequence has at most `max_tokens` tokens, special ones included. Of these, some are reserved for the response: as many as
    the longest of its `choices` needs, or `response_tokens` (default: a quarter of `max_tokens`) if the example has no choices,
    or all but one if it has no prompt. A prompt that does not fit in the rest loses its middle: instructions stand at its
    start, the question at its end. A response may fill all that its prompt leaves; a longer one is cut and then has no end
    token, since it does not end there. For an encoder-decoder, prompt and response have `max_tokens` each.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        encoder_decoder: bool = False,
        response_tokens: int | None = None,
    ) -> None:
        if max_tokens < 4:
            raise BadValue(f"max_tokens = {max_tokens}, but a prompt and a response need at least 4 tokens; set it to 4 or more")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.encoder_decoder = encoder_decoder
        self.response_tokens = min(response_tokens or max_tokens // 4, max_tokens - 2)
        self.eos = end_token(tokenizer)
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.before, self.after = special_tokens(tokenizer)
        self._longest_choice: dict[tuple[str, ...], int] = {}  # choices → tokens, the end token included
        self._prompt_ids: dict[tuple[str, tuple[str, ...]], list[int]] = {}  # (prompt, choices) → cut prompt

    def batch(self, examples: Sequence[Example]) -> Mapping[str, Int[Tensor, "examples tokens"]]:
        """`input_ids`, `attention_mask` and `labels`, padded on the right; only response and end token have labels."""
        prompts, responses = self._prompts(examples), self._ids([example.response for example in examples])
        if self.encoder_decoder:
            ended = [self._ended(response, self.max_tokens) for response in responses]
            return {**self._padded(prompts), "labels": pad_right(ended, IGNORED)}
        ended = [
            self._ended(response, self.max_tokens - len(prompt)) for prompt, response in zip(prompts, responses, strict=True)
        ]
        sequences = [prompt + response for prompt, response in zip(prompts, ended, strict=True)]
        labels = [[IGNORED] * len(prompt) + response for prompt, response in zip(prompts, ended, strict=True)]
        return {**self._padded(sequences), "labels": pad_right(labels, IGNORED)}

    def prompts(self, examples: Sequence[Example]) -> Mapping[str, Int[Tensor, "examples tokens"]]:
        """`input_ids` and `attention_mask` to generate from, padded on the left."""
        prompts = self._prompts(examples)
        return {"input_ids": pad_left(prompts, self.pad), "attention_mask": pad_left([[1] * len(ids) for ids in prompts], 0)}

    def decode(self, ids: Int[Tensor, "examples tokens"]) -> list[str]:
        """The texts of generated `ids` up to the first end token, without special tokens and outer white space."""
        texts = [self._until_end(row) for row in ids.tolist()]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in texts]

    def _prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """The cut prompt of each example; cached, since clients see their examples repeatedly and long prompts take long."""
        keys = [(example.prompt, example.choices) for example in examples]
        new = {key: example for key, example in zip(keys, examples, strict=True) if key not in self._prompt_ids}
        if len(self._prompt_ids) + len(new) > CACHED_PROMPTS:
            self._prompt_ids, new = {}, dict(zip(keys, examples, strict=True))
        if new or not examples:
            self._prompt_ids.update(zip(new, self._cut_prompts(list(new.values())), strict=True))
        return [self._prompt_ids[key] for key in keys]

    def _cut_prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Prompts with special tokens, cut to fit; an empty prompt is one end token."""
        after = self.after if self.encoder_decoder else []
        limits = [limit - len(self.before) - len(after) for limit in self._prompt_limits(examples)]
        prompts = self._ids([example.prompt for example in examples])
        cut = [self.before + without_middle(ids, max(limit, 1)) + after for ids, limit in zip(prompts, limits, strict=True)]
        return [ids or [self.eos] for ids in cut]

    def _prompt_limits(self, examples: Sequence[Example]) -> list[int]:
        """The most tokens that each prompt may have, special ones included."""
        if self.encoder_decoder:
            return [self.max_tokens] * len(examples)
        return [max(self.max_tokens - self._reserved(example.choices), self.max_tokens // 4) for example in examples]

    def _reserved(self, choices: tuple[str, ...]) -> int:
        """Tokens reserved for a response and its end token; cached, since the examples of a task have the same choices."""
        if not choices:
            return self.response_tokens
        if choices not in self._longest_choice:
            self._longest_choice[choices] = max(map(len, self._ids(choices))) + 1
        return self._longest_choice[choices]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            raise BadValue("a batch of no examples cannot be encoded; give at least one")
        return text_ids(self.tokenizer, texts)

    def _ended(self, response: list[int], limit: int) -> list[int]:
        return [*response, self.eos][:limit]

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        return {"input_ids": pad_right(rows, self.pad), "attention_mask": pad_right([[1] * len(ids) for ids in rows], 0)}

    def _until_end(self, ids: list[int]) -> list[int]:
        """`ids` before the first end token, not counting the token that an encoder-decoder starts with, which may be one."""
        start = 1 if self.encoder_decoder else 0
        return ids[start : ids.index(self.eos, start)] if self.eos in ids[start:] else ids[start:]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a text.

    Raises:
        BadValue: the tokenizer has none.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        name = type(tokenizer).__name__
        raise BadValue(f"the tokenizer ({name}) has no end token, but responses must end; set its eos_token")
    return tokenizer.eos_token_id


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens: text that reads like one is split like any other."""
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


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and after a text."""
    marked: list[int] = tokenizer("a")["input_ids"]
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(index for index in range(len(marked)) if marked[index : index + len(plain)] == plain)
    return marked[:start], marked[start + len(plain) :]


def without_middle(ids: list[int], limit: int) -> list[int]:
    """`ids`, or the first and last `limit` / 2 if there are more than `limit`; of an odd limit the end has one more."""
    head = limit // 2
    return ids if len(ids) <= limit else ids[:head] + ids[len(ids) - (limit - head) :]


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "rows width"]:
    """int64 rows of one width, padded with `value` on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "rows width"]:
    """int64 rows of one width, padded with `value` on the left."""
    width = max(map(len, rows))
    return torch.tensor([[*[value] * (width - len(row)), *row] for row in rows])
