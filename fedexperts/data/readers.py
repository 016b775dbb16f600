"""Rows of .json, .jsonl, .csv, .tsv and .parquet files, each with its file and line for error sentences; and hashes of what was
read."""

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pyarrow
import pyarrow.parquet

from fedexperts.data.fields import Row
from fedexperts.errors import BadData, shortened

T = TypeVar("T")
LONGEST_SENTENCE, LONGEST_PATH = 300, 130  # in characters


@dataclass(frozen=True)
class LocatedRow:
    """A row and its location, such as `data.csv, line 7`, which error sentences name."""

    row: Row
    location: str


def read(path: Path) -> list[LocatedRow]:
    """All rows of a .json, .jsonl, .csv, .tsv or .parquet file (.gz or not).

    Raises:
        BadData: no such file, no rows in it, or a line that cannot be read.
    """
    kind = format_of(path.name)
    if kind is None:
        raise BadData(f"{shown(path)} is no {KINDS} file (.gz or not); convert it to one")
    if not path.is_file():
        raise BadData(f"{shown(path)} does not exist; check the path, or set FEDEXPERTS_DATA to the folder of the data pack")
    try:
        rows = list(READERS[kind](path))
    except OSError as error:
        raise BadData(f"{shown(path)} cannot be read ({error.strerror or type(error).__name__}); check the file") from error
    if not rows:
        raise BadData(f"{shown(path)}, line 1: the file is empty; give a file with at least one example")
    return rows


def format_of(name: str) -> str | None:
    """json, jsonl, csv, tsv or parquet, by the ending of a file name in any case; None for any other."""
    name = name.lower().removesuffix(".gz")
    return next((kind for kind in READERS if name.endswith(f".{kind}")), None)


def shown(path: Path) -> str:
    """`path` as error sentences name it: of a long one, the end."""
    text = " ".join(str(path).split())
    return text if len(text) <= LONGEST_PATH else f"…{text[-LONGEST_PATH + 1 :]}"


def at_location(row: LocatedRow, convert: Callable[[Row], T]) -> T:
    """`convert(row)`.

    Raises:
        BadData: the row cannot be converted; the sentence names its location.
    """
    try:
        return convert(row.row)
    except BadData as error:
        raise BadData(shortened(f"{row.location}: {error}", LONGEST_SENTENCE)) from error
    except (KeyError, ValueError, TypeError, IndexError) as error:
        reason = shortened(f"{type(error).__name__}: {error}")
        raise BadData(f"{row.location}: its fields do not fit together ({reason}); correct or remove the row") from error


def digest_of(values: Iterable[Any]) -> str:
    """sha256 of `values` as JSON, or as `repr` gives them where JSON cannot."""
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


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, decompressed if it ends in .gz.

    Raises:
        BadData: the file is damaged, or not UTF-8.
    """
    number = 0
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadData(f"{shown(path)}, line {number + 1}: the compressed file is damaged ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise BadData(f"{shown(path)}, line {number}: not UTF-8 ({error.reason}); convert the file") from error


def parsed(text: str, path: Path, line: int) -> Any:
    """The JSON value of `text`, which starts at `line` of the file.

    Raises:
        BadData: it is not JSON, too deep, or has a number of too many digits or half a character.
    """
    at = f"{shown(path)}, line"
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no character
    except json.JSONDecodeError as error:
        raise BadData(f"{at} {line + error.lineno - 1}: not JSON ({error}); correct or remove the line") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise BadData(f"{at} {line}: it has {half}, half of a surrogate pair; correct or remove it") from error
    except RecursionError as error:
        raise BadData(f"{at} {line}: its lists and objects are nested too deeply; flatten or remove it") from error
    except ValueError as error:  # Python converts no number of more digits than this
        reason = str(error) if isinstance(error, _NoConstant) else f"a number of more than {sys.get_int_max_str_digits()} digits"
        raise BadData(f"{at} {line}: not JSON ({reason}); correct it, or write it as text") from error
    return value


class _NoConstant(ValueError):
    """NaN, Infinity or -Infinity, which Python reads and JSON does not have."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NoConstant(f"{name} is no value of JSON")


def read_json(path: Path) -> Iterator[LocatedRow]:
    """The objects of a list; a file of one object a line, which often has this ending too, is read as .jsonl."""
    text = "".join(line for _, line in lines(path))
    if text.lstrip().startswith("{"):
        yield from read_jsonl(path)
        return
    rows = parsed(text, path, 1) if text.strip() else []
    if not isinstance(rows, list):
        raise BadData(f"{shown(path)}, line 1: a {type(rows).__name__}, but a .json file is a list of objects; make it one")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise BadData(f"{shown(path)}, row {number}: a {kind}, but a row is an object of fields; correct the row")
        yield LocatedRow(row, f"{shown(path)}, row {number}")


def read_jsonl(path: Path) -> Iterator[LocatedRow]:
    """One row a line; blank lines are skipped."""
    for number, line in lines(path):
        if not line.strip():
            continue
        row = parsed(line, path, number)
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise BadData(f"{shown(path)}, line {number}: a {kind}, but a row is an object of fields; correct the line")
        yield LocatedRow(row, f"{shown(path)}, line {number}")


def read_table(path: Path, delimiter: str) -> Iterator[LocatedRow]:
    """Rows of a .csv or .tsv file, under the field names of the first line."""
    text = "".join(line for _, line in lines(path))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    last = 0  # line on which the row before ended
    try:
        with _fields_of_any_size():
            names = reader.fieldnames or ()
            if twice := [name for name, number in Counter(names).items() if number > 1]:
                raise csv.Error(f"the field {shortened(twice[0], 40)!r} stands twice in the first line")
            last = reader.line_num
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error(f"not the {len(names)} fields of the first line")
                last = reader.line_num
                yield LocatedRow(row, f"{shown(path)}, line {last}")
    except csv.Error as error:
        raise BadData(f"{shown(path)}, line {last + 1}: {error}; correct or remove the line") from error


@contextmanager
def _fields_of_any_size() -> Iterator[None]:
    """Lifts the limit of 128 kB a field, which is only the default of Python's parser."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_parquet(path: Path) -> Iterator[LocatedRow]:
    """The rows of the table."""
    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = shortened(str(error) or type(error).__name__)
        raise BadData(f"{shown(path)}, row 1: not a parquet file ({reason}); write it anew") from error
    for number, row in enumerate(table, 1):
        yield LocatedRow(row, f"{shown(path)}, row {number}")


READERS: Mapping[str, Callable[[Path], Iterator[LocatedRow]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": partial(read_table, delimiter=","),
    "tsv": partial(read_table, delimiter="\t"),
    "parquet": read_parquet,
}
KINDS = f".{', .'.join(list(READERS)[:-1])} or .{list(READERS)[-1]}"
