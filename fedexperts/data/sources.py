"""Where examples come from: the data pack, files of one's own, the hub, and generated tasks."""

import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet

from fedexperts.data import synthetic
from fedexperts.data.settings import DataSettings, SourceSettings
from fedexperts.data.templates import TEMPLATES, Frame, Hints, Row, frame, kind_of, names_of, rows_of
from fedexperts.errors import BadData, BadValue, nearest
from fedexperts.types import Example

T = TypeVar("T")
HUB, GENERATED = "hub:", "synthetic/"
TEST_SHARE = 0.1  # of the rows of a file or set that has no test split
GENERATED_TRAIN, GENERATED_TEST = 1000, 200  # examples of a generated task, where no limit is set


@dataclass(frozen=True)
class Source:
    """Examples to divide among clients and to test them with, and the sha256 of what they were read from."""

    name: str
    train: list[Example]
    test: list[Example]
    hash: str
    frames: Mapping[str, Frame | None] = field(default_factory=dict)  # task → what its prompts begin and end with


@dataclass(frozen=True)
class Pack:
    """A set in the data pack: `<stem>.train.jsonl.gz` and `<stem>.test.jsonl.gz`."""

    train: tuple[str, ...]
    kind: str
    question: str = ""
    test: str = ""  # the stem of the test file, where it is another
    many_tasks: bool = False  # its rows name their tasks


PACKS: Mapping[str, Pack] = {
    "ag_news": Pack(("restricted/ag_news",), "classification", "What is this news about?"),
    "banking77": Pack(("classify/banking77",), "classification", "What does this customer of a bank want?"),
    "dbpedia14": Pack(("classify/dbpedia14",), "classification", "What kind of thing is this?"),
    "trec6": Pack(("restricted/trec6",), "classification", "What does this question ask for?"),
    "dolly": Pack(("instruct/dolly15k",), "instruction", many_tasks=True),
    "medquad": Pack(("instruct/medquad",), "instruction", many_tasks=True),
    "superni": Pack(("instruct/superni",), "instruction", many_tasks=True),
    "commonsenseqa": Pack(("reasoning/commonsenseqa",), "multiple_choice"),
    "mmlu": Pack(("reasoning/mmlu",), "multiple_choice", many_tasks=True),
    "piqa": Pack(("reasoning/piqa",), "multiple_choice"),
    "commonsenseqa_cloze": Pack(("reasoning/commonsenseqa",), "cloze"),
    "mmlu_cloze": Pack(("reasoning/mmlu",), "cloze", many_tasks=True),
    "piqa_cloze": Pack(("reasoning/piqa",), "cloze"),
    "gsm8k": Pack(("reasoning/gsm8k",), "exact"),
    "mbpp": Pack(("reasoning/mbpp",), "instruction"),
    "gpteacher_code": Pack(("reasoning/gpteacher_code",), "instruction"),
    "books2": Pack(("text/books2a", "text/books2b"), "plain_text", test="text/books2"),
    **{
        stem: Pack((f"text/{stem}",), "plain_text")
        for stem in ("classic_books", "dialogue", "encyclopedic", "openstax", "state_union", "stories", "tinyshakespeare")
    },
    "wikitext2": Pack(("text/wikitext2_valid",), "plain_text"),
}
ALIASES: Mapping[str, str] = {
    "quoref": "superni/task002_quoref_answer_generation",
    "xsum": "superni/task1290_xsum_summarization",
}


@dataclass(frozen=True)
class Part:
    """A task, in a pack of many, that is not of the pack's kind."""

    kind: str
    question: str = ""  # shorter words for a long instruction, so that more of the text fits
    metric: str | None = None


PARTS: Mapping[str, Part] = {
    "dolly/closed_qa": Part("instruction", metric="token_f1"),
    "superni/task002_quoref_answer_generation": Part("short_answer", "Answer with a phrase from the passage."),
    "superni/task064_all_elements_except_first_i": Part("exact"),
    "superni/task073_commonsenseqa_answer_generation": Part("closed"),
    "superni/task181_outcome_extraction": Part("short_answer"),
    "superni/task346_hybridqa_classification": Part("closed"),
    "superni/task363_sst2_polarity_classification": Part("closed"),
    "superni/task511_reddit_tifu_long_text_summarization": Part("summary"),
    "superni/task875_emotion_classification": Part("closed"),
    "superni/task1290_xsum_summarization": Part("summary", "Summarize the article in a sentence."),
    "superni/task1510_evalution_relation_extraction": Part("short_answer"),
}


@dataclass(frozen=True)
class Placed:
    """A row and where it stands, for error messages."""

    row: Row
    place: str


def load(source: SourceSettings, settings: DataSettings) -> Source:
    """The examples of one source; its limit is drawn at random, the same whatever the run's seed.

    Raises:
        BadValue: a name we do not know.
        BadData: files that are not there, are empty or cannot be read, with the line.
    """
    limit = source.limit or settings.limit
    if source.name.startswith(GENERATED):
        return _generated(source, limit)
    return _limited(_loader(source.name)(source), limit)


def data_folder() -> Path:
    """The folder of the data pack: FEDEXPERTS_DATA, or else shared/data beside the working directory or the repository.

    Raises:
        BadData: there is none.
    """
    told = os.environ.get("FEDEXPERTS_DATA")
    repository = Path(__file__).resolve().parents[2]
    candidates = [Path(told)] if told else [Path("../shared/data"), repository.parent / "shared" / "data"]
    found = next((folder for folder in candidates if folder.is_dir()), None)
    if found is None:
        raise BadData(f"the data pack is not at {candidates[0]}; set FEDEXPERTS_DATA to its folder")
    return found


def _loader(name: str) -> Callable[[SourceSettings], Source]:
    if name.startswith(HUB):
        return _from_hub
    if format_of(name):
        return _from_file
    if ALIASES.get(name, name).partition("/")[0] in PACKS:
        return _from_pack
    known = [*PACKS, *ALIASES]
    raise BadValue(
        f"source {name!r} is not one of {', '.join(known)}, a .jsonl, .csv or .parquet file, synthetic/<task> or hub:<set>"
        f"{nearest(name, known)}"
    )


def _generated(source: SourceSettings, limit: int | None) -> Source:
    task = source.name.removeprefix(GENERATED)
    made = (
        synthetic.examples(task, limit or GENERATED_TRAIN, "train", "train"),
        synthetic.examples(task, GENERATED_TEST, "test", "test"),
    )
    train, test = (
        [replace(example, task=source.task or example.task, metric=source.metric or example.metric) for example in side]
        for side in made
    )
    before = synthetic.ask(task.capitalize(), "").removesuffix(synthetic.SEPARATOR)
    return Source(source.name, train, test, digest_of(train + test), {source.task or task: (before, synthetic.SEPARATOR)})


def _from_pack(source: SourceSettings) -> Source:
    head, _, part = ALIASES.get(source.name, source.name).partition("/")
    pack, folder = PACKS[head], data_folder()
    train_files = [folder / f"{stem}.train.jsonl.gz" for stem in pack.train]
    test_file = folder / f"{pack.test or pack.train[0]}.test.jsonl.gz"
    train, test = [placed for path in train_files for placed in read(path)], read(test_file)
    hash = hash_of([*train_files, test_file])
    if not pack.many_tasks:
        hints = Hints(source.task or source.name, source.metric, pack.question)
        return _source(source.name, train, test, pack.kind, hints, hash)

    frames: dict[str, Frame | None] = {}
    sides: tuple[list[Example], list[Example]] = ([], [])
    tasks = _tasks(train, part, source.name)
    for task in tasks:
        own = PARTS.get(f"{head}/{task}", Part(pack.kind))
        name = source.task or (source.name if part and len(tasks) == 1 else f"{head}/{task}")
        hints = Hints(name, source.metric or own.metric, own.question)
        rows = [[placed for placed in side if placed.row["task"] == task] for side in (train, test)]
        one = _source(source.name, rows[0], rows[1], own.kind, hints, hash)
        for side, examples in zip(sides, (one.train, one.test), strict=True):
            side += examples
        frames |= one.frames
    return Source(source.name, *sides, hash, frames)


def _tasks(rows: Iterable[Placed], part: str, name: str) -> list[str]:
    """The tasks that `part` of a source's name means: all, one, or one by the start of its name (`task002`)."""
    tasks = sorted({str(placed.row["task"]) for placed in rows})
    chosen = [task for task in tasks if not part or task == part or task.startswith(f"{part}_")]
    exact = [task for task in chosen if task == part]
    if not chosen:
        raise BadValue(f"source {name!r} has no task {part!r}, only {', '.join(tasks)}{nearest(part, tasks)}")
    return exact or chosen


def _from_file(source: SourceSettings) -> Source:
    path = Path(source.name)
    beside = path.with_name(path.name.replace(".train.", ".test."))
    test = Path(source.test) if source.test else beside if beside != path and beside.exists() else None
    rows = read(path)
    train_rows, test_rows = (rows, read(test)) if test else split(rows, source.name)
    return _custom(source, path.name.split(".")[0], rows[0], train_rows, test_rows, hash_of([path, *([test] if test else [])]))


def _from_hub(source: SourceSettings) -> Source:
    name = source.name.removeprefix(HUB)
    sets = _hub_sets(name, source.config)
    for wanted in filter(None, (source.split, source.test_split)):
        if wanted not in sets:
            raise BadData(f"{name} has no split {wanted}, only {', '.join(sets)}{nearest(wanted, sets)}")
    test_split = source.test_split or next(
        (held for held in ("test", "validation") if held in sets and held != source.split), None
    )
    rows = _hub_rows(sets[source.split], f"{name}, {source.split} row", source.label)
    if not rows:
        raise BadData(f"{name}, {source.split} row 1: the split is empty; name another")
    held = _hub_rows(sets[test_split], f"{name}, {test_split} row", source.label) if test_split else None
    train, test = (rows, held) if held else split(rows, source.name)
    return _custom(source, name.rpartition("/")[2], rows[0], train, test, digest_of([placed.row for placed in train + test]))


def _hub_sets(name: str, config: str | None) -> Mapping[str, Any]:
    import datasets  # heavy, and only needed here

    try:
        sets: Mapping[str, Any] = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadData(f"{name} cannot be loaded from the hub ({reason}); check its name, or give a local file") from error
    return sets


def _hub_rows(table: Any, place: str, label: str | None) -> list[Placed]:
    """Rows of a `datasets.Dataset`, each with its place."""
    return [Placed(row, f"{place} {number}") for number, row in enumerate(rows_of(table, label), 1)]


def examples_from(source: SourceSettings, train: list[Placed], test: list[Placed]) -> Source:
    """Examples of rows that are already here, as a file with these rows would give them; `source.name` is their task's name."""
    return _custom(source, source.name, train[0], train, test, digest_of([placed.row for placed in train + test]))


def _custom(source: SourceSettings, task: str, first: Placed, train: list[Placed], test: list[Placed], hash: str) -> Source:
    """Examples of rows whose fields the user named, or whose fields we recognise from the first row."""
    kind = at_place(first, lambda row: _kind(row, source))
    hints = Hints(source.task or task, source.metric, prompt=source.prompt, response=source.response, label=source.label)
    return _source(source.name, train, test, kind, hints, hash)


def _kind(row: Row, source: SourceSettings) -> str:
    """The template for rows like `row`, by the fields the user named or else by the row's own."""
    if source.label is not None and source.response is None:
        return "classification"
    if source.prompt is not None or (source.response is not None and "prompt" in row):
        return "fields"
    return "plain_text" if source.response is not None else kind_of(row)


def _source(name: str, train: list[Placed], test: list[Placed], kind: str, hints: Hints, hash: str) -> Source:
    """Both splits of one task through the template of `kind`, which learns the names of labels from both."""
    if kind == "classification":
        train, test = _numbered(train, test, hints.label or "label")
    template = TEMPLATES[kind]
    hints = replace(hints, names=names_of((placed.row for placed in train + test), kind, hints.label))
    made = [[at_place(placed, lambda row: template(row, hints)) for placed in side] for side in (train, test)]
    rows = [placed.row for placed in train or test]
    return Source(name, made[0], made[1], hash, {hints.task: frame(rows, kind, hints)})


def _numbered(train: list[Placed], test: list[Placed], label: str) -> tuple[list[Placed], list[Placed]]:
    """The same rows with class ids that count from 0, whatever the classes are called; ids keep the order of numbers or names."""

    def called(row: Row) -> int | str:
        return row[label] if isinstance(row[label], int) else str(row[label])

    given = {called(placed.row) for placed in train + test if placed.row.get(label) is not None}
    ids = {name: number for number, name in enumerate(sorted(given, key=lambda name: (isinstance(name, str), name)))}

    def numbered(placed: Placed) -> Placed:
        if placed.row.get(label) is None:
            return placed  # its template will say so, with the line
        name = called(placed.row)
        return Placed({"label_name": str(name), **placed.row, label: ids[name]}, placed.place)

    return [numbered(placed) for placed in train], [numbered(placed) for placed in test]


def at_place(placed: Placed, make: Callable[[Row], T]) -> T:
    """`make(row)`; what goes wrong is said with the row's file and line."""
    try:
        return make(placed.row)
    except (BadData, KeyError, ValueError, TypeError, IndexError) as error:
        raise BadData(f"{placed.place}: {error}") from error


def _limited(source: Source, limit: int | None) -> Source:
    return replace(source, train=drawn(source.train, limit, source.name))


def drawn(examples: list[Example], limit: int | None, name: str) -> list[Example]:
    """`limit` of the examples of the source `name`, always the same, in their order; all where there are no more."""
    if limit is None or len(examples) <= limit:
        return examples
    return [examples[index] for index in sorted(Random(f"limit/{name}").sample(range(len(examples)), limit))]


def split(rows: list[Placed], name: str) -> tuple[list[Placed], list[Placed]]:
    """A tenth of `rows` for testing, at least one; always the same."""
    order = list(range(len(rows)))
    Random(f"split/{name}").shuffle(order)
    test = set(order[: max(1, round(TEST_SHARE * len(rows)))]) if len(rows) > 1 else set()
    return [row for index, row in enumerate(rows) if index not in test], [row for index, row in enumerate(rows) if index in test]


def digest_of(values: Iterable[Any]) -> str:
    """sha256 of values as JSON, or as they print."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=repr, ensure_ascii=False).encode())
    return digest.hexdigest()


def hash_of(files: Iterable[Path]) -> str:
    """sha256 of the bytes of all `files`, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def format_of(name: str) -> str | None:
    """jsonl, csv or parquet, by the ending; None for what is no file of ours."""
    plain = name.removesuffix(".gz")
    return next((kind for kind in READERS if plain.endswith(f".{kind}")), None)


def read(path: Path) -> list[Placed]:
    """All rows of a .jsonl, .csv or .parquet file, each with its place.

    Raises:
        BadData: no such file, nothing in it, or a line that cannot be read.
    """
    kind = format_of(path.name)
    if kind is None:
        raise BadData(f"{path} ends in none of .jsonl, .csv and .parquet (.gz or not); convert it")
    if not path.is_file():
        raise BadData(f"{path} is not there; check the path, or set FEDEXPERTS_DATA to the folder of the data pack")
    rows = list(READERS[kind](path))
    if not rows:
        raise BadData(f"{path}, line 1: the file is empty; give a file with at least one example")
    return rows


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, unpacked where it is packed."""
    number = 0
    unpack = gzip.open if path.suffix == ".gz" else open
    try:
        with unpack(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadData(f"{path}, line {number + 1}: the packed file is damaged ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise BadData(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file") from error


def read_jsonl(path: Path) -> Iterator[Placed]:
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadData(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from error
        if not isinstance(row, dict):
            raise BadData(f"{path}, line {number}: a {type(row).__name__} where an object of fields was expected; mend the line")
        yield Placed(row, f"{path}, line {number}")


def read_csv(path: Path) -> Iterator[Placed]:
    reader = csv.DictReader(io.StringIO("".join(line for _, line in lines(path)), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                fields = len(reader.fieldnames or ())
                raise csv.Error(f"not the {fields} fields of the first line")
            yield Placed(row, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise BadData(f"{path}, line {reader.line_num}: {error}; mend or remove the line") from error


def read_parquet(path: Path) -> Iterator[Placed]:
    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BadData(f"{path}, row 1: not a parquet file ({str(error).splitlines()[0]}); make it again") from error
    for number, row in enumerate(table, 1):
        yield Placed(row, f"{path}, row {number}")


READERS: Mapping[str, Callable[[Path], Iterator[Placed]]] = {"jsonl": read_jsonl, "csv": read_csv, "parquet": read_parquet}
