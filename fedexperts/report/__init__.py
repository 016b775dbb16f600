"""Reports of one or several runs: an HTML page, CSV, Markdown and LaTeX files, figures as images, tables for the terminal."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Group, RenderableType

from fedexperts.io.files import write_text
from fedexperts.report import (
    cautions,
    comparison_figures,
    comparison_tables,
    csv_export,
    facts,
    figure_numbers,
    images,
    latex_tables,
    page,
    progress,
    run_figures,
    run_tables,
    settings_tables,
    target_ratios,
    told_apart,
)
from fedexperts.report.page import Form
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


@dataclass(frozen=True)
class Shown:
    """What a report of some runs shows."""

    tables: tuple[Table, ...]
    figures: Callable[[], Mapping[str, Sequence[Figure]]]
    page: Callable[[Form], str]
    csv: Callable[[], str]
    warning: str


def write(
    folders: Sequence[Path],
    html: Path | None = None,
    csv: Path | None = None,
    markdown: Path | None = None,
    baseline: str | None = None,
    pictures: Path | None = None,
    latex: Path | None = None,
    svg: Path | None = None,
    pdf: Path | None = None,
    single_file: bool = False,
) -> Report:
    """Writes the report of the runs in `folders` to the given files, each completely or not at all.

    `pictures`, `svg` and `pdf` are folders for the figures as PNG, SVG and PDF files, with the numbers of each in a CSV file.
    `html` needs the file `page.LIBRARY`, which is written beside it and which all pages of a folder share; with `single_file` it
    needs none, and is 4.8 MB larger.

    A folder that is not a run's stands for the runs below it; several runs of a method are its seeds; runs of a comparison over
    several run files belong to several settings. Only finished runs are compared, unless none is finished. Differences are
    relative to `baseline`, by default the first federated method.

    Raises:
        BadRun: a folder contains no run, or a file in it cannot be read.
        BadValue: `baseline` is not one of the methods, or figures cannot be drawn as image files here.
    """
    runs = read_all(folders)
    unfinished = _unfinished(runs) if len(runs) > 1 else ()
    shown = _shown(_compared(runs), baseline, unfinished, several=len(runs) > 1)
    texts: dict[Path, str] = {}
    if html is not None:
        texts[html] = shown.page(Form(whole=single_file))
        texts |= {} if single_file else {html.with_name(page.LIBRARY): page.library()}
    if csv is not None:
        texts[csv] = shown.csv()
    if markdown is not None:
        remarks = [shown.warning, f"Not finished: {'; '.join(unfinished)}. {facts.UNFINISHED}" if unfinished else ""]
        texts[markdown] = "\n".join([*map(to_markdown, shown.tables), *(f"{markdown_text(each)}\n" for each in remarks if each)])
    if latex is not None:
        texts[latex] = latex_tables.to_latex(shown.tables)
    drawn: list[Path] = []
    for folder, kind in ((pictures, "png"), (svg, "svg"), (pdf, "pdf")):
        if folder is not None:
            drawings = [figure for group in shown.figures().values() for figure in group]
            files = images.write(drawings, folder, kind)
            numbers = (cells_csv(figure_numbers.numbers_table(figure)) for figure in drawings)
            texts |= {path.with_suffix(".csv"): text for path, text in zip(files, numbers, strict=True)}
            drawn += files
    for path, text in texts.items():
        write_text(path, text)
    return Report(runs, shown.tables, (*texts, *drawn), (shown.warning,) if shown.warning else (), unfinished)


def under_way(folders: Sequence[Path], baseline: str | None, form: Form) -> str:
    """The page of all runs in `folders`, finished or not.

    Raises:
        BadRun, BadValue: as in `write`.
    """
    runs = read_all(folders)
    several = len(runs) > 1
    return _shown(runs, baseline, _unfinished(runs) if several else (), several=several).page(form)


def _shown(runs: Sequence[RunResults], baseline: str | None, unfinished: Sequence[str], *, several: bool) -> Shown:
    """The report of `runs`, side by side if `several`; `unfinished` names those that are not finished."""
    settings = by_setting(runs)
    groups = next(iter(settings.values()))
    by_method = {method: [run for each in settings.values() for run in each[method]] for method in groups}
    base = comparison_tables.baseline_of(by_method, baseline)
    csv, warning = partial(csv_export.to_csv, settings, base), cautions.warning(by_label(settings))
    if len(settings) > 1:
        tables = settings_tables.all_tables(settings, base)
        figures = partial(comparison_figures.several_settings, settings)
        return Shown(tables, figures, partial(page.several_settings, settings, base, unfinished), csv, warning)
    if several:
        to_target = (*settings_tables.to_target(settings), *target_ratios.tables(settings, base))
        tables = (*comparison_tables.several(groups, base), *to_target)
        return Shown(
            tables, partial(comparison_figures.several, groups), partial(page.several, groups, base, unfinished), csv, warning
        )
    tables = run_tables.one_run(runs[0])
    return Shown(tables, partial(run_figures.one_run, runs[0]), partial(page.one_run, runs[0]), csv, warning)


def table(folders: Sequence[Path], width: int | None = None) -> RenderableType:
    """The table printed at the end of a run or comparison: quality overall and of each task, bytes, memory, experts held,
    failures; for several settings, the overall quality in each. For several methods in one setting, below it which of them are
    told apart in overall quality.

    Methods are rows, or columns if that fits `width` characters (by default the terminal's) better. The note warns of clients
    that sent no expert, and of methods that train different parts.
    """
    settings = by_setting(_compared(read_all(folders)))
    results = comparison_tables.final(settings[""]) if len(settings) == 1 else settings_tables.overall(settings)
    upright = replace(results, note=f"{cautions.warning(by_label(settings))} {results.note}".strip())
    apart = [each for each in [told_apart.brief(settings[""])] if each.rows] if len(settings) == 1 else []
    return Group(*(to_rich(_fitting(each, width or shutil.get_terminal_size().columns)) for each in (upright, *apart)))


def _fitting(upright: Table, wide: int) -> Table:
    """The table with rows as columns if that fits `wide` characters better."""
    return upright if table_width(upright) <= max(wide, table_width(upright.transposed())) else upright.transposed()


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
