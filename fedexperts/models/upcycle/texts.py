"""The texts on which an upcycled model is calibrated and measured, in windows of tokens."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from transformers import PreTrainedTokenizerBase

from fedexperts.data.encode import special_tokens
from fedexperts.data.fields import field_text
from fedexperts.data.pack import data_folder
from fedexperts.data.readers import at_location, format_of, read
from fedexperts.errors import BadData, BadValue, shortened
from fedexperts.models.upcycle.parts import Window

WINDOW = 256  # tokens
HELD_OUT = 4  # every so many windows one is measured on, and not calibrated on
WORD = 100  # characters within which a word begins, in languages that write spaces
CHARACTERS = 8  # read for each wanted token, so that a window is full

PACK = ("books2a", "openstax", "classic_books", "state_union", "stories", "wikitext2_valid", "encyclopedic", "dialogue")
"""Stems of the texts in the data pack."""


def default_texts() -> tuple[str, list[str]]:
    """Texts to calibrate on, with a name for them: those of the data pack, or else the Python manual that comes with Python."""
    try:
        folder = data_folder() / "text"
    except BadData:
        folder = Path()
    files = [file for stem in PACK if (file := folder / f"{stem}.train.jsonl.gz").is_file()]
    if files:
        return "the texts of the data pack", [read_text(file) for file in files]
    return "the Python manual (pydoc_data)", ["\n\n".join(topics.values())]


def read_text(file: Path) -> str:
    """A text file; or the field `text` of each row of a data file, such as JSONL.

    Raises:
        BadData: it cannot be read.
    """
    if format_of(file.name):
        return "\n\n".join(at_location(row, lambda fields: field_text(fields, "text")) for row in read(file))
    try:
        return file.read_text()
    except (OSError, ValueError) as error:
        raise BadData(f"{file} cannot be read ({shortened(str(error))}); give a text file, or JSONL with a field text") from error


def read_prompts(file: Path, experts: int) -> list[list[str]]:
    """The prompts of each expert: a JSON list with a list of prompts for each, in their order.

    Raises:
        BadValue: it is something else, or has another number of lists.
    """
    try:
        prompts: list[list[str]] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadValue(f"--prompts {file} cannot be read as JSON ({shortened(str(error))})") from error
    lists = isinstance(prompts, list) and all(isinstance(each, list) and each for each in prompts)
    if not lists or not all(isinstance(prompt, str) and prompt for each in prompts for prompt in each):
        raise BadValue(f"--prompts {file} is not a JSON list with a list of prompts for each expert; write it so")
    if len(prompts) != experts:
        raise BadValue(f"--prompts {file} has {len(prompts)} lists of prompts for {experts} experts; give one for each")
    return prompts


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int, size: int, expert: int | None = None
) -> list[Window]:
    """About `tokens` tokens of `texts` in windows of at most `size`, as many of each text and spread evenly over it.

    Raises:
        BadData: there is less text than two windows.
    """
    number = max(tokens // size, HELD_OUT)
    each = -(-number // len(texts))
    pieces = [piece for text in texts for piece in cut(text, each, CHARACTERS * size)]
    found = [ids for piece in pieces if len(ids := encode(tokenizer, piece, size)) > 1]
    if len(found) < 2:
        raise BadData(f"the text gives {len(found)} windows of {size} tokens, and at least 2 are needed; give more text")
    period = min(HELD_OUT, len(found))
    return [window(tokenizer, ids, index % period == period - 1, expert) for index, ids in enumerate(found)]


def prompt_windows(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[str]], size: int) -> list[Window]:
    """A window to calibrate on for each prompt of each expert."""
    return [
        window(tokenizer, encode(tokenizer, prompt, size), held_out=False, expert=expert)
        for expert, some in enumerate(prompts)
        for prompt in some
    ]


def cut(text: str, number: int, characters: int) -> list[str]:
    """`number` pieces of a text with equal distances between them, fewer if there is less text.

    Each begins with a word, unless there is no white space near, as in languages that write none.
    """
    number = max(1, min(number, len(text) // characters))
    starts = [word_from(text, index * (len(text) // number)) for index in range(number)]
    return [text[start:][:characters] for start in starts]


def word_from(text: str, start: int) -> int:
    """Where the first word of `text` from `start` on begins; `start` itself if none begins within WORD characters."""
    space = re.compile(r"\s").search(text, start, start + WORD) if start else None
    return space.end() if space else start


def encode(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> tuple[int, ...]:
    """At most `size` tokens of `text`, after the token that the tokenizer puts before a text, or else that ends one."""
    before, _ = special_tokens(tokenizer)
    start = before or [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    return tuple([*start, *tokenizer(text, add_special_tokens=False, truncation=True, max_length=size)["input_ids"]][:size])


def window(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], held_out: bool, expert: int | None) -> Window:
    """The window of `ids`, with the bytes that its tokens but the first stand for."""
    text = tokenizer.decode(list(ids[1:]), clean_up_tokenization_spaces=False)
    return Window(ids, len(str(text).encode()), held_out, expert)
