"""Where examples come from: sets of the data pack, the user's files, the hub, and generated tasks."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from fedexperts.data import synthetic
from fedexperts.data.conversations import FIELDS
from fedexperts.data.fields import Row
from fedexperts.data.pack import ALIASES, PACKS, PARTS, Part, data_folder
from fedexperts.data.readers import KINDS, LocatedRow, at_location, digest_of, format_of, hash_of, read
from fedexperts.data.settings import PLAIN, DataSettings, SourceSettings, with_templates
from fedexperts.data.templates import (
    FORMATS,
    TEMPLATES,
    Frame,
    Hints,
    asked,
    class_ids,
    class_of,
    frame,
    kind_of,
    names_of,
    rows_with_label_names,
)
from fedexperts.errors import BadData, BadValue, listed, nearest, quoted, shortened
from fedexperts.types import Example

HUB, GENERATED = "hub:", "synthetic/"
TEST_SHARE = 0.1  # of the rows of a file or set that has no test split
MOST_GENERATED = 100_000
GENERATED_TRAIN, GENERATED_TEST = 1000, 200  # examples of a generated task, where no limit is set


@dataclass(frozen=True)
class Source:
    """Examples to divide among clients and to test them with, and the sha256 of what they were read from."""

    name: str
    train: list[Example]
    test: list[Example]
    hash: str
    frames: Mapping[str, Frame | None] = field(default_factory=dict)  # task → what its prompts begin and end with


def load(source: SourceSettings, settings: DataSettings) -> Source:
    """The examples of one source; if it has a limit, the same random sample for any seed of the run.

    Raises:
        BadValue: an unknown name.
        BadData: files that do not exist, are empty or cannot be read, with the line.
    """
    limit = source.limit or settings.limit
    source = with_templates([source], settings.template)[0]
    if source.name.startswith(GENERATED):
        return _generated(source, limit)
    loaded = _loader(source.name)(source)
    return replace(loaded, train=sample_examples(loaded.train, limit, source.name))


def sample_examples(examples: list[Example], limit: int | None, name: str) -> list[Example]:
    """A random sample of `limit` examples of the source `name`, always the same, in their order; all if there are no more."""
    if limit is None or len(examples) <= limit:
        return examples
    return [examples[index] for index in sorted(Random(f"limit/{name}").sample(range(len(examples)), limit))]


def examples_from(source: SourceSettings, train: list[LocatedRow], test: list[LocatedRow]) -> Source:
    """Examples of rows in memory, as a file with these rows would give them; the task is `source.task`, or else `source.name`."""
    return _custom(source, source.name, train[0], train, test, digest_of([row.row for row in train + test]))


def _loader(name: str) -> Callable[[SourceSettings], Source]:
    if name.startswith(HUB):
        return _from_hub
    if format_of(name):
        return _from_file
    if ALIASES.get(name, name).partition("/")[0] in PACKS:
        return _from_pack
    names = [*PACKS, *ALIASES]
    raise BadValue(
        f"source {name!r} is no set of the data pack ({listed(names, 3)}), {KINDS} file, synthetic/<task> or"
        f" hub:<set>; give one of these{nearest(name, names)}"
    )


def _generated(source: SourceSettings, limit: int | None) -> Source:
    task = source.name.removeprefix(GENERATED)
    if limit is not None and limit > MOST_GENERATED:
        raise BadData(
            f"a limit of {quoted(limit)} examples of {source.name} is too many to generate; give at most {MOST_GENERATED:,}"
        )
    generated = (
        synthetic.examples(task, limit or GENERATED_TRAIN, "train", "train"),
        synthetic.examples(task, GENERATED_TEST, "test", "test"),
    )
    train, test = (
        [replace(example, task=source.task or example.task, metric=source.metric or example.metric) for example in examples]
        for examples in generated
    )
    hints, hash = _asking(source), digest_of(train + test)
    separator = synthetic.SEPARATOR if hints.plain else ""

    def asks(example: Example) -> Example:
        return asked(replace(example, prompt=example.prompt.removesuffix(synthetic.SEPARATOR) + separator), hints)

    train, test = (list(map(asks, part)) for part in (train, test))
    before = synthetic.format_prompt(task.capitalize(), "").removesuffix(synthetic.SEPARATOR)
    before = f"{hints.system}\n\n{before}" if hints.system and hints.plain else before
    return Source(source.name, train, test, hash, {source.task or task: (before, separator)})


def _from_pack(source: SourceSettings) -> Source:
    head, _, part = ALIASES.get(source.name, source.name).partition("/")
    pack, folder = PACKS[head], data_folder()
    train_files = [folder / f"{stem}.train.jsonl.gz" for stem in pack.train]
    test_file = folder / f"{pack.test or pack.train[0]}.test.jsonl.gz"
    train, test = [row for path in train_files for row in read(path)], read(test_file)
    hash = hash_of([*train_files, test_file])
    asking = _asking(source)
    if not pack.many_tasks:
        hints = replace(asking, task=source.task or source.name, metric=source.metric, question=pack.question)
        return _source(source.name, train, test, pack.kind, hints, hash)

    frames: dict[str, Frame | None] = {}
    all_train: list[Example] = []
    all_test: list[Example] = []
    tasks = _tasks(train, part, source.name)
    for task in tasks:
        template = PARTS.get(f"{head}/{task}", Part(pack.kind))
        name = source.task or (source.name if part and len(tasks) == 1 else f"{head}/{task}")
        hints = replace(asking, task=name, metric=source.metric or template.metric, question=template.question)
        train_rows, test_rows = ([row for row in rows if row.row["task"] == task] for rows in (train, test))
        one_task = _source(source.name, train_rows, test_rows, template.kind, hints, hash)
        all_train += one_task.train
        all_test += one_task.test
        frames |= one_task.frames
    return Source(source.name, all_train, all_test, hash, frames)


def _tasks(rows: Iterable[LocatedRow], part: str, name: str) -> list[str]:
    """The tasks that `part`, the end of a source's name, selects: all, one, or those whose names start with it (`task002`)."""
    tasks = sorted({str(row.row["task"]) for row in rows})
    selected = [task for task in tasks if not part or task == part or task.startswith(f"{part}_")]
    exact = [task for task in selected if task == part]
    if not selected:
        raise BadValue(f"source {name!r} has no task {part!r}, only {listed(tasks, 4)}{nearest(part, tasks)}")
    return exact or selected


def _from_file(source: SourceSettings) -> Source:
    path = source.path(source.name)
    beside = path.with_name(path.name.replace(".train.", ".test."))
    test_path = source.path(source.test) if source.test else beside if beside != path and beside.exists() else None
    rows = read(path)
    train, test = (rows, read(test_path)) if test_path else _split(rows, source.name)
    if test_path:
        require_known_classes(source, train, test)
    hash = hash_of([path, *([test_path] if test_path else [])])
    return _custom(source, path.name.split(".")[0], rows[0], train, test, hash)


def _from_hub(source: SourceSettings) -> Source:
    name = source.name.removeprefix(HUB)
    splits = _hub_splits(name, source.config)
    for split in filter(None, (source.split, source.test_split)):
        if split not in splits:
            raise BadData(f"{name} has no split {split}, only {listed(splits)}{nearest(split, splits)}")
    test_split = source.test_split or next(
        (split for split in ("test", "validation") if split in splits and split != source.split), None
    )
    rows = _hub_rows(splits[source.split], f"{name}, {source.split} row", source.label)
    if not rows:
        raise BadData(f"{name}, {source.split} row 1: the split is empty; name another")
    test_rows = _hub_rows(splits[test_split], f"{name}, {test_split} row", source.label) if test_split else None
    train, test = (rows, test_rows) if test_rows else _split(rows, source.name)
    if test_rows:
        require_known_classes(source, train, test)
    return _custom(source, name.rpartition("/")[2], rows[0], train, test, digest_of([row.row for row in train + test]))


def _hub_splits(name: str, config: str | None) -> Mapping[str, Any]:
    import datasets  # heavy, and only needed here

    try:
        splits: Mapping[str, Any] = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = shortened(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise BadData(f"{name} cannot be loaded from the hub ({reason}); check its name, or give a local file") from error
    return splits


def _hub_rows(table: Any, location: str, label: str | None) -> list[LocatedRow]:
    """The rows of a `datasets.Dataset`."""
    return [LocatedRow(row, f"{location} {number}") for number, row in enumerate(rows_with_label_names(table, label), 1)]


def _custom(
    source: SourceSettings, task: str, first: LocatedRow, train: list[LocatedRow], test: list[LocatedRow], hash: str
) -> Source:
    """Examples of rows by the fields that the user named, or else by those of the first row."""
    kind = at_location(first, lambda row: _kind(row, source))
    hints = replace(
        _asking(source),
        task=source.task or task,
        metric=source.metric,
        prompt=source.prompt,
        response=source.response,
        label=source.label,
        messages=source.messages or (source.format if source.format in FIELDS else None),
    )
    return _source(source.name, train, test, kind, hints, hash)


def _asking(source: SourceSettings) -> Hints:
    """The hints of a source about how it is asked."""
    return Hints("", system=source.system, template=source.template or PLAIN)


def _kind(row: Row, source: SourceSettings) -> str:
    """The template for rows like `row`, by the fields that the user named or else by its own."""
    if source.messages is not None:
        return "conversation"
    if source.format is not None:
        return FORMATS[source.format]
    if source.label is not None and source.response is None:
        return "classification"
    if source.prompt is not None or (source.response is not None and "prompt" in row):
        return "fields"
    return "plain_text" if source.response is not None else kind_of(row)


def _source(name: str, train: list[LocatedRow], test: list[LocatedRow], kind: str, hints: Hints, hash: str) -> Source:
    """Both splits of one task through the template of `kind`, with the names of the labels of both."""
    label, rows = hints.label or "label", [row.row for row in train + test]
    hints = replace(hints, names=names_of(rows, kind, hints.label))
    if kind == "classification":
        ids = class_ids(rows, label)
        train, test = ([_numbered(row, label, ids) for row in part] for part in (train, test))
    template = TEMPLATES[kind]
    examples = [[at_location(row, lambda row: asked(template(row, hints), hints)) for row in rows] for rows in (train, test)]
    task_frame = frame([row.row for row in train or test], kind, hints)
    return Source(name, examples[0], examples[1], hash, {hints.task: task_frame})


def _numbered(row: LocatedRow, label: str, ids: Mapping[int | str, int]) -> LocatedRow:
    """The row with the id of its class; without a class it is unchanged, and its template refuses it, with the line."""
    name = class_of(row.row.get(label))
    return row if name is None else LocatedRow({**row.row, label: ids[name]}, row.location)


def require_known_classes(source: SourceSettings, train: list[LocatedRow], test: list[LocatedRow]) -> None:
    """Raises BadData for a test row whose class no training row has, such as the -1 of a test set whose classes are hidden."""
    if at_location(train[0], lambda row: _kind(row, source)) != "classification":
        return
    label = source.label or "label"
    known = class_ids([row.row for row in train], label)
    for row in test:
        name = class_of(row.row.get(label))
        if name is not None and name not in known:
            raise BadData(
                f"{row.location}: its {label} is {str(name)[:40]!r}, which no training row has (they have {listed(known, 3)}); "
                "correct it, or name another test split"
            )


def _split(rows: list[LocatedRow], name: str) -> tuple[list[LocatedRow], list[LocatedRow]]:
    """`rows` without a random tenth, at least one row, and this tenth for testing; always the same for a source's name."""
    order = list(range(len(rows)))
    Random(f"split/{name}").shuffle(order)
    test = set(order[: max(1, round(TEST_SHARE * len(rows)))]) if len(rows) > 1 else set()
    return [row for index, row in enumerate(rows) if index not in test], [row for index, row in enumerate(rows) if index in test]
