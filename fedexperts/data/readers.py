"""Rows of .jsonl, .csv and .parquet files, each with its file and line for error sentences; and hashes of what was read."""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet

from fedexperts.data.templates import Row
from fedexperts.errors import BadData, shortened

T = TypeVar("T")


@dataclass(frozen=True)
class LocatedRow:
    """A row and its location, such as `data.csv, line 7`, which error sentences name."""

    row: Row
    location: str


def read(path: Path) -> list[LocatedRow]:
    """All rows of a .jsonl, .csv or .parquet file (.gz or not).

    Raises:
        BadData: no such file, no rows in it, or a line that cannot be read.
    """
    kind = format_of(path.name)
    if kind is None:
        raise BadData(f"{path} is no .jsonl, .csv or .parquet file (.gz or not); convert it to one")
    if not path.is_file():
        raise BadData(f"{path} does not exist; check the path, or set FEDEXPERTS_DATA to the folder of the data pack")
    rows = list(READERS[kind](path))
    if not rows:
        raise BadData(f"{path}, line 1: the file is empty; give a file with at least one example")
    return rows


def format_of(name: str) -> str | None:
    """jsonl, csv or parquet, by the ending of a file name; None for any other."""
    name = name.removesuffix(".gz")
    return next((kind for kind in READERS if name.endswith(f".{kind}")), None)


def at_location(row: LocatedRow, convert: Callable[[Row], T]) -> T:
    """`convert(row)`.

    Raises:
        BadData: the row cannot be converted; the sentence names its location.
    """
    try:
        return convert(row.row)
    except BadData as error:
        raise BadData(f"{row.location}: {error}") from error
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
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadData(f"{path}, line {number + 1}: the compressed file is damaged ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise BadData(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file") from error


def read_jsonl(path: Path) -> Iterator[LocatedRow]:
    """One row a line; blank lines are skipped."""
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadData(f"{path}, line {number}: not JSON ({error}); correct or remove the line") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise BadData(f"{path}, line {number}: a {kind}, but a row is an object of fields; correct the line")
        yield LocatedRow(row, f"{path}, line {number}")


def read_csv(path: Path) -> Iterator[LocatedRow]:
    """Rows under the field names of the first line."""
    reader = csv.DictReader(io.StringIO("".join(line for _, line in lines(path)), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                fields = len(reader.fieldnames or ())
                raise csv.Error(f"not the {fields} fields of the first line")
            yield LocatedRow(row, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise BadData(f"{path}, line {reader.line_num}: {error}; correct or remove the line") from error


def read_parquet(path: Path) -> Iterator[LocatedRow]:
    """The rows of the table."""
    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = shortened(str(error).splitlines()[0])
        raise BadData(f"{path}, row 1: not a parquet file ({reason}); write it anew") from error
    for number, row in enumerate(table, 1):
        yield LocatedRow(row, f"{path}, row {number}")


READERS: Mapping[str, Callable[[Path], Iterator[LocatedRow]]] = {"jsonl": read_jsonl, "csv": read_csv, "parquet": read_parquet}
