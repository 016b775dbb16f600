"""What continued training reads: windows of equal length, of texts and of conversations, and those that are held out.

A window of text begins with the separator, as a document does, since models treat the first token of a text in a special way
(attention sinks). A window of conversations begins with a conversation.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedexperts.data import sources
from fedexperts.data.chat import ChatTemplate
from fedexperts.data.encode import special_tokens
from fedexperts.data.readers import format_of, hash_of
from fedexperts.data.settings import DataSettings, SourceSettings
from fedexperts.data.tokens import text_ids
from fedexperts.errors import BadData, BadValue
from fedexperts.models.continued.settings import Corpus
from fedexperts.models.measure import held_out_file, held_out_texts
from fedexperts.models.settings import Texts
from fedexperts.models.stream import read_texts, text_file
from fedexperts.models.upcycle.texts import read_text
from fedexperts.types import Example, Turn

AT_ONCE = 1000  # documents that are tokenized together
EVERY = 50  # of the windows of a text without held-out file, one in so many is held out
SAMPLED = 4  # held-out documents that are read for each window that is measured, at most

Rows = Int[Tensor, "windows tokens"]


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of all parts: those to train on, and those to measure on."""

    train: Mapping[str, Rows]  # part → its windows
    held_out: Mapping[str, Rows]  # text → its windows
    hashes: Mapping[str, str]  # what was read → sha256

    def batch(self, counts: Mapping[str, int], step: int, seed: int) -> Rows:
        """The batch of a step: `counts` windows of each part; all windows of a part are read before one is read again."""
        rows = [self._row(part, step * count + index, seed) for part, count in counts.items() for index in range(count)]
        return torch.stack(rows).long()

    def _row(self, part: str, number: int, seed: int) -> Tensor:
        epoch, index = divmod(number, len(self.train[part]))
        return self.train[part][order(f"{seed}/{part}/{epoch}", len(self.train[part]))[index]]


@lru_cache(maxsize=8)
def order(seed: str, number: int) -> list[int]:
    """The numbers below `number` in random order."""
    return Random(seed).sample(range(number), number)


def read_windows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, measured: int, seed: int) -> Windows:
    """All windows of `corpus`, of which at most `measured` of each text are held out; without texts, of each of the instructions.

    Raises:
        BadData, BadValue: a source is missing, empty, damaged, unknown or too short, or the tokenizer lacks the separator.
    """
    lead = separator(corpus, tokenizer)
    train: dict[str, list[Rows]] = {"texts": [], "instructions": []}
    held_out: dict[str, Rows] = {}
    hashes: dict[str, str] = {}
    files: set[Path | None] = set()
    for texts in corpus.texts:
        hashes[texts.name] = hash_of([text_file(texts.name)])
        rows = required(texts.name, text_rows(tokenizer, documents(texts), lead, corpus.window))
        rows, apart = divided(tokenizer, texts, rows, lead, measured)
        train["texts"].append(rows)
        if file := held_out_file(texts.name):
            hashes[f"{title(texts.name)}, held out"] = hash_of([file])
        if file is None or file not in files:  # books2a and books2b have one held-out file
            held_out[title(texts.name) if title(texts.name) not in held_out else texts.name] = apart
        files.add(file)
    for name in corpus.instructions:
        source = sources.load(SourceSettings(name=name), DataSettings(sources=(name,)))
        hashes[name] = source.hash
        examples = list(source.train)
        Random(f"{seed}/{name}").shuffle(examples)
        rows = required(name, conversation_rows(tokenizer, examples, corpus.window))
        if not corpus.texts:
            rows, held_out[name] = one_apart(name, rows, measured)
        train["instructions"].append(rows)
    return Windows({part: torch.cat(rows) for part, rows in train.items() if rows}, held_out, hashes)


def separator(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token before each document and window of text.

    Raises:
        BadValue: the tokenizer has no such token.
    """
    if corpus.separator is not None:
        found = tokenizer.get_vocab().get(corpus.separator)
        if found is None:
            raise BadValue(f"corpus.separator = {corpus.separator!r} is no token of the tokenizer; give one of its tokens")
        return int(found)
    before, _ = special_tokens(tokenizer)
    ids = [*before, *(id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id) if id is not None)]
    if not ids:
        raise BadValue("the tokenizer has no token that begins or ends a text; set corpus.separator to one of its tokens")
    return int(ids[0])


def documents(texts: Texts) -> list[str]:
    """The documents of a text file, which is one, or the rows of a data file.

    Raises:
        BadData: rows of a text file are to be left out.
    """
    file = text_file(texts.name)
    if format_of(file.name):
        return read_texts(texts)
    if texts.without:
        raise BadData(
            f"corpus.texts: {texts.name} is one text without rows, so its without leaves nothing out; leave without out"
        )
    return [read_text(file)]


def title(name: str) -> str:
    """What the held-out text of a source is called: after its file."""
    return (held_out_file(name) or text_file(name)).name.partition(".")[0]


def divided(tokenizer: PreTrainedTokenizerBase, texts: Texts, rows: Rows, lead: int, measured: int) -> tuple[Rows, Rows]:
    """The windows of a text to train on, and those to measure on: of its held-out file, or else one in EVERY of its own."""
    window = rows.shape[1]
    file = held_out_file(texts.name)
    others: list[str] = []
    if file:
        others = held_out_texts(file, texts, SAMPLED * measured) if format_of(file.name) else [read_text(file)]
    apart = spread(text_rows(tokenizer, others, lead, window), measured)
    return (rows, apart) if len(apart) else one_apart(texts.name, rows, measured)


def one_apart(name: str, rows: Rows, measured: int) -> tuple[Rows, Rows]:
    """`rows` without one in EVERY of them, and at most `measured` of those."""
    if len(rows) < 2:
        raise BadData(
            f"{name} gives {len(rows)} window of {rows.shape[1]} tokens, and one is held out; add text, or lower corpus.window"
        )
    held = set(range(0, len(rows), EVERY))
    train = rows[[index for index in range(len(rows)) if index not in held]]
    return train, spread(rows[sorted(held)], measured)


def spread(rows: Rows, number: int) -> Rows:
    """At most `number` of `rows`, at equal distances."""
    step = max(1, len(rows) // number)
    return rows[::step][:number]


def required(name: str, rows: Rows) -> Rows:
    """Raises BadData if there is no window."""
    if not len(rows):
        raise BadData(f"{name} has less text than one window of {rows.shape[1]} tokens; add text, or lower corpus.window")
    return rows


def text_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], lead: int, window: int) -> Rows:
    """The documents one after the other, each begun by `lead`, in windows that begin with `lead` too; the rest is left out."""
    ids = torch.tensor([id for row in in_parts(tokenizer, texts) for id in (*row, lead)], dtype=torch.int32)
    rows = ids[: len(ids) // (window - 1) * (window - 1)].view(-1, window - 1)
    return torch.cat([torch.full((len(rows), 1), lead, dtype=torch.int32), rows], dim=1)


def conversation_rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], window: int) -> Rows:
    """Windows that begin with a conversation, and are filled with the next ones until the last is cut."""
    rows: list[list[int]] = []
    row: list[int] = []
    for ids in conversations(tokenizer, examples):
        row += ids
        if len(row) >= window:
            rows.append(row[:window])
            row = []
    return torch.tensor(rows, dtype=torch.int32).view(-1, window)


def conversations(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterator[list[int]]:
    """The ids of prompt and response: in the chat template, or without one one after the other with the end token."""
    if tokenizer.chat_template is None:
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        texts = in_parts(tokenizer, [example.prompt + example.response for example in examples])
        yield from ([*ids, *end] for ids in texts)
        return
    chat = ChatTemplate(tokenizer, None)
    for example in examples:
        yield chat.whole((Turn("user", example.prompt), Turn("assistant", example.response)))


def in_parts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterable[list[int]]:
    """The ids of each text, tokenized AT_ONCE by AT_ONCE."""
    for start in range(0, len(texts), AT_ONCE):
        yield from text_ids(tokenizer, texts[start : start + AT_ONCE])
