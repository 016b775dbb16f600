"""Examples as tensors, with any fast tokenizer of transformers.

The text of a special token in an example, such as `</s>`, stays text: special tokens are only those that we add.

Prompt and response are tokenized separately and joined as ids, so a model is trained on exactly the prompt ids that it gets for
generation. How much of a prompt stays never depends on its response: else the length of a cut prompt would reveal the answer.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedexperts.data.chat import ChatTemplate, RenderedPrompt
from fedexperts.data.conversations import PLAIN_CHAT
from fedexperts.data.tokens import text_ids
from fedexperts.errors import BadValue
from fedexperts.moe.logits import IGNORED
from fedexperts.types import Example

T = TypeVar("T")
MOST_TOKENS = 2**40  # where nothing is to be cut
CACHED_PROMPTS = 4096  # of at most max_tokens ids each


@dataclass(frozen=True)
class CutPrompt:
    """The ids before a response, cut to fit, and which of them are of the assistant's earlier turns; and the whole prompt."""

    ids: list[int]
    answered: list[bool]
    rendered: RenderedPrompt | None = None  # of a conversation

    @property
    def labels(self) -> list[int]:
        return [id if answered else IGNORED for id, answered in zip(self.ids, self.answered, strict=True)]


@dataclass(frozen=True)
class Cut:
    """Tokens of an example, special ones included, and how many of them do not fit."""

    prompt: int
    prompt_lost: int
    response: int
    response_lost: int


class Encoder:
    """Tokenizes examples, pads them, and hides the prompt from the loss.

    A sequence has at most `max_tokens` tokens, special ones included. Of these, some are reserved for the response: as many as
    the longest of its `choices` needs, or `response_tokens` (default: a quarter of `max_tokens`) if the example has no choices,
    or all but one if it has no prompt. A prompt that does not fit in the rest loses its middle: instructions stand at its
    start, the question at its end. A response may fill all that its prompt leaves; a longer one is cut and then has no end
    token, since it does not end there. For an encoder-decoder, prompt and response have `max_tokens` each.

    A conversation (`Example.turns`) is rendered by its chat template. All of the assistant's turns are learned, by an
    encoder-decoder the last one.
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
        self.ends: Collection[int] = {self.eos}  # of responses; chat templates add theirs once they are used
        self._chats: dict[str | None, ChatTemplate] = {}
        self._longest_choice: dict[tuple[str, ...], int] = {}  # choices → tokens, the end token included
        self._prompt_cache: dict[Hashable, CutPrompt] = {}

    def batch(self, examples: Sequence[Example]) -> Mapping[str, Int[Tensor, "examples tokens"]]:
        """`input_ids`, `attention_mask` and `labels`, padded on the right; only responses and end tokens have labels."""
        if self.encoder_decoder:
            prompts = self._prompts(examples)
            labels = [response[: self.max_tokens] for response in self._responses(examples, prompts)]
            return {**self._padded([prompt.ids for prompt in prompts]), "labels": pad_right(labels, IGNORED)}
        sequences, labels = self._sequences(examples)
        return {**self._padded(sequences), "labels": pad_right(labels, IGNORED)}

    def packed(self, examples: Sequence[Example]) -> Mapping[str, Int[Tensor, "windows tokens"]]:
        """As `batch`, with several examples in a row where they fit into `max_tokens`; for a decoder-only model.

        `position_ids` begin at 0 with each example, by which models keep the attention of examples apart; padding has 0. Each
        example has at least two tokens, so padding can be told (`moe.packing.real_tokens`).
        """
        sequences, labels = self._sequences(examples)
        windows = first_fit_decreasing([len(ids) for ids in sequences], self.max_tokens)
        joined = [[[each for index in window for each in rows[index]] for window in windows] for rows in (sequences, labels)]
        positions = [[place for index in window for place in range(len(sequences[index]))] for window in windows]
        return {**self._padded(joined[0]), "position_ids": pad_right(positions, 0), "labels": pad_right(joined[1], IGNORED)}

    def prompts(self, examples: Sequence[Example]) -> Mapping[str, Int[Tensor, "examples tokens"]]:
        """`input_ids` and `attention_mask` to generate from, padded on the left."""
        prompts = [prompt.ids for prompt in self._prompts(examples)]
        return {"input_ids": pad_left(prompts, self.pad), "attention_mask": pad_left([[1] * len(ids) for ids in prompts], 0)}

    def decode(self, ids: Int[Tensor, "examples tokens"]) -> list[str]:
        """The texts of generated `ids` up to the first end token, without special tokens and outer white space."""
        texts = [self._until_end(row) for row in ids.tolist()]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in texts]

    def targets(self, examples: Sequence[Example]) -> list[int]:
        """How many ids of each example have labels if nothing is cut."""
        rendered = [self._rendered(example) for example in examples]
        earlier = [sum(prompt.answered) if prompt and not self.encoder_decoder else 0 for prompt in rendered]
        prompts = [CutPrompt([], [], prompt) for prompt in rendered]
        responses = self._responses(examples, prompts)
        return [number + len(response) for number, response in zip(earlier, responses, strict=True)]

    def cuts(self, examples: Sequence[Example]) -> list[Cut]:
        """What `batch` cuts off each example."""
        whole = Encoder(self.tokenizer, MOST_TOKENS, self.encoder_decoder)
        full, kept = whole._cut_prompts(examples), self._cut_prompts(examples)
        room = [self.max_tokens - (0 if self.encoder_decoder else len(prompt.ids)) for prompt in kept]
        lengths = map(len, self._responses(examples, kept))
        return [
            Cut(len(all.ids), len(all.ids) - len(some.ids), length, max(0, length - most))
            for all, some, length, most in zip(full, kept, lengths, room, strict=True)
        ]

    def _sequences(self, examples: Sequence[Example]) -> tuple[list[list[int]], list[list[int]]]:
        """The ids of each example, prompt and response, and their labels."""
        prompts = self._prompts(examples)
        pairs = zip(prompts, self._responses(examples, prompts), strict=True)
        responses = [response[: self.max_tokens - len(prompt.ids)] for prompt, response in pairs]
        sequences = [prompt.ids + response for prompt, response in zip(prompts, responses, strict=True)]
        return sequences, [prompt.labels + response for prompt, response in zip(prompts, responses, strict=True)]

    def _prompts(self, examples: Sequence[Example]) -> list[CutPrompt]:
        """The cut prompt of each example; cached, since clients see their examples repeatedly and long prompts take long."""
        if not examples:
            raise BadValue("a batch of no examples cannot be encoded; give at least one")
        keys = [(example.prompt, example.choices, example.turns, example.template) for example in examples]
        new = {key: example for key, example in zip(keys, examples, strict=True) if key not in self._prompt_cache}
        if len(self._prompt_cache) + len(new) > CACHED_PROMPTS:
            self._prompt_cache, new = {}, dict(zip(keys, examples, strict=True))
        if new:
            self._prompt_cache.update(zip(new, self._cut_prompts(list(new.values())), strict=True))
        return [self._prompt_cache[key] for key in keys]

    def _cut_prompts(self, examples: Sequence[Example]) -> list[CutPrompt]:
        """Prompts with special tokens, cut to fit; an empty prompt is one end token."""
        after = self.after if self.encoder_decoder else []
        texts = iter(text_ids(self.tokenizer, [example.prompt for example in examples if not example.turns]))
        cut = []
        for example, limit in zip(examples, self._prompt_limits(examples), strict=True):
            rendered = self._rendered(example)
            before = [] if rendered else self.before
            ids = rendered.ids if rendered else next(texts)
            answered = rendered.answered if rendered else [False] * len(ids)
            room = max(limit - len(before) - len(after), 1)
            ids = [*before, *without_middle(ids, room), *after] or [self.eos]
            answered = [*[False] * len(before), *without_middle(answered, room)]
            cut.append(CutPrompt(ids, [*answered, *[False] * (len(ids) - len(answered))], rendered))
        return cut

    def _rendered(self, example: Example) -> RenderedPrompt | None:
        """The prompt of a conversation; None for any other example."""
        return self._chat(example.template).prompt(example.turns) if example.turns else None

    def _responses(self, examples: Sequence[Example], prompts: Sequence[CutPrompt]) -> list[list[int]]:
        """The uncut response of each example, with its end token."""
        texts = iter(text_ids(self.tokenizer, [example.response for example in examples if not example.turns]))
        return [
            self._chat(example.template).answer(example.turns, prompt.rendered, example.response)
            if prompt.rendered
            else [*next(texts), self.eos]
            for example, prompt in zip(examples, prompts, strict=True)
        ]

    def _chat(self, template: str | None) -> ChatTemplate:
        if template not in self._chats:
            start = self.before if template == PLAIN_CHAT else ()
            self._chats[template] = ChatTemplate(self.tokenizer, template, start)
            self.ends = {*self.ends, *self._chats[template].ends}
        return self._chats[template]

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
            self._longest_choice[choices] = max(map(len, text_ids(self.tokenizer, choices))) + 1
        return self._longest_choice[choices]

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        return {"input_ids": pad_right(rows, self.pad), "attention_mask": pad_right([[1] * len(ids) for ids in rows], 0)}

    def _until_end(self, ids: list[int]) -> list[int]:
        """`ids` before the first end token, not counting the token that an encoder-decoder starts with, which may be one."""
        start = 1 if self.encoder_decoder else 0
        return ids[start : next((at for at in range(start, len(ids)) if ids[at] in self.ends), len(ids))]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a text.

    Raises:
        BadValue: the tokenizer has none.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        name = type(tokenizer).__name__
        raise BadValue(f"the tokenizer ({name}) has no end token, but responses must end; set its eos_token")
    return tokenizer.eos_token_id


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and after a text."""
    marked: list[int] = tokenizer("a")["input_ids"]
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(index for index in range(len(marked)) if marked[index : index + len(plain)] == plain)
    return marked[:start], marked[start + len(plain) :]


def without_middle(ids: list[T], limit: int) -> list[T]:
    """`ids`, or the first and last `limit` / 2 if there are more than `limit`; of an odd limit the end has one more."""
    head = limit // 2
    return ids if len(ids) <= limit else ids[:head] + ids[len(ids) - (limit - head) :]


def first_fit_decreasing(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Windows of at most `most` tokens, each a list of indices into `lengths`.

    From the longest on, each goes into the first window that has room for it, or else into a new one (D. S. Johnson, Near-optimal
    bin packing algorithms, 1973).
    """
    windows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = next((at for at, free in enumerate(room) if lengths[index] <= free), len(windows))
        if at == len(windows):
            windows.append([])
            room.append(most)
        windows[at].append(index)
        room[at] -= lengths[index]
    return windows


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "rows width"]:
    """int64 rows of one width, padded with `value` on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "rows width"]:
    """int64 rows of one width, padded with `value` on the left."""
    width = max(map(len, rows))
    return torch.tensor([[*[value] * (width - len(row)), *row] for row in rows])
