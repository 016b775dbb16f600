"""What a run, or several side by side, gave: an HTML page, a CSV file, Markdown, pictures, a table for the terminal."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table as RichTable

from fedexperts.io.files import write_text
from fedexperts.report import (
    comparison_figures,
    comparison_tables,
    csv_export,
    facts,
    figure_numbers,
    page,
    png,
    progress,
    run_figures,
    run_tables,
    settings_tables,
)
from fedexperts.report.read import RunResults, by_setting, read_all
from fedexperts.report.table_format import Table, cells_csv, to_markdown, to_rich
from fedexperts.report.table_format import width as table_width
from fedexperts.report.traces import Figure


@dataclass(frozen=True)
class Report:
    """What was read, its tables, and the files that were written."""

    runs: tuple[RunResults, ...]
    tables: tuple[Table, ...]
    written: tuple[Path, ...]
    unfinished: tuple[str, ...] = ()  # names of runs that are compared only while no run is finished


def write(
    folders: Sequence[Path],
    html: Path | None = None,
    csv: Path | None = None,
    markdown: Path | None = None,
    baseline: str | None = None,
    pictures: Path | None = None,
) -> Report:
    """Writes the report of the runs in `folders` to the files that are named, each whole or not at all.

    Every figure becomes a PNG file in the folder `pictures`, where one is named, and its numbers a CSV file beside it.

    A folder without a run stands for the runs below it; several runs of one method are its seeds; runs of comparisons over
    several run files are of several settings. Of several runs only finished ones are compared, as long as there are any.
    Differences are taken from `baseline`, by default fedavg, else the first method.

    Raises:
        BadRun: a folder holds no run, or a file in it cannot be read.
        BadValue: `baseline` is none of the methods, or pictures were asked for and cannot be made.
    """
    runs = read_all(folders)
    settings = by_setting(_compared(runs))
    groups = next(iter(settings.values()))
    base = comparison_tables.baseline_of(groups, baseline)
    unfinished = _unfinished(runs) if len(runs) > 1 else ()
    text_of: Callable[[], str]
    drawn: Callable[[], Mapping[str, Sequence[Figure]]]
    if len(settings) > 1:
        made, drawn = settings_tables.all_tables(settings, base), partial(comparison_figures.several_settings, settings)
        text_of = partial(page.several_settings, settings, base, unfinished)
    elif len(runs) > 1:
        made = (*comparison_tables.several(groups, base), *settings_tables.to_target(settings))
        drawn = partial(comparison_figures.several, groups)
        text_of = partial(page.several, groups, base, unfinished)
    else:
        made, drawn, text_of = run_tables.one_run(runs[0]), partial(run_figures.one_run, runs[0]), partial(page.one_run, runs[0])
    texts: dict[Path, str] = {}
    if html is not None:
        texts[html] = text_of()
    if csv is not None:
        texts[csv] = csv_export.to_csv(settings, base)
    if markdown is not None:
        told = [f"Not finished: {'; '.join(unfinished)}. {facts.UNFINISHED}\n"] if unfinished else []
        texts[markdown] = "\n".join([*map(to_markdown, made), *told])
    every = [figure for group in drawn().values() for figure in group] if pictures else []
    pngs = png.write(every, pictures) if pictures else ()
    texts |= {path.with_suffix(".csv"): cells_csv(figure_numbers.numbers(each)) for path, each in zip(pngs, every, strict=True)}
    for path, text in texts.items():
        write_text(path, text)
    return Report(runs, made, (*texts, *pngs), unfinished)


def table(folders: Sequence[Path], width: int | None = None) -> RichTable:
    """The table a run or comparison ends with: quality of each task and overall, bytes, memory, experts held, failures; of
    several settings, the overall quality in each.

    Methods are rows, or columns where that fits `width` characters (by default the terminal) better.
    """
    settings = by_setting(_compared(read_all(folders)))
    upright = comparison_tables.final(settings[""]) if len(settings) == 1 else settings_tables.overall(settings)
    wide = width or shutil.get_terminal_size().columns
    fits = table_width(upright) <= max(wide, table_width(upright.transposed()))
    return to_rich(upright if fits else upright.transposed())


def _compared(runs: Sequence[RunResults]) -> Sequence[RunResults]:
    """The finished runs; all while there is none, so that one can see how they get on."""
    return [run for run in runs if progress.finished(run)] or runs


def _unfinished(runs: Sequence[RunResults]) -> tuple[str, ...]:
    """The runs that are not finished, by their names, and how far they are."""
    return tuple(
        f"{setting}{': ' if setting else ''}{label}, seed {run.plan.seed} "
        f"({progress.rounds_done(run)} of {progress.rounds_asked(run)} rounds)"
        for setting, groups in by_setting(runs).items()
        for label, members in groups.items()
        for run in members
        if not progress.finished(run)
    )
