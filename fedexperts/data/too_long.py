"""What becomes of examples with more tokens than `data.max_tokens`, if they are not to be cut."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fedexperts.data.encode import Encoder
from fedexperts.data.pool import Pool
from fedexperts.data.settings import TooLong
from fedexperts.errors import BadData
from fedexperts.types import Example


def fitting(pool: Pool, encoder: Encoder, too_long: TooLong) -> Pool:
    """`pool` without the training and test examples of which `encoder` would cut the prompt or the answer; "cut": as it is.

    Raises:
        BadData: there are such examples and `too_long` is "refuse", or all examples of a task and split are such.
    """
    if too_long == "cut":
        return pool
    train, test = (_fit(examples, encoder) for examples in (pool.train, pool.test))
    long = [example for examples, fit in ((pool.train, train), (pool.test, test)) for example in _where(examples, fit, False)]
    dropped = Counter(example.task for example in long)
    if long and too_long == "refuse":
        task, number = dropped.most_common(1)[0]
        total = sum(example.task == task for example in (*pool.train, *pool.test))
        raise BadData(
            f"{number} of the {total} examples of {task} have more than data.max_tokens = {encoder.max_tokens} tokens (prompt "
            f'and answer need up to {_longest(long, encoder)}), and data.too_long = "refuse"; raise it, or set "cut" or "drop"'
        )
    kept = replace(pool, train=tuple(_where(pool.train, train)), test=tuple(_where(pool.test, test)), dropped=dict(dropped))
    for split in ("train", "test"):
        before, after = ({example.task for example in getattr(each, split)} for each in (pool, kept))
        if lost := sorted(before - after):
            raise BadData(
                f"all {split} examples of {lost[0]} have more than data.max_tokens = {encoder.max_tokens} tokens, and "
                f'data.too_long = "drop" leaves none; raise it, or set "cut"'
            )
    return kept


def _fit(examples: Sequence[Example], encoder: Encoder) -> list[bool]:
    """Whether nothing of each example is cut."""
    return [cut.prompt_lost == cut.response_lost == 0 for cut in encoder.cuts(examples)] if examples else []


def _where(examples: Sequence[Example], fit: Sequence[bool], wanted: bool = True) -> list[Example]:
    return [example for example, fits in zip(examples, fit, strict=True) if fits == wanted]


def _longest(examples: Sequence[Example], encoder: Encoder) -> int:
    """Tokens of the longest example, uncut."""
    return max(cut.prompt + cut.response for cut in encoder.cuts(examples))
