"""Reports of one or several runs: an HTML page, a CSV file, Markdown, PNG figures, and a table for the terminal."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.table import Table as RichTable

from fedexperts.io.files import write_text
from fedexperts.report import (
    cautions,
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
from fedexperts.report.read import RunResults, by_label, by_setting, read_all
from fedexperts.report.table_format import Table, cells_csv, markdown_text, to_markdown, to_rich
from fedexperts.report.table_format import width as table_width
from fedexperts.report.traces import Figure


@dataclass(frozen=True)
class Report:
    """The runs of a report, its tables, and the files that were written."""

    runs: tuple[RunResults, ...]
    tables: tuple[Table, ...]
    written: tuple[Path, ...]
    warnings: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()  # runs that are left out of the comparison, unless none is finished


def write(
    folders: Sequence[Path],
    html: Path | None = None,
    csv: Path | None = None,
    markdown: Path | None = None,
    baseline: str | None = None,
    pictures: Path | None = None,
) -> Report:
    """Writes the report of the runs in `folders` to the given files, each completely or not at all.

    `pictures` is a folder for the figures as PNG files, with the numbers of each in a CSV file beside it.

    A folder that is not a run's stands for the runs below it; several runs of a method are its seeds; runs of a comparison over
    several run files belong to several settings. Only finished runs are compared, unless none is finished. Differences are
    relative to `baseline`, by default the first federated method.

    Raises:
        BadRun: a folder contains no run, or a file in it cannot be read.
        BadValue: `baseline` is not one of the methods, or figures cannot be drawn as PNG files here.
    """
    runs = read_all(folders)
    settings = by_setting(_compared(runs))
    groups = next(iter(settings.values()))
    by_method = {method: [run for each in settings.values() for run in each[method]] for method in groups}
    base = comparison_tables.baseline_of(by_method, baseline)
    unfinished = _unfinished(runs) if len(runs) > 1 else ()
    warning = cautions.warning(by_label(settings))
    make_page: Callable[[], str]
    make_figures: Callable[[], Mapping[str, Sequence[Figure]]]
    if len(settings) > 1:
        tables = settings_tables.all_tables(settings, base)
        make_figures = partial(comparison_figures.several_settings, settings)
        make_page = partial(page.several_settings, settings, base, unfinished)
    elif len(runs) > 1:
        tables = (*comparison_tables.several(groups, base), *settings_tables.to_target(settings))
        make_figures = partial(comparison_figures.several, groups)
        make_page = partial(page.several, groups, base, unfinished)
    else:
        tables = run_tables.one_run(runs[0])
        make_figures, make_page = partial(run_figures.one_run, runs[0]), partial(page.one_run, runs[0])
    texts: dict[Path, str] = {}
    if html is not None:
        texts[html] = make_page()
    if csv is not None:
        texts[csv] = csv_export.to_csv(settings, base)
    if markdown is not None:
        remarks = [warning, f"Not finished: {'; '.join(unfinished)}. {facts.UNFINISHED}" if unfinished else ""]
        texts[markdown] = "\n".join([*map(to_markdown, tables), *(f"{markdown_text(each)}\n" for each in remarks if each)])
    pngs: tuple[Path, ...] = ()
    if pictures is not None:
        drawings = [figure for group in make_figures().values() for figure in group]
        pngs = png.write(drawings, pictures)
        numbers = (cells_csv(figure_numbers.numbers_table(figure)) for figure in drawings)
        texts |= {path.with_suffix(".csv"): text for path, text in zip(pngs, numbers, strict=True)}
    for path, text in texts.items():
        write_text(path, text)
    return Report(runs, tables, (*texts, *pngs), (warning,) if warning else (), unfinished)


def table(folders: Sequence[Path], width: int | None = None) -> RichTable:
    """The table printed at the end of a run or comparison: quality overall and of each task, bytes, memory, experts held,
    failures; for several settings, the overall quality in each.

    Methods are rows, or columns if that fits `width` characters (by default the terminal's) better. The note warns of clients
    that sent no expert, and of methods that train different parts.
    """
    settings = by_setting(_compared(read_all(folders)))
    results = comparison_tables.final(settings[""]) if len(settings) == 1 else settings_tables.overall(settings)
    upright = replace(results, note=f"{cautions.warning(by_label(settings))} {results.note}".strip())
    wide = width or shutil.get_terminal_size().columns
    fits = table_width(upright) <= max(wide, table_width(upright.transposed()))
    return to_rich(upright if fits else upright.transposed())


def _compared(runs: Sequence[RunResults]) -> Sequence[RunResults]:
    """The finished runs, or all if none is finished, to show their progress."""
    return [run for run in runs if progress.finished(run)] or runs


def _unfinished(runs: Sequence[RunResults]) -> tuple[str, ...]:
    """The names of the unfinished runs, with their numbers of rounds."""
    return tuple(
        f"{setting}{': ' if setting else ''}{label}, seed {run.plan.seed} "
        f"({progress.rounds_done(run)} of {progress.rounds_planned(run)} rounds)"
        for setting, groups in by_setting(runs).items()
        for label, members in groups.items()
        for run in members
        if not progress.finished(run)
    )
