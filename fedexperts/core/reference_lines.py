"""Reference lines: what answers that need no model score on the same examples, by the same metrics.

A quality says little unless one knows what a constant answer, or a copy of the input, would score.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

from fedexperts.core.evaluation import Scores, TaskScores, judge, merge, way_of
from fedexperts.types import Example

CONSTANT, COPY = "constant answer", "copy of the input"
NAMES = (CONSTANT, COPY)


def reference_lines(train: Sequence[Example], scored: Sequence[Example], shorten: Callable[[str], str]) -> Mapping[str, Scores]:
    """Reference line → what it scores on the `scored` examples of a client.

    The constant answer to a task is the most frequent response of the client's training examples of that task (of equally
    frequent ones the first); if choices are scored by likelihood, the choice at the most frequent place. The copy is the
    example's input, cut by `shorten` to what a model may generate; there is none of tasks scored by likelihood. A task scored by
    perplexity has neither.
    """
    constants = {task: _most_frequent(train, task) for task in {example.task for example in train}}
    parts: dict[str, list[Scores]] = {name: [] for name in NAMES}
    for example in scored:
        for name, answer in _answers(example, constants.get(example.task), shorten):
            parts[name].append(Scores({example.task: _judged(answer, example)}))
    return {name: merge(each) for name, each in parts.items()}


def _answers(example: Example, constant: str | int | None, shorten: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """The answers of the reference lines to `example`."""
    if isinstance(constant, int):
        yield CONSTANT, example.choices[constant] if constant < len(example.choices) else ""
    elif constant is not None:
        yield CONSTANT, constant
    if way_of(example) == "answer":
        yield COPY, shorten(example.input or example.prompt)


def _most_frequent(train: Sequence[Example], task: str) -> str | int | None:
    """The most frequent response of a task, or the most frequent place of the right choice; None for texts to continue."""
    examples = [example for example in train if example.task == task]
    ways = {way_of(example) for example in examples}
    if ways == {"likelihood"}:
        places = [example.choices.index(example.response) for example in examples if example.response in example.choices]
        return Counter(places).most_common(1)[0][0] if places else None  # evaluations refuse examples without a right choice
    return None if "perplexity" in ways else Counter(example.response for example in examples).most_common(1)[0][0]


def _judged(answer: str, example: Example) -> TaskScores:
    if way_of(example) == "likelihood":
        return TaskScores(example.metric, 1, {"likelihood": float(answer == example.response)})
    sums, labels = _verdict(answer, example)
    return TaskScores(example.metric, 1, sums, labels)


_verdict = lru_cache(maxsize=50_000)(judge)  # clients, runs and seeds share examples, and ROUGE takes its time
