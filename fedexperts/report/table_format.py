"""A table as values, and its output as Markdown, in a terminal, and as CSV."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from io import StringIO

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from fedexperts.report import scores
from fedexperts.report.resources import MB
from fedexperts.report.stats import Interval

NONE = "–"  # in a cell: there is no such number, or not yet


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is the name of the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: tuple[int, ...] = (0,)  # left-aligned; all others are numbers
    sums: int = 0  # rows at the end that summarize those before them, or that they are compared with

    def above(self, rows: Sequence[tuple[str, ...]]) -> "Table":
        """The table with `rows` at its end, which are not sorted with the others."""
        return replace(self, rows=(*self.rows, *rows), sums=self.sums + len(rows))

    def transposed(self) -> "Table":
        """Rows as columns, for many columns in a narrow terminal."""
        head, *body = zip(self.columns, *self.rows, strict=True)
        return replace(self, columns=head, rows=tuple(body), text_columns=(0,), sums=0)


def number(value: float | None) -> str:
    """Three to four significant digits, with a comma between thousands."""
    if value is None:
        return NONE
    size = abs(value)
    return f"{value:,.2f}" if 0 < size < 10 else f"{value:,.1f}" if size < 1000 else f"{value:,.0f}"


def count(value: float | None) -> str:
    """A count, with a decimal only if it is not an integer."""
    return NONE if value is None else f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def megabytes(value: float | None) -> str:
    """Bytes in units of 10^6."""
    return NONE if value is None else number(value / MB)


def quality_value(value: float | None, unit: str) -> str:
    """A quality in its unit, with one decimal for a percentage."""
    if value is None:
        return NONE
    return f"{scores.to_unit(value, unit):.1f}" if unit == "%" else number(value)


def with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def plus_minus(value: Interval | None, unit: str, sign: str = "") -> str:
    """`mean ± half`, or the mean alone if there is no interval; `sign="+"` also shows the sign of positive numbers."""
    if value is None:
        return NONE
    digits = 1 if unit == "%" or abs(value.mean) >= 10 or value.mean == 0 else 2
    integer = not unit and not value.half and value.mean.is_integer()
    digits = 0 if integer or abs(value.mean) >= 1000 else digits
    half = "" if value.half is None else f" ± {value.half:,.{digits}f}" if value.half else " ± 0"
    return f"{value.mean:{sign},.{digits}f}{half}"


def to_markdown(table: Table) -> str:
    """A GitHub Markdown table under its title."""
    marks = ["---" if index in table.text_columns else "---:" for index in range(len(table.columns))]
    lines = [f"### {markdown_text(table.title)}", "", _line(table.columns), f"| {' | '.join(marks)} |", *map(_line, table.rows)]
    return "\n".join([*lines, *(["", markdown_text(table.note)] if table.note else [])]) + "\n"


def markdown_text(text: str) -> str:
    """`text` on one line, with the characters escaped that have a meaning in Markdown or HTML."""
    safe = escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{char}" if char in "\\`*_[]|~" else char for char in safe)


def to_rich(table: Table) -> RichTable:
    """For the terminal; markup and control sequences in a cell are shown as text."""
    shown = RichTable(title=_plain(table.title), caption=_plain(table.note) if table.note else None, box=box.SIMPLE_HEAD)
    for index, column in enumerate(table.columns):
        shown.add_column(_plain(column), justify="left" if index in table.text_columns else "right")
    for row in table.rows:
        shown.add_row(*map(_plain, row))
    return shown


def width(table: Table) -> int:
    """Characters per line of `to_rich` if no cell is broken; heads may break between their words."""
    heads = [max(head.split(), key=len, default="") for head in table.columns]
    return sum(max(map(len, cells)) + 2 for cells in zip(heads, *table.rows, strict=True)) + 2


def cells_csv(table: Table) -> str:
    """The cells of `table` without the commas between thousands; empty if there is no number."""
    text = StringIO()
    cells = ([_bare(cell) for cell in row] for row in table.rows)
    csv.writer(text, lineterminator="\n").writerows([table.columns, *cells])
    return text.getvalue()


def _bare(cell: str) -> str:
    """A number without commas; other text unchanged."""
    bare = cell.replace(",", "")
    try:
        float(bare)
    except ValueError:
        return "" if cell == NONE else cell
    return bare


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"


def _plain(text: str) -> Text:
    return Text("".join(char if char.isprintable() else "�" for char in text))
