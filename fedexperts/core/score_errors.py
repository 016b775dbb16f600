"""Checks of scores that come from clients: why a value is none, as the rest of a sentence."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fedexperts.core.evaluation import METRICS
from fedexperts.errors import quoted
from fedexperts.types import Example

MOST_LABELS = 10_000
LONGEST_NAME = 500  # characters of a label
LARGEST_NLL = 1e12
LARGEST_COUNT = 10**9  # of examples, tokens and labels
FIELDS = {"metric", "examples", "sums", "labels", "nll", "tokens"}


def scores_error(value: object, tasks: Mapping[str, str], examples: int) -> str | None:
    """Why `value` is no `Scores.to_json()` of so many examples, as the rest of a sentence; None where it is.

    tasks: task → its main metric, of all tasks that there are.
    """
    if not isinstance(value, Mapping):
        return f"is {quoted(value)}, and should be scores by task"
    for task, scores in value.items():
        if task not in tasks:
            return f"has scores of {quoted(task)}, and the tasks of the run are {', '.join(tasks)}"
        if why := task_error(scores, tasks[task]):
            return f"of task {task!r} {why}"
    if (total := sum(scores["examples"] for scores in value.values())) != examples:
        return f"are of {total} examples, and the client has {examples} to be scored on"
    return None


def task_error(scores: object, metric: str) -> str | None:
    """Why `scores` are no sums of one task that is judged by `metric`."""
    if not isinstance(scores, Mapping) or scores.keys() != FIELDS:
        return f"holds {quoted(scores)}, and should hold {', '.join(sorted(FIELDS))}"
    if scores["metric"] != metric:
        return f"is judged by {quoted(scores['metric'])}, and should be by {metric}"
    examples, labels = scores["examples"], scores["labels"]
    if not is_count(examples) or examples < 1 or not is_count(scores["tokens"]):
        return f"counts {quoted(examples)} examples and {quoted(scores['tokens'])} tokens, and these are no counts"
    if not is_between(scores["nll"], 0, LARGEST_NLL):
        return f"has a negative log-likelihood of {quoted(scores['nll'])}, and it should be from 0 to {LARGEST_NLL:g}"
    sums = scores["sums"]
    if not isinstance(sums, Mapping) or not sums.keys() <= METRICS.keys():
        return f"has sums {quoted(sums)}, and they should be of metrics"
    if not all(is_between(each, 0, examples * 1.001) for each in sums.values()):
        return f"has sums {quoted(sums)}, and each should be from 0 to its {examples} examples"
    if (
        not isinstance(labels, Mapping)
        or len(labels) > MOST_LABELS
        or not all(is_label(*each, examples) for each in labels.items())
    ):
        return f"has labels {quoted(labels)}, and each should have three counts of its {examples} examples"
    there = {*sums, *(("macro_f1",) if labels else ()), *(("perplexity",) if scores["tokens"] else ())}
    return None if scores["metric"] in there else f"has no {scores['metric']}, which it is judged by"


def by_example_error(value: object, examples: Sequence[Example]) -> str | None:
    """Why `value` is nothing that `by_example` gives for `examples`."""
    metrics = {example.task: example.metric for example in examples}
    counts = Counter(example.task for example in examples)
    if not isinstance(value, Mapping) or value.keys() != metrics.keys():
        return f"is {quoted(value)}, and should be scores of {', '.join(metrics)}"
    for task, scores in value.items():
        metric, count = metrics[task], counts[task]
        if not isinstance(scores, Mapping) or scores.keys() != {"metric", "examples", "value", "values"}:
            return f"of task {task!r} holds {quoted(scores)}, and should hold metric, examples, value, values"
        if scores["metric"] != metric or not is_count(scores["examples"]) or scores["examples"] != count:
            given = f"{quoted(scores['metric'])} of {quoted(scores['examples'])} examples"
            return f"of task {task!r} is {given}, and should be {metric} of {count} examples"
        values, single = scores["values"], metric not in ("macro_f1", "perplexity")  # those two are no means over examples
        most = 1.001 if single else math.exp(700)
        fit = isinstance(values, list) and len(values) == (count if single else 0)
        if not fit or not all(is_between(each, 0, most) for each in (scores["value"], *values)):
            given = f"{quoted(values)} and {quoted(scores['value'])}"
            return f"of task {task!r} has values {given}, which cannot be {metric} of {count} examples"
    return None


def drift_error(value: object, blocks: Iterable[str]) -> str | None:
    """Why `value` is no drift of the routers of `blocks`: block → a number from 0."""
    if not isinstance(value, Mapping) or value.keys() != set(blocks):
        return f"is {quoted(value)}, and should hold a number for each MoE block of its job"
    return None if all(is_between(each, 0, 1e9) for each in value.values()) else f"is {quoted(value)}, beyond 0 to 1e9"


def is_between(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def is_label(name: object, counts: object, examples: int) -> bool:
    """A label, and its true positives, false positives and false negatives among so many examples; at least one is not 0."""
    if not isinstance(name, str) or len(name) > LONGEST_NAME or not is_text(name):
        return False
    if not isinstance(counts, list | tuple) or len(counts) != 3:
        return False
    return all(map(is_count, counts)) and 1 <= sum(counts) <= examples


def is_text(name: str) -> bool:
    """Whether it can be written as UTF-8: lone surrogates cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
