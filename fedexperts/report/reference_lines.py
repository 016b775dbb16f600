"""Reference lines beside methods: what a constant answer and a copy of the input score, on the same examples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedexperts.report import measures
from fedexperts.report.read import Groups, RunResults, all_runs
from fedexperts.report.table_format import NONE, plus_minus

NOTE = (
    "Constant answer: to every example the most frequent answer in the client's training data. Copy of the input: its text, as "
    "far as evaluation.generate_tokens goes."
)


def of_run(run: RunResults) -> Mapping[str, RunResults]:
    """Reference line → its scores as those of a run, which was evaluated once and cost nothing; empty where there are none."""
    names = dict.fromkeys(row.line for row in run.reference_lines)
    nothing = replace(run, rounds=(), ledger=(), reference_lines=())
    return {name: replace(nothing, evaluations=tuple(row for row in run.reference_lines if row.line == name)) for name in names}


def of_groups(groups: Groups) -> Mapping[str, Sequence[RunResults]]:
    """Reference line → its scores, one run of each seed; each method has its own if the methods were scored on other examples."""
    by_seed: dict[str, dict[int, RunResults]] = {}
    for runs in groups.values():
        for run in runs:
            for name, line in of_run(run).items():
                first = by_seed.setdefault(name, {}).setdefault(run.plan.seed, line)
                if first.evaluations != line.evaluations:
                    return _of_each_method(groups)
    return {name: list(lines.values()) for name, lines in by_seed.items()}


def rows(groups: Groups, columns: Sequence[measures.Measure], *before: str) -> list[tuple[str, ...]]:
    """A row for each reference line of a table with `columns`, with qualities alone; `before`: cells after the name."""
    qualities = {measure.label for measure in measures.qualities(all_runs(groups))}
    return [
        (
            name,
            *before,
            *(
                plus_minus(measures.over_seeds(measure, runs), measure.unit) if measure.label in qualities else NONE
                for measure in columns
            ),
        )
        for name, runs in of_groups(groups).items()
    ]


def note(groups: Groups) -> str:
    """What the reference lines are; empty where there are none."""
    return NOTE if of_groups(groups) else ""


def _of_each_method(groups: Groups) -> Mapping[str, Sequence[RunResults]]:
    lines: dict[str, list[RunResults]] = {}
    for method, runs in groups.items():
        for run in runs:
            for name, line in of_run(run).items():
                lines.setdefault(f"{name} ({method})", []).append(line)
    return lines
