"""Sample answers: which of a client's examples are shown at an evaluation, and the rows that a client sends of them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import zip_longest
from typing import Any

from fedexperts.core.evaluation import Judged
from fedexperts.core.score_errors import is_between, is_text
from fedexperts.errors import quoted
from fedexperts.types import Example

FIELDS = {"task", "prompt", "reference", "answer", "score"}
LONGEST = 5_000
"""Characters that a text may take as JSON; a longer one loses its middle."""
MOST_JSON = 3 * LONGEST + 2_000
"""Characters of a row as JSON."""
CONTROL = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\r\t"}
"""Characters that a terminal would obey instead of showing them."""


def chosen(examples: Sequence[Example], most: int) -> list[Example]:
    """At most `most` of `examples`, from each task in turn.

    Within a task they are in the order of the sha256 of their content. So they are the same for every method, engine and seed, as
    far as a client has the same examples, and fewer are the first ones of more.
    """
    by_task: dict[str, list[Example]] = {}
    for example in sorted(examples, key=digest):
        by_task.setdefault(example.task, []).append(example)
    turns = zip_longest(*(by_task[task] for task in sorted(by_task)))
    return [example for turn in turns for example in turn if example is not None][:most]


def digest(example: Example) -> bytes:
    """sha256 of an example's task, prompt and response."""
    return sha256(json.dumps([example.task, example.prompt, example.response]).encode()).digest()


def rows(judged: Iterable[Judged], examples: Sequence[Example]) -> list[dict[str, Any]]:
    """What a model answered to each of `examples`, which are among those of `judged`, as JSON values."""
    known = {id(example): (answer, scores) for example, answer, scores in judged}
    found = []
    for example in examples:
        answer, scores = known[id(example)]
        score = scores.main(example.task)
        shown = {"answer": None if answer is None else fitted(answer), "score": score if math.isfinite(score) else None}
        found.append({**question(example), **shown})
    return found


def question(example: Example) -> dict[str, str]:
    """The part of a row that does not depend on the model."""
    return {"task": example.task, "prompt": fitted(example.prompt), "reference": fitted(example.response)}


def fitted(text: str) -> str:
    """`text` as a file can hold and a terminal show it, without its middle if it takes more than LONGEST characters as JSON."""
    text = text.encode("utf-8", "replace").decode().translate(CONTROL)
    shown, kept = text, len(text)
    while len(json.dumps(shown)) > LONGEST:
        kept = min(kept * 9 // 10, LONGEST)
        shown = f"{text[: kept - kept // 2]} […{len(text) - kept:,} characters…] {text[len(text) - kept // 2 :]}"
    return shown


def rows_error(value: object, tasks: Mapping[str, str], most: int, known: Sequence[Example] | None) -> str | None:
    """Why `value` is nothing that `rows` gives, as the rest of a sentence; None where it is.

    tasks: task → its main metric, of all tasks that there are. most: number of rows. known: the examples that the first rows are
    about; None: those of a client with its own data.
    """
    if not isinstance(value, list) or len(value) > most:
        return f"is {quoted(value)}, and should be a list of at most {most} answers"
    for place, row in enumerate(value):
        if why := row_error(row, tasks):
            return f"has as answer {place + 1} {why}"
        if known is not None and any(row[name] != text for name, text in question(known[place]).items()):
            return f"has as answer {place + 1} one to {quoted(row['prompt'])}, which is not the example to show"
    return None


def row_error(row: object, tasks: Mapping[str, str]) -> str | None:
    """Why `row` is no row of a client's predictions."""
    if not isinstance(row, Mapping) or row.keys() != FIELDS:
        return f"{quoted(row)}, which should hold {', '.join(sorted(FIELDS))}"
    if not isinstance(row["task"], str) or row["task"] not in tasks:
        return f"one of task {quoted(row['task'])}, and the tasks of the run are {', '.join(tasks)}"
    metric = tasks[row["task"]]
    texts = [row["prompt"], row["reference"], *([] if metric == "perplexity" else [row["answer"]])]
    if metric == "perplexity" and row["answer"] is not None:
        return f"{quoted(row['answer'])}, and its task is scored by perplexity, without answers"
    for text in texts:
        if not isinstance(text, str) or not is_text(text) or text != fitted(text):
            return f"{quoted(text)}, and it should be a text of at most {LONGEST:,} characters as JSON without control characters"
    most = math.exp(700) if metric == "perplexity" else 1.001
    if row["score"] is not None and not is_between(row["score"], 0, most):
        return f"one with the score {quoted(row['score'])}, and it should be from 0 to {most:.4g}"
    return None
