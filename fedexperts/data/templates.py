"""From a row of a data set to an Example: the prompt, the response and the metric of each kind of task.

Prompts are short, since small models see few tokens, and end in a line break, where tokenizers do not join two words.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from fedexperts.errors import BadData, listed
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
    """What a template needs besides the row."""

    task: str
    metric: str | None = None  # instead of the template's own
    question: str = ""  # instead of the row's own instruction
    names: tuple[str, ...] = ()  # of the classes, in the order of their ids; or all answers of a closed set
    prompt: str | None = None  # a field, or a text with {field}s in it
    response: str | None = None  # likewise
    label: str | None = None  # the field of the class


Template = Callable[[Row, Hints], Example]
Frame = tuple[str, str]
"""What every prompt of a task begins and ends with."""

MARK = "\x00"
"""Stands in a prompt for the part that differs between rows."""


def classification(row: Row, hints: Hints) -> Example:
    """The text of a row; the response is the readable name of its class id, `label`."""
    label = field_value(row, hints.label or "label")
    question = f"{hints.question}\n" if hints.question else ""
    text = fill_template(row, hints.prompt or "text")
    return Example(
        prompt=f"{question}{text}\nAnswer:\n",
        response=hints.names[label],
        task=hints.task,
        metric=hints.metric or "accuracy",
        label=label,
        choices=hints.names,
    )


def closed(row: Row, hints: Hints) -> Example:
    """An instruction with a closed set of answers, which are the labels."""
    answer = field_text(row, "output").strip()
    label = hints.names.index(answer)
    return Example(instruction_prompt(row, hints), answer, hints.task, hints.metric or "accuracy", label, hints.names)


def multiple_choice(row: Row, hints: Hints) -> Example:
    """The options stand in the input; the answer is a letter. Letters are no labels, since they do not describe the content."""
    letters = tuple(LETTERS[: len(field_value(row, "choices"))])
    letter = letters[gold_index(row)]
    return Example(instruction_prompt(row, hints), letter, hints.task, hints.metric or "accuracy", choices=letters)


def cloze(row: Row, hints: Hints) -> Example:
    """The question without the options below it; the answer is the text of an option, not its letter.

    The better format for small models, which seldom know what a letter stands for (OLMES, https://arxiv.org/abs/2406.08446).
    """
    choices = tuple(str(choice).strip() for choice in field_value(row, "choices"))
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, field_value(row, "choices"), strict=False))
    prompt = f"{field_text(row, 'input').removesuffix(options)}\nAnswer:\n"
    return Example(prompt, choices[gold_index(row)], hints.task, hints.metric or "likelihood", choices=choices)


def short_answer(row: Row, hints: Hints) -> Example:
    """A question whose answer is a phrase, mostly from the input."""
    return Example(instruction_prompt(row, hints), field_text(row, "output"), hints.task, hints.metric or "token_f1")


def summary(row: Row, hints: Hints) -> Example:
    """A long text to summarize."""
    return Example(instruction_prompt(row, hints), field_text(row, "output"), hints.task, hints.metric or "rouge2")


def instruction(row: Row, hints: Hints) -> Example:
    """Any instruction, in the format of Alpaca."""
    template = ALPACA_WITH_INPUT if row.get("input") else ALPACA
    prompt = template.format(instruction=field_text(row, "instruction"), input=row.get("input", ""))
    return Example(prompt, field_text(row, "output"), hints.task, hints.metric or "rougeL")


def exact(row: Row, hints: Hints) -> Example:
    """A question with one right answer; that of a word problem ends in `#### 72`. GSM8K's `<<…>>` calculations are removed."""
    answer = re.sub(r"<<.*?>>", "", field_text(row, "output"))
    return Example(instruction_prompt(row, hints), answer, hints.task, hints.metric or "exact_match")


def plain_text(row: Row, hints: Hints) -> Example:
    """Text to continue, without a prompt; its domain is its label."""
    label = hints.names.index(str(field_value(row, "domain")).strip()) if hints.names else None
    return Example("", fill_template(row, hints.response or "text"), hints.task, hints.metric or "perplexity", label)


def fields(row: Row, hints: Hints) -> Example:
    """Prompt and response from the fields, or texts with {field}s, that the user named."""
    label = hints.names.index(str(field_value(row, hints.label)).strip()) if hints.label else None
    prompt, response = fill_template(row, hints.prompt or "prompt"), fill_template(row, hints.response or "response")
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
    """What stands before and after the part that differs between the prompts of `rows`, to build the prompt of a new question.

    Both are empty if several parts differ: the user writes the whole prompt. None: there are no prompts, text is continued.
    """
    if kind == "plain_text":
        return None
    if kind in ("classification", "fields"):
        template = hints.prompt or ("text" if kind == "classification" else "prompt")
        marked: dict[str, str] = dict.fromkeys(template_fields(template) or [template], MARK)
    elif kind == "cloze" or (kind != "instruction" and same_instruction(rows, hints)):
        marked = {"input": MARK}
    else:
        hints, marked = replace(hints, question=""), {"instruction": MARK, "input": ""}
    before, _, after = TEMPLATES[kind]({**rows[0], **marked}, hints).prompt.partition(MARK)
    return ("", "") if MARK in after else (before, after)


def same_instruction(rows: Sequence[Row], hints: Hints) -> bool:
    """Whether all `rows` have an input, and the same instruction."""
    instructions = {hints.question or row["instruction"] for row in rows}
    return len(instructions) == 1 and all(row.get("input") for row in rows)


def kind_of(row: Row) -> str:
    """The template for a row of unknown origin, by its fields.

    Raises:
        BadData: no template fits them.
    """
    names = set(row)
    for kind, needed_names in (
        ("multiple_choice", {"instruction", "choices", "gold"}),
        ("instruction", {"instruction", "output"}),
        ("fields", {"prompt", "response"}),
        ("classification", {"text", "label"}),
        ("plain_text", {"text"}),
    ):
        if needed_names <= names:
            return kind
    raise BadData(
        f"its fields are {listed(sorted(names), 2)}, but known are only instruction and output, prompt and response, text and"
        ' label, or text; name them: { name = "…", prompt = "field", response = "field" }'
    )


def rows_with_label_names(table: Iterable[Row], label: str | None = None) -> list[dict[str, Any]]:
    """All rows of `table`; if it is a `datasets.Dataset` with named classes, each with the `label_name` of its class id."""
    field, features = label or "label", getattr(table, "features", None) or {}  # any other iterable has no features
    names = getattr(features.get(field), "names", None)  # only a ClassLabel has names
    if names is None:
        return [dict(row) for row in table]
    return [{"label_name": names[row[field]], **row} if names_a_class(row[field]) else {**row, field: None} for row in table]


def names_a_class(number: int | None) -> bool:
    """Whether `number` is the id of a class; sets with secret test labels have -1 or None there."""
    return number is not None and number >= 0


def names_of(rows: Iterable[Row], kind: str, label: str | None = None) -> tuple[str, ...]:
    """The names of classes, domains or closed answers in `rows` that the template of `kind` needs (`Hints.names`)."""
    if kind == "classification":
        return class_names(rows, label or "label")
    field = {"closed": "output", "plain_text": "domain", "fields": label}.get(kind)
    return tuple(sorted({str(row[field]).strip() for row in rows if field in row})) if field else ()


def class_names(rows: Iterable[Row], label: str) -> tuple[str, ...]:
    """Readable names in the order of the class ids, which count from 0; the name of a class without `label_name` is its id."""
    names = {row[label]: readable(str(row.get("label_name", row[label]))) for row in rows if row.get(label) is not None}
    return tuple(names[number] for number in sorted(names))


def readable(name: str) -> str:
    """A class name in plain words: `card_arrival` becomes card arrival."""
    return TREC.get(name, name.replace("_", " ").strip())


def gold_index(row: Row) -> int:
    """The index of the right choice.

    Raises:
        BadData: the row has no such choice (sets with secret answers have -1 there).
    """
    gold, number = int(field_value(row, "gold")), len(field_value(row, "choices"))
    if not 0 <= gold < number:
        raise BadData(f"its gold is {gold}, but it has {number} choices; give an index from 0 to {number - 1} or remove the row")
    return gold


def instruction_prompt(row: Row, hints: Hints) -> str:
    """Instruction, input and `Answer:`, each on its own line."""
    parts = (hints.question or field_text(row, "instruction"), str(row.get("input") or ""), "Answer:\n")
    return "\n".join(part for part in parts if part)


def fill_template(row: Row, template: str) -> str:
    """`template` with its {field}s filled in; if it has none, it is the name of a field, whose text is given."""
    names = template_fields(template)
    return template.format_map({name: field_text(row, name) for name in names}) if names else field_text(row, template)


def template_fields(template: str) -> list[str]:
    """The names of the {field}s in `template`."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def field_text(row: Row, field: str) -> str:
    """A field as text.

    Raises:
        BadData: it is missing or blank.
    """
    text = str(field_value(row, field))
    if not text.strip():
        raise BadData(f"its field {field} is empty; fill it in or remove the row")
    return text


def field_value(row: Row, field: str) -> Any:
    """A field of any type.

    Raises:
        BadData: it is missing or None.
    """
    if row.get(field) is None:
        raise BadData(f"it has no field {field}, only {listed(row, 5)}; add it or name another field")
    return row[field]
