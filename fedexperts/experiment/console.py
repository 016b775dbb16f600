"""What commands print."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from fedexperts.experiment.progress import Progress

console = Console()


def say(sentence: str) -> None:
    """Prints a sentence as it is: brackets are no markup, and the terminal wraps the line."""
    console.print(sentence, markup=False, soft_wrap=True, highlight=False)


def progress(quiet: bool) -> "Progress":
    """An object that reports the progress of a run on the console, or, if `quiet`, nowhere."""
    from fedexperts.experiment.progress import Quiet, Shown

    return Quiet() if quiet else Shown(console)


def finish(folders: Sequence[Path], out: Path) -> None:
    """Prints the table of results and writes the report that a run ends with."""
    from fedexperts import report as reports

    html, csv, markdown, latex = (out / f"report.{kind}" for kind in ("html", "csv", "md", "tex"))
    summary = reports.write(folders, html, csv, markdown, latex=latex)
    console.print(reports.table(folders))
    for path in summary.written:
        say(f"written: {path}")
