"""Public text: plain text that every client has, so that all can select experts by the same tokens."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fedexperts.errors import BadValue
from fedexperts.types import Example

WINDOW = 2000
"""Characters of a window of public text; it is truncated to the run's max_tokens."""


def read_public_text(name: str) -> str:
    """The text in the file `name`.

    Raises:
        BadValue: no such file, or a file without text.
    """
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if not text.strip():
        raise BadValue(f"method.public_text = {name!r} is no file with text (UTF-8); give a text file that every client has")
    return text


def fingerprint(text: str) -> Tensor:
    """sha256 of `text` as a uint8 tensor, which jobs carry so that all clients select with the same text."""
    return torch.tensor(list(sha256(text.encode()).digest()), dtype=torch.uint8)


def windows(text: str, number: int, as_prompt: bool = False) -> Sequence[Example]:
    """At most `number` windows of `text`, evenly spread; `as_prompt`: each also as its own prompt (ours).

    Without a prompt, the experts of an encoder would be selected on an empty input.
    """
    starts = range(0, len(text), WINDOW)
    chosen = min(number, len(starts))
    spread = (starts[turn * len(starts) // chosen] for turn in range(chosen))
    pieces = (text[start : start + WINDOW] for start in spread)
    return [Example(piece if as_prompt else "", piece, "public") for piece in pieces]
