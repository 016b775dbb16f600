"""A table and a figure for a paper, of a comparison's results alone, in cells for VS Code, Spyder or Jupyter (jupytext).

    make quickstart          # or another comparison; name its folder below
    python examples/paper.py

The first cell writes the results as CSV files; all others need nothing but these files, pandas and Jinja. The table is in
results/paper as Markdown and LaTeX (booktabs), the figure as SVG. It takes some seconds.
"""

# %% The results of a comparison as files: one per table, with a row for each method, seed, round, client and metric
from pathlib import Path

import jinja2
import pandas as pd

import fedexperts

COMPARISON, PAPER = Path("results/quickstart"), Path("results/paper")
print(fedexperts.results(COMPARISON))  # in a notebook the last line of a cell is enough: fedexperts.results(COMPARISON)
fedexperts.results(COMPARISON).write(PAPER / "data", tables=["runs", "evaluations", "rounds"])

# %% From here on the files alone; columns.csv says what each of their columns means
runs, scores, rounds = (pd.read_csv(PAPER / "data" / f"{name}.csv") for name in ("runs", "evaluations", "rounds"))
finished = runs.loc[runs.finished, ["method", "seed"]]
scores, rounds = scores.merge(finished), rounds.merge(finished)  # only rows of finished runs
overall = scores[scores.metric == "overall"].assign(quality=lambda rows: 100 * rows.value)  # the mean over tasks, in %
methods = list(overall.method.unique())

# %% One row per run: the quality after its last round, and what all clients and the server sent each other
per_run = overall.sort_values("round").groupby(["method", "seed"])[["quality"]].last()
per_run["sent"] = rounds.groupby(["method", "seed"])[["bytes_down", "bytes_up"]].sum().sum(axis=1) / 1e6

# %% The table: mean and standard deviation over the seeds; the mean alone of a single one
mean, deviation = per_run.groupby("method").mean(), per_run.groupby("method").std()


def cell(method, column):
    spread = deviation.loc[method, column]
    return f"{mean.loc[method, column]:.1f}" + ("" if pd.isna(spread) else f" ± {spread:.1f}")


table = pd.DataFrame(
    {"Quality (%)": [cell(each, "quality") for each in methods], "Sent (MB)": [cell(each, "sent") for each in methods]},
    index=pd.Index(methods, name="Method"),
)
heads = [[table.index.name, *table.columns], ["---", *["---:"] * len(table.columns)]]
markdown = "".join(f"| {' | '.join(row)} |\n" for row in [*heads, *table.itertuples()])
latex = table.reset_index().to_latex(index=False, escape=True, column_format="lrr").replace("±", r"$\pm$")
(PAPER / "table.md").write_text(markdown)
(PAPER / "table.tex").write_text(latex)
print(markdown)

# %% The figure: quality over rounds, the mean over seeds as a line and their range as a band
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]  # Okabe and Ito
FIGURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-family="sans-serif" font-size="14">
<rect width="640" height="400" fill="white"/>
{% for number in range(0, 101, 20) %}
<path d="M60 {{ y(number) }}H460" stroke="#ddd"/><text x="52" y="{{ y(number) + 5 }}" text-anchor="end">{{ number }}</text>
{% endfor %}
{% for number in evaluated %}<text x="{{ x(number) }}" y="364" text-anchor="middle">{{ number }}</text>{% endfor %}
<text x="260" y="390" text-anchor="middle">Round</text><text x="60" y="24">Quality (%)</text>
{% for method in methods %}{% set color = colors[loop.index0 % 7] %}
<polygon points="{{ points(method, 'min') }} {{ points(method, 'max', -1) }}" fill="{{ color }}" opacity="0.2"/>
<polyline points="{{ points(method, 'mean') }}" fill="none" stroke="{{ color }}" stroke-width="2"/>
<text x="472" y="{{ 30 + 20 * loop.index }}" fill="{{ color }}">{{ method }}</text>
{% endfor %}
</svg>
"""
over_seeds = overall.groupby(["method", "round"]).quality.agg(["mean", "min", "max"])
last = overall["round"].max()


def x(number):
    return round(60 + 400 * number / last, 1)


def y(percent):
    return round(340 - 3 * percent, 1)


def points(method, column, step=1):
    values = over_seeds.loc[method][column]
    return " ".join(f"{x(number)},{y(value)}" for number, value in list(values.items())[::step])


template = jinja2.Template(FIGURE, autoescape=True)
evaluated = sorted(overall["round"].unique())
figure = template.render(x=x, y=y, points=points, methods=methods, colors=COLORS, evaluated=evaluated)
(PAPER / "figure.svg").write_text(figure)
print(f"written: {PAPER / 'table.md'}, {PAPER / 'table.tex'}, {PAPER / 'figure.svg'}")
