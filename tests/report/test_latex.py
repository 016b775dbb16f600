import shutil
import subprocess
from pathlib import Path

import pytest

from fedexperts import report
from fedexperts.report.latex_tables import latex_text, to_latex
from fedexperts.report.table_format import Table

from .fake import write_comparison


def test_a_table_has_the_rules_of_booktabs_and_no_cell_is_markup():
    table = Table("A_b", ("method", "quality (%)"), (("x & y", "-1.5 ± 0.2"), ("all", "3")), note="50 % of 10^6", sums=1)
    lines = to_latex([table]).splitlines()[1:]
    assert lines == [
        "",
        r"\begin{table}",
        r"\centering",
        r"\caption{A\_b}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"method & quality (\%) \\",
        r"\midrule",
        r"x \& y & $-$1.5 $\pm$ 0.2 \\",
        r"\midrule",
        r"all & 3 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\smallskip\footnotesize 50 \% of 10\textasciicircum{}6",
        r"\end{table}",
    ]
    assert latex_text("\\input{x}\n%") == r"\textbackslash{}input\{x\} \%"


def test_all_tables_of_a_comparison_are_in_the_file_and_latex_reads_it(tmp_path: Path):
    runs = write_comparison(tmp_path / "runs", seeds=2, retained=True)
    written = report.write([runs], latex=tmp_path / "tables.tex")
    text = (tmp_path / "tables.tex").read_text()
    assert text.count(r"\toprule") == text.count(r"\end{table}") == len(written.tables) > 6
    assert written.written == (tmp_path / "tables.tex",)
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed, so it cannot read the tables")
    whole = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{text}\end{{document}}"
    (tmp_path / "whole.tex").write_text(whole)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "whole.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]
