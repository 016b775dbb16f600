"""From a row of a data set to an Example: how each kind of task asks, what it wants to hear and how that is judged.

Prompts are short, since small models see few tokens, and end in a line break, where tokenizers do not join two words.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from fedexperts.errors import BadData
from fedexperts.types import Example

Row = Mapping[str, Any]
ALPACA = "### Instruction:\n{instruction}\n\n### Response:\n"
ALPACA_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TREC = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "person",
    "LOC": "location",
    "NUM": "number",
}


@dataclass(frozen=True)
class Hints:
    """What a template must know besides the row."""

    task: str
    metric: str | None = None  # instead of the one of the kind
    question: str = ""  # instead of the row's own instruction
    names: tuple[str, ...] = ()  # of the classes, in the order of their ids; or all answers of a closed set
    prompt: str | None = None  # a field, or a text with {field}s in it
    response: str | None = None  # likewise
    label: str | None = None  # the field of the class


Template = Callable[[Row, Hints], Example]
Frame = tuple[str, str]
"""What every prompt of a task begins and ends with."""

MARK = "\x00"


def classification(row: Row, hints: Hints) -> Example:
    """`text` in, the readable name of `label`, a class id, out."""
    label = value(row, hints.label or "label")
    question = f"{hints.question}\n" if hints.question else ""
    text = filled(row, hints.prompt or "text")
    return Example(
        prompt=f"{question}{text}\nAnswer:\n",
        response=hints.names[label],
        task=hints.task,
        metric=hints.metric or "accuracy",
        label=label,
        choices=hints.names,
    )


def closed(row: Row, hints: Hints) -> Example:
    """An instruction with a closed set of answers, which are its labels."""
    answer = text_of(row, "output").strip()
    return Example(asked(row, hints), answer, hints.task, hints.metric or "accuracy", hints.names.index(answer), hints.names)


def multiple_choice(row: Row, hints: Hints) -> Example:
    """The options stand in the input; the answer is a letter. Letters are no labels: they say nothing of the content."""
    letters = tuple(LETTERS[: len(value(row, "choices"))])
    letter = letters[int(value(row, "gold"))]
    return Example(asked(row, hints), letter, hints.task, hints.metric or "accuracy", choices=letters)


def cloze(row: Row, hints: Hints) -> Example:
    """The question alone, without the options that stand below it; the answer is an option's text, not its letter.

    How small models are best asked: they seldom know what a letter stands for (OLMES, https://arxiv.org/abs/2406.08446).
    """
    choices = tuple(str(choice).strip() for choice in value(row, "choices"))
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, value(row, "choices"), strict=False))
    prompt = f"{text_of(row, 'input').removesuffix(options)}\nAnswer:\n"
    return Example(prompt, choices[int(value(row, "gold"))], hints.task, hints.metric or "likelihood", choices=choices)


def short_answer(row: Row, hints: Hints) -> Example:
    """A phrase, mostly from the text that was given."""
    return Example(asked(row, hints), text_of(row, "output"), hints.task, hints.metric or "token_f1")


def summary(row: Row, hints: Hints) -> Example:
    """A long text in, a short one out."""
    return Example(asked(row, hints), text_of(row, "output"), hints.task, hints.metric or "rouge2")


def instruction(row: Row, hints: Hints) -> Example:
    """Anything a user may ask for, in the form Alpaca made common."""
    shape = ALPACA_WITH_INPUT if row.get("input") else ALPACA
    prompt = shape.format(instruction=text_of(row, "instruction"), input=row.get("input", ""))
    return Example(prompt, text_of(row, "output"), hints.task, hints.metric or "rougeL")


def exact(row: Row, hints: Hints) -> Example:
    """An answer that must be right; a sum in words ends in `#### 72`. The calculator's marks in sums are taken out."""
    answer = re.sub(r"<<.*?>>", "", text_of(row, "output"))
    return Example(asked(row, hints), answer, hints.task, hints.metric or "exact_match")


def plain_text(row: Row, hints: Hints) -> Example:
    """Text to be continued from nothing; its domain is its label."""
    label = hints.names.index(str(value(row, "domain"))) if hints.names else None
    return Example("", filled(row, hints.response or "text"), hints.task, hints.metric or "perplexity", label)


def fields(row: Row, hints: Hints) -> Example:
    """Prompt and response from the fields, or texts with {field}s, that the user named."""
    label = hints.names.index(str(value(row, hints.label))) if hints.label else None
    prompt, response = filled(row, hints.prompt or "prompt"), filled(row, hints.response or "response")
    return Example(prompt, response, hints.task, hints.metric or "rougeL", label)


TEMPLATES: Mapping[str, Template] = {
    "classification": classification,
    "closed": closed,
    "multiple_choice": multiple_choice,
    "cloze": cloze,
    "short_answer": short_answer,
    "summary": summary,
    "instruction": instruction,
    "exact": exact,
    "plain_text": plain_text,
    "fields": fields,
}


def frame(rows: Sequence[Row], kind: str, hints: Hints) -> Frame | None:
    """What stands before and after the part that differs in the prompts of `rows`, so that others can be asked alike.

    Both are empty where several fields differ: who asks writes it all. None: nothing is asked, a text is continued.
    """
    if kind == "plain_text":
        return None
    if kind in ("classification", "fields"):
        wanted = hints.prompt or ("text" if kind == "classification" else "prompt")
        marked: dict[str, str] = dict.fromkeys(fields_of(wanted) or [wanted], MARK)
    elif kind == "cloze" or (kind != "instruction" and one_instruction(rows, hints)):
        marked = {"input": MARK}
    else:
        hints, marked = replace(hints, question=""), {"instruction": MARK, "input": ""}
    before, _, after = TEMPLATES[kind]({**rows[0], **marked}, hints).prompt.partition(MARK)
    return ("", "") if MARK in after else (before, after)


def one_instruction(rows: Sequence[Row], hints: Hints) -> bool:
    """Whether all that differs in the questions of `rows` is their input."""
    asked = {hints.question or row["instruction"] for row in rows}
    return len(asked) == 1 and all(row.get("input") for row in rows)


def kind_of(row: Row) -> str:
    """The template for a row of unknown origin, by its fields.

    Raises:
        BadData: they are none we know.
    """
    has = set(row)
    for kind, needed in (
        ("multiple_choice", {"instruction", "choices", "gold"}),
        ("instruction", {"instruction", "output"}),
        ("fields", {"prompt", "response"}),
        ("classification", {"text", "label"}),
        ("plain_text", {"text"}),
    ):
        if needed <= has:
            return kind
    raise BadData(
        f"its fields are {', '.join(sorted(has))}, but we know only instruction and output, prompt and response, text and label,"
        ' or text; name them: { name = "…", prompt = "field", response = "field" }'
    )


def rows_of(table: Iterable[Row], label: str | None = None) -> list[dict[str, Any]]:
    """All rows; where `table` is a `datasets.Dataset` that knows the names of its classes, each with its `label_name`."""
    field, features = label or "label", getattr(table, "features", None) or {}  # any other iterable has no features
    names = getattr(features.get(field), "names", None)  # only a ClassLabel has names
    if names is None:
        return [dict(row) for row in table]
    return [{"label_name": names[row[field]], **row} if known(row[field]) else {**row, field: None} for row in table]


def known(number: int | None) -> bool:
    """Whether a class id names a class; sets whose test labels are kept secret have -1 there."""
    return number is not None and number >= 0


def names_of(rows: Iterable[Row], kind: str, label: str | None = None) -> tuple[str, ...]:
    """The names of classes, domains or closed answers in `rows`, as the template of `kind` wants them."""
    if kind == "classification":
        return class_names(rows, label or "label")
    field = {"closed": "output", "plain_text": "domain", "fields": label}.get(kind)
    return tuple(sorted({str(row[field]).strip() for row in rows if field in row})) if field else ()


def class_names(rows: Iterable[Row], label: str) -> tuple[str, ...]:
    """Readable names in the order of the class ids, which count from 0; a class without `label_name` is called by its id."""
    names = {row[label]: readable(str(row.get("label_name", row[label]))) for row in rows if row.get(label) is not None}
    return tuple(names[number] for number in sorted(names))


def readable(name: str) -> str:
    """A class name as a person would say it: `card_arrival` is card arrival."""
    return TREC.get(name, name.replace("_", " ").strip())


def asked(row: Row, hints: Hints) -> str:
    """Instruction and input, and where the answer goes."""
    parts = (hints.question or text_of(row, "instruction"), str(row.get("input") or ""), "Answer:\n")
    return "\n".join(part for part in parts if part)


def filled(row: Row, wanted: str) -> str:
    """The field `wanted`, or `wanted` with its {field}s filled in."""
    names = fields_of(wanted)
    return wanted.format_map({name: text_of(row, name) for name in names}) if names else text_of(row, wanted)


def fields_of(wanted: str) -> list[str]:
    """The names of the {field}s in `wanted`."""
    return [name for _, name, _, _ in Formatter().parse(wanted) if name]


def text_of(row: Row, field: str) -> str:
    """A field as text.

    Raises:
        BadData: it is not there, or blank.
    """
    text = str(value(row, field))
    if not text.strip():
        raise BadData(f"its field {field} is empty; fill it in or leave the row out")
    return text


def value(row: Row, field: str) -> Any:
    """A field of any type.

    Raises:
        BadData: it is not there.
    """
    if row.get(field) is None:
        raise BadData(f"it has no field {field}, only {', '.join(map(str, row))}; add it or name another field")
    return row[field]
