"""Texts, instructions and generated examples as long sequences of tokens, read in windows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedexperts.data import sources, synthetic
from fedexperts.data.encode import end_token, special_tokens
from fedexperts.data.fields import field_text
from fedexperts.data.pack import data_folder
from fedexperts.data.readers import LocatedRow, at_location, hash_of, read
from fedexperts.data.settings import DataSettings, SourceSettings
from fedexperts.data.tokens import text_ids
from fedexperts.errors import BadData
from fedexperts.models.settings import PretrainSettings, Stream, Texts
from fedexperts.types import Example

TOKENIZED_AT_ONCE = 1000  # examples


class Windows:
    """The batches of a run: windows of each part, in a new random order after all windows of the part were read."""

    def __init__(self, parts: Mapping[str, Int[Tensor, " tokens"]], settings: PretrainSettings, stream: Stream) -> None:
        self.parts, self.size = parts, stream.window
        self.seed, self.workers = settings.seed, settings.workers
        self.counts = stream.counts(settings.batch_size // settings.workers)

    def batch(self, step: int, rank: int) -> dict[str, Int[Tensor, "windows tokens"]]:
        """The part of a batch that worker `rank` trains on; every token is a label."""
        windows = [
            self.window(part, (step * self.workers + rank) * count + index)
            for part, count in self.counts.items()
            for index in range(count)
        ]
        ids = torch.stack(windows).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def window(self, part: str, number: int) -> Int[Tensor, " tokens"]:
        """The window of a part that is read as the `number`-th; each pass over the part cuts it at other tokens."""
        tokens = self.parts[part]
        windows = len(tokens) // self.size - 1  # one less than there is room for, so that all can be shifted
        epoch, index = divmod(number, windows)
        shift, order = shuffled(f"{self.seed}/{part}/{epoch}", windows, self.size)
        start = shift + order[index] * self.size
        return tokens[start : start + self.size]


@lru_cache(maxsize=8)
def shuffled(seed: str, number: int, size: int) -> tuple[int, list[int]]:
    """A random shift below `size`, and the numbers below `number` in random order."""
    rng = Random(seed)
    return rng.randrange(size), rng.sample(range(number), number)


def tokens_of(
    stream: Stream, tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, Sequence[Example]]
) -> dict[str, Int[Tensor, " tokens"]]:
    """The tokens of each part's examples, one after the other, as int16 if the vocabulary allows it, else int32.

    Raises:
        BadData: a part has fewer tokens than two windows.
    """
    dtype = torch.int16 if len(tokenizer) <= 2**15 else torch.int32
    sequences = {part: torch.tensor(list(token_ids(tokenizer, examples)), dtype=dtype) for part, examples in parts.items()}
    for part, tokens in sequences.items():
        if len(tokens) < 2 * stream.window:
            raise BadData(f"stream.{part} gives {len(tokens)} tokens, fewer than two windows; add sources or lower stream.window")
    return sequences


def token_ids(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterator[int]:
    """Start token, prompt, response and end token of each example."""
    before, _ = special_tokens(tokenizer)
    end = end_token(tokenizer)
    for start in range(0, len(examples), TOKENIZED_AT_ONCE):
        chunk = examples[start : start + TOKENIZED_AT_ONCE]
        prompts, responses = (text_ids(tokenizer, [getattr(each, part) for each in chunk]) for part in ("prompt", "response"))
        for prompt, response in zip(prompts, responses, strict=True):
            yield from (*before, *prompt, *response, end)


def read_parts(stream: Stream, seed: int) -> tuple[dict[str, list[Example]], dict[str, str]]:
    """The training examples of each part, and the sha256 of what each source was read from.

    Texts stay in order, since the rows of a book follow one another; the others are shuffled.

    Raises:
        BadData, BadValue: a source is missing, empty, damaged or unknown, or texts are no plain text.
    """
    loaded = [sources.load(SourceSettings(name=name), DataSettings(sources=(name,))) for name in stream.instructions]
    hashes = {texts.name: hash_of([text_file(texts.name)]) for texts in stream.texts}
    number = stream.generated_examples
    parts = {
        "texts": [as_example(text) for texts in stream.texts for text in read_texts(texts)],
        "instructions": [example for source in loaded for example in source.train],
        "generated": [example for task in stream.generated for example in synthetic.examples(task, number, seed, "train")],
    }
    for part in ("instructions", "generated"):
        Random(f"{seed}/{part}").shuffle(parts[part])
    return {part: parts[part] for part in stream.parts}, hashes | {source.name: source.hash for source in loaded}


def as_example(text: str) -> Example:
    """Text to continue, without a prompt."""
    return Example("", text, "text", metric="perplexity")


def read_texts(texts: Texts) -> list[str]:
    """The `text` of each row of a file, except those that `texts.without` excludes.

    Raises:
        BadData: the file cannot be read, or a prefix in `without` excludes no row.
    """
    rows = read(text_file(texts.name))
    for prefix in texts.without:
        if not any(origin(row).startswith(prefix) for row in rows):
            raise BadData(f"stream.texts: no row of {texts.name} has a source that begins with {prefix!r}; correct its without")
    return texts_of(rows, texts)


def texts_of(rows: Iterable[LocatedRow], texts: Texts) -> list[str]:
    """The `text` of each row whose `source` begins with none of `texts.without`."""
    return [
        at_location(row, lambda fields: field_text(fields, "text")) for row in rows if not origin(row).startswith(texts.without)
    ]


def origin(row: LocatedRow) -> str:
    """The field `source` of a row."""
    return str(row.row.get("source", ""))


def text_file(name: str) -> Path:
    """The file of a path, or of a stem in the data pack.

    Raises:
        BadData: neither exists.
    """
    path = Path(name)
    if not path.is_file():
        path = data_folder() / f"{name}.train.jsonl.gz"
    if not path.is_file():
        raise BadData(f"stream.texts: neither {name} nor {path} is a file; give a path, or set FEDEXPERTS_DATA to the data pack")
    return path
