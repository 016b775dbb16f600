"""What a run, or several side by side, gave: an HTML page, a CSV file, Markdown, a table for the terminal."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table as RichTable

from fedexperts.files import write_text
from fedexperts.report import page, tables
from fedexperts.report.read import RunResults, grouped, read_all
from fedexperts.report.tables import Groups, Table


@dataclass(frozen=True)
class Report:
    """What was read, its tables, and the files that were written."""

    runs: tuple[RunResults, ...]
    tables: tuple[Table, ...]
    written: tuple[Path, ...]


def write(
    folders: Sequence[Path],
    html: Path | None = None,
    csv: Path | None = None,
    markdown: Path | None = None,
    baseline: str | None = None,
) -> Report:
    """Writes the report of the runs in `folders` to the files that are named, each whole or not at all.

    A folder without a run stands for the runs below it; several runs of one method are its seeds. Differences are taken
    from `baseline`, by default fedavg, else the first method.

    Raises:
        BadRun: a folder holds no run, or a file in it cannot be read.
        BadValue: `baseline` is none of the methods.
    """
    runs = read_all(folders)
    groups = grouped(runs)
    base = tables.baseline_of(groups, baseline)
    made = _tables(groups, base)
    texts: dict[Path, str] = {}
    if html is not None:
        texts[html] = page.one_run(runs[0]) if len(runs) == 1 else page.several(groups, base)
    if csv is not None:
        texts[csv] = tables.to_csv(groups, base)
    if markdown is not None:
        texts[markdown] = "\n".join(map(tables.to_markdown, made))
    for path, text in texts.items():
        write_text(path, text)
    return Report(runs, made, tuple(texts))


def table(folders: Sequence[Path], width: int | None = None) -> RichTable:
    """The table a run or comparison ends with: quality of each task and overall, bytes, memory, experts held, failures.

    Methods are rows, or columns where that fits `width` characters (by default the terminal) better.
    """
    upright = tables.final(grouped(read_all(folders)))
    wide = width or shutil.get_terminal_size().columns
    fits = tables.width(upright) <= max(wide, tables.width(upright.transposed()))
    return tables.to_rich(upright if fits else upright.transposed())


def _tables(groups: Groups, baseline: str) -> tuple[Table, ...]:
    """All tables of a single run; of several, the final one, the whole comparison and the differences."""
    runs = [run for members in groups.values() for run in members]
    if len(runs) == 1:
        return tables.one_run(runs[0])
    versus = (tables.differences(groups, baseline),) if len(groups) > 1 else ()
    return (tables.final(groups), tables.comparison(groups), *versus)
