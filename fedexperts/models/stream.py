"""Texts, instructions and generated examples as long rows of tokens, read in windows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedexperts.data import sources
from fedexperts.data.encode import end_token, special_tokens
from fedexperts.data.pack import data_folder
from fedexperts.data.readers import LocatedRow, at_location, hash_of, read
from fedexperts.data.settings import DataSettings, SourceSettings
from fedexperts.data.synthetic import examples
from fedexperts.data.templates import field_text
from fedexperts.errors import BadData
from fedexperts.models.settings import PretrainSettings, Stream, Texts
from fedexperts.types import Example

TOKENISED = 1000  # examples at a time


class Windows:
    """The batches of a run: windows of each part, in an order drawn anew whenever all of the part was read."""

    def __init__(self, parts: Mapping[str, Int[Tensor, " tokens"]], settings: PretrainSettings, stream: Stream) -> None:
        self.parts, self.size = parts, stream.window
        self.seed, self.workers = settings.seed, settings.workers
        self.counts = stream.counts(settings.batch_size // settings.workers)

    def batch(self, step: int, rank: int) -> dict[str, Int[Tensor, "windows tokens"]]:
        """One worker's part of one batch; every token is a label."""
        windows = [
            self.window(part, (step * self.workers + rank) * count + index)
            for part, count in self.counts.items()
            for index in range(count)
        ]
        ids = torch.stack(windows).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def window(self, part: str, number: int) -> Int[Tensor, " tokens"]:
        """The `number`-th window that is read of a part; whenever all were read, the cuts between them lie elsewhere."""
        tokens = self.parts[part]
        windows = len(tokens) // self.size - 1  # one less than there is room for, so that they can be shifted
        time, place = divmod(number, windows)
        shift, order = shuffled(f"{self.seed}/{part}/{time}", windows, self.size)
        start = shift + order[place] * self.size
        return tokens[start : start + self.size]


@lru_cache(maxsize=8)
def shuffled(seed: str, number: int, size: int) -> tuple[int, list[int]]:
    """A shift below `size`, and the numbers below `number` in another order."""
    rng = Random(seed)
    return rng.randrange(size), rng.sample(range(number), number)


def tokens_of(
    stream: Stream, tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, Sequence[Example]]
) -> dict[str, Int[Tensor, " tokens"]]:
    """Each part's examples one after the other, as int16 where the vocabulary allows.

    Raises:
        BadData: a part has fewer tokens than two windows.
    """
    dtype = torch.int16 if len(tokenizer) <= 2**15 else torch.int32
    found = {part: torch.tensor(list(token_ids(tokenizer, chosen)), dtype=dtype) for part, chosen in parts.items()}
    for part, tokens in found.items():
        if len(tokens) < 2 * stream.window:
            raise BadData(f"stream.{part} gives {len(tokens)} tokens, fewer than two windows; add sources or lower stream.window")
    return found


def token_ids(tokenizer: PreTrainedTokenizerBase, chosen: Sequence[Example]) -> Iterator[int]:
    """Start, prompt, response and end of each example."""
    before, _ = special_tokens(tokenizer)
    end = end_token(tokenizer)
    for start in range(0, len(chosen), TOKENISED):
        some = chosen[start : start + TOKENISED]
        prompts = tokenizer([example.prompt for example in some], add_special_tokens=False, verbose=False)["input_ids"]
        responses = tokenizer([example.response for example in some], add_special_tokens=False, verbose=False)["input_ids"]
        for prompt, response in zip(prompts, responses, strict=True):
            yield from (*before, *prompt, *response, end)


def read_parts(stream: Stream, seed: int) -> tuple[dict[str, list[Example]], dict[str, str]]:
    """The training examples of each part, and the sha256 of what each source was read from.

    Texts stay in order, since the rows of a book follow one another; the others are mixed.

    Raises:
        BadData, BadValue: a source is missing, empty, damaged, unknown or no plain text.
    """
    loaded = [sources.load(SourceSettings(name=name), DataSettings(sources=(name,))) for name in stream.instructions]
    hashes = {texts.name: hash_of([text_file(texts.name)]) for texts in stream.texts}
    number = stream.generated_examples
    parts = {
        "texts": [as_example(text) for texts in stream.texts for text in read_texts(texts)],
        "instructions": [example for source in loaded for example in source.train],
        "generated": [example for task in stream.generated for example in examples(task, number, seed, "train")],
    }
    for part in ("instructions", "generated"):
        Random(f"{seed}/{part}").shuffle(parts[part])
    return {part: parts[part] for part in stream.parts}, hashes | {source.name: source.hash for source in loaded}


def as_example(text: str) -> Example:
    """Text to be continued from nothing."""
    return Example("", text, "text", metric="perplexity")


def read_texts(texts: Texts) -> list[str]:
    """The `text` of each row that is not left out.

    Raises:
        BadData: the file cannot be read, or one of `without` leaves nothing out.
    """
    rows = read(text_file(texts.name))
    for prefix in texts.without:
        if not any(origin(row).startswith(prefix) for row in rows):
            raise BadData(f"stream.texts: no row of {texts.name} has a source that begins with {prefix!r}; mend its without")
    return texts_of(rows, texts)


def texts_of(rows: Iterable[LocatedRow], texts: Texts) -> list[str]:
    """The `text` of each row whose `source` begins with none of `texts.without`."""
    return [
        at_location(row, lambda fields: field_text(fields, "text")) for row in rows if not origin(row).startswith(texts.without)
    ]


def origin(row: LocatedRow) -> str:
    return str(row.row.get("source", ""))


def text_file(name: str) -> Path:
    """A file given by path, or by its stem in the data pack.

    Raises:
        BadData: there is neither.
    """
    path = Path(name)
    if not path.is_file():
        path = data_folder() / f"{name}.train.jsonl.gz"
    if not path.is_file():
        raise BadData(f"stream.texts: neither {name} nor {path} is a file; give a path, or set FEDEXPERTS_DATA")
    return path
