"""Tables in LaTeX, with the rules of booktabs."""

from collections.abc import Sequence

from fedexperts.report.table_format import Table

HEAD = "% Needs \\usepackage{booktabs}. Each table is complete; take those that you want.\n"
ESCAPED = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "–": "--",
    "…": r"\dots{}",
    "→": r"$\rightarrow$",
    "‖": r"$\Vert$",
    "∥": r"$\Vert$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "\u00a0": "~",
}


def to_latex(tables: Sequence[Table]) -> str:
    """All `tables`, each in a table environment under its title, with its note below."""
    return "\n".join([HEAD, *map(_table, tables)])


def latex_text(text: str) -> str:
    """`text` on one line, with the characters escaped or replaced that LaTeX does not print as they are."""
    return "".join(ESCAPED.get(char, char) for char in " ".join(text.split()))


def _table(table: Table) -> str:
    columns = "".join("l" if index in table.text_columns else "r" for index in range(len(table.columns)))
    last = len(table.rows) - table.sums
    body, sums = (map(_line, table.rows[:last]), map(_line, table.rows[last:]))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_text(table.title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _line(table.columns),
            r"\midrule",
            *body,
            *([r"\midrule", *sums] if table.sums else []),
            r"\bottomrule",
            r"\end{tabular}",
            *([rf"\par\smallskip\footnotesize {latex_text(table.note)}"] if table.note else []),
            r"\end{table}",
            "",
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return " & ".join(_number(latex_text(cell)) for cell in cells) + r" \\"


def _number(cell: str) -> str:
    """A hyphen before a digit as a minus sign."""
    return rf"$-${cell[1:]}" if cell[:1] == "-" and cell[1:2].isdigit() else cell
