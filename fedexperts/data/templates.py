"""From a row of a data set to an Example: the prompt, the response and the metric of each kind of task.

Prompts are short, since small models see few tokens. In "plain-1" they end in a line break, where tokenizers do not join two
words; in "plain-2" answers follow in the same line (benchmarks/frames.py compares them).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedexperts.data.conversations import PLAIN_CHAT, conversation_field, turns_of
from fedexperts.data.fields import Row, field_text, field_value, fill_template, is_missing, template_fields
from fedexperts.data.settings import PLAIN, PLAIN_2, PLAINS
from fedexperts.errors import BadData, listed
from fedexperts.types import Example, Turn

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
    messages: str | None = None  # the field of the conversation
    system: str | None = None  # the system message of rows without one of their own
    template: str = PLAIN  # of prompts: "plain-1", "plain-2", "chat" or Jinja

    @property
    def plain(self) -> bool:
        """Whether prompts are asked in a plain frame."""
        return self.template in PLAINS

    @property
    def end(self) -> str:
        """What a plain prompt ends with; a chat template has its own marks."""
        return {PLAIN: "\nAnswer:\n", PLAIN_2: "\nAnswer:"}.get(self.template, "")


Template = Callable[[Row, Hints], Example]
Frame = tuple[str, str]
"""What every prompt of a task begins and ends with."""

MARK = "\x00"
"""Stands in a prompt for the part that differs between rows."""


def classification(row: Row, hints: Hints) -> Example:
    """The text of a row; the response is the readable name of its class id, `label`."""
    field = hints.label or "label"
    field_text(row, field)  # refuses what is no class
    label = row[field]
    question = f"{hints.question}\n" if hints.question else ""
    text = fill_template(row, hints.prompt or "text")
    return Example(
        prompt=f"{question}{text}{hints.end}",
        response=hints.names[label],
        task=hints.task,
        metric=hints.metric or "accuracy",
        label=label,
        choices=hints.names,
        input=text,
    )


def closed(row: Row, hints: Hints) -> Example:
    """An instruction with a closed set of answers, which are the labels."""
    answer = field_text(row, "output").strip()
    label = hints.names.index(answer)
    prompt, metric = instruction_prompt(row, hints), hints.metric or "accuracy"
    return Example(prompt, answer, hints.task, metric, label, hints.names, input=input_text(row))


def multiple_choice(row: Row, hints: Hints) -> Example:
    """The options stand in the input; the answer is a letter. Letters are no labels, since they do not describe the content."""
    letters = tuple(LETTERS[: len(field_value(row, "choices"))])
    letter = letters[gold_index(row)]
    prompt, metric = instruction_prompt(row, hints), hints.metric or "accuracy"
    return Example(prompt, letter, hints.task, metric, choices=letters, input=input_text(row))


def cloze(row: Row, hints: Hints) -> Example:
    """The question without the options below it; the answer is the text of an option, not its letter.

    The better format for small models, which seldom know what a letter stands for (OLMES, https://arxiv.org/abs/2406.08446).
    """
    choices = tuple(str(choice).strip() for choice in field_value(row, "choices"))
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, field_value(row, "choices"), strict=False))
    prompt = f"{field_text(row, 'input').removesuffix(options)}{hints.end}"
    return Example(prompt, choices[gold_index(row)], hints.task, hints.metric or "likelihood", choices=choices)


def short_answer(row: Row, hints: Hints) -> Example:
    """A question whose answer is a phrase, mostly from the input."""
    return _answered(row, instruction_prompt(row, hints), hints, "token_f1")


def summary(row: Row, hints: Hints) -> Example:
    """A long text to summarize."""
    return _answered(row, instruction_prompt(row, hints), hints, "rouge2")


def instruction(row: Row, hints: Hints) -> Example:
    """Any instruction; a plain prompt is in the format of Alpaca."""
    texts = {"instruction": field_text(row, "instruction"), "input": row.get("input") or ""}
    template = ALPACA_WITH_INPUT if texts["input"] else ALPACA
    prompt = template.format(**texts) if hints.plain else "\n\n".join(filter(None, map(str, texts.values())))
    return _answered(row, prompt, hints, "rougeL")


def _answered(row: Row, prompt: str, hints: Hints, metric: str) -> Example:
    """The example whose response is the output of `row`."""
    return Example(prompt, field_text(row, "output"), hints.task, hints.metric or metric, input=input_text(row))


def exact(row: Row, hints: Hints) -> Example:
    """A question with one right answer; that of a word problem ends in `#### 72`. GSM8K's `<<…>>` calculations are removed."""
    answer = re.sub(r"<<.*?>>", "", field_text(row, "output"))
    return Example(instruction_prompt(row, hints), answer, hints.task, hints.metric or "exact_match", input=input_text(row))


def plain_text(row: Row, hints: Hints) -> Example:
    """Text to continue, without a prompt; its domain is its label."""
    label = hints.names.index(field_text(row, "domain").strip()) if hints.names else None
    return Example("", fill_template(row, hints.response or "text"), hints.task, hints.metric or "perplexity", label)


def fields(row: Row, hints: Hints) -> Example:
    """Prompt and response from the fields, or texts with {field}s, that the user named."""
    label = hints.names.index(field_text(row, hints.label).strip()) if hints.label else None
    prompt, response = fill_template(row, hints.prompt or "prompt"), fill_template(row, hints.response or "response")
    parts = template_fields(hints.prompt or "") or [hints.prompt or "prompt"]
    about = "\n".join(field_text(row, part) for part in parts)
    return Example(prompt, response, hints.task, hints.metric or "rougeL", label, input=about)


def conversation(row: Row, hints: Hints) -> Example:
    """The conversation before the last answer, and this answer; what follows it is left out. Its prompt is the text before."""
    *turns, last = turns_of(row, hints.messages or conversation_field(row), hints.system)
    prompt = "\n".join(turn.content for turn in turns)
    return Example(prompt, last.content, hints.task, hints.metric or "rougeL", turns=tuple(turns), input=turns[-1].content)


def asked(example: Example, hints: Hints) -> Example:
    """`example` as the template of `hints` asks it: as turns, unless it is a plain prompt or a text without one."""
    jinja = PLAIN_CHAT if hints.plain else {"chat": None}.get(hints.template, hints.template)
    if example.turns:
        return replace(example, template=jinja)
    if not example.prompt:
        return example
    if hints.plain:
        example = in_the_line(example) if hints.template == PLAIN_2 and example.prompt.endswith(hints.end) else example
        return replace(example, prompt=f"{hints.system}\n\n{example.prompt}") if hints.system else example
    system = [Turn("system", hints.system)] if hints.system else []
    return replace(example, turns=(*system, Turn("user", example.prompt)), template=jinja)


def in_the_line(example: Example) -> Example:
    """`example` with its answer in the line of the prompt's end, after a space, which tokenizers join with the word after it."""
    return replace(example, response=f" {example.response}", choices=tuple(f" {choice}" for choice in example.choices))


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
    "conversation": conversation,
}
FORMATS: Mapping[str, str] = {
    "messages": "conversation",
    "conversations": "conversation",
    "alpaca": "instruction",
    "prompt_response": "fields",
    "text_label": "classification",
    "text": "plain_text",
}
"""Names of formats in settings → their templates."""


NEEDED: Sequence[tuple[str, set[str]]] = (
    ("multiple_choice", {"instruction", "choices", "gold"}),
    ("instruction", {"instruction", "output"}),
    ("fields", {"prompt", "response"}),
    ("classification", {"text", "label"}),
    ("plain_text", {"text"}),
    ("conversation", {"messages"}),
    ("conversation", {"conversations"}),
)
"""Template → the fields by which its rows are known, those with more of them first."""


def frame(rows: Sequence[Row], kind: str, hints: Hints) -> Frame | None:
    """What stands before and after the part that differs between the prompts of `rows`, to build the prompt of a new question.

    Both are empty if several parts differ: the user writes the whole prompt. None: there are no prompts, text is continued.
    """
    if kind == "plain_text":
        return None
    if kind == "conversation":
        return "", ""
    if kind in ("classification", "fields"):
        template = hints.prompt or ("text" if kind == "classification" else "prompt")
        marked: dict[str, str] = dict.fromkeys(template_fields(template) or [template], MARK)
    elif kind == "cloze" or (kind != "instruction" and same_instruction(rows, hints)):
        marked = {"input": MARK}
    else:
        hints, marked = replace(hints, question=""), {"instruction": MARK, "input": ""}
    before, _, after = asked(TEMPLATES[kind]({**rows[0], **marked}, hints), hints).prompt.partition(MARK)
    return ("", "") if MARK in after else (before, after)


def same_instruction(rows: Sequence[Row], hints: Hints) -> bool:
    """Whether all `rows` have an input, and the same instruction."""
    instructions = {hints.question or row["instruction"] for row in rows}
    return len(instructions) == 1 and all(row.get("input") for row in rows)


def kind_of(row: Row) -> str:
    """The template for a row of unknown origin, by its fields.

    Raises:
        BadData: no template fits them, or a conversation and another one.
    """
    names = set(row)
    kinds = [kind for kind, needed_names in NEEDED if needed_names <= names]
    others = [kind for kind in kinds if kind != "conversation"]
    if kinds.count("conversation") + bool(others) > 1:
        formats = listed(sorted(name for name in FORMATS if FORMATS[name] in kinds))
        raise BadData(
            f"its fields {listed(sorted(names), 3)} fit several formats; say which one to read with format = …, one of {formats}"
        )
    if kinds:
        return kinds[0]
    raise BadData(
        f"its fields are {listed(sorted(names), 2)}, but known are only messages, conversations, instruction and output, prompt"
        ' and response, text and label, or text; name them: { name = "…", prompt = "field", response = "field" }'
    )


def rows_with_label_names(table: Iterable[Row], label: str | None = None) -> list[dict[str, Any]]:
    """All rows of `table`; if it is a `datasets.Dataset` with named classes, each with the `label_name` of its class id."""
    field, features = label or "label", getattr(table, "features", None) or {}  # any other iterable has no features
    names = getattr(features.get(field), "names", None)  # only a ClassLabel has names
    if names is None:
        return [dict(row) for row in table]

    def named(row: Row) -> dict[str, Any]:
        name = ClassName(names[row[field]])
        return {"label_name": name, **row} if field == "label" else {**row, "label_name": name}

    return [named(row) if names_a_class(row[field]) else {**row, field: None} for row in table]


def names_a_class(number: int | None) -> bool:
    """Whether `number` is the id of a class; sets with secret test labels have -1 or None there."""
    return number is not None and number >= 0


def names_of(rows: Sequence[Row], kind: str, label: str | None = None) -> tuple[str, ...]:
    """The names of classes, domains or closed answers in `rows` that the template of `kind` needs (`Hints.names`)."""
    if kind == "classification":
        return class_names(rows, label or "label")
    field = {"closed": "output", "plain_text": "domain", "fields": label}.get(kind)
    return tuple(sorted({str(row[field]).strip() for row in rows if class_of(row.get(field)) is not None})) if field else ()


class ClassName(str):
    """The name of a row's class, from the features of its table: no column that happens to be called `label_name`."""


def class_of(value: object) -> int | str | None:
    """The class that a field says; None if it is empty, or holds what is no class."""
    if is_missing(value) or isinstance(value, list | dict | bytes) or not str(value).strip():
        return None
    return value if isinstance(value, int) else str(value)


def class_ids(rows: Iterable[Row], label: str) -> dict[int | str, int]:
    """Class → its id; ids count from 0, in the order of the classes' numbers or names."""
    classes = {value for row in rows if (value := class_of(row.get(label))) is not None}
    return {value: id for id, value in enumerate(sorted(classes, key=lambda value: (isinstance(value, str), value)))}


def class_names(rows: Sequence[Row], label: str) -> tuple[str, ...]:
    """Readable names in the order of the class ids; the name of a class without `label_name` is the class."""
    names: dict[int | str | None, str] = {}
    for row in rows:
        name = row.get("label_name") if label == "label" else None
        name = row["label_name"] if isinstance(row.get("label_name"), ClassName) else name
        names[class_of(row.get(label))] = readable(str(row[label] if is_missing(name) else name)) if label in row else ""
    return tuple(names[value] for value in class_ids(rows, label))


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


def input_text(row: Row) -> str:
    """What an instruction is about: its input, or the instruction itself where it has none."""
    return str(row.get("input") or row.get("instruction") or "")


def instruction_prompt(row: Row, hints: Hints) -> str:
    """Instruction, input and, in a plain prompt, `Answer:`, each on its own line."""
    parts = (hints.question or field_text(row, "instruction"), str(row.get("input") or ""))
    return "\n".join(part for part in parts if part) + hints.end
