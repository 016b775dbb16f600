"""The results of runs as pandas DataFrames and as files: the public face of what `read` reads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from fedexperts.errors import BadValue, nearest, quoted
from fedexperts.io.files import write_bytes, write_text
from fedexperts.report import comparison_tables, progress, settings_tables
from fedexperts.report.frames import FRAMES
from fedexperts.report.read import RunResults, by_setting, read_all
from fedexperts.report.table_format import Table, to_rich

if TYPE_CHECKING:
    from pandas import DataFrame

FORMATS = ("csv", "parquet")
WIDEST = 200  # characters of a line of the table as text


@dataclass(frozen=True, eq=False, repr=False)
class Results:
    """All runs of some results folders. Each table is made when it is first asked for.

    A notebook shows the table of results; so does `print`.
    """

    read_runs: tuple[RunResults, ...]

    @cached_property
    def runs(self) -> "DataFrame":
        """One row per run: where it is, and how far."""
        return self.frame("runs")

    @cached_property
    def clients(self) -> "DataFrame":
        """One row per client of a run, as planned."""
        return self.frame("clients")

    @cached_property
    def rounds(self) -> "DataFrame":
        """One row per round and setup task: losses, bytes, seconds."""
        return self.frame("rounds")

    @cached_property
    def evaluations(self) -> "DataFrame":
        """One row per round, client, task and metric."""
        return self.frame("evaluations")

    @cached_property
    def reference_lines(self) -> "DataFrame":
        """The scores of answers that need no model."""
        return self.frame("reference_lines")

    @cached_property
    def retained(self) -> "DataFrame":
        """Scores on retained examples: of the base model, and of each client's model after the last round."""
        return self.frame("retained")

    @cached_property
    def drift(self) -> "DataFrame":
        """How far the routers of each client's model moved."""
        return self.frame("drift")

    @cached_property
    def ledger(self) -> "DataFrame":
        """One row per job: what it sent and cost."""
        return self.frame("ledger")

    @cached_property
    def experts(self) -> "DataFrame":
        """One row per round, client, MoE layer and expert: who held and trained it, and how often it was used."""
        return self.frame("experts")

    @cached_property
    def predictions(self) -> "DataFrame":
        """One row per answer that was kept."""
        return self.frame("predictions")

    def frame(self, name: str) -> "DataFrame":
        """The table `name`, with the columns that `frames.FRAMES` declares.

        Raises:
            BadValue: no such table.
        """
        import pandas  # here, since it takes a second that most uses of the package need not wait

        require_known([name])
        columns, make = FRAMES[name].all_columns, FRAMES[name].rows
        rows = [(*keys, *row) for *keys, run in self.labeled() for row in make(run)]
        cells = list(zip(*rows, strict=True)) or [()] * len(columns)
        series = zip(columns, cells, strict=True)
        return pandas.DataFrame({each.name: pandas.Series(values, dtype=each.dtype) for each, values in series})

    def labeled(self) -> Iterator[tuple[str, str, int, RunResults]]:
        """(setting, method, seed, run) of all runs, as reports call them."""
        for groups in by_setting(self.read_runs).values():
            for method, members in groups.items():
                for run in members:
                    yield run.plan.setting, method, run.plan.seed, run

    def write(
        self, folder: Path | str, format: Literal["csv", "parquet"] = "csv", tables: Sequence[str] = ()
    ) -> tuple[Path, ...]:
        """Writes each of `tables` (by default all) to a file in `folder`, and columns.csv, which says what each column means.

        Raises:
            BadValue: no such format or table.
        """
        if format not in FORMATS:
            raise BadValue(f"format = {quoted(format)} is not one of {', '.join(FORMATS)}{nearest(str(format), FORMATS)}")
        require_known(tables)
        paths = []
        for name in tables or FRAMES:
            paths.append(Path(folder) / f"{name}.{format}")
            frame = self.frame(name)
            if format == "csv":
                write_text(paths[-1], frame.to_csv(index=False, lineterminator="\n"))
            else:
                write_bytes(paths[-1], frame.to_parquet(engine="pyarrow", index=False))
        paths.append(Path(folder) / "columns.csv")
        write_text(paths[-1], columns_csv(tables))
        return tuple(paths)

    @property
    def table(self) -> Table:
        """The table that ends a run or comparison: of the finished runs, or of all if none is finished."""
        settings = by_setting(self.finished or self.read_runs)
        return comparison_tables.final(settings[""]) if len(settings) == 1 else settings_tables.overall(settings)

    @property
    def finished(self) -> Sequence[RunResults]:
        """The finished runs."""
        return [run for run in self.read_runs if progress.finished(run)]

    @property
    def note(self) -> str:
        """How many runs there are, and what tables."""
        left, several = len(self.read_runs) - len(self.finished), len(self.read_runs) > 1
        unfinished = "" if not left else f", {left} not finished" + (" and left out here" if self.finished else "")
        return f"{len(self.read_runs)} run{'s' if several else ''}{unfinished}; tables: {', '.join(FRAMES)}"

    def __repr__(self) -> str:
        shown = Console(file=StringIO(), width=WIDEST, color_system=None)
        with shown.capture() as text:
            shown.print(to_rich(self.table))
        lines = (line.rstrip() for line in text.get().splitlines())
        return "\n".join([*filter(None, lines), self.note])

    def _repr_html_(self) -> str:
        return f"{to_html(self.table)}<p>{self.note}</p>"


def results(folders: Path | str | Sequence[Path | str]) -> Results:
    """The results of the runs in one or several folders: of `run`, or of `compare` with all its methods, settings and seeds.

    A run that is under way, or was stopped, has the rounds that are there. `fedexperts.results(folder).evaluations` is a pandas
    DataFrame; docs/reference/results.md lists the tables and their columns.

    Raises:
        BadRun: a folder contains no run, or a file in it is damaged.
    """
    several = [folders] if isinstance(folders, Path | str) else folders
    return Results(read_all([Path(folder) for folder in several]))


def require_known(tables: Sequence[str]) -> None:
    """Raises BadValue for a table that there is not."""
    for name in tables:
        if name not in FRAMES:
            raise BadValue(f"there is no table {quoted(name)}; the tables are {', '.join(FRAMES)}{nearest(str(name), FRAMES)}")


def columns_csv(tables: Sequence[str]) -> str:
    """What each column of `tables` (empty: of all) means, as a CSV file."""
    import pandas

    rows = [
        (name, column.name, column.dtype, column.unit, column.meaning)
        for name in tables or FRAMES
        for column in FRAMES[name].all_columns
    ]
    frame = pandas.DataFrame(rows, columns=["table", "column", "dtype", "unit", "meaning"])
    return str(frame.to_csv(index=False, lineterminator="\n"))


def to_html(table: Table) -> str:
    """`table` as an HTML table without style, as notebooks show it."""

    def line(cells: Sequence[str], tag: str) -> str:
        side = ["left" if index in table.text_columns else "right" for index in range(len(cells))]
        return "".join(f'<{tag} style="text-align:{side[i]}">{escape(cell)}</{tag}>' for i, cell in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in table.rows)
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return f"<table><thead><tr>{line(table.columns, 'th')}</tr></thead><tbody>{body}</tbody></table>{note}"
